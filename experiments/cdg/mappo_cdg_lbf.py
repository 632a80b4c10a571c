# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4,<=2.13.0", "numpy", "gymnasium", "tyro", "tensorboard", "lbforaging>=2.0.0", "tqdm"]
# ///
"""MAPPO with counterfactual dependence graphs (after arXiv 2601.21523) on Level-Based Foraging.

Every agent learns from the rewards that it can have influenced. The graph says whose outcome another action of agent i
would have changed; the critic of every pair of agents predicts what j earns from the step at which i has reached it, so
that an action is credited for bringing that step about, too.

    python mappo_cdg_lbf.py --no-shared-food
    python mappo_cdg_lbf.py --env-id Foraging-15x15-3p-4f-v3 --no-winner-take-all --seed 2

Axes are (T, E, N, ...): time step, environment, agent. A pair is (..., i, j): i is the influencer, j the influenced.
B: the steps that took place, of all episodes in one row; D: observation size, A: actions, Z: latent size.
"""

import difflib
import io
import os
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from lbforaging.foraging.environment import Action, ForagingEnv
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the networks, the environments and every random draw"""
    torch_deterministic: bool = True
    """if toggled, PyTorch uses deterministic algorithms only"""
    cuda: bool = False
    """use a GPU (networks this small are faster on a core); set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"""
    num_threads: int = 1
    """PyTorch threads"""
    track: bool = False
    """also log to Weights and Biases"""
    wandb_project_name: str = "dependence-graphs"
    """the W&B project"""
    wandb_entity: str | None = None
    """the W&B team"""
    save_model: bool = False
    """save a checkpoint at the end, also when --checkpoint-interval is 0"""
    checkpoint_interval: int = 100_000
    """frames between two checkpoints (0: none but those of --save-model and of an interrupted run)"""
    resume: str | None = None
    """path of a checkpoint.pt: continue that run exactly, in its own folder, also beyond --total-timesteps"""

    env_id: str = "Foraging-8x8-2p-4f-coop-v3"
    """any vector-observation id of lbforaging"""
    winner_take_all: bool = True
    """all of a food's reward goes to its strongest loader, food needs two agents (the paper's change to -coop tasks)"""
    total_timesteps: int = 5_000_000
    """frames: environment steps summed over the environments"""
    num_envs: int = 10
    """parallel environments, each plays one whole episode per iteration"""
    eval_interval: int = 50_000
    """frames between two evaluations"""
    eval_episodes: int = 100
    """episodes of an evaluation"""
    eval_greedy: bool = False
    """evaluate with the most likely actions instead of sampled ones"""
    hidden_dim: int = 128
    """units of each hidden layer of policy and critic"""
    learning_rate: float = 5e-4
    """learning rate of every Adam"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the generalized advantage estimation"""
    update_epochs: int = 4
    """gradient steps per iteration, each on the whole batch"""
    norm_adv: bool = False
    """normalise the advantages"""
    clip_coef: float = 0.2
    """PPO's clipping coefficient"""
    ent_coef: float = 0.001
    """coefficient of the entropy bonus"""
    max_grad_norm: float = 10.0
    """largest norm of the policy's and of the critic's gradient"""

    advantage: Literal["pairwise", "blind", "predictable", "published"] = "pairwise"
    """a critic of every pair; a second one that sees no other agent; edges one step later; or the paper's advantage"""
    pre_meeting_lambda: float = 0.0
    """predictable: lambda of the steps before a meeting; 0: their first TD error alone, gae_lambda: global rewards"""
    c: float = 0.9
    """entropy-ratio threshold of an edge: 0 gives no edge (like local rewards), 1 most (like global rewards)"""
    graph: Literal["simulator", "reverse", "random", "complete", "identity"] = "simulator"
    """where the dependence graph comes from: simulator: what other actions would have changed, reverse: the paper's"""
    shared_food: bool = True
    """simulator: who decides whether a food disappears influences everybody; --no-shared-food: whom it rewards"""
    graph_p: float = 0.5
    """probability of an edge under --graph random"""
    soft: bool = True
    """mix hard path weights with lambda (robust to a noisy graph); --no-soft: hard weights"""


class UserError(Exception):
    """Ends the script with its one sentence on stderr and exit status 2."""


def check_args(args):
    """Raise UserError for the first setting that makes no sense (settings that this script lacks are skipped)."""
    counts = "total_timesteps num_envs eval_interval eval_episodes update_epochs hidden_dim num_threads"
    amounts = "seed checkpoint_interval learning_rate clip_coef ent_coef max_grad_norm"
    fractions = "gamma gae_lambda pre_meeting_lambda c graph_p"
    for names, low, high in ((counts, 1, torch.inf), (amounts, 0, torch.inf), (fractions, 0, 1)):
        for name in names.split():
            if not low <= getattr(args, name, low) <= high:
                raise UserError(f"{name} must lie in [{low}, {high}], not {getattr(args, name)}")
    if args.pre_meeting_lambda > args.gae_lambda:
        raise UserError(f"pre_meeting_lambda is {args.pre_meeting_lambda}, above gae_lambda ({args.gae_lambda})")
    if args.total_timesteps < (frames := args.num_envs * make_env(args.env_id)._max_episode_steps):
        raise UserError(f"total_timesteps is {args.total_timesteps}, below one iteration ({frames} frames)")


