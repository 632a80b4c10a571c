"""Can the counterfactual graph and the effects be learned from what agents see? Forward models on recorded play.

    python experiments/learned_graph_study.py                 # what the two CSVs lack, then the tables
    python experiments/learned_graph_study.py --table-only    # the tables, from results/learned_*_study.csv
    python experiments/learned_graph_study.py --tasks Foraging-8x8-2p-4f-coop-v3 --output study \
        --checkpoint experiments/trained/mappo_dg_8x8-2p-4f-coop.pt
    python experiments/learned_graph_study.py --runs runs/A runs/B      # what --graph learned has learned in these runs

i influences j iff another action of i would have changed what became of j. A forward model predicts what becomes of j
from observations and actions. The score of an edge is how far that prediction moves when i's action is exchanged: the
largest total variation over i's other actions, 1 - (1 - a)(1 - b) for an outcome of two parts; where the prediction is
no distribution, the largest distance. The truth is that of mappo_cdg_lbf.py's simulator:

    move      where j ends                      private   either of the two
    reward    j's reward                        shared    or which food is left (--shared-food)

Recorded is play of three stages, one after the other. The players are scripted: with a probability that grows from
stage to stage an agent goes to the food nearest to all and loads, otherwise it acts at random. With --checkpoint a
trained policy plays the last stage. Every model goes through the record as it would in training: it scores an iteration
of 500 steps first, then learns from it and from a replay of the earlier ones. It sees observations, actions and
rewards; the truth only measures it.

Models (o: observation, a: action):
    reverse             the paper's rule: H(q_psi(a^i | z^j, z'^j, z^i)) / H(q_phi(a^i | z^i)), small = edge
    raw X               an MLP from o^j, o^i and the one-hot a^j, a^i to the outcome X, see Raw
    relational          mappo_cdg_lbf.py's ForwardModel: agents and foods are entities
Unless it says otherwise: 8 gradient steps of 128 time steps an iteration, drawn from all that was recorded before.

Effects (how much more j is rewarded than if i did nothing): what --graph learned has, the script's forward_effects
after its own update_forward_model, against the simulator's. The relative error is the sum of the errors over the sum of
the true effects: 0 if exact, 1 if all effects are taken for 0. A part of it comes from the pairs that have no effect.

What came out: see docs/counterfactual.md. results/learned_graph_study.csv was made at commit cfe8649, one seed, but
for the rows "relational, half rewarded", which are this file's. The other rows "relational" come from a class that this
file had then: ForwardModel without identities of the players, with six classes of rewards and boards of 16 cells. It
combined the largest change of each part; now the combinations are compared, as in forward_graph. The policies of the
stage "trained" were not kept. Effects: three seeds, of records and models.
"""

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from errors import UserError, one_sentence

with one_sentence():
    import numpy as np
    import pandas as pd
    import torch
    import tyro
    from collecting import read_csv, write_whole
    from known_graph import auc
    from torch import nn
    from watch import load_checkpoint, load_script

    cdg = load_script("mappo_cdg_lbf")

TASKS = "Foraging-8x8-2p-4f-coop-v3", "Foraging-10x10-3p-3f-v3", "Foraging-15x15-3p-4f-v3"
STAGES = {"random": 0.0, "half skilled": 0.4, "skilled": 0.8}  # probability that an agent plays well
RESULTS = Path(__file__).resolve().parent / "results"
A, REWARDS = len(cdg.Action), len(cdg.REWARD_SIZES) + 1  # actions, classes of rewards
ITERATION, TRUTH_EVERY, SCORED = 500, 2, 200  # frames; iterations; steps whose edges are scored in such an iteration
BATCH = 128  # steps of a gradient step
THRESHOLDS = 0.05, 0.1, 0.2, 0.3, 0.5
GRAPHS = "move", "reward", "private", "shared"
EFFECT_SEEDS = 1, 2, 3
SHIPPED = cdg.Args()  # the settings of --graph learned
SHIPPED_NAME = "--graph learned"
GRAPH_COLUMNS = ["task", "model", "stage", "frames", "rewarded_steps", "seconds", "graph", "outcome", "pairs"]
GRAPH_COLUMNS += ["base_rate", "average_precision", "auc", *(f"recall_{threshold}" for threshold in THRESHOLDS)]
EFFECT_COLUMNS = ["task", "model", "seed", "stage", "frames", "rewarded_steps", "seconds", "pairs", "affected_pairs"]
EFFECT_COLUMNS += ["correlation", "relative_error", "unaffected_error"]


