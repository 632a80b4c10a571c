# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4,<=2.13.0", "numpy", "gymnasium>=1.0", "tyro", "tensorboard", "lbforaging>=2.0.0", "tqdm"]
# ///
"""MAPPO with counterfactual dependence graphs (beyond arXiv 2601.21523) on Level-Based Foraging.

Every agent learns from the rewards that it earns and from its effects on those of the others: what agent j earns in
a step, less what it would have earned had agent i done nothing. Own reward and effects add up to G(a) - G(a with i
doing nothing), G being the team's reward of the step: the difference reward of Wolpert and Tumer (2001). Effects are
known from the simulator or learned by a forward model. An iteration:

    1. collect one whole episode in every environment
    2. effects, and the dependence graph for the other advantages: who influences whom at each step
    3. advantages: GAE of every agent's own rewards and effects (--advantage difference)
    4. update the policy and the critic (PPO), then the graph models
    5. log, evaluate and save, if they are due

    python mappo_cdg_lbf.py
    python mappo_cdg_lbf.py --env-id Foraging-15x15-3p-4f-v3 --no-winner-take-all --seed 2

Axes are (T, E, N, ...): time step, environment, agent. A pair is (..., i, j): i is the influencer, j the influenced.
B: the steps that took place, of all episodes, flattened; D: observation size, A: number of actions, Z: latent size.
An episode is alive (T, E) while its steps take place; what follows, up to the end of the longest one, is padding.
A frame is a step of one environment.
"""

import contextlib
import csv
import difflib
import io
import itertools
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from lbforaging.foraging.environment import Action, ForagingEnv
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

if os.name == "posix":
    import fcntl

SCRIPT = os.path.basename(__file__)[: -len(".py")]


@dataclass
class Args:
    exp_name: str = SCRIPT
    """the name of this experiment, part of the run folder's name"""
    seed: int = 1
    """seed of the networks, the environments and every random draw"""
    torch_deterministic: bool = True
    """use deterministic algorithms on a GPU (a CPU is deterministic anyway)"""
    cuda: bool = False
    """use a GPU (networks this small are faster on a core)"""
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
    """frames between two checkpoints (0: only with --save-model or when interrupted)"""
    resume: str | None = None
    """run folder or checkpoint.pt to continue exactly, in place; --total-timesteps may be larger"""

    env_id: str = "Foraging-8x8-2p-4f-coop-v3"
    """any vector-observation id of lbforaging"""
    winner_take_all: bool = True
    """a food's whole reward goes to its strongest loader, and no food needs more than two agents"""
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
    adam_eps: float = 1e-5
    """epsilon of every Adam (the authors have PyTorch's 1e-8)"""
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

    advantage: Literal["difference", "pairwise", "published"] = "difference"
    """difference: own rewards and effects, pairwise: values of pairs from the meeting on, published: the paper's"""
    negative_effects: bool = True
    """--advantage difference: blame for what i's action takes from others, too; --no-...: credit for help alone"""
    c: float = 0.9
    """--graph reverse: entropy-ratio threshold of an edge, 0: no edges, 1: most"""
    graph: Literal["simulator", "learned", "reverse", "random", "complete", "identity"] = "simulator"
    """learned: a forward model, reverse: the paper's entropy ratio, complete: global, identity: local rewards"""
    graph_p: float = 0.5
    """probability of an edge under --graph random"""
    shared_food: bool = False
    """graph of pairwise, published: who decides whether a food disappears influences everybody"""
    edge_threshold: float = 0.3
    """graph learned for pairwise, published: difference that another action of i must make to j"""
    replay_size: int = 100_000
    """--graph learned: latest steps from which the forward model learns"""
    forward_learning_rate: float = 3e-3
    """--graph learned: learning rate of the forward model"""
    soft: bool = True
    """--advantage published: count the share 1 - gae_lambda of all TD errors at once; --no-soft: none"""
    encoder: bool = True
    """--graph reverse: on encoded observations; --no-encoder: on raw ones"""
    bf16: bool = False
    """--graph reverse: run its models in bfloat16 (faster with AVX512-BF16, a little less exact)"""


class UserError(Exception):
    """Ends the script with its one sentence on stderr and exit status 2."""


def check_range(name, value, low, high=math.inf):
    """Raise UserError unless low <= value <= high; nan always fails."""
    if isinstance(value, int):
        high = min(high, 2**64 - 1)  # what no machine takes
    if not low <= value <= high:
        raise UserError(f"{name} must lie in [{low}, {high}], not {value}")


def check_args(args):
    """Raise UserError for the first setting that makes no sense."""
    check_range("seed", args.seed, 0, 2**64 - 1)
    check_range("num_threads", args.num_threads, 1)
    check_range("checkpoint_interval", args.checkpoint_interval, 0)
    check_range("total_timesteps", args.total_timesteps, 1)
    check_range("num_envs", args.num_envs, 1)
    check_range("eval_interval", args.eval_interval, 1)
    check_range("eval_episodes", args.eval_episodes, 1)
    check_range("hidden_dim", args.hidden_dim, 1)
    check_range("learning_rate", args.learning_rate, 0)
    check_range("adam_eps", args.adam_eps, 0)
    check_range("gamma", args.gamma, 0, 1)
    check_range("gae_lambda", args.gae_lambda, 0, 1)
    check_range("update_epochs", args.update_epochs, 1)
    check_range("clip_coef", args.clip_coef, 0)
    check_range("ent_coef", args.ent_coef, 0)
    check_range("max_grad_norm", args.max_grad_norm, 0)
    frames = args.num_envs * make_env(args.env_id)._max_episode_steps
    if args.total_timesteps < frames:
        raise UserError(f"total_timesteps is {args.total_timesteps}, below one iteration ({frames} frames)")


def check_graph_args(args):
    """Raise UserError for the first setting of the dependence graph that makes no sense."""
    check_range("c", args.c, 0, 1)
    check_range("graph_p", args.graph_p, 0, 1)
    check_range("edge_threshold", args.edge_threshold, 0, 1)
    check_range("replay_size", args.replay_size, 1)
    check_range("forward_learning_rate", args.forward_learning_rate, 0)
    if args.graph == "learned":
        check_observations(make_env(args.env_id))
    counterfactual = args.graph in ("simulator", "learned")
    has_effect = {
        "negative_effects": args.advantage == "difference",
        "c": args.graph == "reverse",
        "graph_p": args.graph == "random",
        "shared_food": counterfactual and args.advantage != "difference",
        "edge_threshold": args.graph == "learned" and args.advantage != "difference",
        "replay_size": args.graph == "learned",
        "forward_learning_rate": args.graph == "learned",
        "soft": args.advantage == "published",
        "encoder": args.graph == "reverse",
        "bf16": args.graph == "reverse",
    }
    for name, relevant in has_effect.items():
        if getattr(args, name) != getattr(Args, name) and not relevant:
            # a sweep over it would be one run, many times
            raise UserError(f"{name} has no effect with --graph {args.graph} --advantage {args.advantage}")