# ENVIRONMENT
class LevelBasedForaging(ForagingEnv):
    """lbforaging's environment, bit for bit but several times faster, with the paper's winner-take-all variant.

    Winner-take-all: a food's whole reward goes to its loader with the highest level (ties: the lowest index), and its
    level is at most (-coop tasks: just) the sum of the two lowest player levels, in the package of the three lowest.
    """

    def __init__(self, winner_take_all=False, **kwargs):
        super().__init__(**kwargs)
        self.winner_take_all, self.board, self._valid_actions = winner_take_all, None, {}

    def spawn_food(self, max_num_food, min_levels, max_levels):
        if self.winner_take_all:
            max_levels = np.full_like(max_levels, sum(sorted(player.level for player in self.players)[:2]))
        super().spawn_food(max_num_food, min_levels, max_levels)

    def step(self, actions):
        foods = self.foods
        obs, rewards, terminated, truncated, info = super().step(actions)
        if self.winner_take_all and any(rewards):
            for cell in foods.keys() - self.foods.keys():
                # no cell touches two foods: who stands beside this one and has a reward has loaded this one
                loaders = [player for player in self.adjacent_players(*cell) if player.reward > 0]
                winner, whole = max(loaders, key=lambda player: player.level), sum(player.reward for player in loaders)
                for player in loaders:
                    player.reward = whole if player is winner else 0
            rewards = [player.reward for player in self.players]
        return obs, rewards, terminated, truncated, info

    def _gen_valid_moves(self):
        board = self.field.tobytes()
        if board != self.board:  # food seldom changes: until it does, keep what each visited cell offers
            rows, cols = self.field.nonzero()
            self.foods = dict(zip(zip(rows.tolist(), cols.tolist()), self.field[rows, cols].tolist()))  # cell -> level
            self.board, self.view = board, {}
        for player in self.players:
            cell = player.position = int(player.position[0]), int(player.position[1])
            player.history.append(cell)  # for the oracle graph; empty in the package, cleared by reset
            if cell not in self.view:
                self.view[cell] = self._look_around(*cell)
            self._valid_actions[player] = self.view[cell][0]

    def _look_around(self, row, col):
        (rows, cols), foods, sight = self.field_size, self.foods, self.sight
        beside = ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1))  # north, south, west, east
        can = [0 <= r < rows and 0 <= c < cols and (r, c) not in foods for r, c in beside]
        can.append(bool(foods.keys() & beside))  # load
        top, left, food = max(row - sight, 0), max(col - sight, 0), []
        for (r, c), level in foods.items():
            if top <= r <= row + sight and left <= c <= col + sight:
                food += [r - top, c - left, level]
        food += [-1, -1, 0] * (self.max_num_food - len(food) // 3)
        return [Action.NONE, *(action for action, valid in zip(self.action_set, can) if valid)], food

    def _make_gym_obs(self):
        reach, width = 2 * self.sight, 3 if self._observe_agent_levels else 2
        players = [(*player.position, int(player.level)) for player in self.players]
        obs = []
        for i, (row, col, _) in enumerate(players):
            top, left = max(row - self.sight, 0), max(col - self.sight, 0)  # what is seen is counted from this corner
            features = self.view[row, col][1].copy()
            for r, c, level in (players[i], *players[:i], *players[i + 1 :]):  # oneself first
                # the package's test: near the board's first row and column, players are seen farther away than food
                if 0 <= r - top <= reach and 0 <= c - left <= reach:
                    features += (r - top, c - left, level)[:width]
            missing = 3 * self.max_num_food + width * len(players) - len(features)
            obs.append(features + [-1, -1, 0][:width] * (missing // width))
        return tuple(np.array(obs, dtype=np.float32))


def make_env(env_id, winner_take_all=False, seed=0):
    """A fresh environment whose first reset() draws its board from seed; UserError for an id that cannot be used."""
    known = [name for name in gym.registry if name.startswith("Foraging-")]
    if env_id.startswith("Foraging-grid"):
        raise UserError(f"{env_id} has grid observations, the networks here need vectors: drop '-grid' from the id")
    if env_id not in known:
        nearest = ", ".join(difflib.get_close_matches(env_id, known, n=3, cutoff=0))
        raise UserError(f"unknown environment {env_id}; the nearest names are {nearest}")
    env = LevelBasedForaging(winner_take_all=winner_take_all, **gym.spec(env_id).kwargs)
    env.seed(int(seed))
    return env


# COUNTERFACTUAL GRAPH
ACTIONS = tuple(Action)
MOVES = (0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)  # rows and columns that an action asks for


def counterfactual_edges(env, actions, shared_food=True):
    """The pairs (i, j), i != j, in which i influences j in the step that env makes next, with this joint action.

    i influences j iff another available action of i, the others doing what they do, would change (a) the cell in which
    j ends or j's reward, or (b, if shared_food) which foods disappear: food is part of everybody's state, so i then
    influences every j. So i's edges do not depend on the action that i takes, but on those of the others.
    """
    available = [env._valid_actions[player] for player in env.players]
    actions = [action if ACTIONS[action] in valid else 0 for action, valid in zip(actions, available)]
    return collision_edges(env, actions) + load_edges(env, actions, available, shared_food)


def collision_edges(env, actions):
    """The pairs in which it is up to i whether j gets to the cell that it moves to."""
    cells = [player.position for player in env.players]
    claims = [(row + MOVES[action][0], col + MOVES[action][1]) for (row, col), action in zip(cells, actions)]
    edges = []
    for j, claim in enumerate(claims):
        if claim == cells[j]:
            continue  # who stays is not moved by anybody
        rivals = claims.count(claim) - 1  # a cell that two or more claim is entered by none
        for i, (row, col) in enumerate(cells):
            # where j can go i can go, too, from beside it; and from that cell i can go to where j comes from
            near = abs(row - claim[0]) + abs(col - claim[1]) <= 1
            if near and i != j and rivals == (claims[i] == claim):
                edges.append((i, j))
    return edges


def load_edges(env, actions, available, shared_food):
    """The pairs in which i, by loading or not, changes j's reward or (shared_food) whether a food disappears."""
    edges = []
    load = [ACTIONS[action] is Action.LOAD for action in actions]
    for i, player in enumerate(env.players):
        if Action.LOAD not in available[i]:
            continue
        food = env.adjacent_food_location(*player.position)  # no cell touches two foods
        beside = env.adjacent_players(*food)
        others = [j for j, other in enumerate(env.players) if load[j] and other in beside and other is not player]
        gone, rewards = load_food(env, food, sorted([*others, i]))
        if not gone:
            continue  # with i or without
        gone_without, rewards_without = load_food(env, food, others)
        if shared_food and not gone_without:
            edges += [(i, j) for j in range(env.n_agents) if j != i]
        else:
            edges += [(i, j) for j in others if rewards[j] != rewards_without[j]]
    return edges


def load_food(env, food, loaders):
    """Whether these players, in ascending order, load the food, and the reward of each: {player: reward}."""
    needed, levels = env.foods[food], {i: env.players[i].level for i in loaders}
    total = sum(levels.values())
    if total < needed:
        return False, dict.fromkeys(loaders, -env.penalty)
    whole = needed / env._food_spawned if env._normalize_reward else needed * total
    if env.winner_take_all:
        winner = max(loaders, key=levels.get)  # ties: the lowest index
        return True, dict.fromkeys(loaders, 0.0) | {winner: whole}
    return True, {i: whole * level / total for i, level in levels.items()}


# NETWORKS
class AgentNetwork(nn.Module):
    """Two hidden layers on [x, one-hot agent id], shared by all agents: x (..., N, in_dim) -> (..., N, out_dim).

    The first is W x + U[agent], so that an x common to all agents, (..., 1, in_dim), is not repeated for each of them.
    """

    def __init__(self, in_dim, num_agents, hidden_dim, out_dim):
        super().__init__()
        self.input, self.agent_id = nn.Linear(in_dim, hidden_dim), nn.Embedding(num_agents, hidden_dim)
        nn.init.uniform_(self.agent_id.weight, -((in_dim + num_agents) ** -0.5), (in_dim + num_agents) ** -0.5)
        self.hidden, self.output = nn.Linear(hidden_dim, hidden_dim), nn.Linear(hidden_dim, out_dim)

    def forward(self, x):
        x = torch.relu(self.input(x) + self.agent_id.weight)
        return self.output(torch.relu(self.hidden(x)))


class Critic(AgentNetwork):
    """Centralised critic: each agent's value from all observations side by side, (..., N, D) -> (..., N)."""

    def forward(self, obs):
        return super().forward(obs.flatten(-2).unsqueeze(-2)).squeeze(-1)


class PairCritic(AgentNetwork):
    """What j earns once i has reached it, from all observations side by side: (..., N, D) -> (..., N_i, N_j)."""

    def forward(self, obs):
        return super().forward(obs.flatten(-2).unsqueeze(-2))


class TwoCritics(nn.Module):
    """Each agent's value from all observations, and from what is its own or common: (..., N, D) -> (..., N, 2).

    own_dim: an observation begins with the foods and oneself, the other players follow.
    """

    def __init__(self, obs_dim, own_dim, num_agents, hidden_dim):
        super().__init__()
        self.own_dim, self.seeing = own_dim, Critic(num_agents * obs_dim, num_agents, hidden_dim, 1)
        self.blind = AgentNetwork(own_dim, num_agents, hidden_dim, 1)

    def forward(self, obs):
        return torch.stack([self.seeing(obs), self.blind(obs[..., : self.own_dim]).squeeze(-1)], -1)


# DEPENDENCE GRAPH
def mlp(*sizes):
    """Layers of the given sizes; each hidden one is Linear -> ReLU -> LayerNorm."""
    layers = [nn.Linear(sizes[0], sizes[1])]
    for n_in, n_out in zip(sizes[1:], sizes[2:]):
        layers += [nn.ReLU(), nn.LayerNorm(n_in), nn.Linear(n_in, n_out)]
    return nn.Sequential(*layers)


class ReverseModel(nn.Module):
    """q_psi(a^i | z^j, z'^j, z^i), what i did from what became of j: (B, N, Z) -> logits of a^i (B, N_i, N_j, A)."""

    def __init__(self, latent_dim, num_actions):
        super().__init__()
        # the first layer sees the three vectors side by side: computed once per agent, added per pair
        self.influencer, self.influenced = nn.Linear(latent_dim, 256), nn.Linear(2 * latent_dim, 256)
        self.head = nn.Sequential(nn.ReLU(), nn.LayerNorm(256), mlp(256, 128, 128, num_actions))

    def forward(self, z, z_next):
        influenced = self.influenced(torch.cat([z, z_next], -1))  # (B, N_j, 256)
        return self.head(self.influencer(z).unsqueeze(-2) + influenced.unsqueeze(-3))


class GraphModels(nn.Module):
    """The networks behind the learned graph: encoder, single-agent reverse model, action predictor, reverse model."""

    def __init__(self, obs_dim, num_actions, encoder=True, latent_dim=64):
        super().__init__()
        latent_dim = latent_dim if encoder else obs_dim
        self.encoder = mlp(obs_dim, 64, 64, latent_dim) if encoder else nn.Identity()
        self.single_reverse_model = mlp(2 * latent_dim, 256, 128, 128, num_actions)
        self.action_predictor = mlp(latent_dim, 256, 128, 128, num_actions)
        self.reverse_model = ReverseModel(latent_dim, num_actions)

    def forward(self, obs, alive):
        """Logits of a^i in the steps: obs (T+1, E, N, D), alive (T, E) -> single-agent reverse model (B, N, A), action
        predictor (B, N, A), reverse model (B, N_i, N_j, A). Only the first of them trains the encoder."""
        latent = self.encoder(obs)  # (T+1, E, N, Z)
        z, z_next = latent[:-1][alive], latent[1:][alive]  # (B, N, Z)
        single = self.single_reverse_model(torch.cat([z, z_next], -1))
        z, z_next = z.detach(), z_next.detach()
        return single, self.action_predictor(z), self.reverse_model(z, z_next)


def learned_graph(predictor_logits, reverse_logits, c):
    """i -> j iff H(q_psi(a^i | z^j, z'^j, z^i)) < c H(q_phi(a^i | z^i)), or i = j; H: entropy in nats.

    Logits (B, N, A) and (B, N_i, N_j, A) -> graph (B, N_i, N_j) bool, mean entropies (i = j included), their ratio.
    """
    logprobs = [logits.detach().log_softmax(-1) for logits in (predictor_logits, reverse_logits)]
    predictor_entropy, reverse_entropy = (-(x.exp() * x).sum(-1) for x in logprobs)  # (B, N), (B, N_i, N_j)
    graph = reverse_entropy < c * predictor_entropy.unsqueeze(-1)
    graph.diagonal(dim1=-2, dim2=-1).fill_(True)
    means = {"predictor_entropy": predictor_entropy.mean(), "reverse_entropy": reverse_entropy.mean()}
    return graph, means | {"entropy_ratio": means["reverse_entropy"] / means["predictor_entropy"]}


def change_edges(graph, drop, add):
    """Remove each edge with probability drop and add each missing one with probability add, but for the diagonal."""
    noise = torch.rand(graph.shape).to(graph.device)
    graph = torch.where(graph, noise >= drop, noise < add)
    graph.diagonal(dim1=-2, dim2=-1).fill_(True)
    return graph


def graph_statistics(graph, simulator):
    """Edges per agent besides itself, precision and recall against the simulator's edges; graphs (B, N, N)."""
    others = ~torch.eye(graph.shape[-1], dtype=torch.bool, device=graph.device)
    correct, edges, true_edges = ((x & others).sum() for x in (graph & simulator, graph, simulator))
    precision, recall = correct / edges.clamp(min=1), correct / true_edges.clamp(min=1)
    agents = graph[..., 0].numel()
    statistics = {"density": edges / agents, "simulator_density": true_edges / agents}
    return statistics | {"simulator_precision": precision, "simulator_recall": recall}


def update_graph_models(logits, actions, optimizer):
    """One step on the cross-entropy of each prediction of a^i; logits as GraphModels returns them, actions (B, N)."""
    targets = actions, actions, actions.unsqueeze(-1).expand(logits[2].shape[:-1])  # every j of a pair (i, j) tells a^i
    names, losses, metrics = ("single_reverse_model", "action_predictor", "reverse_model"), [], {}
    for name, logit, target in zip(names, logits, targets):
        losses.append(nn.functional.cross_entropy(logit.flatten(0, -2), target.flatten()))
        metrics[f"{name}_loss"] = losses[-1].detach()
        metrics[f"{name}_accuracy"] = (logit.argmax(-1) == target).float().mean()
    # one sum, one Adam: no two of the losses share a weight and Adam treats every weight by itself
    gradient_step(optimizer, sum(losses), " + ".join(f"{name}_loss" for name in names))
    return metrics


# ADVANTAGES
def gae(rewards, values, terminated, alive, gamma, gae_lambda):
    """Every agent's own generalized advantage estimate (Schulman et al. 2016) over whole, padded episodes.

    rewards (T, E, N), values (T+1, E, N), terminated and alive (T, E) -> (T, E, N), 0 in the padding. An episode that
    ends without `terminated` bootstraps from the value after its last step.
    """
    alive, terminated = alive.bool().unsqueeze(-1), terminated.bool().unsqueeze(-1)  # (T, E, 1)
    next_values = values[1:].masked_fill(terminated, 0.0)
    deltas = (rewards + gamma * next_values - values[:-1]).masked_fill(~alive, 0.0)
    discounts = gamma * gae_lambda * (alive & ~terminated).to(deltas.dtype)
    advantages = torch.zeros_like(deltas)
    last = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        last = torch.addcmul(deltas[t], discounts[t], last, out=advantages[t])
    return advantages


def meeting_times(graph, alive):
    """First time m >= t at which something that i did at t can have reached j, along edges of t, t+1, ..., m.

    graph (T, E, N, N) bool, alive (T, E) -> (T, E, N_i, N_j) float, inf if the episode ends before. An edge i -> j at t
    gives m_t[i, j] = t; otherwise m_t[i, j] = min over k with an edge i -> k of m_t+1[k, j]: one backward sweep.
    """
    T, E, N, _ = graph.shape
    eye = torch.eye(N, dtype=torch.bool, device=graph.device)
    edges = (graph.bool() | eye) & alive.bool()[..., None, None]
    # adding inf where there is no edge i -> k leaves the minimum to the k that i influences
    penalty = torch.zeros(edges.shape, device=graph.device).masked_fill(~edges, torch.inf).unsqueeze(-1)
    times = torch.empty(edges.shape, device=graph.device)
    following = torch.full((E, N, N), torch.inf, device=graph.device)  # m_t+1[k, j]
    for t in reversed(range(T)):
        following.diagonal(dim1=-2, dim2=-1).fill_(t)  # via k = j: an edge i -> j now
        following = (penalty[t] + following.unsqueeze(-3)).amin(-2)
        times[t] = following
    return times


def multi_agent_gae(rewards, values, terminated, alive, graph, gamma, gae_lambda, soft=True):
    """Advantage of agent i: the TD errors of every agent j, counted from the first meeting time of i and j.

        hard: A^i_t = sum_j (gamma lambda)^(m - t) GAE^j_m with m = m_t[i, j], 0 if they never meet
        soft: (1 - lambda) sum_j GAE^j_t + lambda * hard

    which equals the paper's double sum over path weights, in O(T). Shapes as in gae and meeting_times -> (T, E, N).
    """
    alive = alive.bool()
    own = gae(rewards, values, terminated, alive, gamma, gae_lambda)  # (T, E, N)
    met = meeting_times(graph, alive)  # (T, E, N_i, N_j)
    never = met.isinf()
    delay = met - torch.arange(len(met), device=met.device).view(-1, 1, 1, 1)
    at_meeting = own.unsqueeze(2).expand(met.shape).gather(0, met.masked_fill(never, 0).long())  # GAE^j_m
    hard = ((gamma * gae_lambda) ** delay * at_meeting).masked_fill(never, 0.0).sum(-1)
    return (1 - gae_lambda) * own.sum(-1, keepdim=True) + gae_lambda * hard if soft else hard


def pairwise_targets(rewards, pair_values, terminated, alive, graph, gamma, gae_lambda):
    """What j earns from the first meeting time of i and j on, as a lambda-return: the target of W[i, j] (PairCritic).

        C_t[i, j] = R^j_t, agent j's own lambda-return, if i influences j at t (always if i = j); otherwise
        C_t[i, j] = gamma ((1 - lambda) W[k, j](s_t+1) + lambda C_t+1[k, j])

    where k is the agent that i influences at t which meets j first (ties: i itself, then the lowest index). lambda = 1:
    sum_{t' >= m} gamma^(t' - t) r^j_t' with m = m_t[i, j]. Shapes as in gae and meeting_times; pair_values
    (T+1, E, N, N) -> (T, E, N_i, N_j), 0 in the padding. An episode that ends without `terminated` bootstraps from the
    value after its last step.
    """
    alive, terminated = alive.bool(), terminated.bool()
    T, E, N = rewards.shape
    eye = torch.eye(N, dtype=torch.bool, device=graph.device)
    graph = graph.bool() | eye
    own_values = pair_values.diagonal(dim1=-2, dim2=-1)  # (T+1, E, N), W[j, j]
    own = gae(rewards, own_values, terminated, alive, gamma, gae_lambda) + own_values[:-1]  # (T, E, N), R^j

    met = meeting_times(graph, alive)
    met_next = torch.cat([met[1:], torch.full_like(met[:1], T)]).clamp(max=T)  # m_t+1[k, j], T for never
    # one minimum finds the time and the agent: order 0 is i itself, order k + 1 is k
    order = torch.arange(1.0, N + 1, device=graph.device).masked_fill(eye, 0.0)  # (N_i, N_k)
    order = order.masked_fill(~graph, torch.inf)  # (T, E, N_i, N_k)
    first = ((N + 1) * met_next.unsqueeze(-3) + order.unsqueeze(-1)).amin(-2) % (N + 1)  # (T, E, N_i, N_j)
    via = torch.where(first == 0, torch.arange(1.0, N + 1, device=graph.device).unsqueeze(-1), first).long() - 1  # k

    last_step = torch.cat([~alive[1:], torch.ones_like(alive[:1])])[..., None, None]
    later = (alive & ~terminated)[..., None, None] & ~graph  # where the second line holds and is not 0
    bootstrapped = gamma * torch.where(last_step, 1.0, 1 - gae_lambda) * pair_values[1:].gather(-2, via)
    direct = own.unsqueeze(-2).masked_fill(~(graph & alive[..., None, None]), 0.0)
    targets = torch.where(later, bootstrapped, direct)
    factor = gamma * gae_lambda * (later & ~last_step)
    following = torch.zeros_like(targets[0])  # C_t+1
    for t in reversed(range(T)):
        following = targets[t].addcmul_(factor[t], following.gather(-2, via[t]))
    return targets


def predictable_gae(rewards, values, terminated, alive, graph, gamma, gae_lambda, pre_meeting_lambda):
    """Advantage of agent i: every agent's first TD error, and the later ones of those whom i has reached before.

    A^i_t = sum_j A_t[i, j]; lambda' = pre_meeting_lambda, k the agent that i influences at t which meets j first:

        A_t[i, j] = GAE^j_t                                  if i influences j at t (always if i = j); otherwise
        A_t[i, j] = delta^j_t + gamma lambda' A_t+1[k, j]    (0 past the end of an episode)

    Whether delta^j_t counts is known before the actions of t: with the true values of the state all of it but the first
    TD error has expectation 0, whatever the graph. In closed form, GAE'^j being that of lambda' and m = m_t[i, j]:
    A_t[i, j] = GAE'^j_t + (gamma lambda')^(m - t) (GAE^j_m - GAE'^j_m). Shapes as in multi_agent_gae -> (T, E, N).
    """
    own = gae(rewards, values, terminated, alive, gamma, gae_lambda)  # (T, E, N)
    before = gae(rewards, values, terminated, alive, gamma, pre_meeting_lambda)
    met = meeting_times(graph, alive)  # (T, E, N_i, N_j)
    never = met.isinf()
    delay = met - torch.arange(len(met), device=met.device).view(-1, 1, 1, 1)
    gain = (own - before).unsqueeze(2).expand(met.shape).gather(0, met.masked_fill(never, 0).long())
    gain = ((gamma * pre_meeting_lambda) ** delay * gain).masked_fill(never, 0.0)
    return before.sum(-1, keepdim=True) + gain.sum(-1)


def credit(rewards, values, terminated, alive, graph, args):
    """Every agent's advantage (T, E, N), and the critic's targets, shaped as its values.

    pairwise:    A^i = sum_j (C[i, j] - W[i, j]), values (T+1, E, N, N) of PairCritic
    blind:       A^i = GAE^i + sum_{j != i} (gamma lambda)^(m - t) GAEblind^j_m, values (T+1, E, N, 2) of TwoCritics
    predictable: predictable_gae, values (T+1, E, N) of Critic
    published:   multi_agent_gae, likewise
    """
    discounts = args.gamma, args.gae_lambda
    if args.advantage == "pairwise":
        targets = pairwise_targets(rewards, values, terminated, alive, graph, *discounts)
        return (targets - values[:-1]).sum(-1), targets
    if args.advantage == "blind":
        seeing, blind = (gae(rewards, x, terminated, alive, *discounts) for x in values.unbind(-1))  # (T, E, N)
        reached = multi_agent_gae(rewards, values[..., 1], terminated, alive, graph, *discounts, soft=False)
        # i meets itself at once, so that this exchanges GAEblind^i for GAE^i
        return reached - blind + seeing, torch.stack([seeing, blind], -1) + values[:-1]
    targets = gae(rewards, values, terminated, alive, *discounts) + values[:-1]  # they ignore the graph
    if args.advantage == "predictable":
        data = rewards, values, terminated, alive, graph
        return predictable_gae(*data, *discounts, args.pre_meeting_lambda), targets
    return multi_agent_gae(rewards, values, terminated, alive, graph, *discounts, args.soft), targets


# ROLLOUT
@torch.no_grad()
def collect(envs, actor, device, greedy=False, edges=None):
    """Play one whole episode in every environment; T is the longest one's length; `alive` masks what follows an end.

    Returns obs (T+1, E, N, D) with the observation after the last step, actions, logprobs, rewards (T, E, N),
    terminated (T, E) bool: ended in a terminal state, alive (T, E) bool: the step took place; and, if edges(env, joint
    action) is given, the graph (T, E, N, N) bool of the pairs that it returns before each step, ones on the diagonal.
    """
    T, E, N = envs[0]._max_episode_steps, len(envs), envs[0].n_agents
    obs = np.zeros((T + 1, E, N, *envs[0].observation_space[0].shape), dtype=np.float32)
    actions, logprobs = torch.zeros((T, E, N), dtype=torch.long), torch.zeros((T, E, N))
    rewards = np.zeros((T, E, N), dtype=np.float32)
    terminated, truncated, alive = (np.zeros((T, E), dtype=bool) for _ in range(3))
    graph = np.tile(np.eye(N, dtype=bool), (T, E, 1, 1))
    obs[0] = [env.reset()[0] for env in envs]
    running, t = range(E), 0
    while running:
        policy = actor(torch.from_numpy(obs[t]).to(device)).log_softmax(-1).cpu()  # (E, N, A)
        # Gumbel-max: the argmax of log-probabilities plus Gumbel noise is a sample, at a third of Categorical's cost
        actions[t] = (policy - (0.0 if greedy else torch.empty_like(policy).exponential_().log())).argmax(-1)
        logprobs[t] = policy.gather(-1, actions[t].unsqueeze(-1)).squeeze(-1)
        joint_actions = actions[t].tolist()
        for e in running:
            for i, j in edges(envs[e], joint_actions[e]) if edges else ():
                graph[t, e, i, j] = True
            obs[t + 1, e], rewards[t, e], terminated[t, e], truncated[t, e], _ = envs[e].step(joint_actions[e])
            alive[t, e] = True
        running = [e for e in running if not (terminated[t, e] or truncated[t, e])]
        t += 1
    results = obs[: t + 1], actions[:t], logprobs[:t], rewards[:t], terminated[:t], alive[:t], graph[:t]
    return [torch.as_tensor(x).to(device) for x in results[: 7 if edges else 6]]


# PPO UPDATE
def gradient_step(optimizer, loss, name, max_grad_norm=torch.inf):
    """One step of the optimizer; UserError if the loss or its gradient is not finite."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    if not (loss.isfinite() and norm.isfinite()):
        raise UserError(f"{name} is {loss.item()} and the norm of its gradient {norm.item()}")
    optimizer.step()


def ppo_update(actor, critic, actor_optimizer, critic_optimizer, obs, actions, logprobs, advantages, returns, args):
    """update_epochs times a critic step, then a policy step, each on the whole batch (Schulman et al. 2017).

    obs (B, N, D), the others (B, N) -> means over the epochs. UserError if a loss is not finite.
    """
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8) if args.norm_adv else advantages
    history = []
    for _ in range(args.update_epochs):
        value_loss = 0.5 * ((critic(obs) - returns) ** 2).mean()
        gradient_step(critic_optimizer, value_loss, "value_loss", args.max_grad_norm)

        policy = actor(obs).log_softmax(-1)  # (B, N, A)
        entropy = -(policy.exp() * policy).sum(-1).mean()
        logratio = policy.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - logprobs  # (B, N)
        ratio = logratio.exp()
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        policy_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
        gradient_step(actor_optimizer, policy_loss - args.ent_coef * entropy, "policy_loss", args.max_grad_norm)

        approx_kl = (ratio - 1 - logratio).mean()
        clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
        history.append(torch.stack([value_loss, policy_loss, entropy, approx_kl, clipfrac, ratio.mean()]).detach())
    names = ("value_loss", "policy_loss", "entropy", "approx_kl", "clipfrac")
    return dict(zip(names, torch.stack(history).mean(0))) | {"first_ratio": history[0][-1]}  # must be 1


# EVALUATION
def evaluate(actor, args, index, device):
    """Play eval_episodes episodes on fresh environments -> per-agent returns (episodes, N).

    The boards depend on args.seed and the index of the evaluation alone: every script plays the same ones.
    """
    seeds = np.random.SeedSequence([args.seed, index]).generate_state(args.eval_episodes)
    envs = [make_env(args.env_id, args.winner_take_all, seed) for seed in seeds]
    with torch.random.fork_rng(devices=[]):  # training goes on as if there had been no evaluation
        torch.manual_seed(int(seeds[0]))
        return collect(envs, actor, device, args.eval_greedy)[3].sum(0).cpu()


# CHECKPOINTS
def write_atomically(path, data):
    """Write bytes to a temporary file and rename it: whenever the process is killed, path is whole, old or new."""
    with open(path + ".tmp", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def parse_args(script):
    """The checked command line and, under --resume, the checkpoint, which provides the settings that are not given."""
    args, checkpoint = tyro.cli(Args), None
    if args.resume:
        try:
            checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
            writer, saved = checkpoint["script"], dict(checkpoint["args"])
        except Exception as error:
            raise UserError(f"--resume: {args.resume} is not a whole checkpoint ({type(error).__name__})") from error
        if writer != script or saved.keys() != vars(args).keys():
            raise UserError(f"--resume: {args.resume} was written by {writer}.py or by another version of it")
        args = tyro.cli(Args, default=Args(**saved))
        free = "resume save_model checkpoint_interval num_workers track wandb_project_name wandb_entity"
        for name in saved.keys() - free.split():
            if getattr(args, name) != saved[name] and (name != "total_timesteps" or args.total_timesteps < saved[name]):
                raise UserError(f"--resume: {name} is {getattr(args, name)} here, {saved[name]} in the checkpoint")
    check_args(args)
    return args, checkpoint


def main():
    # SET-UP
    script = os.path.basename(__file__)[: -len(".py")]
    args, checkpoint = parse_args(script)
    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
    run_dir = os.path.dirname(os.path.abspath(args.resume)) if checkpoint else os.path.join("runs", run_name)
    if args.track:
        import wandb  # optional: pip install wandb

        target = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": os.path.basename(run_dir)}
        wandb.init(**target, sync_tensorboard=True, config=vars(args), save_code=True)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.cuda and device.type == "cpu":
        print(f"{script}: CUDA is not available, the CPU is used", file=sys.stderr)
    stop_signals = []  # looked at between two iterations
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: stop_signals.append(signum))
    torch.set_num_threads(args.num_threads)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.manual_seed(args.seed)  # PyTorch's CPU generator is the only random stream besides the environments' own
    seeds = np.random.SeedSequence(args.seed).generate_state(args.num_envs)
    envs = [make_env(args.env_id, args.winner_take_all, seed) for seed in seeds]
    N, D, A = envs[0].n_agents, envs[0].observation_space[0].shape[0], int(envs[0].action_space[0].n)
    actor = AgentNetwork(D, N, args.hidden_dim, A).to(device)
    own_dim = D - (N - 1) * (3 if envs[0]._observe_agent_levels else 2)
    critics = {
        "pairwise": lambda: PairCritic(N * D, N, args.hidden_dim, N),
        "blind": lambda: TwoCritics(D, own_dim, N, args.hidden_dim),
    }
    critic = critics.get(args.advantage, lambda: Critic(N * D, N, args.hidden_dim, 1))().to(device)
    models = GraphModels(D, A).to(device)
    adam = {"lr": args.learning_rate, "eps": 1e-5, "fused": True}
    actor_optimizer = torch.optim.Adam(actor.parameters(), **adam)
    critic_optimizer = torch.optim.Adam(critic.parameters(), **adam)
    models_optimizer = torch.optim.Adam(models.parameters(), **adam)
    trained = {"actor": actor, "critic": critic, "models": models, "models_optimizer": models_optimizer}
    trained |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    global_step, iteration, evaluations, saved_step = 0, 0, [], -1
    if checkpoint:
        global_step, iteration, evaluations = (checkpoint[key] for key in ("global_step", "iteration", "evaluations"))
        for name, part in trained.items():
            part.load_state_dict(checkpoint[name])
        for env, (random_state, positions) in zip(envs, checkpoint["envs"]):
            env.np_random.bit_generator.state = random_state
            for player, position in zip(env.players, positions):
                player.position = position  # lbforaging's reset avoids the cells where the players stood
        torch.set_rng_state(checkpoint["torch_rng"])
    try:
        os.makedirs(run_dir, exist_ok=bool(checkpoint))
    except FileExistsError as error:
        raise UserError(f"the run folder {run_dir} exists and is never overwritten") from error
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if checkpoint else None)
    settings = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + settings)
    print(f"{run_dir}: {N} agents, {D} observations, {A} actions, {args.num_envs} episodes per iteration, {device}")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" frames", unit_scale=True, mininterval=1.0)
    start_time, start_step = time.time(), global_step

    while True:
        # EVALUATE (first the untrained policy)
        finished = global_step >= args.total_timesteps
        every, last = args.eval_interval, evaluations[-1]["global_step"] if evaluations else -1
        if not stop_signals and (global_step // every > last // every or finished and global_step > last):
            returns = evaluate(actor, args, global_step // every, device)  # (episodes, N)
            team, agents = returns.sum(-1), returns.mean(0).tolist()
            row = {"episodic_return": team.mean().item(), "episodic_return_std": team.std(correction=0).item()}
            row |= {"episodes": len(team)} | {f"episodic_return_agent_{i}": mean for i, mean in enumerate(agents)}
            for name, value in row.items():
                writer.add_scalar(f"eval/{name}", value, global_step)
            evaluations.append({"global_step": global_step} | row)
            text = "".join(",".join(map(str, line)) + "\n" for line in [evaluations[0], *map(dict.values, evaluations)])
            write_atomically(os.path.join(run_dir, "evaluations.csv"), text.encode())

        # SAVE
        every = args.checkpoint_interval
        due = every and (finished or global_step // every > saved_step // every)
        if due or stop_signals or finished and args.save_model:
            state = {name: part.state_dict() for name, part in trained.items()}
            state |= {"script": script, "args": vars(args), "evaluations": evaluations, "iteration": iteration}
            state |= {"global_step": global_step, "torch_rng": torch.get_rng_state()}
            state["envs"] = [(e.np_random.bit_generator.state, [p.position for p in e.players]) for e in envs]
            torch.save(state, buffer := io.BytesIO())
            write_atomically(os.path.join(run_dir, "checkpoint.pt"), buffer.getvalue())
            saved_step = global_step
        if finished or stop_signals:
            break

        # COLLECT
        iteration += 1
        edges = partial(counterfactual_edges, shared_food=args.shared_food)
        *experience, simulator = collect(envs, actor, device, edges=edges)  # (T, E, N, ...), (T, E, N_i, N_j)
        obs, actions, logprobs, rewards, terminated, alive = experience
        global_step += int(alive.sum())

        # DEPENDENCE GRAPH, by models trained up to the iteration before
        probability = {"random": args.graph_p, "complete": 1.0}.get(args.graph, 0.0)
        # the simulator's is for the charts, unless --graph asks for it
        # random, complete, identity: no edge but one's own, then others added with the probability
        graph = simulator if args.graph == "simulator" else change_edges(torch.zeros_like(simulator), 0.0, probability)
        entropies = {}
        if args.graph == "reverse":
            logits = models(obs, alive)  # the models' update below needs the same forward pass
            _, predictor_logits, reverse_logits = logits
            graph[alive], entropies = learned_graph(predictor_logits, reverse_logits, args.c)

        # ADVANTAGES
        with torch.no_grad():
            values = critic(obs)  # (T+1, E, N), pairwise (T+1, E, N_i, N_j), blind (T+1, E, N, 2)
        advantages, returns = credit(rewards, values, terminated, alive, graph, args)  # (T, E, N), as values

        # UPDATE POLICY AND CRITIC, THEN THE GRAPH MODELS
        batch = [x[alive] for x in (obs[:-1], actions, logprobs, advantages, returns)]  # (B, N, ...)
        try:
            losses = ppo_update(actor, critic, actor_optimizer, critic_optimizer, *batch, args)
            if args.graph == "reverse":
                losses |= update_graph_models(logits, actions[alive], models_optimizer)
        except UserError as error:
            bar.close()
            last = f"the last checkpoint is of frame {saved_step}" if saved_step >= 0 else "there is no checkpoint"
            raise UserError(f"iteration {iteration}: {error}; {last}") from error

        # LOG
        losses["explained_variance"] = 1 - (returns - values[:-1])[alive].var() / returns[alive].var()
        episodes = rewards.sum(0).mean(0)  # (N), mean return of each agent
        charts = {"episodic_return": episodes.sum(), "episodic_length": alive.sum(0).float().mean()}
        charts |= {f"episodic_return_agent_{i}": value for i, value in enumerate(episodes)}
        charts |= {"learning_rate": args.learning_rate, "SPS": (global_step - start_step) / (time.time() - start_time)}
        statistics = graph_statistics(graph[alive], simulator[alive]) | entropies
        for group, metrics in (("charts", charts), ("losses", losses), ("graph", statistics)):
            for name, value in metrics.items():
                writer.add_scalar(f"{group}/{name}", float(value), global_step)
        shown = {"eval": f"{evaluations[-1]['episodic_return']:.3f}", "edges": f"{statistics['density']:.2f}"}
        bar.set_postfix(shown, refresh=False)
        bar.update(global_step - bar.n)

    bar.close()
    writer.close()
    sys.exit(128 + stop_signals[0] if stop_signals else 0)


if __name__ == "__main__":
    try:
        main()
    except (UserError, ImportError) as error:
        print(f"{os.path.basename(__file__)}: {error}", file=sys.stderr)
        sys.exit(2)
