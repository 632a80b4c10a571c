"""Can the counterfactual graph be learned from what agents see? Forward models on recorded play, with known truth.

    python experiments/cdg/learned_graph_study.py                 # what the CSV lacks, then the tables
    python experiments/cdg/learned_graph_study.py --table-only    # the tables, from learned_graph_study.csv

i influences j iff another action of i would have changed what became of j. A forward model predicts what becomes of j
from observations and actions; the score of an edge is how far its prediction moves when i's action is exchanged: the
largest total variation over i's other actions (continuous outcomes: the largest distance), and 1 - (1 - a)(1 - b) for
an outcome of two parts. The truth is that of mappo_cdg_lbf.py's simulator:

    move      where j ends                      private   either of the two (graph (a))
    reward    j's reward                        shared    or which food is left (graphs (a) and (b))

Recorded is play of three stages, one after the other. The players are scripted: with a probability that grows from
stage to stage an agent goes to the food nearest to all and loads, otherwise it acts at random; with --checkpoint the
last stage is played by a trained policy. Every model goes through
the record as it would in training: it scores an iteration of 500 steps first, then learns from it and from a replay of
the earlier ones. It sees observations, actions and rewards; the graphs only measure it.

Models (o: observation, a: action):
    reverse             the paper's rule: H(q_psi(a^i | z^j, z'^j, z^i)) / H(q_phi(a^i | z^i)), small = edge
    raw X               an MLP from o^j, o^i and the one-hot a^j, a^i to the outcome X, see Raw
    relational          agents and foods as entities: an agent's cell relative to a food or to another agent is looked
                        up together with its action. In these tasks everybody observes all cells and levels.
Unless it says otherwise: 8 gradient steps of 128 time steps an iteration, drawn from all that was recorded before.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import tyro
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import mappo_cdg_lbf as cdg  # noqa: E402

TASKS = "Foraging-8x8-2p-4f-coop-v3", "Foraging-10x10-3p-3f-v3", "Foraging-15x15-3p-4f-v3"
STAGES = {"random": 0.0, "half skilled": 0.4, "skilled": 0.8}
RESULTS = Path(__file__).resolve().parent / "learned_graph_study.csv"
ACTIONS, LEVELS, CELLS = 6, 8, 16  # levels and cells at or above the last number count as it
REWARD_BINS = torch.tensor([0.0, 0.08, 0.16, 0.25, 0.4])  # class of a reward: how many of these it exceeds
MOVES = torch.tensor([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])
ITERATION, TRUTH_EVERY, SCORED = 500, 2, 200  # frames; iterations; steps that are scored in such an iteration
BATCH = 128  # steps of a gradient step
THRESHOLDS = 0.05, 0.1, 0.2, 0.3, 0.5
GRAPHS = "move", "reward", "private", "shared"
COLUMNS = "obs", "next_obs", "actions", "rewards", *GRAPHS


@dataclass
class Args:
    frames: int = 10_000
    """frames of each stage, a multiple of 2000"""
    tasks: tuple[str, ...] = TASKS
    """ids of the tasks"""
    configs: tuple[str, ...] = ()
    """names in CONFIGS; if not given, all"""
    csv: Path = RESULTS
    """where results are kept: what it holds is not run again"""
    checkpoint: Path | None = None
    """a checkpoint.pt of an LBF script, trained on the one task that is given: its policy plays the last stage"""
    table_only: bool = False
    """run nothing"""


# RECORDING
def towards_food(env, skill, rng):
    """Every agent, with probability skill, goes to the food nearest to all of them and loads it; else at random."""
    actions = rng.integers(0, ACTIONS, env.n_agents).tolist()
    cells = [player.position for player in env.players]
    distances = {food: sum(abs(food[0] - row) + abs(food[1] - col) for row, col in cells) for food in env.foods}
    for i in np.flatnonzero(rng.random(env.n_agents) < skill).tolist():
        row, col = cells[i]
        food = min(env.foods, key=distances.get)
        down, right = food[0] - row, food[1] - col
        if abs(down) + abs(right) == 1:
            actions[i] = 5
        else:
            vertical = (1 if down < 0 else 2, abs(down))
            horizontal = (3 if right < 0 else 4, abs(right))
            ways = [action for action, steps in (vertical, horizontal) if steps > 0]
            allowed = [action for action in ways if cdg.ACTIONS[action] in env._valid_actions[env.players[i]]]
            actions[i] = int(rng.choice(allowed)) if allowed else actions[i]
    return actions


def true_edges(env, actions):
    """The simulator's edges in the next step, i != j, one graph for each of GRAPHS: (4, N_i, N_j)."""
    available = [env._valid_actions[player] for player in env.players]
    actions = [action if cdg.ACTIONS[action] in valid else 0 for action, valid in zip(actions, available)]
    move = cdg.collision_edges(env, actions)
    reward, shared = (cdg.load_edges(env, actions, available, shared_food) for shared_food in (False, True))
    graphs = np.zeros((len(GRAPHS), env.n_agents, env.n_agents), bool)
    for graph, pairs in zip(graphs, (move, reward, move + reward, move + shared)):
        for pair in pairs:
            graph[pair] = True
    return graphs