# ENVIRONMENT
class FastForaging(ForagingEnv):
    """lbforaging's environment, bit for bit, four to five times as fast. Skip it on first reading.

    Most of the package's time goes into looking up what every agent sees and may do. Food seldom changes: until it
    does, each cell that an agent visits is looked up once.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.board = None  # the field as bytes, when it was last looked at
        self.foods = {}  # cell -> level
        self.views = {}  # cell -> (actions that it offers, food as it is observed from there)
        self._valid_actions = {}

    def _gen_valid_moves(self):
        board = self.field.tobytes()
        if board != self.board:
            self.board = board
            self.views = {}
            rows, cols = self.field.nonzero()
            levels = self.field[rows, cols]
            self.foods = dict(zip(zip(rows.tolist(), cols.tolist()), levels.tolist()))
        for player in self.players:
            cell = (int(player.position[0]), int(player.position[1]))
            player.position = cell
            player.history.append(cell)  # empty in the package, cleared by reset
            if cell not in self.views:
                self.views[cell] = (self._actions_from(*cell), self._food_seen_from(*cell))
            self._valid_actions[player] = self.views[cell][0]

    def _actions_from(self, row, col):
        rows, cols = self.field_size
        # in the order of the actions: north, south, west, east
        beside = [(row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)]
        actions = [Action.NONE]
        for action, (r, c) in zip(self.action_set, beside):
            if 0 <= r < rows and 0 <= c < cols and (r, c) not in self.foods:
                actions.append(action)
        if any(cell in self.foods for cell in beside):
            actions.append(Action.LOAD)
        return actions

    def _food_seen_from(self, row, col):
        sight = self.sight
        # observed coordinates are relative to this corner
        top = max(row - sight, 0)
        left = max(col - sight, 0)
        features = []
        for (r, c), level in self.foods.items():
            if top <= r <= row + sight and left <= c <= col + sight:
                features += [r - top, c - left, level]
        unseen = self.max_num_food - len(features) // 3
        return features + [-1, -1, 0] * unseen

    def _make_gym_obs(self):
        reach = 2 * self.sight  # how far from that corner players are seen
        width = 3 if self._observe_agent_levels else 2
        players = [(*player.position, int(player.level)) for player in self.players]
        obs = []
        for i, (row, col, _) in enumerate(players):
            top = max(row - self.sight, 0)
            left = max(col - self.sight, 0)
            features = self.views[row, col][1].copy()
            for r, c, level in (players[i], *players[:i], *players[i + 1 :]):  # oneself first
                # the package's test: near the first row and column, players are seen farther away than food
                if 0 <= r - top <= reach and 0 <= c - left <= reach:
                    features += (r - top, c - left, level)[:width]
            missing = 3 * self.max_num_food + width * len(players) - len(features)
            obs.append(features + [-1, -1, 0][:width] * (missing // width))
        return tuple(np.array(obs, dtype=np.float32))


class LevelBasedForaging(FastForaging):
    """Level-Based Foraging with the paper's winner-take-all variant.

    Winner-take-all: a food's whole reward goes to its loader with the highest level (ties: the lowest
    index). Food levels are capped at (in -coop tasks: equal to) the sum of the two lowest player levels;
    the package uses the three lowest.
    """

    def __init__(self, winner_take_all=False, **kwargs):
        super().__init__(**kwargs)
        self.winner_take_all = winner_take_all

    def spawn_food(self, max_num_food, min_levels, max_levels):
        if self.winner_take_all:
            levels = sorted(player.level for player in self.players)
            max_levels = np.full_like(max_levels, levels[0] + levels[1])
        super().spawn_food(max_num_food, min_levels, max_levels)

    def step(self, actions):
        foods_before = self.foods
        obs, rewards, terminated, truncated, info = super().step(actions)
        if self.winner_take_all and any(rewards):
            for cell in foods_before.keys() - self.foods.keys():
                # no cell touches two foods, so a rewarded neighbour has loaded this one
                loaders = [player for player in self.adjacent_players(*cell) if player.reward > 0]
                whole = sum(player.reward for player in loaders)
                winner = max(loaders, key=lambda player: player.level)
                for player in loaders:
                    player.reward = whole if player is winner else 0
            rewards = [player.reward for player in self.players]
        return obs, rewards, terminated, truncated, info

    def get_state(self):
        """What the following episodes depend on, for a checkpoint."""
        # the package's reset avoids the cells where the players stood
        return self.np_random.bit_generator.state, [player.position for player in self.players]

    def set_state(self, state):
        """Back to a state that get_state() has returned."""
        random_state, positions = state
        self.np_random.bit_generator.state = random_state
        for player, position in zip(self.players, positions):
            player.position = position


ACTIONS = tuple(Action)  # looking one up here is much faster than Action(1)
LOAD = Action.LOAD.value
# rows and columns that an action asks for: none, north, south, west, east, load
MOVES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))


class CounterfactualForaging(LevelBasedForaging):
    """Level-Based Foraging that keeps, for every step of an episode, who influenced whom, and by how much.

    i influences j iff another available action of i, the others doing what they do, would change (a) the
    cell in which j ends or j's reward, or (b, if shared_food) which foods disappear: food is part of
    everybody's state, so i then influences every j. The edges of i do not depend on the action that i takes.
    """

    shared_food = False

    def reset(self, seed=None, options=None):
        self.edges = []  # of each step: the pairs (i, j), i != j
        self.effects = []  # of each step: {(i, j): how much more j is rewarded than if i had done nothing}
        return super().reset(seed=seed, options=options)

    def step(self, actions):
        self.edges.append(self.counterfactual_edges(actions))
        self.effects.append(self.reward_effects(actions))
        return super().step(actions)

    def counterfactual_edges(self, actions):
        """The pairs (i, j), i != j, in which i influences j in the step that comes next, with this joint action."""
        actions = self.possible_actions(actions)
        return self.collision_edges(actions) + self.load_edges(actions)

    def possible_actions(self, actions):
        """The joint action with NONE for what is not available, as the package does."""
        possible = []
        for player, action in zip(self.players, actions):
            possible.append(action if ACTIONS[action] in self._valid_actions[player] else 0)
        return possible

    def collision_edges(self, actions):
        """The pairs in which it is up to i whether j gets to the cell that it moves to."""
        cells = [player.position for player in self.players]
        claims = []
        for (row, col), action in zip(cells, actions):
            down, right = MOVES[action]
            claims.append((row + down, col + right))
        edges = []
        for j, claim in enumerate(claims):
            if claim == cells[j]:
                continue  # who stays is not moved by anybody
            rivals = claims.count(claim) - 1  # a cell that two or more claim is entered by none
            for i, (row, col) in enumerate(cells):
                # i beside that cell can go there, too; i in that cell can leave to where j comes from
                near = abs(row - claim[0]) + abs(col - claim[1]) <= 1
                only_rival = rivals == (claims[i] == claim)
                if i != j and near and only_rival:
                    edges.append((i, j))
        return edges

    def load_edges(self, actions):
        """The pairs in which i, by loading or not, changes j's reward or (shared_food) whether a food disappears."""
        edges = []
        if LOAD not in actions and not self.shared_food:
            return edges  # nobody has a reward that another could change
        for i, rewards, rewards_without in self.possible_loads(actions):
            if self.shared_food and rewards_without is None:
                edges += [(i, j) for j in range(self.n_agents) if j != i]
                continue
            for j in rewards:
                without_i = -self.penalty if rewards_without is None else rewards_without.get(j, 0.0)
                if j != i and rewards[j] != without_i:
                    edges.append((i, j))
        return edges

    def reward_effects(self, actions):
        """{(i, j): how much more j is rewarded in the step that comes next than if i did nothing}, i != j."""
        actions = self.possible_actions(actions)
        effects = {}
        if actions.count(LOAD) < 2:
            return effects
        for i, rewards, rewards_without in self.possible_loads(actions):
            if actions[i] == LOAD:
                for j in rewards:
                    without_i = -self.penalty if rewards_without is None else rewards_without.get(j, 0.0)
                    if j != i:
                        effects[i, j] = rewards[j] - without_i
        return effects

    def possible_loads(self, actions):
        """For every agent i that can, by loading, take part in taking a food: (i, rewards with it, rewards without).

        Rewards are {player: reward} of who loads that food, None where it would stay.
        """
        for i, player in enumerate(self.players):
            if Action.LOAD not in self._valid_actions[player]:
                continue
            food = self.adjacent_food_location(*player.position)  # no cell touches two foods
            beside = self.adjacent_players(*food)
            others = []  # who loads this food besides i
            for j, other in enumerate(self.players):
                if j != i and actions[j] == LOAD and other in beside:
                    others.append(j)
            rewards = self.load_rewards(food, sorted([*others, i]))
            if rewards is not None:
                yield i, rewards, self.load_rewards(food, others)

    def load_rewards(self, food, loaders):
        """{player: reward} if these players, in ascending order, can load the food together, else None."""
        needed = self.foods[food]
        levels = {i: self.players[i].level for i in loaders}
        total = sum(levels.values())
        if total < needed:
            return None
        # what the package gives a loader of level 1, times the food's level
        whole = needed / self._food_spawned if self._normalize_reward else needed * total
        if self.winner_take_all:
            winner = max(loaders, key=levels.get)  # ties: the lowest index
            return {i: whole if i == winner else 0.0 for i in loaders}
        return {i: whole * level / total for i, level in levels.items()}


def make_env(env_id, winner_take_all=False, seed=0):
    """A fresh environment whose first reset() draws its board from seed; UserError for an unusable id."""
    known = [name for name in gym.registry if name.startswith("Foraging-")]
    if env_id.startswith("Foraging-grid"):
        raise UserError(f"{env_id} has grid observations, the networks need vectors: drop '-grid' from the id")
    if env_id not in known:
        nearest = ", ".join(difflib.get_close_matches(env_id, known, n=3, cutoff=0))
        raise UserError(f"unknown environment {env_id}; the nearest names are {nearest}")
    env = CounterfactualForaging(winner_take_all=winner_take_all, **gym.spec(env_id).kwargs)
    env.seed(int(seed))
    return env


def simulator_graph(envs):
    """The counterfactual graph of the episodes just played, (T, E, N_i, N_j) bool; envs as collect left them."""
    N = envs[0].n_agents
    T = max(len(env.edges) for env in envs)
    graph = torch.eye(N, dtype=torch.bool).repeat(T, len(envs), 1, 1)
    for e, env in enumerate(envs):
        for t, edges in enumerate(env.edges):
            for i, j in edges:
                graph[t, e, i, j] = True
    return graph


def known_effects(envs):
    """How much more j was rewarded than if i had done nothing, (T, E, N_i, N_j), 0 for i = j.

    envs as collect left them.
    """
    N = envs[0].n_agents
    T = max(len(env.effects) for env in envs)
    effects = torch.zeros((T, len(envs), N, N))
    for e, env in enumerate(envs):
        for t, step_effects in enumerate(env.effects):
            for (i, j), effect in step_effects.items():
                effects[t, e, i, j] = effect
    return effects


def check_observations(env):
    """Raise UserError unless everybody observes all cells and levels: what the forward model reads."""
    if env.sight < max(env.field_size) or not env._observe_agent_levels:
        raise UserError("--graph learned needs a task in which everybody observes all cells and levels")


# NETWORKS
class AgentNetwork(nn.Module):
    """Two hidden layers on [x, one-hot agent id], shared by all: x (..., N, in_dim) -> (..., N, out_dim).

    The first layer is W x + U[agent]: an x common to all agents, (..., 1, in_dim), need not be repeated.
    """

    def __init__(self, in_dim, num_agents, hidden_dim, out_dim):
        super().__init__()
        bound = (in_dim + num_agents) ** -0.5  # of U, as for a linear layer on [x, one-hot agent id]
        self.input = nn.Linear(in_dim, hidden_dim)
        self.agent_id = nn.Parameter(torch.empty(num_agents, hidden_dim).uniform_(-bound, bound))
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, out_dim)

    def forward(self, x):
        x = torch.relu(self.input(x) + self.agent_id)
        x = torch.relu(self.hidden(x))
        return self.output(x)


class Critic(AgentNetwork):
    """Centralised critic: each agent's value from all observations side by side, (..., N, D) -> (..., N)."""

    def forward(self, obs):
        all_obs = obs.flatten(-2).unsqueeze(-2)  # (..., 1, N * D)
        return super().forward(all_obs).squeeze(-1)


class PairCritic(AgentNetwork):
    """W[i, j], a value of j's later return for i, from all observations: (..., N, D) -> (..., N_i, N_j)."""

    def forward(self, obs):
        all_obs = obs.flatten(-2).unsqueeze(-2)  # (..., 1, N * D)
        return super().forward(all_obs)


