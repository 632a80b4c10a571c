"""How trained agents load: what food they leave, and how often more of them load it than are needed.

    python experiments/loads.py runs/A runs/B --episodes 300

Plays fresh boards with the policy of every run (LBF scripts only), sampled, and prints a table, a row per run:

    return, length      means of an episode
    left, needs k       share of the foods that are left at the end, of those that need k of the team's strongest agents
    more than needed    share of the loads in which some loader could be missed
    nobody decisive     share of the loads in which any one loader could be missed: the difference credits none of them
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from errors import UserError, one_sentence

with one_sentence():
    import numpy as np
    import pandas as pd
    import torch
    import tyro
    from watch import load_checkpoint, load_script

    lbf = load_script("mappo_cdg_lbf")


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders or checkpoint.pt files of the LBF scripts"""
    episodes: int = 300
    """episodes that each of them plays"""
    seed: int = 10_000
    """of the boards and of the sampled actions"""


def agents_needed(food_level, player_levels):
    """How many agents, the strongest first, it takes to load a food of this level; UserError if all are too few."""
    total = 0
    for count, level in enumerate(sorted(player_levels, reverse=True), start=1):
        total += level
        if total >= food_level:
            return count
    raise UserError(f"agents of levels {player_levels} cannot load a food of level {food_level}")


def watch_loads(env, act):
    """Play an episode with act(obs) -> actions; -> (return, length, Counter of what happened)."""
    obs, _ = env.reset()
    levels = [player.level for player in env.players]
    counts = Counter(("there", agents_needed(food, levels)) for food in env.foods.values())
    team_return, length, over = 0.0, 0, False
    while not over:
        actions = act(obs)
        before = dict(env.foods)
        cells = [player.position for player in env.players]
        obs, rewards, terminated, truncated, _ = env.step(actions)
        over = terminated or truncated
        team_return += sum(rewards)
        length += 1
        for food in before.keys() - env.foods.keys():
            loaders = []
            for level, cell, action in zip(levels, cells, actions, strict=True):
                beside = abs(cell[0] - food[0]) + abs(cell[1] - food[1]) == 1
                if beside and action == lbf.LOAD:
                    loaders.append(level)
            spare = [level for level in loaders if sum(loaders) - level >= before[food]]
            counts["loads"] += 1
            counts["more than needed"] += len(spare) > 0
            counts["nobody decisive"] += len(spare) == len(loaders)
    counts.update(("left", agents_needed(food, levels)) for food in env.foods.values())
    return team_return, length, counts


def measure(path, episodes, seed):
    """A row of the table for one run; UserError if it is none of an LBF script."""
    path, checkpoint = load_checkpoint(path)
    settings = checkpoint["args"]
    if not checkpoint["script"].endswith("_lbf"):
        raise UserError(f"{path} was written by {checkpoint['script']}.py, which does not play LBF")
    torch.manual_seed(seed)
    boards = np.random.SeedSequence(seed).generate_state(episodes)
    envs = [lbf.make_env(settings["env_id"], settings["winner_take_all"], board) for board in boards]
    num_agents, obs_dim = envs[0].n_agents, envs[0].observation_space[0].shape[0]
    actor = lbf.AgentNetwork(obs_dim, num_agents, settings["hidden_dim"], len(lbf.Action))
    actor.load_state_dict(checkpoint["actor"])

    @torch.no_grad()
    def act(obs):
        logits = actor(torch.from_numpy(np.stack(obs)))
        return torch.distributions.Categorical(logits=logits).sample().tolist()

    returns, lengths, counts = [], [], Counter()
    for env in envs:
        team_return, length, happened = watch_loads(env, act)
        returns.append(team_return)
        lengths.append(length)
        counts.update(happened)
    row = {"run": path.parent.name, "frames": checkpoint["global_step"]}
    row |= {"return": f"{np.mean(returns):.2f}", "length": f"{np.mean(lengths):.0f}"}
    for needed in range(1, num_agents + 1):
        if counts["there", needed]:
            row[f"left, needs {needed}"] = f"{counts['left', needed] / counts['there', needed]:.2f}"
    for name in ("more than needed", "nobody decisive"):
        row[name] = f"{counts[name] / max(counts['loads'], 1):.2f}"
    return row


def main(args):
    """Print the table; raises UserError."""
    if args.episodes < 1:
        raise UserError(f"--episodes must be at least 1, not {args.episodes}")
    if not args.runs:
        raise UserError("give the folder of a run")
    torch.set_num_threads(1)
    table = pd.DataFrame([measure(path, args.episodes, args.seed) for path in args.runs]).fillna("-")
    print("| " + " | ".join(table.columns) + " |")
    print("|" + " --- |" * table.shape[1])
    for row in table.itertuples(index=False):
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(Args, description=__doc__))