def trained_policy(checkpoint, env):
    """(obs, random generator) -> sampled actions, by the actor of a training script."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    size = env.observation_space[0].shape[0], env.n_agents, saved["args"]["hidden_dim"]
    actor = cdg.AgentNetwork(*size, ACTIONS)
    actor.load_state_dict(saved["actor"])

    @torch.no_grad()
    def act(obs, rng):
        return (actor(torch.from_numpy(np.stack(obs))).numpy() + rng.gumbel(size=(env.n_agents, ACTIONS))).argmax(-1)

    return act


def record(env_id, frames, checkpoint=None):
    """Play every stage for so many frames -> steps in one row: obs, next_obs (S, N, D), actions, rewards (S, N) and the
    graphs (S, N_i, N_j), which are all False in the iterations whose truth is not recorded."""
    env, rng, rows = cdg.make_env(env_id, "coop" in env_id, 1), np.random.default_rng(1), []
    obs, _ = env.reset()
    unknown = np.zeros((len(GRAPHS), env.n_agents, env.n_agents), bool)
    act = trained_policy(checkpoint, env) if checkpoint else None
    for stage, skill in STAGES.items():
        for _ in range(frames):
            trained = act and stage == list(STAGES)[-1]
            actions = act(obs, rng).tolist() if trained else towards_food(env, skill, rng)
            graphs = unknown if len(rows) // ITERATION % TRUTH_EVERY else true_edges(env, actions)
            next_obs, rewards, terminated, *_ = env.step(actions)
            rows.append((np.int8(obs), np.int8(next_obs), np.int8(actions), np.float32(rewards), *graphs))
            obs = env.reset()[0] if terminated else next_obs
    return SimpleNamespace(**dict(zip(COLUMNS, (torch.from_numpy(np.stack(x)) for x in zip(*rows)))))


def take(data, index):
    """Some steps of a run: observations as float, actions as long."""
    step = SimpleNamespace(**{name: getattr(data, name)[index] for name in COLUMNS})
    step.obs, step.next_obs, step.actions = step.obs.float(), step.next_obs.float(), step.actions.long()
    step.N = step.actions.shape[-1]
    step.F = step.obs.shape[-1] // 3 - step.N
    return step


def own_cell(step, obs):
    return obs[..., 3 * step.F : 3 * step.F + 2]  # (B, N, 2)


def targets(step):
    """What became of each agent: class of its move (B, N), of its reward (B, N); (B, F): is the food gone?"""
    move = own_cell(step, step.next_obs) - own_cell(step, step.obs)
    move = (move.unsqueeze(-2) == MOVES).all(-1).float().argmax(-1)
    reward = (step.rewards.unsqueeze(-1) > REWARD_BINS).sum(-1)
    now, then = (x[:, 0, : 3 * step.F].unflatten(-1, (step.F, 3)) for x in (step.obs, step.next_obs))
    left = (now[:, :, None, :2] == then[:, None, :, :2]).all(-1).any(-1)
    return move, reward, ~left & (now[..., 2] > 0)


def onehot(x, n):
    return nn.functional.one_hot(x.long().clamp(0, n - 1), n).float()


# MODELS
class Reverse:
    """The paper's models and rule: one step per iteration, on that iteration."""

    def __init__(self, step):
        self.models = cdg.GraphModels(step.obs.shape[-1], ACTIONS)
        self.optimizer = torch.optim.Adam(self.models.parameters(), lr=5e-4, eps=1e-5, fused=True)

    def logits(self, step):
        alive = torch.ones((1, len(step.obs)), dtype=torch.bool)
        return self.models(torch.stack([step.obs, step.next_obs]), alive)

    def update(self, step):
        cdg.update_graph_models(self.logits(step), step.actions, self.optimizer)

    @torch.no_grad()
    def scores(self, step):
        _, predictor, reverse = (logits.log_softmax(-1) for logits in self.logits(step))
        predictor, reverse = (-(x.exp() * x).sum(-1) for x in (predictor, reverse))
        return {"": -reverse / predictor.unsqueeze(-1)}


