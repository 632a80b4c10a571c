"""How good is the learned dependence graph? A small world in which the true one is known.

    python experiments/known_graph.py                  # the runs that results/known_graph.csv lacks, figures, table
    python experiments/known_graph.py --figure-only    # figure and table again, from the CSV (report.py does so, too)

The world: N agents sit on a ring. Agent i has a dial x^i in {0, 1, 2, 3} and a flag f^i in {0, 1}, and chooses one of
four actions. It reaches its right neighbour j = i + 1 iff f^i = 1 and f^j = 0, so nobody is reached by two others.
    action-driven   the dial of a reached agent becomes a^i: the action of i is written into the next state of j
    state-driven    the dial of a reached agent becomes x^i: where i is, not what it does, decides the next state of j
    unseen          as action-driven, but an agent shows itself to the others only while its dial is 0 or 1
The dial of any other agent turns by its own action, x' = x + a mod 4. Flags are coins, tossed anew after every step.
An agent is paid 1 for a dial at 0. It observes its own features (seat, dial, flag) and those of all others (dial,
flag), in the order of the ring: as in Level-Based Foraging, observations show other agents directly.

The truth, for i != j and policies that read an agent's own features z (H: entropy in nats; given z^i, an action is
independent of the rest of the world):
    edge i -> j               iff i reaches j
    H(a^i | z^i)              is the entropy of the policy at z^i; ln 4 if it is random
    H(a^i | z^j, z'^j, z^i)   is 0 on an edge, where the dial of j shows a^i, and H(a^i | z^i) elsewhere;
                              in the state-driven world it is H(a^i | z^i) everywhere: no edge can be found
With whole observations o in place of z, o^j and o'^j also show how the dial of i turned, which gives a^i away unless i
is itself reached. So H(a^i | o^j, o'^j, o^i) is 0 for three quarters of all pairs, and the precision of the rule is
1 / (3 (N - 1)) for every c in (0, 1]: the spurious edges that the encoder is there to prevent. What the models see:
    encoder   observations, encoded           raw   observations as they are (--no-encoder of the training scripts)
    own       own features only, not encoded: what a perfect encoder would leave

Each iteration takes new data from a fixed policy (random, or trained by PPO on the true graph's advantages) and makes
one step of mappo_dg_lbf.py's own models. An iteration has at most 5000 pairs (i, j) and at most 500 steps, of which
there are the fewer the more agents: compare by `frames`, the number of steps so far. All measures are of held-out data,
pairs i != j.
"""

import itertools
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from errors import UserError, one_sentence

with one_sentence():
    import numpy as np
    import pandas as pd
    import torch
    import tyro
    from known_graph_figure import COLUMNS, OBSERVATIONS, draw, table
    from plotting import save
    from report import read_csv
    from scipy.stats import rankdata
    from watch import load_script

    dg = load_script("mappo_dg_lbf")
DIAL = 4  # positions of a dial, and actions
PAIRS, STEPS, HORIZON = 5000, 500, 20  # largest batch of an iteration in pairs and in steps; steps of an episode
THRESHOLDS = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]
ITERATIONS = {2: 160, 5: 400, 10: 800, 20: 2400, 50: 6000}  # by N: 80k, 80k, 32k, 28.8k and 12k frames


# WORLD
def reaching(flag):
    """Does agent i reach i + 1? flags (..., N) -> (..., N) bool."""
    return (flag == 1) & (np.roll(flag, -1, -1) == 0)


def true_edges(flag):
    """Edges of the coming step, an agent's own included; flags (..., N) -> (..., N_i, N_j) bool."""
    N = flag.shape[-1]
    return np.eye(N, dtype=bool) | (reaching(flag)[..., None] & np.roll(np.eye(N, dtype=bool), 1, -1))


def next_dial(world, dial, flag, actions):
    """The dials after a step; dials, flags and actions (..., N) -> (..., N)."""
    written = dial if world == "state-driven" else actions
    return np.where(np.roll(reaching(flag), 1, -1), np.roll(written, 1, -1), (dial + actions) % DIAL)