def make_critic(args, obs_dim, num_agents):
    """The critic that args.advantage needs."""
    if args.advantage == "pairwise":
        return PairCritic(num_agents * obs_dim, num_agents, args.hidden_dim, num_agents)
    return Critic(num_agents * obs_dim, num_agents, args.hidden_dim, 1)


def gradient_step(optimizer, loss, name, max_grad_norm=torch.inf):
    """One step of the optimizer; UserError if the loss or its gradient is not finite."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    if not (loss.isfinite() and norm.isfinite()):
        raise UserError(f"{name} is {loss.item()} and the norm of its gradient {norm.item()}")
    optimizer.step()


# DEPENDENCE GRAPH
def mlp(*sizes):
    """Layers of the given sizes; each hidden one is Linear -> ReLU -> LayerNorm."""
    layers = [nn.Linear(sizes[0], sizes[1])]
    for n_in, n_out in zip(sizes[1:], sizes[2:]):
        layers += [nn.ReLU(), nn.LayerNorm(n_in), nn.Linear(n_in, n_out)]
    return nn.Sequential(*layers)


class ReverseModel(nn.Module):
    """q_psi(a^i | z^j, z'^j, z^i): logits of i's action, told from j's transition; z' is the next step's z.

    It is mlp(3 * Z, 256, 128, 128, A) on every pair of agents, the first layer split to save time.
    """

    def __init__(self, latent_dim, num_actions):
        super().__init__()
        self.input = nn.Linear(3 * latent_dim, 256)  # of [z^j, z'^j, z^i]
        self.head = nn.Sequential(nn.ReLU(), nn.LayerNorm(256), mlp(256, 128, 128, num_actions))

    def forward(self, z, z_next):
        """z and z_next (B, N, Z) -> (B, N_i, N_j, A)."""
        # the widest layer is computed once per agent and added per pair
        latent_dim = z.shape[-1]
        influenced_weight = self.input.weight[:, : 2 * latent_dim]
        influencer_weight = self.input.weight[:, 2 * latent_dim :]
        influenced = torch.cat([z, z_next], -1) @ influenced_weight.T  # (B, N_j, 256)
        influencer = z @ influencer_weight.T + self.input.bias  # (B, N_i, 256)
        # (B, N_i, 1, 256) + (B, 1, N_j, 256)
        return self.head(influencer.unsqueeze(-2) + influenced.unsqueeze(-3))


class GraphLogits(NamedTuple):
    """What the graph models predict of a^i."""

    single_reverse_model: torch.Tensor  # (B, N, A)
    action_predictor: torch.Tensor  # (B, N, A)
    reverse_model: torch.Tensor  # (B, N_i, N_j, A)


class GraphModels(nn.Module):
    """The networks behind the learned graph.

    encoder               z = f(o), so that merely seeing another agent gives no edge
    single_reverse_model  q(a^i | z^i, z'^i): trains the encoder to keep what actions change; no other use
    action_predictor      q_phi(a^i | z^i)
    reverse_model         q_psi(a^i | z^j, z'^j, z^i) for all pairs (i, j), i = j included
    """

    def __init__(self, obs_dim, num_actions, encoder=True, bf16=False, latent_dim=64):
        super().__init__()
        self.bf16 = bf16
        if encoder:
            self.encoder = mlp(obs_dim, 64, 64, latent_dim)
        else:
            self.encoder = nn.Identity()
            latent_dim = obs_dim
        self.single_reverse_model = mlp(2 * latent_dim, 256, 128, 128, num_actions)
        self.action_predictor = mlp(latent_dim, 256, 128, 128, num_actions)
        self.reverse_model = ReverseModel(latent_dim, num_actions)

    def forward(self, obs, alive):
        """obs (T+1, E, N, D), alive (T, E) -> GraphLogits of the steps that took place."""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            latent = self.encoder(obs)  # (T+1, E, N, Z)
            z = latent[:-1][alive]  # (B, N, Z)
            z_next = latent[1:][alive]
            single = self.single_reverse_model(torch.cat([z, z_next], -1))
            # the two others do not train the encoder
            z = z.detach()
            z_next = z_next.detach()
            predictor = self.action_predictor(z)
            reverse = self.reverse_model(z, z_next)
        return GraphLogits(single.float(), predictor.float(), reverse.float())


def entropy(logits):
    """Entropy in nats of the distributions with these logits, (..., A) -> (...)."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def other_agents(graph):
    """The pairs (N_i, N_j) bool with i != j, where graph is any tensor (..., N_i, N_j)."""
    return ~torch.eye(graph.shape[-1], dtype=torch.bool, device=graph.device)


def learned_graph(predictor_logits, reverse_logits, c):
    """i -> j iff H(q_psi(a^i | z^j, z'^j, z^i)) < c H(q_phi(a^i | z^i)), or i = j; H: entropy in nats.

    That is: to know what became of j tells something about what i did. Logits (B, N, A) and
    (B, N_i, N_j, A) -> graph (B, N_i, N_j) bool and, to be logged, the entropies' means and their ratio,
    those of q_psi over the pairs i != j, which alone decide anything.
    """
    predictor_entropy = entropy(predictor_logits.detach())  # (B, N)
    reverse_entropy = entropy(reverse_logits.detach())  # (B, N_i, N_j)
    graph = reverse_entropy < c * predictor_entropy.unsqueeze(-1)
    graph.diagonal(dim1=-2, dim2=-1).fill_(True)
    reverse_mean = reverse_entropy[:, other_agents(graph)].mean()
    statistics = {
        "predictor_entropy": predictor_entropy.mean(),
        "reverse_entropy_others": reverse_mean,
        "entropy_ratio_others": reverse_mean / predictor_entropy.mean(),
    }
    return graph, statistics


def one_hot(x, size):
    """x (...) -> (..., size) float; what lies outside counts as the nearest class."""
    return nn.functional.one_hot(x.long().clamp(0, size - 1), size).float()


class Steps(NamedTuple):
    """Steps of any episodes, for the forward model."""

    obs: torch.Tensor  # (B, N, D)
    next_obs: torch.Tensor  # (B, N, D)
    actions: torch.Tensor  # (B, N) int64
    rewards: torch.Tensor  # (B, N)


class Foods(NamedTuple):
    """The foods as everybody observes them."""

    cells: torch.Tensor  # (B, F, 2)
    levels: torch.Tensor  # (B, F)
    there: torch.Tensor  # (B, F) bool: not padding, which stands for foods that are loaded


def read_observations(obs):
    """obs (B, N, D) -> Foods and each player's cell (B, N, 2) and level (B, N)."""
    num_foods = obs.shape[-1] // 3 - obs.shape[-2]
    foods = obs[:, 0, : 3 * num_foods].unflatten(-1, (num_foods, 3))
    own = obs[..., 3 * num_foods : 3 * num_foods + 3]
    return Foods(foods[..., :2], foods[..., 2], foods[..., 2] > 0), own[..., :2], own[..., 2]


class Outcome(NamedTuple):
    """What becomes of the players in a step, as logits of the forward model or as it was."""

    move: torch.Tensor  # (B, N, 5) or the class (B, N): stays, north, south, west, east
    reward: torch.Tensor  # (B, N, classes) or the class (B, N)
    gone: torch.Tensor  # (B, F): a food disappears


# the class of a reward: how many of these it exceeds
REWARD_SIZES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class ForwardModel(nn.Module):
    """What becomes of everybody, from what they see and do; players and foods are entities.

    What a player does near a food is an entry of a table: its relative cell and its action; likewise what two
    players do near each other. Tables begin near 0: what was never seen shall make next to no difference. Players
    have identities, since of loaders of one level the lowest index wins all.
    """

    def __init__(self, num_agents, num_actions, num_cells, width=64, num_levels=8):
        super().__init__()
        self.num_actions = num_actions
        self.num_levels = num_levels
        self.num_cells = num_cells
        # foods: what their neighbours do decides whether they disappear and what everybody gets
        self.player_at_food = nn.Embedding(25 * num_actions, width)
        self.player_level = nn.Linear(num_levels, width)
        self.agent_id = nn.Parameter(torch.zeros(num_agents, 1, width))
        self.effort = nn.Sequential(nn.ReLU(), nn.Linear(width, width))
        self.food_level = nn.Linear(num_levels, width)
        self.gone = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.is_gone = nn.Linear(1, width)
        self.own_effort = nn.Linear(width, width)
        self.share = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.reward = nn.Linear(width, len(REWARD_SIZES) + 1)
        self.register_buffer("class_rewards", torch.zeros(len(REWARD_SIZES) + 1))  # the mean reward of each class
        # cells: other players, foods and the edges of the board are in the way
        self.rival = nn.Embedding(49 * num_actions**2, width)
        self.obstacle = nn.Embedding(25 * num_actions, width)
        self.place = nn.Linear(2 * num_cells, width)
        self.action = nn.Embedding(num_actions, width)
        self.move = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))
        for table in (self.player_at_food, self.rival, self.obstacle):
            nn.init.normal_(table.weight, std=0.03)

    def forward(self, obs, actions):
        """obs (B, N, D), actions (B, N) -> Outcome of logits."""
        foods, cells, levels = read_observations(obs)
        there = foods.there.unsqueeze(-1)  # (B, F, 1)
        offset = (cells.unsqueeze(2) - foods.cells.unsqueeze(1)).clamp(-2, 2).long() + 2  # (B, N, F, 2)
        near_food = (5 * offset[..., 0] + offset[..., 1]) * self.num_actions + actions.unsqueeze(-1)  # (B, N, F)

        level = self.player_level(one_hot(levels, self.num_levels)).unsqueeze(2)
        # what every player does for every food
        effort = self.effort(self.player_at_food(near_food) + level + self.agent_id)  # (B, N, F, width)
        # does their sum move the food, and who gets what
        at_food = effort.sum(1) + self.food_level(one_hot(foods.levels, self.num_levels))  # (B, F, width)
        gone = self.gone(at_food).squeeze(-1).masked_fill(~foods.there, -100.0)
        result = at_food + self.is_gone(gone.sigmoid().unsqueeze(-1))
        share = self.share(result.unsqueeze(1) + self.own_effort(effort))
        reward = self.reward((share * there.unsqueeze(1)).sum(2))

        offset = (cells.unsqueeze(1) - cells.unsqueeze(2)).clamp(-3, 3).long() + 3  # (B, N_j, N_k, 2): of k from j
        near = (7 * offset[..., 0] + offset[..., 1]) * self.num_actions + actions.unsqueeze(1)
        rival = self.rival(near * self.num_actions + actions.unsqueeze(2))  # (B, N_j, N_k, width)
        rival = (rival * other_agents(rival[..., 0]).unsqueeze(-1)).sum(2)
        obstacle = (self.obstacle(near_food) * there.unsqueeze(1)).sum(2)
        place = self.place(one_hot(cells, self.num_cells).flatten(-2))
        move = self.move(rival + obstacle + place + self.action(actions))
        return Outcome(move, reward, gone)


def reward_class(rewards):
    """How many of REWARD_SIZES each reward exceeds."""
    return (rewards.unsqueeze(-1) > torch.tensor(REWARD_SIZES, device=rewards.device)).sum(-1)


def outcome(steps):
    """What became of the players -> Outcome of classes."""
    foods, cells, _ = read_observations(steps.obs)
    foods_after, cells_after, _ = read_observations(steps.next_obs)
    moves = torch.tensor(MOVES[:5], device=cells.device)
    move = ((cells_after - cells).unsqueeze(-2) == moves).all(-1).float().argmax(-1)
    still = (foods.cells.unsqueeze(2) == foods_after.cells.unsqueeze(1)).all(-1).any(-1)
    return Outcome(move, reward_class(steps.rewards), foods.there & ~still)


@torch.no_grad()
def forward_graph(model, obs, actions, shared_food, threshold):
    """i -> j iff another action of i would, as the model has it, make a difference to j, or i = j.

    The difference is the total variation of what becomes of j: of its move and reward (and of every food, if
    shared_food), taken as independent. obs (B, N, D), actions (B, N) -> graph (B, N_i, N_j) bool.
    """

    def probabilities(actions):
        move, reward, gone = model(obs, actions)
        return move.softmax(-1), reward.softmax(-1), gone.sigmoid()

    B, N = actions.shape
    move, reward, gone = probabilities(actions)
    difference = torch.zeros((B, N, N), device=obs.device)
    for i in range(N):
        for action in range(model.num_actions):
            other_actions = actions.clone()
            other_actions[:, i] = action
            other_move, other_reward, other_gone = probabilities(other_actions)
            same = 1 - (move - other_move).abs().sum(-1) / 2  # (B, N_j)
            same = same * (1 - (reward - other_reward).abs().sum(-1) / 2)
            if shared_food:
                same = same * (1 - (gone - other_gone).abs()).prod(-1, keepdim=True)
            difference[:, i] = torch.max(difference[:, i], 1 - same)
    graph = difference > threshold
    graph.diagonal(dim1=-2, dim2=-1).fill_(True)
    return graph


@torch.no_grad()
def forward_effects(model, obs, actions, rewards, smallest=0.02):
    """How much more j was rewarded than, as the model has it, if i had done nothing: (B, N_i, N_j), 0 for i = j.

    The model says which pairs have an effect, more than smallest, and what j would have earned; what j has earned is
    known. It is asked about steps with rewards alone: most have none, and small errors would add up to more than the
    effects. What kept everybody from a reward is not seen.
    obs (B, N, D), actions and rewards (B, N).
    """
    effects = torch.zeros((*actions.shape, actions.shape[-1]), device=obs.device)
    rewarded = (rewards != 0).any(-1)
    obs, actions, rewards = obs[rewarded], actions[rewarded], rewards[rewarded]

    def expected_rewards(actions):
        return model(obs, actions).reward.softmax(-1) @ model.class_rewards  # (B, N)

    expected = expected_rewards(actions)
    for i in range(actions.shape[-1]):
        without_i = actions.clone()
        without_i[:, i] = Action.NONE.value
        expected_without_i = expected_rewards(without_i)
        affected = (expected - expected_without_i).abs() > smallest
        effects[rewarded, i] = (rewards - expected_without_i) * affected
    return effects * other_agents(effects)


class Replay:
    """The last steps that took place, for the forward model; observations of LBF are small whole numbers."""

    def __init__(self, size, num_agents, obs_dim):
        self.obs = torch.zeros((size, num_agents, obs_dim), dtype=torch.int8)
        self.next_obs = torch.zeros_like(self.obs)
        self.actions = torch.zeros((size, num_agents), dtype=torch.int8)
        self.rewards = torch.zeros((size, num_agents))
        self.added = 0  # steps since the beginning; those that are kept lie in a ring

    def __len__(self):
        return min(self.added, len(self.rewards))

    def add(self, rollout):
        """Add the steps of a Rollout that took place."""
        alive = rollout.alive
        size = len(self.rewards)
        obs = rollout.obs[:-1][alive][-size:]
        place = torch.arange(self.added, self.added + len(obs)) % size
        self.obs[place] = obs.cpu().to(torch.int8)
        self.next_obs[place] = rollout.obs[1:][alive][-size:].cpu().to(torch.int8)
        self.actions[place] = rollout.actions[alive][-size:].cpu().to(torch.int8)
        self.rewards[place] = rollout.rewards[alive][-size:].cpu()
        self.added += len(obs)

    def take(self, index, device):
        """These steps as Steps."""
        return Steps(
            obs=self.obs[index].float().to(device),
            next_obs=self.next_obs[index].float().to(device),
            actions=self.actions[index].long().to(device),
            rewards=self.rewards[index].to(device),
        )

    def state_dict(self):
        """For a checkpoint."""
        kept = {name: getattr(self, name)[: len(self)].clone() for name in Steps._fields}
        return kept | {"added": self.added}

    def load_state_dict(self, state):
        """Back to what state_dict has returned."""
        self.added = state["added"]
        for name in Steps._fields:
            getattr(self, name)[: len(self)] = state[name]


def update_forward_model(model, optimizer, replay, num_steps=4, batch_size=128):
    """Gradient steps on replayed steps, a quarter of them rewarded -> losses, means over the steps.

    Rewards are rare: a batch of what comes would hardly show the model any; half of it has it expect too many.
    """
    device = model.class_rewards.device
    rewarded = (replay.rewards > 0).any(-1).nonzero().squeeze(-1)
    if len(rewarded):
        rewards = replay.rewards[rewarded].to(device)
        classes = one_hot(reward_class(rewards), len(model.class_rewards))  # (B, N, classes)
        sums = (classes * rewards.unsqueeze(-1)).sum((0, 1))
        model.class_rewards.copy_(sums / classes.sum((0, 1)).clamp(min=1))
    history = defaultdict(list)
    for _ in range(num_steps):
        index = torch.randint(len(replay), (batch_size,))
        if len(rewarded):
            index[: batch_size // 4] = rewarded[torch.randint(len(rewarded), (batch_size // 4,))]
        steps = replay.take(index, device)
        actual = outcome(steps)
        predicted = model(steps.obs, steps.actions)
        foods, _, _ = read_observations(steps.obs)
        move_loss = cross_entropy(predicted.move, actual.move)
        reward_loss = cross_entropy(predicted.reward, actual.reward)
        gone = actual.gone[foods.there].float()
        food_loss = nn.functional.binary_cross_entropy_with_logits(predicted.gone[foods.there], gone)
        gradient_step(optimizer, move_loss + reward_loss + food_loss, "move_loss + reward_loss + food_loss")
        history["move_loss"].append(move_loss.detach())
        history["reward_loss"].append(reward_loss.detach())
        history["food_loss"].append(food_loss.detach())
    return {name: torch.stack(values).mean() for name, values in history.items()}


def change_edges(graph, drop, add):
    """Remove each edge with probability drop, add each missing one with probability add; not on the diagonal."""
    noise = torch.rand(graph.shape).to(graph.device)  # drawn on the CPU, whose generator a checkpoint keeps
    graph = torch.where(graph, noise >= drop, noise < add)
    graph.diagonal(dim1=-2, dim2=-1).fill_(True)
    return graph


def dependence_graph(args, simulator, simulator_effects, graph_models, graph_logits, rollout):
    """The graph (T, E, N_i, N_j) bool, what i adds to j's reward (T, E, N_i, N_j), what to log of the reverse graph.

    simulator and simulator_effects (T, E, N_i, N_j): as the environments know them; graph_logits: GraphLogits,
    for --graph reverse alone. Where only edges are known, an edge i -> j adds the whole of j's reward, so
    that the complete graph gives global rewards and identity local ones.
    """
    alive = rollout.alive
    identity = torch.eye(simulator.shape[-1], dtype=torch.bool, device=simulator.device).expand_as(simulator)
    charts = {}
    if args.graph == "simulator":
        return simulator, simulator_effects, charts
    if args.graph == "learned":
        graph = identity.clone()
        effects = torch.zeros_like(simulator_effects)
        obs = rollout.obs[:-1][alive]
        actions = rollout.actions[alive]
        effects[alive] = forward_effects(graph_models, obs, actions, rollout.rewards[alive])
        if args.advantage == "difference":
            graph = graph | (effects.abs() > 0.01)  # for the charts alone; all other actions would cost far more
        else:
            graph[alive] = forward_graph(graph_models, obs, actions, args.shared_food, args.edge_threshold)
        return graph, effects, charts
    if args.graph == "reverse":
        graph = identity.clone()
        predictor_logits = graph_logits.action_predictor
        graph[alive], charts = learned_graph(predictor_logits, graph_logits.reverse_model, args.c)
    elif args.graph == "random":
        graph = change_edges(identity, drop=0.0, add=args.graph_p)
    elif args.graph == "complete":
        graph = torch.ones_like(simulator)
    else:
        graph = identity
    return graph, (graph & other_agents(graph)) * rollout.rewards.unsqueeze(-2), charts


def effects_statistics(effects, simulator_effects):
    """Per episode: the sizes of the simulator's effects and of the errors, summed up; (T, E, N, N)."""
    num_episodes = effects.shape[1]
    return {
        "simulator_effects": simulator_effects.abs().sum() / num_episodes,
        "effects_error": (effects - simulator_effects).abs().sum() / num_episodes,
    }


def graph_statistics(graph, simulator):
    """Edges per agent besides itself, precision and recall against the simulator's; graphs (B, N, N)."""
    others = other_agents(graph)
    edges = (graph & others).sum()
    simulator_edges = (simulator & others).sum()
    correct = (graph & simulator & others).sum()
    num_agents = graph[..., 0].numel()
    return {
        "edges_per_agent": edges / num_agents,
        "simulator_edges_per_agent": simulator_edges / num_agents,
        "simulator_precision": correct / edges.clamp(min=1),
        "simulator_recall": correct / simulator_edges.clamp(min=1),
    }


def cross_entropy(logits, actions):
    """Mean cross-entropy of predicted actions; logits (..., A), actions (...)."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), actions.flatten())


def accuracy(logits, actions):
    """Fraction of the actions that are the most likely ones; logits (..., A), actions (...)."""
    return (logits.argmax(-1) == actions).float().mean()


def update_graph_models(logits, actions, optimizer):
    """One step on the cross-entropy of each prediction of a^i; actions (B, N) -> losses and accuracies."""
    # the target of a pair (i, j) is a^i
    pair_actions = actions.unsqueeze(-1).expand(logits.reverse_model.shape[:-1])
    others = other_agents(pair_actions)
    single_loss = cross_entropy(logits.single_reverse_model, actions)
    predictor_loss = cross_entropy(logits.action_predictor, actions)
    reverse_loss = cross_entropy(logits.reverse_model, pair_actions)
    # one sum, one Adam: no two of the losses share a weight and Adam treats every weight by itself
    loss = single_loss + predictor_loss + reverse_loss
    names = "single_reverse_model_loss + action_predictor_loss + reverse_model_loss"
    gradient_step(optimizer, loss, names)
    return {
        "single_reverse_model_loss": single_loss.detach(),
        "single_reverse_model_accuracy": accuracy(logits.single_reverse_model, actions),
        "action_predictor_loss": predictor_loss.detach(),
        "action_predictor_accuracy": accuracy(logits.action_predictor, actions),
        "reverse_model_loss": reverse_loss.detach(),
        # i = j is easier
        "reverse_model_accuracy_others": accuracy(logits.reverse_model[:, others], pair_actions[:, others]),
    }


# ADVANTAGES
def gae(rewards, values, terminated, alive, gamma, gae_lambda):
    """Every agent's own generalized advantage estimate (Schulman et al. 2016) over whole, padded episodes.

    rewards (T, E, N), values (T+1, E, N), terminated and alive (T, E) bool -> (T, E, N), 0 in the padding.
    An episode that ends without `terminated` bootstraps from the value after its last step.
    """
    advantages = torch.zeros_like(rewards)
    last_advantage = torch.zeros_like(rewards[0])  # (E, N)
    for t in reversed(range(len(rewards))):
        next_values = values[t + 1].masked_fill(terminated[t].unsqueeze(-1), 0.0)
        delta = rewards[t] + gamma * next_values - values[t]
        last_advantage = last_advantage.masked_fill(terminated[t].unsqueeze(-1), 0.0)
        last_advantage = delta + gamma * gae_lambda * last_advantage
        last_advantage = last_advantage.masked_fill(~alive[t].unsqueeze(-1), 0.0)
        advantages[t] = last_advantage
    return advantages


def meeting_times(graph, alive):
    """First m >= t at which the effect of i's action at t can have reached j, along edges of t, t+1, ..., m.

        m_t[i, j] = t                                              if there is an edge i -> j at t
        m_t[i, j] = min over k with an edge i -> k of m_t+1[k, j]  otherwise (k = i: wait)

    graph (T, E, N, N) bool, alive (T, E) bool -> (T, E, N_i, N_j) float, inf if the episode ends before.
    """
    T, E, N, _ = graph.shape
    eye = torch.eye(N, dtype=torch.bool, device=graph.device)
    edges = (graph | eye) & alive[..., None, None]
    times = torch.empty(edges.shape, device=graph.device)
    next_times = torch.full((E, N, N), torch.inf, device=graph.device)  # m_t+1[k, j]
    for t in reversed(range(T)):
        next_times.diagonal(dim1=-2, dim2=-1).fill_(t)  # an edge i -> j, with k = j, gives t itself
        # (E, N_i, N_k, N_j)
        through_k = torch.where(edges[t].unsqueeze(-1), next_times.unsqueeze(-3), torch.inf)
        next_times = through_k.amin(-2)
        times[t] = next_times
    return times


def multi_agent_gae(rewards, values, terminated, alive, graph, gamma, gae_lambda, soft=True):
    """Advantage of agent i: every agent j's TD errors delta^j from the first meeting m = m_t[i, j] on.

        A^i_t = sum_j sum_{l >= t} (gamma lambda)^(l - t) w_l delta^j_l
        hard: w_l = [l >= m]      soft: w_l = lambda [l >= m] + 1 - lambda

    With agent j's own GAE^j_t = sum_{l >= t} (gamma lambda)^(l - t) delta^j_l this is

        hard: A^i_t = sum_j (gamma lambda)^(m - t) GAE^j_m, 0 for a j that is never met
        soft: A^i_t = lambda * hard + (1 - lambda) sum_j GAE^j_t

    Shapes as in gae and meeting_times -> (T, E, N).
    """
    own = gae(rewards, values, terminated, alive, gamma, gae_lambda)  # (T, E, N)
    meeting = meeting_times(graph, alive)  # (T, E, N_i, N_j)
    never = meeting.isinf()
    now = torch.arange(len(meeting), device=meeting.device).view(-1, 1, 1, 1)
    discount = (gamma * gae_lambda) ** (meeting - now)
    meeting_index = meeting.masked_fill(never, 0).long()  # 0 for never, which is masked below
    at_meeting = own.unsqueeze(2).expand(meeting.shape).gather(0, meeting_index)  # GAE^j_m
    hard = (discount * at_meeting).masked_fill(never, 0.0).sum(-1)
    if not soft:
        return hard
    return (1 - gae_lambda) * own.sum(-1, keepdim=True) + gae_lambda * hard


def pairwise_targets(rewards, pair_values, terminated, alive, graph, gamma, gae_lambda):
    """What j earns from the first meeting of i and j on, as a lambda-return: the target of a pair's value, W[i, j].

        C_t[i, j] = R^j_t                                          if i influences j at t, and always if i = j
        C_t[i, j] = gamma ((1 - lambda) W[k, j](s_t+1) + lambda C_t+1[k, j])                         otherwise

    R^j is agent j's own lambda-return; k is the agent that i influences at t which meets j first (ties: i itself,
    then the lowest index). With lambda = 1 this is the sum of gamma^(t' - t) r^j_t' over t' >= m_t[i, j].

    Shapes as in gae and meeting_times; pair_values (T+1, E, N, N) -> (T, E, N_i, N_j), 0 in the padding. An episode
    that ends without `terminated` bootstraps from the value after its last step.
    """
    T, _, N = rewards.shape
    eye = torch.eye(N, dtype=torch.bool, device=graph.device)
    graph = graph | eye
    own_values = pair_values.diagonal(dim1=-2, dim2=-1)  # (T+1, E, N), W[j, j]
    own_returns = gae(rewards, own_values, terminated, alive, gamma, gae_lambda) + own_values[:-1]  # R^j
    direct = own_returns.unsqueeze(-2).masked_fill(~(graph & alive[..., None, None]), 0.0)  # (T, E, N_i, N_j)

    via = first_to_meet(graph, meeting_times(graph, alive))  # (T, E, N_i, N_j), k
    later = (alive & ~terminated)[..., None, None] & ~graph  # where the second line holds and is not 0
    last_step = torch.cat([~alive[1:], torch.ones_like(alive[:1])])[..., None, None]
    next_values = pair_values[1:].gather(-2, via)  # W[k, j](s_t+1)
    bootstrapped = gamma * torch.where(last_step, 1.0, 1 - gae_lambda) * next_values
    targets = torch.where(later, bootstrapped, direct)
    discount = gamma * gae_lambda * (later & ~last_step)
    next_targets = torch.zeros_like(targets[0])  # C_t+1
    for t in reversed(range(T)):
        next_targets = targets[t].addcmul_(discount[t], next_targets.gather(-2, via[t]))
    return targets


def first_to_meet(graph, meeting):
    """The agent k that i influences at t with the smallest m_t+1[k, j]; ties: i itself, then the lowest index.

    graph (T, E, N, N) bool with ones on the diagonal, meeting (T, E, N, N) -> (T, E, N_i, N_j) int64.
    """
    T, _, N, _ = graph.shape
    eye = torch.eye(N, dtype=torch.bool, device=graph.device)
    next_meeting = torch.cat([meeting[1:], torch.full_like(meeting[:1], T)]).clamp(max=T)  # T for never
    # one minimum finds the time and the agent: rank 0 is i itself, rank k + 1 is k
    rank = torch.arange(1.0, N + 1, device=graph.device).masked_fill(eye, 0.0)  # (N_i, N_k)
    rank = rank.masked_fill(~graph, torch.inf)  # (T, E, N_i, N_k)
    first = ((N + 1) * next_meeting.unsqueeze(-3) + rank.unsqueeze(-1)).amin(-2) % (N + 1)
    itself = torch.arange(1.0, N + 1, device=graph.device).unsqueeze(-1)
    return torch.where(first == 0, itself, first).long() - 1


def credit(args, rollout, values, graph, effects):
    """Every agent's advantage (T, E, N), and the critic's targets, shaped as its values.

        difference: GAE^i of what i earns and adds to the others' rewards, r^i + sum_j effects[i, j]
        pairwise:   sum_j (C[i, j] - W[i, j]), see pairwise_targets
        published:  multi_agent_gae

    values (T+1, E, N) of Critic, pairwise (T+1, E, N, N) of PairCritic; graph and effects (T, E, N, N).
    """
    experience = (values, rollout.terminated, rollout.alive)
    discounts = (args.gamma, args.gae_lambda)
    rewards = rollout.rewards
    if args.advantage == "difference":
        if not args.negative_effects:
            effects = effects.clamp(min=0)
        advantages = gae(rewards + effects.sum(-1), *experience, *discounts)
        return advantages, advantages + values[:-1]
    if args.advantage == "pairwise":
        targets = pairwise_targets(rewards, *experience, graph, *discounts)
        return (targets - values[:-1]).sum(-1), targets
    # a value is that of the agent's own return: its target ignores the graph
    value_targets = gae(rewards, *experience, *discounts) + values[:-1]
    advantages = multi_agent_gae(rewards, *experience, graph, *discounts, args.soft)
    return advantages, value_targets


# ROLLOUT
class Rollout(NamedTuple):
    """One whole episode of every environment; T is the length of the longest.

    In the padding rewards and observations are 0, actions and logprobs arbitrary.
    """

    obs: torch.Tensor  # (T+1, E, N, D), with the observation after the last step
    actions: torch.Tensor  # (T, E, N) int64
    logprobs: torch.Tensor  # (T, E, N)
    rewards: torch.Tensor  # (T, E, N), each agent's own
    terminated: torch.Tensor  # (T, E) bool: ended in a terminal state; any other end is a truncation
    alive: torch.Tensor  # (T, E) bool: the step took place


@torch.no_grad()
def collect(envs, actor, device, greedy=False, generator=None):
    """Play one whole episode in every environment -> Rollout. The generator is PyTorch's own unless given."""
    max_steps = envs[0]._max_episode_steps
    E = len(envs)
    N = envs[0].n_agents
    D = envs[0].observation_space[0].shape[0]
    obs = np.zeros((max_steps + 1, E, N, D), dtype=np.float32)
    actions = torch.zeros((max_steps, E, N), dtype=torch.long)
    logprobs = torch.zeros((max_steps, E, N))
    rewards = np.zeros((max_steps, E, N), dtype=np.float32)
    terminated = np.zeros((max_steps, E), dtype=bool)
    truncated = np.zeros((max_steps, E), dtype=bool)
    alive = np.zeros((max_steps, E), dtype=bool)

    for e, env in enumerate(envs):
        obs[0, e], _ = env.reset()
    running = list(range(E))
    t = 0
    while running:
        logits = actor(torch.from_numpy(obs[t]).to(device))
        all_logprobs = logits.log_softmax(-1).cpu()  # (E, N, A), where the generator is
        if greedy:
            actions[t] = all_logprobs.argmax(-1)
        else:
            # Gumbel-max: -log of an exponential is Gumbel noise; a third of the cost of Categorical
            exponential = torch.empty_like(all_logprobs).exponential_(generator=generator)
            actions[t] = (all_logprobs - exponential.log()).argmax(-1)
        logprobs[t] = all_logprobs.gather(-1, actions[t].unsqueeze(-1)).squeeze(-1)
        joint_actions = actions[t].tolist()
        for e in running:
            step = envs[e].step(joint_actions[e])
            obs[t + 1, e], rewards[t, e], terminated[t, e], truncated[t, e], _ = step
            alive[t, e] = True
        running = [e for e in running if not (terminated[t, e] or truncated[t, e])]
        t += 1

    return Rollout(
        obs=torch.from_numpy(obs[: t + 1]).to(device),
        actions=actions[:t].to(device),
        logprobs=logprobs[:t].to(device),
        rewards=torch.from_numpy(rewards[:t]).to(device),
        terminated=torch.from_numpy(terminated[:t]).to(device),
        alive=torch.from_numpy(alive[:t]).to(device),
    )


def episode_charts(rollout):
    """Means over the episodes of a rollout, for TensorBoard."""
    agent_returns = rollout.rewards.sum(0).mean(0)  # (N)
    charts = {
        "episodic_return": agent_returns.sum(),
        "episodic_length": rollout.alive.sum(0).float().mean(),
    }
    for i, agent_return in enumerate(agent_returns):
        charts[f"episodic_return_agent_{i}"] = agent_return
    return charts


# PPO UPDATE
class Batch(NamedTuple):
    """What the policy and the critic learn from: the steps that took place."""

    obs: torch.Tensor  # (B, N, D)
    actions: torch.Tensor  # (B, N) int64
    logprobs: torch.Tensor  # (B, N), under the policy that collected them
    advantages: torch.Tensor  # (B, N)
    value_targets: torch.Tensor  # (B, N)


def make_batch(rollout, advantages, value_targets):
    """The steps that took place as one Batch; advantages and value_targets (T, E, N)."""
    alive = rollout.alive
    return Batch(
        obs=rollout.obs[:-1][alive],
        actions=rollout.actions[alive],
        logprobs=rollout.logprobs[alive],
        advantages=advantages[alive],
        value_targets=value_targets[alive],
    )


def ppo_update(actor, critic, actor_optimizer, critic_optimizer, batch, args):
    """update_epochs times a critic step, then a policy step, each on the whole batch (Schulman et al. 2017).

    Batch -> means over the epochs. UserError if a loss is not finite.
    """
    advantages = batch.advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    history = defaultdict(list)
    for _ in range(args.update_epochs):
        value_loss = 0.5 * ((critic(batch.obs) - batch.value_targets) ** 2).mean()
        gradient_step(critic_optimizer, value_loss, "value_loss", args.max_grad_norm)

        all_logprobs = actor(batch.obs).log_softmax(-1)  # (B, N, A)
        mean_entropy = -(all_logprobs.exp() * all_logprobs).sum(-1).mean()
        logprobs = all_logprobs.gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)  # (B, N)
        logratio = logprobs - batch.logprobs
        ratio = logratio.exp()
        clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        policy_loss = torch.max(-advantages * ratio, -advantages * clipped_ratio).mean()
        loss = policy_loss - args.ent_coef * mean_entropy
        gradient_step(actor_optimizer, loss, "policy_loss", args.max_grad_norm)

        history["value_loss"].append(value_loss.detach())
        history["policy_loss"].append(policy_loss.detach())
        history["entropy"].append(mean_entropy.detach())
        history["approx_kl"].append((ratio - 1 - logratio).mean().detach())
        history["clipfrac"].append(((ratio - 1).abs() > args.clip_coef).float().mean())
        history["ratio"].append(ratio.mean().detach())
    first_ratio = history.pop("ratio")[0]  # 1 up to rounding: nothing has changed yet
    means = {name: torch.stack(epochs).mean() for name, epochs in history.items()}
    return means | {"first_ratio": first_ratio}


def explained_variance(values, value_targets):
    """1 - Var(target - value) / Var(target): 1 for a perfect critic, 0 for one that gives the mean."""
    return 1 - (value_targets - values).var() / value_targets.var()


# EVALUATION
def evaluation_is_due(evaluations, global_step, args):
    """True at the start, when global_step has passed a multiple of eval_interval, and at the end."""
    if not evaluations:
        return True
    at_end = global_step >= args.total_timesteps and global_step > evaluations[-1]["global_step"]
    return at_end or global_step // args.eval_interval > evaluations[-1]["evaluation"]


def evaluate(actor, args, index, device):
    """Play eval_episodes episodes on fresh environments -> per-agent returns (episodes, N).

    The boards depend on args.seed and the evaluation's index alone: all scripts here play the same ones.
    """
    # the 1 keeps them apart from the seeds of training
    seeds = np.random.SeedSequence([args.seed, 1, index]).generate_state(args.eval_episodes)
    envs = [make_env(args.env_id, args.winner_take_all, seed) for seed in seeds]
    # an own generator: none of training's random numbers are used up
    generator = torch.Generator().manual_seed(int(seeds[0]))
    rollout = collect(envs, actor, device, args.eval_greedy, generator)
    return rollout.rewards.sum(0).cpu()


def evaluation_row(agent_returns, global_step, args):
    """A row of evaluations.csv from the returns (episodes, N)."""
    team_returns = agent_returns.sum(-1)
    index = global_step // args.eval_interval
    at_end = global_step >= args.total_timesteps
    row = {
        "global_step": global_step,
        "evaluation": index,
        # when it was due
        "nominal_step": args.total_timesteps if at_end else index * args.eval_interval,
        "episodic_return": team_returns.mean().item(),
        "episodic_return_std": team_returns.std(correction=0).item(),
        "episodes": len(team_returns),
    }
    for i, mean in enumerate(agent_returns.mean(0).tolist()):
        row[f"episodic_return_agent_{i}"] = mean
    return row


# RUN FOLDER: command line, signals, logs, checkpoints. Skip it on first reading.
class Stopped(BaseException):
    """A stop signal has come: what is half done is dropped, the run is saved and ends."""


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP: save, then exit with 128 + signal; a second one ends the run at once.

    They cut short what stands under `with stop_signals.raised():` and leave no trace of it, since a checkpoint
    gets the random state of the last whole iteration. Everything else is finished first.
    """

    def __init__(self):
        self.received = None
        self.received_at = 0.0
        self.raising = False
        signals = [signal.SIGINT, signal.SIGTERM]
        # Windows has no SIGHUP, nohup ignores it
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        for signum in signals:
            signal.signal(signum, self.handle)

    def handle(self, signum, _):
        if self.received:
            # `timeout` and closing terminals send the first one twice
            if time.monotonic() > self.received_at + 1:
                signal.signal(signum, signal.SIG_DFL)
                os.kill(os.getpid(), signum)
            return
        self.received = signum
        self.received_at = time.monotonic()
        if self.raising:
            raise Stopped

    @contextlib.contextmanager
    def raised(self):
        """Raise Stopped as soon as a signal comes, or at once if one has come before."""
        self.raising = True
        try:
            if self.received:
                raise Stopped
            yield
        finally:
            self.raising = False


class LastingStream:
    """stdout or stderr, which may be closed or lose its reader: what nobody reads is dropped."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for what the terminal's encoding lacks

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            self.stream = open(os.devnull, "w", encoding="utf-8")

    def flush(self):
        pass  # write() flushes

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextlib.contextmanager
def writing(path):
    """Turn a full disk, a folder that is gone or read-only, and the like into a UserError."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def write_atomically(path, data):
    """Write bytes to a temporary file and rename it: whenever the process dies, path is whole, old or new."""
    temporary = path + ".tmp"
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise


def read_checkpoint(path):
    """A checkpoint of any script and version as a dict; UserError if it is missing or damaged."""
    if not os.path.exists(path):
        raise UserError(f"--resume: {path} does not exist")
    try:
        with open(path, "rb") as file:
            data = io.BytesIO(file.read())
        damaged = zipfile.ZipFile(data).testzip()  # torch.load itself does not look at the checksums
        if damaged:
            raise zipfile.BadZipFile(damaged)
        data.seek(0)
        checkpoint = dict(torch.load(data, map_location="cpu", weights_only=True))
        checkpoint["args"] = dict(checkpoint["args"])
        checkpoint["script"] = str(checkpoint["script"])
    except Exception as error:
        raise UserError(f"--resume: {path} is not a whole checkpoint ({type(error).__name__})") from error
    return checkpoint


def load_checkpoint(path):
    """A checkpoint as save_checkpoint has written it; UserError if another script or version has, or it is damaged."""
    checkpoint = read_checkpoint(path)
    keys = {"run_name", "global_step", "iteration", "evaluations", "torch_rng"}
    keys |= {"actor", "actor_optimizer", "critic", "critic_optimizer"}
    same_version = keys <= checkpoint.keys() and checkpoint["args"].keys() == vars(Args()).keys()
    if checkpoint["script"] != SCRIPT or not same_version:
        raise UserError(f"--resume: {path} was written by {checkpoint['script']}.py or by another version of it")
    return checkpoint


def parse_args():
    """The checked command line and the checkpoint of --resume or None."""
    args = tyro.cli(Args)
    checkpoint = None
    if args.resume is not None:
        path = args.resume
        if os.path.isdir(path):
            path = os.path.join(path, "checkpoint.pt")
        checkpoint = load_checkpoint(path)
        saved = checkpoint["args"]
        # what the command line does not give is as it was
        args = tyro.cli(Args, default=Args(**saved))
        args.resume = path
        may_change = {
            "resume",
            "save_model",
            "checkpoint_interval",
            "num_workers",
            "track",
            "wandb_project_name",
            "wandb_entity",
        }
        for name, value in vars(args).items():
            longer = name == "total_timesteps" and value >= saved[name]
            if value != saved[name] and name not in may_change and not longer:
                raise UserError(f"--resume: {name} is {value} here, {saved[name]} in the checkpoint")
    check_args(args)
    return args, checkpoint


def choose_device(args):
    """The GPU if it is asked for and there is one, with deterministic algorithms unless they are switched off."""
    if not args.cuda:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        print(f"{SCRIPT}: CUDA is not available, the CPU is used", file=sys.stderr)
        return torch.device("cpu")
    if args.torch_deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(args.torch_deterministic)
    return torch.device("cuda")


def make_run_name(args):
    """A name for a new run's folder; UserError if it cannot be one."""
    task = args.env_id + ("-wta" if args.winner_take_all else "")
    name = f"{task}__{args.exp_name}__{args.seed}__{int(time.time())}"
    one_component = args.exp_name and "/" not in args.exp_name and os.sep not in args.exp_name
    if not one_component or not name.isprintable() or len(name.encode()) > 255:
        raise UserError(f"exp_name must name a folder (not empty, no slashes, not too long): {args.exp_name!r}")
    return name


def start_wandb(args, name):
    """Copy to Weights and Biases whatever goes to TensorBoard from now on."""
    try:
        import wandb
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--track needs Weights and Biases: pip install wandb ({reason})") from error
    try:
        wandb.init(
            project=args.wandb_project_name,
            entity=args.wandb_entity,
            name=name,
            config=vars(args),
            sync_tensorboard=True,
            save_code=True,
        )
    except Exception as error:  # not logged in, no network, ...
        raise UserError(f"--track: {' '.join(str(error).split())}") from error


def open_run_folder(run_name, args, checkpoint):
    """The run's name, its folder, which is new or the checkpoint's, and its file run.json, locked by this process.

    UserError if it cannot be made, another process has it, or it holds another run or a later checkpoint.
    """
    if checkpoint is None:
        run_dir = new_run_folder(run_name)
        run_name = os.path.basename(run_dir)
    else:
        run_dir = os.path.dirname(os.path.realpath(args.resume))  # a symlink resumes the run it points to
        with writing(run_dir):
            os.path.abspath(run_dir).encode()
        check_newest_checkpoint(run_dir, args, checkpoint)
    path = os.path.join(run_dir, "run.json")
    with writing(path):
        run_file = open(path, "a+", encoding="utf-8")
    if os.name == "posix":
        try:
            fcntl.lockf(run_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise UserError(f"another process is at the run {run_dir}") from error
        except OSError:
            pass  # a file system without locks
    run_file.seek(0)
    try:
        owner = json.load(run_file)["run_name"]
    except (ValueError, KeyError, TypeError):  # new, or lost
        owner = run_name
        with writing(path):
            run_file.truncate(0)
            json.dump({"run_name": run_name, "args": vars(args)}, run_file, indent=1)
            run_file.flush()
    if owner != run_name:
        raise UserError(f"--resume: {args.resume} is a checkpoint of {run_name}, its folder is that of {owner}")
    if checkpoint is not None:
        check_newest_checkpoint(run_dir, args, checkpoint)  # again: another process may have gone on meanwhile
    return run_name, run_dir, run_file


def new_run_folder(run_name):
    """Make the folder runs/run_name; runs/run_name_2 or _3, ... if a run of that name has begun already."""
    run_dir = os.path.join("runs", run_name)
    with writing(run_dir):
        os.path.abspath(run_dir).encode()  # TensorBoard takes no other paths
        for k in itertools.count(2):
            try:
                os.makedirs(run_dir)
                return run_dir
            except FileExistsError:
                if not os.path.isdir(run_dir):
                    raise
                run_dir = os.path.join("runs", f"{run_name}_{k}")


def check_newest_checkpoint(run_dir, args, checkpoint):
    """UserError if checkpoint.pt is another run's or later than the one resumed: nothing must be cut back."""
    newest = os.path.join(run_dir, "checkpoint.pt")
    try:
        other = read_checkpoint(newest)
    except UserError:
        return  # a lost or damaged one must not keep an older copy from being resumed
    owner = other.get("run_name")
    if owner != checkpoint["run_name"]:
        raise UserError(
            f"--resume: {args.resume} is a checkpoint of {checkpoint['run_name']}, but {newest} is one of {owner}"
        )
    if other["global_step"] > checkpoint["global_step"]:
        raise UserError(
            f"--resume: {args.resume} is of frame {checkpoint['global_step']}, {newest} of frame "
            f"{other['global_step']}: resume that one, or put the older one into a folder of its own"
        )


def ignore_os_errors(failure):
    """An exception hook of threads, without the traceback where the disk is full."""
    if not issubclass(failure.exc_type, OSError):
        sys.excepthook(failure.exc_type, failure.exc_value, failure.exc_traceback)


def open_log(run_dir, args, global_step, resumed):
    """TensorBoard's writer for a run that stands at global_step; later points are dropped."""
    with writing(run_dir):
        # A run's event files are read in the order of their names, which begin with the second of their
        # start. Clocks may stand still or go back: the earlier files get the seconds 0, 1, 2, ...
        earlier = sorted(name for name in os.listdir(run_dir) if name.startswith("events.out.tfevents."))
        for k, name in enumerate(earlier):
            rest = name.removeprefix("events.out.tfevents.").partition(".")[2]
            new_name = f"events.out.tfevents.{k:010d}.{rest}"
            os.rename(os.path.join(run_dir, name), os.path.join(run_dir, new_name))
        # a full disk in TensorBoard's own thread: the next log_scalars says so in one sentence
        threading.excepthook = ignore_os_errors
        writer = SummaryWriter(run_dir, purge_step=global_step + 1 if resumed else None)
        rows = [f"|{name}|{value}|" for name, value in vars(args).items()]
        writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + "\n".join(rows))
    return writer


def log_scalars(writer, global_step, groups):
    """Write groups, as {"charts": {"SPS": 5000.0}}, to TensorBoard, as charts/SPS."""
    with writing(writer.log_dir):
        for group, metrics in groups.items():
            for name, value in metrics.items():
                writer.add_scalar(f"{group}/{name}", float(value), global_step)


def write_evaluations(run_dir, evaluations):
    """Write evaluations.csv, its numbers with six significant digits."""
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=evaluations[0].keys(), lineterminator="\n")
    table.writeheader()
    for row in evaluations:
        table.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    write_atomically(os.path.join(run_dir, "evaluations.csv"), text.getvalue().encode())