class Forward:
    """What forward models share: Adam, and the score of an edge by exchanging i's action."""

    def __init__(self, network, lr=3e-3):
        self.network = network
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)

    def update(self, step):
        cdg.gradient_step(self.optimizer, self.network.loss(step), "loss")

    @torch.no_grad()
    def scores(self, step):
        """{outcome: (B, N_i, N_j)}, the largest change of the prediction for j over i's other actions."""
        predicted, scores = self.network.predict(step, step.actions), {}
        for i in range(step.N):
            for action in range(ACTIONS):
                actions = step.actions.clone()
                actions[:, i] = action
                for name, other in self.network.predict(step, actions, i).items():
                    own = predicted[name][:, i] if other.dim() < predicted[name].dim() else predicted[name]
                    change = (own - other).abs().sum(-1) / 2  # total variation, if these are probabilities
                    score = scores.setdefault(name, torch.zeros((len(step.obs), step.N, step.N)))
                    score[:, i] = torch.max(score[:, i], change)
        return scores


class Raw(nn.Module):
    """(o^j, o^i, a^j, a^i) -> outcome of j; the two observations are side by side, as they are.

    outcome: reward (squared error), displacement (reward and move, squared error), latent (reward and the encoder's
    next latent, the encoder being trained by the single-agent reverse model), classes (of reward and move, cross-
    entropy), team (the sum of all rewards).
    """

    def __init__(self, step, outcome):
        super().__init__()
        D, self.outcome = step.obs.shape[-1], outcome
        size = {"reward": 1, "team": 1, "displacement": 3, "latent": 17, "classes": 5 + 6}[outcome]
        self.net = cdg.mlp(2 * D + 2 * ACTIONS, 128, 128, size)
        if outcome == "latent":
            self.encoder, self.single = cdg.mlp(D, 64, 64, 16), cdg.mlp(32, 64, ACTIONS)

    def forward(self, step, actions, i):
        """Outcomes of every j, given what agent i sees and does: (B, N_j, size)."""
        acts = onehot(actions, ACTIONS)
        mine, his = step.obs, step.obs[:, i].unsqueeze(1).expand_as(step.obs)
        his_act = acts[:, i].unsqueeze(1).expand_as(acts)
        return self.net(torch.cat([mine / 8, his / 8, acts, his_act], -1))

    def loss(self, step):
        """The mean over all pairs i != j."""
        total = 0.0
        for i in range(step.N):
            others = [j for j in range(step.N) if j != i]
            out = self(step, step.actions, i)[:, others]
            if self.outcome == "classes":
                move, reward, _ = targets(step)
                total += nn.functional.cross_entropy(out[..., :5].flatten(0, 1), move[:, others].flatten())
                total += nn.functional.cross_entropy(out[..., 5:].flatten(0, 1), reward[:, others].flatten())
                continue
            team = step.rewards.sum(-1, keepdim=True).expand_as(step.rewards)
            rewards = team if self.outcome == "team" else step.rewards
            total += ((out[..., 0] - 10 * rewards[:, others]) ** 2).mean()  # of the size of a move
            if self.outcome == "displacement":
                move = own_cell(step, step.next_obs) - own_cell(step, step.obs)
                total += ((out[..., 1:] - move[:, others]) ** 2).mean()
            if self.outcome == "latent":
                z, z_next = self.encoder(step.obs / 8), self.encoder(step.next_obs / 8)
                total += ((out[..., 1:] - z_next[:, others].detach()) ** 2).mean()
                logits = self.single(torch.cat([z, z_next], -1))
                total += nn.functional.cross_entropy(logits.flatten(0, 1), step.actions.flatten())
        return total / step.N

    def predict(self, step, actions, i=None):
        if i is None:  # for every i: (B, N_i, N_j, size)
            parts = [self.predict(step, actions, i) for i in range(step.N)]
            return {name: torch.stack([part[name] for part in parts], 1) for name in parts[0]}
        out = self(step, actions, i)
        if self.outcome == "classes":
            return {"move": out[..., :5].softmax(-1), "reward": out[..., 5:].softmax(-1)}
        return {"": out}