@dataclass
class Args:
    frames: int = 10_000
    """frames of each stage, a multiple of 2000; another number needs an --output of its own"""
    tasks: tuple[str, ...] = TASKS
    """ids of the tasks, in which everybody must observe all cells and levels"""
    configs: tuple[str, ...] = ()
    """names in CONFIGS, or effects; if not given, all"""
    output: Path = RESULTS
    """folder of learned_graph_study.csv and learned_effects_study.csv: what they hold is not run again"""
    checkpoint: Path | None = None
    """a checkpoint of an LBF script, trained on the one task that is given: its policy plays the last stage"""
    table_only: bool = False
    """run nothing"""
    runs: tuple[Path, ...] = ()
    """folders of runs of mappo_cdg_lbf.py --graph learned: measure the models that they have trained, no others"""


# RECORDING
def towards_food(env, skill, rng):
    """Every agent, with probability skill, goes to the food nearest to all of them and loads it; else at random."""
    actions = rng.integers(0, A, env.n_agents).tolist()
    cells = [player.position for player in env.players]
    distances = {food: sum(abs(food[0] - row) + abs(food[1] - col) for row, col in cells) for food in env.foods}
    for i in np.flatnonzero(rng.random(env.n_agents) < skill).tolist():
        row, col = cells[i]
        food = min(env.foods, key=distances.get)
        down, right = food[0] - row, food[1] - col
        if abs(down) + abs(right) == 1:
            actions[i] = cdg.Action.LOAD.value
        else:
            vertical = (1 if down < 0 else 2, abs(down))
            horizontal = (3 if right < 0 else 4, abs(right))
            ways = [action for action, steps in (vertical, horizontal) if steps > 0]
            allowed = [action for action in ways if cdg.Action(action) in env._valid_actions[env.players[i]]]
            actions[i] = int(rng.choice(allowed)) if allowed else actions[i]
    return actions


def true_edges(env, actions):
    """The simulator's edges in the step that comes next, i != j, one graph for each of GRAPHS: (4, N_i, N_j) bool."""
    actions = env.possible_actions(actions)
    move = env.collision_edges(actions)
    env.shared_food = True
    shared = env.load_edges(actions)
    env.shared_food = False
    reward = env.load_edges(actions)
    graphs = np.zeros((len(GRAPHS), env.n_agents, env.n_agents), bool)
    for graph, pairs in zip(graphs, (move, reward, move + reward, move + shared), strict=True):
        for pair in pairs:
            graph[pair] = True
    return graphs


def trained_policy(checkpoint, env):
    """(obs, random generator) -> sampled actions, by the actor of a checkpoint of a training script."""
    size = env.observation_space[0].shape[0], env.n_agents, checkpoint["args"]["hidden_dim"]
    actor = cdg.AgentNetwork(*size, A)
    actor.load_state_dict(checkpoint["actor"])

    @torch.no_grad()
    def act(obs, rng):
        logits = actor(torch.from_numpy(np.stack(obs))).numpy()
        return (logits + rng.gumbel(size=logits.shape)).argmax(-1).tolist()

    return act


class Record(NamedTuple):
    """S steps, one after the other, and the truth about them."""

    steps: cdg.Steps  # of S steps in place of B, whole numbers as int8
    graphs: torch.Tensor  # (S, 4, N_i, N_j) bool; all False in the iterations whose truth is not recorded
    effects: torch.Tensor  # (S, N_i, N_j), of every step
    num_cells: int  # of the longer side of the board