def is_seen(world, dial):
    """Does an agent show itself to the others? Dials (..., N) -> (..., N) bool."""
    return (dial < 2) | (world != "unseen")


def observe(world, dial, flag):
    """Observations (..., N, D) float32: own seat (N, one-hot), dial (4, one-hot) and flag, then dial and flag of agents
    i + 1, i + 2, ... of the ring, zeros for those that are not seen."""
    N = dial.shape[-1]
    features = np.concatenate([np.eye(DIAL)[dial], flag[..., None]], -1)
    shown = features * is_seen(world, dial)[..., None]
    order = (np.arange(N)[:, None] + np.arange(1, N)) % N
    others = shown[..., order, :].reshape(*dial.shape, -1)
    seat = np.broadcast_to(np.eye(N), (*dial.shape, N))
    return np.concatenate([seat, features, others], -1).astype(np.float32)


def own_features(obs):
    """The part of the observations (..., N, D) that is about the agent itself: seat, dial, flag."""
    return obs[..., : obs.shape[-2] + DIAL + 1]


@dataclass
class Data:
    """T steps in E worlds, as tensors."""

    obs: torch.Tensor  # (T+1, E, N, D)
    actions: torch.Tensor  # (T, E, N)
    policy: torch.Tensor  # (T, E, N, A), log-probabilities
    rewards: torch.Tensor  # (T, E, N)
    edges: torch.Tensor  # (T, E, N_i, N_j) bool, the true ones
    seen: torch.Tensor  # (T+1, E, N) bool
    alive: torch.Tensor  # (T, E) bool, all of them


@torch.no_grad()
def rollout(world, num_agents, T, E, rng, actor=None):
    """Play T steps in E worlds, from dials and flags drawn uniformly; without an actor, random actions -> Data."""
    dial, flag = (rng.integers(values, size=(E, num_agents)) for values in (DIAL, 2))
    obs, seen, steps = [observe(world, dial, flag)], [is_seen(world, dial)], []
    for _ in range(T):
        policy = np.full((E, num_agents, DIAL), -np.log(DIAL), dtype=np.float32)
        if actor is not None:
            policy = actor(torch.from_numpy(own_features(obs[-1]))).log_softmax(-1).numpy()
        actions = (policy + rng.gumbel(size=policy.shape)).argmax(-1)
        edges, dial = true_edges(flag), next_dial(world, dial, flag, actions)
        flag = rng.integers(2, size=flag.shape)
        steps.append((actions, policy, (dial == 0).astype(np.float32), edges))
        obs.append(observe(world, dial, flag))
        seen.append(is_seen(world, dial))
    tensors = [torch.from_numpy(np.stack(x)) for x in (obs, *zip(*steps), seen)]
    return Data(*tensors, alive=torch.ones(T, E, dtype=torch.bool))


def true_entropies(world, policy, edges):
    """H(a^i | z^i) (..., N) and, for i != j, H(a^i | z^j, z'^j, z^i) (..., N_i, N_j): the truth stated above.

    policy (..., N, A): log-probabilities of the actions; edges (..., N, N) bool.
    """
    entropy = -(policy.exp() * policy).sum(-1)
    known = edges & (world != "state-driven")
    return entropy, entropy.unsqueeze(-1).expand(edges.shape).masked_fill(known, 0.0)