def log_evaluation(writer, run_dir, evaluations, row):
    """Append the row to the run's evaluations and write them to evaluations.csv and TensorBoard."""
    evaluations.append(row)
    write_evaluations(run_dir, evaluations)
    not_metrics = ("global_step", "evaluation", "nominal_step")
    metrics = {name: value for name, value in row.items() if name not in not_metrics}
    log_scalars(writer, row["global_step"], {"eval": metrics})


def get_random_state(envs):
    """All that the following iterations draw from."""
    return {"torch_rng": torch.get_rng_state(), "envs": [env.get_state() for env in envs]}


def set_random_state(envs, random_state):
    """Back to what get_random_state has returned."""
    torch.set_rng_state(random_state["torch_rng"])
    for env, state in zip(envs, random_state["envs"]):
        env.set_state(state)


def checkpoint_is_due(saved_step, global_step, args):
    """True after the first iteration and when global_step has passed a multiple of checkpoint_interval."""
    interval = args.checkpoint_interval
    if interval == 0 or global_step >= args.total_timesteps:
        return False  # the end has a checkpoint of its own
    return saved_step is None or global_step // interval > saved_step // interval


def save_checkpoint(run_dir, run_name, args, trained, random_state, global_step, iteration, evaluations):
    """Write checkpoint.pt: everything that the run needs to go on exactly."""
    checkpoint = {
        "script": SCRIPT,
        "run_name": run_name,
        "args": vars(args),
        "global_step": global_step,
        "iteration": iteration,
        "evaluations": evaluations,
    }
    checkpoint |= random_state
    for name, part in trained.items():
        checkpoint[name] = part.state_dict()
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_atomically(os.path.join(run_dir, "checkpoint.pt"), buffer.getvalue())