def record(env_id, frames, checkpoint=None, seed=1, stages=STAGES):
    """Play every stage for so many frames, the last one by the policy of the checkpoint if there is one -> Record."""
    env = cdg.make_env(env_id, "coop" in env_id, seed)
    rng = np.random.default_rng(seed)
    act = trained_policy(checkpoint, env) if checkpoint else None
    obs, _ = env.reset()
    unknown = np.zeros((len(GRAPHS), env.n_agents, env.n_agents), bool)
    rows = []
    for stage, skill in stages.items():
        trained = act and stage == list(stages)[-1]
        for _ in range(frames):
            actions = act(obs, rng) if trained else towards_food(env, skill, rng)
            graphs = unknown if len(rows) // ITERATION % TRUTH_EVERY else true_edges(env, actions)
            next_obs, rewards, terminated, truncated, _ = env.step(actions)
            effects = np.zeros((env.n_agents, env.n_agents), np.float32)
            for pair, effect in env.effects[-1].items():
                effects[pair] = effect
            rows.append((np.int8(obs), np.int8(next_obs), np.int8(actions), np.float32(rewards), graphs, effects))
            obs = env.reset()[0] if terminated or truncated else next_obs
    *steps, graphs, effects = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    return Record(cdg.Steps(*steps), graphs, effects, max(env.field_size))


def take(data, index):
    """Some steps of a Record as the models want them -> Steps."""
    obs, next_obs, actions, rewards = (part[index] for part in data.steps)
    return cdg.Steps(obs.float(), next_obs.float(), actions.long(), rewards)


def rewarded_steps(data):
    """The indices of the steps in which somebody is rewarded, ascending."""
    return (data.steps.rewards > 0).any(-1).nonzero().squeeze(-1).numpy()


# MODELS
class Reverse:
    """The paper's models and rule: one step per iteration, on that iteration."""

    def __init__(self, data):
        self.models = cdg.GraphModels(data.steps.obs.shape[-1], A)
        adam = {"lr": SHIPPED.learning_rate, "eps": SHIPPED.adam_eps, "fused": True}
        self.optimizer = torch.optim.Adam(self.models.parameters(), **adam)

    def logits(self, steps):
        alive = torch.ones((1, len(steps.obs)), dtype=torch.bool)
        return self.models(torch.stack([steps.obs, steps.next_obs]), alive)

    def update(self, steps):
        cdg.update_graph_models(self.logits(steps), steps.actions, self.optimizer)

    @torch.no_grad()
    def scores(self, steps):
        logits = self.logits(steps)
        predictor_entropy = cdg.entropy(logits.action_predictor).unsqueeze(-1)
        return {"whole": -cdg.entropy(logits.reverse_model) / predictor_entropy}


class Forward:
    """What forward models share: Adam, and the score of an edge by exchanging i's action."""

    def __init__(self, network, lr=3e-3, eps=1e-8):
        self.network = network
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, eps=eps, fused=True)

    def update(self, steps):
        cdg.gradient_step(self.optimizer, self.network.loss(steps), "loss")

    @torch.no_grad()
    def scores(self, steps):
        """{what of the outcome counts: (B, N_i, N_j)}, the largest change of the prediction for j over i's actions."""
        B, N = steps.actions.shape
        scores = defaultdict(lambda: torch.zeros((B, N, N)))
        for i in range(N):
            predicted = self.network.predict(steps, steps.actions, i)
            for action in range(A):
                actions = steps.actions.clone()
                actions[:, i] = action
                other = self.network.predict(steps, actions, i)
                parts = {name: change(name, part, other[name]) for name, part in predicted.items()}
                for name, part in combined(parts).items():
                    scores[name][:, i] = torch.max(scores[name][:, i], part)
        return dict(scores)


def change(name, before, after):
    """Total variation of an outcome (B, N_j, classes) -> (B, N_j); of the foods (B, F), independent, -> (B, 1)."""
    difference = (before - after).abs()
    if name == "gone":
        return 1 - (1 - difference).prod(-1, keepdim=True)
    return difference.sum(-1) / 2  # for an outcome that is no distribution: half the distance


def combined(parts):
    """{what of the outcome counts: how likely it changes} from its parts, which are taken as independent."""
    if "whole" in parts:
        return parts
    same = (1 - parts["move"]) * (1 - parts["reward"])
    result = parts | {"move+reward": 1 - same}
    if "gone" in parts:
        result["move+reward+gone"] = 1 - same * (1 - parts["gone"])
    return result