def train_policy(world, num_agents, iterations, rng):
    """A policy on own features, trained by the script's PPO with the advantages of the true graph -> actor."""
    args = dg.Args()
    D = num_agents + DIAL + 1
    actor, critic = dg.AgentNetwork(D, num_agents, 64, DIAL), dg.Critic(num_agents * D, num_agents, 64, 1)
    optimizers = [torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-5) for network in (actor, critic)]
    for _ in range(iterations):
        data = rollout(world, num_agents, HORIZON, 10, rng, actor)
        obs, terminated = own_features(data.obs), torch.zeros_like(data.alive)
        terminated[-1] = True
        with torch.no_grad():
            values = critic(obs)
        experience = (data.rewards, values, terminated, data.alive)
        value_targets = dg.gae(*experience, args.gamma, args.gae_lambda) + values[:-1]
        advantages = dg.multi_agent_gae(*experience, data.edges, args.gamma, args.gae_lambda)
        batch = dg.Batch(
            obs=obs[:-1].flatten(0, 1),
            actions=data.actions.flatten(0, 1),
            logprobs=data.policy.gather(-1, data.actions.unsqueeze(-1)).squeeze(-1).flatten(0, 1),
            advantages=advantages.flatten(0, 1),
            value_targets=value_targets.flatten(0, 1),
        )
        dg.ppo_update(actor, critic, *optimizers, batch, args)
    return actor


# MEASURE
def auc(score, positive):
    """Area under the ROC curve: the probability that a positive has the higher score, ties half; nan without both."""
    count = positive.sum()
    if count in (0, len(positive)):
        return np.nan
    above = rankdata(score)[positive].sum() - count * (count + 1) / 2
    return above / (count * (len(positive) - count))


def precision_recall(graph, edges):
    """Precision (nan without an edge in graph), recall, spurious rate: the share of non-edges in graph; bool arrays."""
    correct, found, true = (graph & edges).sum(), graph.sum(), edges.sum()
    with np.errstate(invalid="ignore"):
        return np.divide([correct, correct, found - correct], [found, true, edges.size - true])


@torch.no_grad()
def measure(models, world, obs, data):
    """Compare the models' graph with the truth on all pairs i != j of the data -> rows, one for each subset and c.

    The subsets are those of the unseen world: is i shown to j before and after the step?
    """
    logits = models(obs, data.alive)
    predictor, reverse = logits.action_predictor, logits.reverse_model  # (B, N, A), (B, N_i, N_j, A)
    N = predictor.shape[1]
    between = ~np.eye(N, dtype=bool)
    entropies = [dg.entropy(x) for x in (predictor, reverse)]
    truth = true_entropies(world, data.policy.flatten(0, 1), data.edges.flatten(0, 1))
    errors = [(learned - true).abs().numpy() for learned, true in zip(entropies, truth)]
    score = -(entropies[1] / entropies[0].unsqueeze(-1).clamp(min=1e-9)).numpy()
    edges = data.edges.flatten(0, 1).numpy()
    before, after = (x.flatten(0, 1).unsqueeze(-1).expand(edges.shape).numpy() for x in (data.seen[:-1], data.seen[1:]))
    subsets = {"all": np.ones_like(edges)}
    if world == "unseen":
        subsets |= {"seen": before & after, "enters": ~before & after, "leaves": before & ~after}
        subsets |= {"unseen": ~before & ~after}
    rows = []
    for (name, subset), c in itertools.product(subsets.items(), THRESHOLDS):
        pairs = subset & between
        graph, true = dg.learned_graph(predictor, reverse, c)[0].numpy()[pairs], edges[pairs]
        row = {"subset": name, "c": c, "true_density": true.mean(), "density": graph.mean()}
        row |= dict(zip(("precision", "recall", "spurious_rate"), precision_recall(graph, true)))
        row |= {"auc": auc(score[pairs], true), "predictor_error": errors[0].mean()}
        rows.append(row | {"edge_error": errors[1][pairs][true].mean(), "other_error": errors[1][pairs][~true].mean()})
    return rows