def print_summary(run_dir, evaluations, global_step, args):
    """Say what came of a run that has ended or was stopped, and how to go on with it."""
    print(f"{run_dir}: {global_step:,} of {args.total_timesteps:,} frames")
    if evaluations:
        last = evaluations[-1]
        print(f"last evaluation: return {last['episodic_return']:.3f} at {last['global_step']:,} frames")
    if os.path.exists(os.path.join(run_dir, "checkpoint.pt")):
        longer = " --total-timesteps MORE" if global_step >= args.total_timesteps else ""
        print(f"continue: python {shlex.quote(sys.argv[0])} --resume {shlex.quote(run_dir)}{longer}")
    print(f"curves: tensorboard --logdir {shlex.quote(run_dir)}")


def failure(error, writer, iteration, saved_step):
    """The UserError that ends a run in training: when it came, and what there is to resume from."""
    with contextlib.suppress(OSError):
        writer.close()
    last = "there is no checkpoint"
    if saved_step is not None:
        last = f"the last checkpoint is of frame {saved_step}"
    return UserError(f"iteration {iteration}: {error}; {last}")


def main():
    # SET-UP
    args, checkpoint = parse_args()
    check_graph_args(args)
    run_name = checkpoint["run_name"] if checkpoint else make_run_name(args)
    device = choose_device(args)
    torch.set_num_threads(args.num_threads)
    # PyTorch's CPU generator is the only random stream besides the environments' own
    torch.manual_seed(args.seed)
    stop_signals = StopSignals()

    env_seeds = np.random.SeedSequence(args.seed).generate_state(args.num_envs)
    envs = [make_env(args.env_id, args.winner_take_all, seed) for seed in env_seeds]
    N = envs[0].n_agents
    D = envs[0].observation_space[0].shape[0]
    A = int(envs[0].action_space[0].n)
    actor = AgentNetwork(D, N, args.hidden_dim, A).to(device)
    for env in envs:
        env.shared_food = args.shared_food
    critic = make_critic(args, D, N).to(device)
    if args.graph == "learned":
        graph_models = ForwardModel(N, A, max(envs[0].field_size)).to(device)
    else:
        graph_models = GraphModels(D, A, args.encoder, args.bf16).to(device)
    replay = Replay(args.replay_size if args.graph == "learned" else 1, N, D)
    adam = {"lr": args.learning_rate, "eps": args.adam_eps, "fused": True}
    actor_optimizer = torch.optim.Adam(actor.parameters(), **adam)
    critic_optimizer = torch.optim.Adam(critic.parameters(), **adam)
    if args.graph == "learned":
        adam["lr"] = args.forward_learning_rate
    models_optimizer = torch.optim.Adam(graph_models.parameters(), **adam)
    trained = {
        "actor": actor,
        "actor_optimizer": actor_optimizer,
        "critic": critic,
        "critic_optimizer": critic_optimizer,
        "models": graph_models,
        "models_optimizer": models_optimizer,
        "replay": replay,
    }
    global_step = 0
    iteration = 0
    evaluations = []  # the rows of evaluations.csv
    saved_step = None
    if checkpoint:
        global_step = saved_step = checkpoint["global_step"]
        iteration = checkpoint["iteration"]
        evaluations = checkpoint["evaluations"]
        for name, part in trained.items():
            part.load_state_dict(checkpoint[name])
        set_random_state(envs, checkpoint)
    random_state = get_random_state(envs)

    if args.track:
        start_wandb(args, run_name)
    run_name, run_dir, run_file = open_run_folder(run_name, args, checkpoint)
    writer = open_log(run_dir, args, global_step, resumed=checkpoint is not None)
    if evaluations:
        write_evaluations(run_dir, evaluations)
    rules = "winner-take-all" if args.winner_take_all else "vanilla"
    graph_rule = f"reverse, c = {args.c}" if args.graph == "reverse" else args.graph
    print(f"{run_dir}: {rules}, {N} agents, {D} observations, {A} actions, {args.num_envs} episodes per iteration")
    print(f"dependence graph: {graph_rule}; advantage: {args.advantage}; device: {device}")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" frames", unit_scale=True, mininterval=1.0)
    start_time = time.time()
    start_step = global_step

    try:
        # EVALUATE the untrained policy, or what a stop signal has kept from being evaluated
        if evaluation_is_due(evaluations, global_step, args):
            with stop_signals.raised():
                agent_returns = evaluate(actor, args, global_step // args.eval_interval, device)
            row = evaluation_row(agent_returns, global_step, args)
            log_evaluation(writer, run_dir, evaluations, row)

        while global_step < args.total_timesteps:
            # COLLECT
            with stop_signals.raised():
                rollout = collect(envs, actor, device)  # (T, E, N, ...)
            alive = rollout.alive
            iteration += 1
            global_step += int(alive.sum())

            # DEPENDENCE GRAPH, by models trained up to the iteration before
            simulator = simulator_graph(envs).to(device)  # (T, E, N_i, N_j)
            simulator_effects = known_effects(envs).to(device)  # (T, E, N_i, N_j)
            # one forward pass gives the reverse graph and, below, the losses
            graph_logits = graph_models(rollout.obs, alive) if args.graph == "reverse" else None
            graph, effects, graph_charts = dependence_graph(
                args, simulator, simulator_effects, graph_models, graph_logits, rollout
            )

            # ADVANTAGES
            with torch.no_grad():
                values = critic(rollout.obs)  # (T+1, E, N), pairwise: (T+1, E, N_i, N_j)
            advantages, value_targets = credit(args, rollout, values, graph, effects)  # (T, E, N), as the values

            # UPDATE POLICY AND CRITIC, THEN THE GRAPH MODELS
            batch = make_batch(rollout, advantages, value_targets)
            losses = ppo_update(actor, critic, actor_optimizer, critic_optimizer, batch, args)
            if args.graph == "reverse":
                losses |= update_graph_models(graph_logits, batch.actions, models_optimizer)
            elif args.graph == "learned":
                replay.add(rollout)
                losses |= update_forward_model(graph_models, models_optimizer, replay)
            losses["explained_variance"] = explained_variance(values[:-1][alive], batch.value_targets)
            # the iteration is whole: a stop from here on resumes after it
            random_state = get_random_state(envs)

            # LOG
            charts = episode_charts(rollout)
            charts["learning_rate"] = args.learning_rate
            charts["SPS"] = (global_step - start_step) / max(time.time() - start_time, 1e-9)
            graph_charts |= graph_statistics(graph[alive], simulator[alive])
            graph_charts |= effects_statistics(effects, simulator_effects)
            log_scalars(writer, global_step, {"charts": charts, "losses": losses, "graph": graph_charts})

            # EVALUATE
            if evaluation_is_due(evaluations, global_step, args):
                with stop_signals.raised():
                    agent_returns = evaluate(actor, args, global_step // args.eval_interval, device)
                row = evaluation_row(agent_returns, global_step, args)
                log_evaluation(writer, run_dir, evaluations, row)

            # SHOW
            last_return = evaluations[-1]["episodic_return"]
            edges = graph_charts["edges_per_agent"]
            bar.set_postfix(eval=f"{last_return:.3f}", edges=f"{edges:.2f}", refresh=False)
            bar.update(global_step - bar.n)

            # SAVE
            if checkpoint_is_due(saved_step, global_step, args):
                save_checkpoint(run_dir, run_name, args, trained, random_state, global_step, iteration, evaluations)
                saved_step = global_step
    except Stopped:
        pass  # saved below
    except UserError as error:
        bar.close()
        raise failure(error, writer, iteration, saved_step) from error

    if stop_signals.received or args.checkpoint_interval or args.save_model:
        try:
            save_checkpoint(run_dir, run_name, args, trained, random_state, global_step, iteration, evaluations)
        except UserError as error:
            bar.close()
            raise failure(error, writer, iteration, saved_step) from error
    bar.close()
    with writing(run_dir):
        writer.close()
    run_file.close()
    print_summary(run_dir, evaluations, global_step, args)
    if stop_signals.received:
        sys.exit(128 + stop_signals.received)


if __name__ == "__main__":
    sys.stdout = LastingStream(sys.stdout)
    sys.stderr = LastingStream(sys.stderr)
    try:
        main()
    except UserError as error:
        print(f"{SCRIPT}.py: {error}", file=sys.stderr)
        sys.exit(2)