class Raw(nn.Module):
    """(o^j, o^i, a^j, a^i) -> outcome of j; the two observations are side by side, as they are.

    outcome: reward (squared error), displacement (reward and move, squared error), latent (reward and the encoder's
    next latent, the encoder being trained by the single-agent reverse model), classes (of reward and move, cross-
    entropy), team (the sum of all rewards).
    """

    def __init__(self, data, outcome):
        super().__init__()
        D = data.steps.obs.shape[-1]
        self.outcome = outcome
        size = {"reward": 1, "team": 1, "displacement": 3, "latent": 17, "classes": 5 + REWARDS}[outcome]
        self.net = cdg.mlp(2 * D + 2 * A, 128, 128, size)
        if outcome == "latent":
            self.encoder = cdg.mlp(D, 64, 64, 16)
            self.single = cdg.mlp(32, 64, A)

    def forward(self, steps, actions, i):
        """Outcomes of every j, given what agent i sees and does: (B, N_j, size)."""
        acts = cdg.one_hot(actions, A)
        his_obs = steps.obs[:, i].unsqueeze(1).expand_as(steps.obs)
        his_act = acts[:, i].unsqueeze(1).expand_as(acts)
        return self.net(torch.cat([steps.obs / 8, his_obs / 8, acts, his_act], -1))

    def loss(self, steps):
        """The mean over all pairs i != j."""
        total = 0.0
        N = steps.actions.shape[-1]
        actual = cdg.outcome(steps)
        moved = cdg.read_observations(steps.next_obs)[1] - cdg.read_observations(steps.obs)[1]
        rewards = steps.rewards
        if self.outcome == "team":
            rewards = rewards.sum(-1, keepdim=True).expand_as(rewards)
        for i in range(N):
            others = [j for j in range(N) if j != i]
            out = self(steps, steps.actions, i)[:, others]
            if self.outcome == "classes":
                total += cdg.cross_entropy(out[..., :5], actual.move[:, others])
                total += cdg.cross_entropy(out[..., 5:], actual.reward[:, others])
                continue
            total += ((out[..., 0] - 10 * rewards[:, others]) ** 2).mean()  # of the size of a move
            if self.outcome == "displacement":
                total += ((out[..., 1:] - moved[:, others]) ** 2).mean()
            if self.outcome == "latent":
                z, z_next = self.encoder(steps.obs / 8), self.encoder(steps.next_obs / 8)
                total += ((out[..., 1:] - z_next[:, others].detach()) ** 2).mean()
                total += cdg.cross_entropy(self.single(torch.cat([z, z_next], -1)), steps.actions)
        return total / N

    def predict(self, steps, actions, i):
        out = self(steps, actions, i)
        if self.outcome == "classes":
            return {"move": out[..., :5].softmax(-1), "reward": out[..., 5:].softmax(-1)}
        return {"whole": out}


class Relational(nn.Module):
    """The script's ForwardModel, with the loss of its update_forward_model on any batch."""

    def __init__(self, data):
        super().__init__()
        self.model = cdg.ForwardModel(data.steps.obs.shape[1], A, data.num_cells)

    def loss(self, steps):
        actual = cdg.outcome(steps)
        predicted = self.model(steps.obs, steps.actions)
        there = cdg.read_observations(steps.obs)[0].there
        total = cdg.cross_entropy(predicted.move, actual.move) + cdg.cross_entropy(predicted.reward, actual.reward)
        gone = actual.gone[there].float()
        return total + nn.functional.binary_cross_entropy_with_logits(predicted.gone[there], gone)

    def predict(self, steps, actions, _):
        """Probabilities: (B, N_j, classes), of the foods (B, F)."""
        move, reward, gone = self.model(steps.obs, actions)
        return {"move": move.softmax(-1), "reward": reward.softmax(-1), "gone": gone.sigmoid()}


class Ensemble:
    """Several models on the same steps in another order; the score of an edge is their mean minus their spread."""

    def __init__(self, members, doubt):
        self.members = members
        self.doubt = doubt

    def update(self, steps):
        for member in self.members:
            kept = torch.randint(len(steps.obs), (len(steps.obs),))
            member.update(cdg.Steps(*(part[kept] for part in steps)))

    def scores(self, steps):
        parts = [member.scores(steps) for member in self.members]
        stacked = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        return {name: (x.mean(0) - self.doubt * x.std(0)).clamp(min=0) for name, x in stacked.items()}