# RUNS
def train(world, policy, num_agents, observation, seed, iterations, ppo_iterations=200):
    """Train the script's graph models on new data in every iteration -> rows of measure() by amount of data."""
    rng, held_out = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    torch.manual_seed(seed)
    actor = train_policy(world, num_agents, ppo_iterations, rng) if policy == "trained" else None
    see = own_features if observation == "own" else lambda obs: obs
    size = PAIRS // num_agents**2
    T, E = min(HORIZON, size), max(1, min(size, STEPS) // HORIZON)
    test = rollout(
        world, num_agents, HORIZON, max(1, min(100, 10 * PAIRS // num_agents**2 // HORIZON)), held_out, actor
    )
    models = dg.GraphModels(see(test.obs).shape[-1], DIAL, observation == "encoder")
    optimizer = torch.optim.Adam(models.parameters(), lr=dg.Args.learning_rate, eps=1e-5, fused=True)
    rows, due = [], [iterations // 2**k for k in range(6)]
    for iteration in range(1, iterations + 1):
        data = rollout(world, num_agents, T, E, rng, actor)
        dg.update_graph_models(models(see(data.obs), data.alive), data.actions.flatten(0, 1), optimizer)
        if iteration in due:
            job = {"world": world, "policy": policy, "agents": num_agents, "observation": observation, "seed": seed}
            job |= {"iteration": iteration, "frames": iteration * T * E}
            found = measure(models, world, see(test.obs), test)
            rows += [job | row for row in found if iteration == iterations or row["c"] in (0.5, 0.9)]
    return rows


def plan(seeds):
    """(world, policy, N, observation, seed) of every run; N = 50, which takes long, with one seed."""
    worlds = [("action-driven", policy, N) for policy in ("random", "trained") for N in ITERATIONS]
    worlds += [(world, "random", N) for world in ("state-driven", "unseen") for N in (2, 5)]
    runs = [(*world, view, seed) for seed in range(1, seeds + 1) for world in worlds for view in OBSERVATIONS]
    return [run for run in runs if run[2] < 50 or run[4] == 1]


def finished_runs(path):
    """{(world, policy, N, observation, seed): rows of the CSV} of the runs that are as long as ITERATIONS says."""
    if not path.exists():
        return {}
    runs = read_csv(path, COLUMNS).groupby(["world", "policy", "agents", "observation", "seed"])
    return {run: rows for run, rows in runs if rows["iteration"].max() == ITERATIONS.get(run[2])}


QUICK = [("action-driven", "random", 2, view, 1) for view in OBSERVATIONS]
QUICK += [("action-driven", "trained", 2, "own", 1), ("state-driven", "random", 2, "own", 1)]
QUICK += [("unseen", "random", 3, "encoder", 1)]


# MAIN
@dataclass
class Args:
    quick: bool = False
    """a minute's worth of runs, to see that everything works; needs an --output of its own"""
    seeds: int = 3
    """seeds of every run"""
    output: Path = Path(__file__).resolve().parent
    """folder of results/known_graph.csv and figures/known_graph-*"""
    figure_only: bool = False
    """train nothing: draw the figure from the CSV"""


def main(args):
    """Train, measure, write the CSV and the figure; raises UserError."""
    if args.seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {args.seeds}")
    if args.quick and args.output == Args.output:
        raise UserError("--quick needs --output: its few runs must not replace the committed ones")
    torch.set_num_threads(1)
    path = args.output / "results" / "known_graph.csv"
    if not args.figure_only:
        path.parent.mkdir(parents=True, exist_ok=True)
        runs, start = QUICK if args.quick else plan(args.seeds), time.time()
        done = {run: rows for run, rows in finished_runs(path).items() if run in runs}
        for run in runs:
            if run in done:
                continue
            done[run] = pd.DataFrame(train(*run, *((100, 20) if args.quick else (ITERATIONS[run[2]],))))
            rows = pd.concat([done[run] for run in runs if run in done])
            rows.to_csv(path.with_suffix(".partial"), index=False, float_format="%.3g")
            os.replace(path.with_suffix(".partial"), path)
            auc = done[run]["auc"].iloc[-1]
            with suppress(BrokenPipeError):  # a reader that has gone away does not end hours of runs
                print(f"{len(done)}/{len(runs)} {' '.join(map(str, run))} AUC {auc:.2f} ({time.time() - start:.0f} s)")
    if not path.exists():
        raise UserError(f"{path} does not exist: run without --figure-only first")
    data = read_csv(path, COLUMNS)
    print(table(data))
    save(lambda theme: draw(data, theme), args.output / "figures", "known_graph")


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(Args, description=__doc__))