class Relational(nn.Module):
    """Agents and foods as entities -> classes of every agent's move and reward, and which food disappears.

    What an agent does beside a food is one entry of a table: its relative cell (within two) and its action.
    """

    def __init__(self, step, width=64):
        super().__init__()
        self.agent_at_food = nn.Embedding(25 * ACTIONS, width)
        self.agent_level = nn.Linear(LEVELS, width)
        self.effort = nn.Sequential(nn.ReLU(), nn.Linear(width, width))
        self.food_level = nn.Linear(LEVELS, width)
        self.gone = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.mine, self.is_gone = nn.Linear(width, width), nn.Linear(1, width)
        self.at_food = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.reward = nn.Linear(width, 6)
        self.rival = nn.Embedding(49 * ACTIONS * ACTIONS, width)
        self.place = nn.Linear(2 * CELLS, width)
        self.action = nn.Embedding(ACTIONS, width)
        self.obstacle = nn.Embedding(25 * ACTIONS, width)
        self.move = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))
        for table in (self.agent_at_food, self.rival, self.obstacle):
            nn.init.normal_(table.weight, std=0.03)  # what was never seen shall make next to no difference

    def forward(self, step, actions):
        N, F = step.N, step.F
        food = step.obs[:, 0, : 3 * F].unflatten(-1, (F, 3))  # (B, F, 3)
        there = (food[..., 2] > 0).float().unsqueeze(-1)  # (B, F, 1)
        cell, level = own_cell(step, step.obs), step.obs[..., 3 * F + 2]  # (B, N, 2), (B, N)
        beside = (cell.unsqueeze(2) - food[:, None, :, :2]).clamp(-2, 2).long() + 2  # (B, N, F, 2)
        beside = (beside[..., 0] * 5 + beside[..., 1]) * ACTIONS + actions.unsqueeze(-1)  # (B, N, F)
        effort = self.effort(self.agent_at_food(beside) + self.agent_level(onehot(level, LEVELS)).unsqueeze(2))
        at_food = effort.sum(1) + self.food_level(onehot(food[..., 2], LEVELS))  # (B, F, width)
        gone = self.gone(at_food).squeeze(-1).masked_fill(there.squeeze(-1) == 0, -100.0)  # (B, F)
        share = (at_food + self.is_gone(gone.sigmoid().unsqueeze(-1))).unsqueeze(1) + self.mine(effort)
        share = (self.at_food(share) * there.unsqueeze(1)).sum(2)  # (B, N, width)

        near = (cell.unsqueeze(1) - cell.unsqueeze(2)).clamp(-3, 3).long() + 3  # (B, N_j, N_k, 2), of k from j
        near = (near[..., 0] * 7 + near[..., 1]) * ACTIONS + actions.unsqueeze(1)
        rival = self.rival(near * ACTIONS + actions.unsqueeze(2))  # (B, N_j, N_k, width)
        rival = (rival * ~torch.eye(N, dtype=torch.bool).unsqueeze(-1)).sum(2)
        obstacle = (self.obstacle(beside) * there.unsqueeze(1)).sum(2)
        place = self.place(torch.cat([onehot(cell[..., 0], CELLS), onehot(cell[..., 1], CELLS)], -1))
        return self.move(rival + obstacle + place + self.action(actions)), self.reward(share), gone

    def loss(self, step):
        move, reward, gone = targets(step)
        move_logits, reward_logits, gone_logits = self(step, step.actions)
        total = nn.functional.cross_entropy(move_logits.flatten(0, 1), move.flatten())
        total += nn.functional.cross_entropy(reward_logits.flatten(0, 1), reward.flatten())
        there = step.obs[:, 0, 2 : 3 * step.F : 3] > 0
        return total + nn.functional.binary_cross_entropy_with_logits(gone_logits[there], gone[there].float())

    def predict(self, step, actions, i=None):
        """Probabilities (B, N_j, classes); of the foods (B, 1, F), the same for every j."""
        move, reward, gone = self(step, actions)
        return {"move": move.softmax(-1), "reward": reward.softmax(-1), "gone": 2 * gone.sigmoid().unsqueeze(1)}