def relational(data):
    return Forward(Relational(data), SHIPPED.forward_learning_rate, SHIPPED.adam_eps)


def raw(outcome):
    return lambda data: Forward(Raw(data, outcome))


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
    "relational, 3 models": (lambda data: Ensemble([relational(data) for _ in range(3)], doubt=1.0), 8, ALL, 0.0),
}


# GRAPHS
def study_graphs(env_id, config, data, frames, stages):
    """Rows of learned_graph_study.csv: one model on one task, its scores pooled over each half of a stage.

    stages: their names.
    """
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    rewarded = rewarded_steps(data)
    build, steps, replay, share = CONFIGS[config]
    model = build(data)
    pooled, rows = [], []
    began = time.process_time()
    for start in range(0, len(data.effects), ITERATION):
        end = start + ITERATION
        if start // ITERATION % TRUTH_EVERY == 0:
            index = np.sort(rng.choice(np.arange(start, end), SCORED, replace=False))
            pooled.append((model.scores(take(data, index)), data.graphs[index]))
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
            rows += measure_graphs(pooled, row)
            pooled = []
    return rows


def average_precision(truth, score):
    """The mean precision at the true pairs, ranked by score, those of equal score as one; truth (P) bool, not none."""
    order = np.argsort(-score)
    last = np.flatnonzero(np.diff(score[order], append=np.nan))  # of each run of equal scores
    found = np.cumsum(truth[order])[last]
    return np.diff(found, prepend=0) @ (found / (last + 1)) / truth.sum()


def measure_graphs(pooled, row):
    """Average precision, AUC, precision and recall of each score against each truth, pairs i != j."""
    rows = []
    others = cdg.other_agents(pooled[0][1])
    for g, graph in enumerate(GRAPHS):
        truth = torch.cat([graphs[:, g][:, others] for _, graphs in pooled]).flatten().numpy()
        for outcome in pooled[0][0]:
            score = torch.cat([scores[outcome][:, others] for scores, _ in pooled]).flatten().numpy()
            entry = row | {"graph": graph, "outcome": outcome, "pairs": len(truth), "base_rate": truth.mean()}
            if not 0 < truth.sum() < len(truth):
                continue
            entry |= {"average_precision": average_precision(truth, score), "auc": auc(score, truth)}
            for threshold in THRESHOLDS:
                found = score > threshold
                entry[f"precision_{threshold}"] = truth[found].mean() if found.any() else np.nan
                entry[f"recall_{threshold}"] = found[truth].mean()
            rows.append(entry)
    return rows


# EFFECTS
def study_effects(env_id, data, frames, stages, seed):
    """Rows of learned_effects_study.csv: what --graph learned makes of one record, pooled over halves of a stage."""
    torch.manual_seed(seed)
    _, N, D = data.steps.obs.shape
    rewarded = rewarded_steps(data)
    model = cdg.ForwardModel(N, A, data.num_cells)
    adam = {"lr": SHIPPED.forward_learning_rate, "eps": SHIPPED.adam_eps, "fused": True}
    optimizer = torch.optim.Adam(model.parameters(), **adam)
    replay = cdg.Replay(SHIPPED.replay_size, N, D)
    learned, rows = [], []
    began = time.process_time()
    for start in range(0, len(data.effects), ITERATION):
        end = start + ITERATION
        steps = take(data, slice(start, end))
        learned.append(cdg.forward_effects(model, steps.obs, steps.actions, steps.rewards))
        seen = {name: part[:end] for name, part in data.steps._asdict().items()}
        replay.load_state_dict(seen | {"added": end})
        cdg.update_forward_model(model, optimizer, replay)
        if 2 * end % frames == 0:
            row = {"task": env_id, "model": SHIPPED_NAME, "seed": seed, "stage": stages[start // frames]}
            row |= {"frames": end, "rewarded_steps": np.searchsorted(rewarded, end)}
            row["seconds"] = time.process_time() - began
            rows.append(row | measure_effects(torch.cat(learned), data.effects[end - frames // 2 : end]))
            learned = []
    return rows


def measure_effects(learned, truth):
    """Agreement of effects (B, N_i, N_j) over the pairs i != j; what is not defined for them is nan."""
    others = cdg.other_agents(truth)
    learned, truth = learned[:, others], truth[:, others]
    with np.errstate(invalid="ignore"):
        correlation = np.corrcoef(learned.flatten(), truth.flatten())[0, 1]
    affected = truth != 0
    error = (learned - truth).abs()
    size = float(truth.abs().sum()) or np.nan
    return {
        "pairs": truth.numel(),
        "affected_pairs": int(affected.sum()),
        "correlation": correlation,
        "relative_error": float(error.sum()) / size,
        "unaffected_error": float(error[~affected].sum()) / size,
    }


def study_run(path, frames=10_000):
    """What a run of --graph learned has learned, on so many frames of its own play -> one row; UserError if not such.

    Average precision and AUC of the edges in move and reward (forward_graph's), and of the pairs with effects, the
    errors of these.
    """
    path, checkpoint = load_checkpoint(path)
    settings = checkpoint["args"]
    if checkpoint["script"] != "mappo_cdg_lbf" or settings["graph"] != "learned":
        raise UserError(f"{path} is no run of mappo_cdg_lbf.py --graph learned")
    env_id = settings["env_id"]
    data = record(env_id, frames, checkpoint, seed=1000 + settings["seed"], stages={"trained": 1.0})
    model = Forward(Relational(data))
    model.network.model.load_state_dict(checkpoint["models"])
    pooled, learned = [], []
    for start in range(0, frames, ITERATION):
        steps = take(data, slice(start, start + ITERATION))
        learned.append(cdg.forward_effects(model.network.model, steps.obs, steps.actions, steps.rewards))
        if start // ITERATION % TRUTH_EVERY == 0:
            pooled.append((model.scores(steps), data.graphs[start : start + ITERATION]))
    row = {"task": env_id, "seed": settings["seed"], "frames": checkpoint["global_step"]}
    measured = measure_graphs(pooled, row)
    private = next(row for row in measured if row["graph"] == "private" and row["outcome"] == "move+reward")
    row |= {name: private[name] for name in ("base_rate", "average_precision", "auc")}
    return row | measure_effects(torch.cat(learned), data.effects)


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
    lines = [table.columns, ["---"] * table.shape[1], *table.to_numpy()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def graph_tables(table):
    """How models rank the edges of both graphs, and the pairs whose reward depends on i; what a threshold gives."""
    text = []
    # runs that differ in the last stage are the same before it
    table = table.drop_duplicates(["task", "model", "stage", "frames", "graph", "outcome"])
    order = [name for name in CONFIGS if name in set(table.model)]
    for graph in ("private", "shared", "reward"):
        part = whole(table, graph)
        if graph == "reward":
            part = table[(table.graph == "reward") & table.outcome.isin(["reward", "gone", "whole"])].copy()
            part["model"] += part.outcome.map({"reward": ": reward", "gone": ": gone", "whole": ""})
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
            shown[f"> {threshold}"] = [" / ".join(pair).replace("nan", "-") for pair in zip(*numbers, strict=True)]
        text.append(f"relational, truth: {graph}. Precision / recall by threshold.\n\n" + markdown(shown))
    return "\n\n".join(text)


def short(x):
    """A number as text, without digits that say nothing."""
    return f"{x:.2f}" if abs(x) < 10 else f"{x:.0f}"


def effects_table(table):
    """How well the learned effects agree with the simulator's: means over seeds, with the smallest and the largest."""
    keys = ["task", "stage", "frames"]
    table = table.drop_duplicates([*keys, "model", "seed"])
    heads = {"correlation": "correlation", "relative_error": "relative error", "unaffected_error": "of it, unaffected"}
    lines = []
    for values, part in table.groupby(keys, sort=False):
        line = dict(zip(keys, values, strict=True))
        line["rewarded steps"] = f"{part.rewarded_steps.mean():.0f}"
        line["affected pairs"] = f"{(part.affected_pairs / part.pairs).mean():.2%}"
        for name, head in heads.items():
            numbers = part[name].dropna()
            line[head] = "-"
            if len(numbers):
                line[head] = f"{short(numbers.mean())} ({short(numbers.min())} to {short(numbers.max())})"
        lines.append(line)
    title = f"Effects, {SHIPPED_NAME}. Mean (smallest to largest) of {table.seed.nunique()} seeds."
    return f"{title}\n\n{markdown(pd.DataFrame(lines))}"


# MAIN
def check_args(args):
    """The checkpoint or None; raises UserError for the first setting that makes no sense."""
    half = ITERATION * TRUTH_EVERY  # each half of a stage needs an iteration whose truth is known
    if args.frames < 1 or args.frames % (2 * half):
        raise UserError(f"--frames must be a multiple of {2 * half}, not {args.frames}")
    if args.frames != Args.frames and args.output == Args.output:
        raise UserError("--frames needs --output: other stages must not be mixed with the committed ones")
    known = *CONFIGS, "effects"
    unknown = [config for config in args.configs if config not in known]
    if unknown:
        raise UserError(f"no config {unknown[0]!r}; there are {', '.join(known)}")
    for env_id in args.tasks:
        try:
            cdg.check_observations(cdg.make_env(env_id))
        except cdg.UserError as error:
            raise UserError(f"{env_id}: {error}") from error
    if args.checkpoint is None:
        return None
    _, checkpoint = load_checkpoint(args.checkpoint)
    trained_on = checkpoint["args"]["env_id"]
    if args.tasks != (trained_on,):
        raise UserError(f"{args.checkpoint} was trained on {trained_on}: give --tasks {trained_on} alone")
    return checkpoint


def read_table(path, columns):
    """The CSV, empty if there is none yet; UserError if it is damaged."""
    return read_csv(path, columns) if path.exists() else pd.DataFrame(columns=columns)


def add_rows(path, columns, rows):
    """Add rows to the CSV, which is written as a whole or not at all."""
    new = pd.DataFrame(rows).to_csv(index=False, float_format="%.4g")
    if path.exists():
        read_csv(path, columns)
        new = path.read_text(encoding="utf-8") + new.partition("\n")[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, new)


def run(args, checkpoint, graphs_csv, effects_csv):
    """Study what the CSVs lack and add its rows."""
    stages = list(STAGES)
    if checkpoint:
        stages[-1] = "trained"
    end = stages[-1], args.frames * len(stages)
    configs = args.configs or (*CONFIGS, "effects")
    done = read_table(graphs_csv, GRAPH_COLUMNS)
    done = set(done[["task", "model", "stage", "frames"]].itertuples(index=False, name=None))
    done_effects = read_table(effects_csv, EFFECT_COLUMNS)
    done_effects = set(done_effects[["task", "seed", "stage", "frames"]].itertuples(index=False, name=None))
    for env_id in args.tasks:
        data = None
        for config in configs:
            if config == "effects" or (env_id, config, *end) in done:
                continue
            data = data or record(env_id, args.frames, checkpoint)
            rows = study_graphs(env_id, config, data, args.frames, stages)
            add_rows(graphs_csv, GRAPH_COLUMNS, rows)
            print(f"{env_id}: {config}, {rows[-1]['seconds']:.0f} s", flush=True)
        for seed in EFFECT_SEEDS if "effects" in configs else ():
            if (env_id, seed, *end) in done_effects:
                continue
            data = record(env_id, args.frames, checkpoint, seed)
            rows = study_effects(env_id, data, args.frames, stages, seed)
            add_rows(effects_csv, EFFECT_COLUMNS, rows)
            print(f"{env_id}: effects, seed {seed}, {rows[-1]['seconds']:.0f} s", flush=True)


def main(args):
    """Run what is missing, print the tables; raises UserError."""
    torch.set_num_threads(1)
    if args.runs:
        table = pd.DataFrame([study_run(path) for path in args.runs])
        print(markdown(table.map(lambda x: short(x) if isinstance(x, float) else x)))
        return
    checkpoint = check_args(args)
    graphs_csv = args.output / "learned_graph_study.csv"
    effects_csv = args.output / "learned_effects_study.csv"
    if not args.table_only:
        run(args, checkpoint, graphs_csv, effects_csv)
    for path, columns, table in (
        (graphs_csv, GRAPH_COLUMNS, graph_tables),
        (effects_csv, EFFECT_COLUMNS, effects_table),
    ):
        if path.exists():
            print(table(read_csv(path, columns)) + "\n")
        elif args.table_only:
            raise UserError(f"{path} does not exist: run without --table-only first")


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(Args, description=__doc__))