class Ensemble:
    """Several models on the same steps in another order; the score of an edge is their mean minus their spread."""

    def __init__(self, members, doubt):
        self.members, self.doubt = members, doubt

    def update(self, step):
        for member in self.members:
            kept = torch.randint(len(step.obs), (len(step.obs),))
            member.update(SimpleNamespace(**{k: v[kept] if torch.is_tensor(v) else v for k, v in vars(step).items()}))

    def scores(self, step):
        parts = [member.scores(step) for member in self.members]
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return {k: (x.mean(0) - self.doubt * x.std(0)).clamp(min=0) for k, x in stacked.items()}


def relational(step):
    return Forward(Relational(step))


def raw(outcome):
    return lambda step: Forward(Raw(step, outcome))


ALL = 10**6  # iterations
# name -> model, steps per iteration, replayed iterations, share of each batch that is drawn from rewarded steps
CONFIGS = {
    "reverse": (Reverse, 1, 0, 0.0),
    "raw reward": (raw("reward"), 8, ALL, 0.0),
    "raw reward, half rewarded": (raw("reward"), 8, ALL, 0.5),
    "raw team reward, half rewarded": (raw("team"), 8, ALL, 0.5),
    "raw displacement": (raw("displacement"), 8, ALL, 0.0),
    "raw latent": (raw("latent"), 8, ALL, 0.0),
    "raw classes": (raw("classes"), 8, ALL, 0.0),
    "relational": (relational, 8, ALL, 0.0),
    "relational, half rewarded": (relational, 8, ALL, 0.5),
    "relational, 1 step": (relational, 1, ALL, 0.0),
    "relational, no replay": (relational, 8, 1, 0.0),
    "relational, 3 models": (lambda step: Ensemble([relational(step) for _ in range(3)], doubt=1.0), 8, ALL, 0.0),
}


def combined(scores):
    """{what of the outcome counts: score}: the chance that any part changes, the parts taken as independent."""
    kept = {name: 1 - part.clamp(0, 1) for name, part in scores.items()}
    if "" in scores:
        return {"whole": scores[""]}
    result = {name: scores[name] for name in kept}
    result["move+reward"] = 1 - kept["move"] * kept["reward"]
    if "gone" in kept:
        result["move+reward+gone"] = 1 - kept["move"] * kept["reward"] * kept["gone"]
    return result


# STUDY
def study(env_id, config, data, frames, stages):
    """Rows of the CSV: one model on one task, its scores pooled over each half of a stage; stages: their names."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    rewarded = (data.rewards > 0).any(-1).nonzero().squeeze(-1).numpy()
    build, steps, replay, share = CONFIGS[config]
    model, pooled, rows, began = build(take(data, slice(0, 2))), [], [], time.process_time()
    for start in range(0, len(data.obs), ITERATION):
        end = start + ITERATION
        if start // ITERATION % TRUTH_EVERY == 0:
            step = take(data, np.sort(rng.choice(np.arange(start, end), SCORED, replace=False)))
            pooled.append((combined(model.scores(step)), step))
        first = max(end - max(replay, 1) * ITERATION, 0)
        low, high = np.searchsorted(rewarded, (first, end))
        for _ in range(steps):
            index = rng.integers(first, end, BATCH) if replay else np.arange(start, end)
            extra = int(share * BATCH) if high > low else 0
            index[:extra] = rewarded[rng.integers(low, max(high, low + 1), extra)]
            model.update(take(data, index))
        if 2 * end % frames == 0:
            row = {"task": env_id, "model": config, "stage": stages[start // frames], "frames": end}
            row |= {"rewarded_steps": np.searchsorted(rewarded, end), "seconds": time.process_time() - began}
            rows += measure(pooled, row)
            pooled = []
    return rows


def measure(pooled, row):
    """Average precision, AUC, precision and recall of each score against each truth, pairs i != j."""
    rows = []
    others = ~torch.eye(pooled[0][1].N, dtype=torch.bool)
    for graph in GRAPHS:
        truth = torch.cat([getattr(step, graph)[:, others] for _, step in pooled]).flatten().numpy()
        for outcome in pooled[0][0]:
            score = torch.cat([scores[outcome][:, others] for scores, _ in pooled]).flatten().numpy()
            entry = row | {"graph": graph, "outcome": outcome, "pairs": len(truth), "base_rate": truth.mean()}
            if not 0 < truth.sum() < len(truth):
                continue
            entry |= {"average_precision": average_precision_score(truth, score), "auc": roc_auc_score(truth, score)}
            for threshold in THRESHOLDS:
                found = score > threshold
                entry[f"precision_{threshold}"] = truth[found].mean() if found.any() else np.nan
                entry[f"recall_{threshold}"] = found[truth].mean()
            rows.append(entry)
    return rows


# TABLES
def whole(table, graph):
    """The rows that measure a model's score of all that counts for this graph."""
    table = table[table.graph == graph]
    foods = table.outcome == "move+reward+gone"
    has_foods = table.model.isin(table.model[foods])
    parts = foods if graph == "shared" else table.outcome == "move+reward"
    parts |= (table.outcome == "move+reward") & ~has_foods
    return table[parts | (table.outcome == "whole")]


def markdown(table):
    """A data frame of text as a Markdown table."""
    lines = [table.columns, ["-"] * table.shape[1], *table.to_numpy()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def tables(table):
    """How models rank the edges of both graphs, and the pairs whose reward depends on i; what a threshold gives."""
    text = []
    # runs that differ in the last stage are the same before it
    table = table.drop_duplicates(["task", "model", "stage", "frames", "graph", "outcome"])
    order = [name for name in CONFIGS if name in set(table.model)]
    for graph in ("private", "shared", "reward"):
        part = whole(table, "private" if graph == "reward" else graph)
        if graph == "reward":
            part = table[(table.graph == "reward") & table.outcome.isin(["reward", "gone", "whole"])].copy()
            part["model"] = part.model + part.outcome.map({"reward": ": reward", "gone": ": gone", "whole": ""})
            order = list(dict.fromkeys(part.model))
        part = part.assign(cell=part.average_precision.map("{:.2f}".format) + " / " + part.auc.map("{:.2f}".format))
        keys = ["task", "stage", "frames", "rewarded_steps"]
        base = part.groupby(keys, sort=False).base_rate.mean().map("{:.3f}".format).rename("base rate")
        cells = part.pivot_table(index=keys, columns="model", values="cell", aggfunc="first", sort=False)
        cells = cells.reindex(columns=order).fillna("")
        cells = base.to_frame().join(cells).reset_index()
        text.append(f"Truth: {graph}. Average precision / AUC.\n\n" + markdown(cells))
    for graph in ("private", "shared"):
        part = whole(table[table.model == "relational"], graph)
        shown = part[["task", "stage", "frames"]].copy()
        for threshold in THRESHOLDS:
            numbers = (part[f"{what}_{threshold}"].map("{:.2f}".format) for what in ("precision", "recall"))
            shown[f"> {threshold}"] = [" / ".join(pair).replace("nan", "-") for pair in zip(*numbers)]
        text.append(f"relational, truth: {graph}. Precision / recall by threshold.\n\n" + markdown(shown))
    return "\n\n".join(text)


def main(args):
    torch.set_num_threads(1)
    half = ITERATION * TRUTH_EVERY  # each half of a stage needs an iteration whose truth is known
    if args.frames % (2 * half):
        sys.exit(f"learned_graph_study.py: frames must be a multiple of {2 * half}, not {args.frames}")
    stages = list(STAGES)
    if args.checkpoint:
        stages[-1] = "trained"
    known = pd.read_csv(args.csv) if args.csv.exists() else pd.DataFrame(columns=["task", "model", "stage"])
    done = set(known[["task", "model", "stage"]].itertuples(index=False, name=None))
    for env_id in () if args.table_only else args.tasks:
        data = None
        for config in args.configs or CONFIGS:
            if (env_id, config, stages[-1]) in done:
                continue
            data = data or record(env_id, args.frames, args.checkpoint)
            rows = study(env_id, config, data, args.frames, stages)
            new = pd.DataFrame(rows)
            new.to_csv(args.csv, mode="a", header=not args.csv.exists(), index=False, float_format="%.4g")
            print(f"{env_id}: {config}, {rows[-1]['seconds']:.0f} s", flush=True)
    print(tables(pd.read_csv(args.csv)))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
