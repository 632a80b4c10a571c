# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4,<=2.13.0", "numpy", "gymnasium>=1.4", "tyro", "tensorboard", "tqdm", "smaclite"]
# [tool.uv]
# override-dependencies = ["rtree>=1.0"]
# [tool.uv.sources]
# smaclite = { git = "https://github.com/uoe-agents/smaclite", rev = "0d6abbea1334011984ae4704a0ef7a33c36057d6" }
# ///
"""MAPPO with dependence graphs (MAPPO-DG, arXiv 2601.21523) on SMAClite: masks, recurrence, deaths, a reward per agent.

Every agent learns from the rewards that it can have influenced: a learned graph says whose state an action has reached,
and the advantage of agent i counts the rewards of agent j from the first step at which i has reached j.

    python mappo_dg_smaclite.py --env-id MMM2 --total-timesteps 2000000
    python mappo_dg_smaclite.py --env-id 2s3z --c 0.5 --num-workers 4

Axes are (T, E, N, ...): time step, environment, agent. A pair is (..., i, j): i is the influencer, j the influenced.
R: agents alive, of all steps in one row; P: pairs of them; D: observation size, S: state, A: actions, Z: latent size.
alive (T, E): the step took place, its game was not over; active (T, E, N): and the agent was living.
"""

import contextlib
import dataclasses
import functools
import io
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

try:
    from smaclite.env.maps.map import MapPreset
    from smaclite.env.rvo2 import rvo2
    from smaclite.env.rvo2.neighbour_finder import NeighbourFinder
    from smaclite.env.rvo2.velocity_updater import NumpyVelocityUpdater
    from smaclite.env.smaclite import REWARD_WIN, SMACliteEnv
    from smaclite.env.units.unit import Unit
    from smaclite.env.util.faction import Faction
    from smaclite.env.util.plane import Plane
except ImportError as error:  # what does not play can be imported without it
    missing = error
    NeighbourFinder = NumpyVelocityUpdater = SMACliteEnv = object


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

    env_id: str = "MMM"
    """any map of SMAClite, or 25m_vs_30m"""
    use_cpp_rvo2: bool = False
    """use SMAClite's optional C++ collision library"""
    total_timesteps: int = 1_000_000
    """frames: environment steps summed over the environments"""
    num_envs: int = 10
    """parallel environments, each plays one whole episode per iteration"""
    num_workers: int = 2
    """environments that may compute at the same time, each in a process of its own"""
    eval_interval: int = 10_000
    """frames between two evaluations"""
    eval_episodes: int = 100
    """episodes of an evaluation"""
    eval_greedy: bool = True
    """evaluate with the most likely actions instead of sampled ones"""
    hidden_dim: int = 64
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

    c: float = 0.9
    """entropy-ratio threshold of an edge: 0 gives no edge (like local rewards), 1 most (like global rewards)"""
    graph: Literal["learned", "random", "complete", "identity"] = "learned"
    """where the dependence graph comes from"""
    graph_p: float = 0.5
    """probability of an edge under --graph random"""
    soft: bool = True
    """mix hard path weights with lambda (robust to a noisy graph); --no-soft: hard weights"""
    encoder: bool = True
    """learn the graph on encoded observations; --no-encoder: on raw ones"""
    edge_drop: float = 0.0
    """probability of removing an edge (injected noise)"""
    edge_add: float = 0.0
    """probability of adding a missing edge (injected noise)"""
    transpose_graph: bool = False
    """use the graph with influencer and influenced exchanged, as the authors' code does with the learned one"""
    pair_chunk: int = 65_536
    """pairs of agents that the reverse model treats at a time: bounds the memory"""


class UserError(Exception):
    """Ends the script with its one sentence on stderr and exit status 2."""


def check_args(args):
    """Raise UserError for the first setting that makes no sense (settings that this script lacks are skipped)."""
    counts = "total_timesteps num_envs num_workers eval_interval eval_episodes update_epochs hidden_dim num_threads"
    amounts = "seed checkpoint_interval learning_rate clip_coef ent_coef max_grad_norm"
    fractions = "gamma gae_lambda c graph_p edge_drop edge_add"
    for names, low, high in ((counts + " pair_chunk", 1, torch.inf), (amounts, 0, torch.inf), (fractions, 0, 1)):
        for name in names.split():
            if not low <= getattr(args, name, low) <= high:
                raise UserError(f"{name} must lie in [{low}, {high}], not {getattr(args, name)}")
    if SMACliteEnv is object:
        raise UserError(f"SMAClite is not installed ({missing}): see requirements-smaclite.txt, or use `uv run`")
    if args.total_timesteps < (frames := args.num_envs * make_env(args.env_id, args.use_cpp_rvo2).time_limit):
        raise UserError(f"total_timesteps is {args.total_timesteps}, below one iteration ({frames} frames)")


# ENVIRONMENT
def make_map(name):
    """The package's map of that name, or 25m_vs_30m: 27m_vs_30m with 25 allied marines. UserError if there is none."""
    maps = {preset.value.name: preset.value for preset in MapPreset}
    allies, enemies = maps["27m_vs_30m"].groups
    allies = dataclasses.replace(allies, units=[(kind, 25) for kind, _ in allies.units])
    maps["25m_vs_30m"] = dataclasses.replace(
        maps["27m_vs_30m"], name="25m_vs_30m", num_allied_units=25, groups=[allies, enemies]
    )
    if name not in maps:
        raise UserError(f"unknown SMAClite map {name}; the maps are {', '.join(sorted(maps))}")
    return maps[name]


class PairwiseNeighbourFinder(NeighbourFinder):
    """The package's neighbour search by plain pairwise distances: for tens of units far cheaper than its KD-trees.

    The same neighbours in the same order: a scikit-learn tree of up to 80 points is one leaf, which answers in the
    order of the points. (Where there are air units the package goes plane by plane, in an order that changes with
    PYTHONHASHSEED; here it is always the units' order. No map's game depends on it.)
    """

    def update(self):
        """Takes a snapshot of the positions; when nobody is left the last one stays, as in the package."""
        if self.all_units:
            self.units = list(self.all_units.values())
            self.positions = np.array([unit.pos for unit in self.units], np.float64)  # (n, 2)
            self.on_plane = {plane: np.array([unit.plane is plane for unit in self.units]) for plane in Plane}

    def query_radius(self, units, radius, return_distance=False, same_plane_only=False, targetting_mode=False):
        """Per unit of `units` the list of units, or of (unit, distance), within `radius` cells (a number or a list)."""
        if not units:
            return []
        delta = np.array([unit.pos for unit in units], np.float64)[:, None] - self.positions  # (m, n, 2)
        distance_sq = delta[..., 0] ** 2 + delta[..., 1] ** 2
        # Only the package's get_obs asks with one radius for distances; it asserts that none equals the radius.
        strict = return_distance and np.isscalar(radius)
        near = np.sqrt(distance_sq) < radius if strict else distance_sq <= np.square(radius)[..., None]
        if same_plane_only or targetting_mode:
            for plane, columns in self.on_plane.items():
                rows = [unit.plane is plane if same_plane_only else plane in unit.valid_targets for unit in units]
                near &= np.logical_or.outer(rows, ~columns)
        rows, columns = near.nonzero()
        neighbours = [[] for _ in units]
        for i, j, distance in zip(rows.tolist(), columns.tolist(), np.sqrt(distance_sq[rows, columns])):
            neighbours[i].append((self.units[j], distance) if return_distance else self.units[j])
        return neighbours


class RobustVelocityUpdater(NumpyVelocityUpdater):
    """The package's numpy collision avoidance, called only where its answer is not obvious, and made survivable.

    To report upstream: rvo2.compute_new_velocity writes np.array(a, b) where the vector (a, b) is meant, three times.
    The second argument is a dtype; numpy 1.24 to 2.4 take a scalar for its own dtype, so the "vector" is the number a
    and the half-plane of a wall is misplaced by up to 1.2 radii (a horizontal wall's by one radius, a vertical one's
    not at all), in every game. We keep that: the package's trajectories are the benchmark. Should a numpy refuse the
    call, the unit disregards walls for that tick. Also, two units in one place at one velocity get the velocity nan,
    on which the package fails; here they walk as they wished.
    """

    def __init__(self, *args):
        super().__init__(*args)
        boxes = np.array([(wall.cx, wall.cy, wall.half_width, wall.half_height) for wall in self.obstacles])
        self.wall_centers, self.wall_halves = boxes[:, :2], boxes[:, 2:]  # (walls, 2)

    def compute_new_velocities(self, all_units):
        """Sets next_velocity (cells per second) of every unit; who does not want to move stays, as in the package."""
        for unit in all_units.values():
            unit.next_velocity = unit.pref_velocity
        moving = [unit for unit in all_units.values() if unit.pref_velocity.any()]
        if not moving:
            return
        radii = [self.max_radius + unit.radius for unit in moving]
        neighbours = self.kd_tree.query_radius(moving, radii, return_distance=True, same_plane_only=True)
        positions = np.array([unit.pos for unit in moving])[:, None]
        gaps = np.maximum(np.abs(positions - self.wall_centers) - self.wall_halves, 0)  # (m, walls, 2)
        wall_distances = np.sqrt((gaps**2).sum(-1)).min(1)
        for unit, near, wall_distance in zip(moving, neighbours, wall_distances):
            # The package's slow search for walls is skipped where none is within a second's walk.
            may_hit = unit.plane is Plane.GROUND and wall_distance < unit.radius + unit.max_velocity + 0.01
            walls = self.obstacle_finder.query(unit) if may_hit else []
            try:
                velocity = rvo2.compute_new_velocity(unit, near, walls)
            except TypeError:
                velocity = rvo2.compute_new_velocity(unit, near, [])
            unit.next_velocity = velocity if math.isfinite(velocity[0] + velocity[1]) else unit.pref_velocity


class MultiAgentSMAClite(SMACliteEnv):
    """SMAClite with a reward per agent, arrays in info and a time limit; the package's trajectories, only faster.

    Observations (N, D) float32, a dead agent's are 0. Actions (N,): 0 nothing (the dead must, the living cannot), 1
    stop, 2-5 move, 6 + k attack enemy k (medivac: heal ally k). Reward: the package's, of the team. info: `rewards`
    (N,) float32, whose sum it is, `avail_actions` (N, A) bool, `state` (S,) float32, `alive` (N,) bool, `battle_won`.
    After `time_limit` steps an episode is truncated. One that has ended stays as it is, at reward 0, until reset,
    since a vector environment steps all its members together. reset(seed=...) depends on nothing but the seed.
    """

    def __init__(self, map_name: str, use_cpp_rvo2: bool = False, time_limit: int = 150):
        """ValueError: unknown map. ImportError: the C++ collision library is asked for and not installed."""
        map_info = make_map(map_name)
        with contextlib.redirect_stdout(io.StringIO()):  # the package prints a line per environment
            try:
                super().__init__(map_info, seed=0, use_cpp_rvo2=use_cpp_rvo2)
            except ImportError as error:
                message = "--use-cpp-rvo2 needs the Python module rvo2 of github.com/micadam/SMAClite-Python-RVO2"
                raise ImportError(f"{message} ({error})") from error
            self.neighbour_finder_ally, self.neighbour_finder_enemy, self.neighbour_finder_all = (
                PairwiseNeighbourFinder() for _ in range(3)
            )
            if not use_cpp_rvo2:
                self.velocity_updater = RobustVelocityUpdater(
                    self.neighbour_finder_all, self.max_unit_radius, map_info.terrain, None
                )
        self.time_limit = time_limit
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self.n_agents, self.obs_size), np.float32)
        self.action_space = gym.spaces.MultiDiscrete([self.n_actions] * self.n_agents)

    def reset(self, seed=None, options=None):
        """Starts an episode. The package leaves the last episode's actions in the first state; here they are 0."""
        self.last_actions = np.zeros_like(self.last_actions)
        obs, _ = super().reset(seed=seed)
        for unit in self.all_units.values():
            unit.game_step = functools.partial(self._scored_step, unit)
        self.elapsed, self.ended = 0, None
        return obs, self._info(np.zeros(self.n_agents, np.float32))

    def step(self, actions):
        """Half a second of the game. ValueError or AssertionError if an action is not available."""
        if self.ended:
            return self.ended
        self.earned = np.zeros(self.n_agents + 1)  # damage and kills by agent; the last: what is nobody's
        obs, team_reward, terminated, _, _ = super().step([int(action) for action in actions])
        self.elapsed += 1
        truncated = not terminated and self.elapsed >= self.time_limit
        shared = self.earned[-1] + (0 if self.enemies else REWARD_WIN)
        rewards = (self.earned[:-1] + shared / self.n_agents) / (self.max_reward / 20)
        info = self._info(rewards.astype(np.float32))
        if terminated or truncated:
            self.ended = obs, 0.0, terminated, truncated, info | {"rewards": np.zeros_like(info["rewards"])}
        return obs, float(team_reward), terminated, truncated, info

    def get_obs(self):
        """The package's observations as one array (N, D)."""
        return np.stack(super().get_obs())

    def get_avail_actions(self):
        """The mask (N, A) of the current step: computed once, for info and for the package's own check."""
        return self.avail_actions

    def _info(self, rewards):
        self.avail_actions = np.array(super().get_avail_actions(), bool)
        alive = np.array([k in self.agents for k in range(self.n_agents)])
        info = {"rewards": rewards, "avail_actions": self.avail_actions, "state": self.get_state(), "alive": alive}
        return info | {"battle_won": not self.enemies}

    def _scored_step(self, unit, **kwargs):
        """A unit's tick. Books what it earned: an ally's to itself, an enemy's (it blew itself up) to nobody."""
        try:
            reward = Unit.game_step(unit, **kwargs)
        except ValueError:  # the package's colossus fails when its target has just died and nobody else stands there
            reward = 0
        self.earned[unit.id_in_faction if unit.faction is Faction.ALLY else -1] += reward
        return reward


def make_env(env_id, use_cpp_rvo2=False):
    """An environment that computes only; UserError for a map or a library that is not there."""
    try:
        return MultiAgentSMAClite(env_id, use_cpp_rvo2)
    except ImportError as error:
        raise UserError(str(error)) from error


def make_vector_env(args):
    """args.num_envs environments, each in a process of its own."""

    def make_worker_env():
        if multiprocessing.parent_process() is not None:
            os.setpgrp()  # Ctrl-C and the like are for the main process, which saves first
        return make_env(args.env_id, args.use_cpp_rvo2)

    options = {"autoreset_mode": AutoresetMode.DISABLED, "max_concurrency": args.num_workers}
    return AsyncVectorEnv([make_worker_env] * args.num_envs, **options)


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


class Actor(nn.Module):
    """Recurrent policy, shared by all agents: Linear, GRU, Linear; what an agent may not do has probability 0."""

    def __init__(self, obs_dim, num_agents, num_actions, hidden_dim):
        super().__init__()
        self.input, self.agent_id = nn.Linear(obs_dim, hidden_dim), nn.Embedding(num_agents, hidden_dim)
        nn.init.uniform_(self.agent_id.weight, -((obs_dim + num_agents) ** -0.5), (obs_dim + num_agents) ** -0.5)
        self.gru, self.output = nn.GRU(hidden_dim, hidden_dim), nn.Linear(hidden_dim, num_actions)

    def forward(self, obs, avail, memory=None):
        """obs (T, E, N, D), avail (T, E, N, A) bool, memory (1, E * N, H) -> log-probabilities (T, E, N, A), memory."""
        x = torch.relu(self.input(obs) + self.agent_id.weight).flatten(1, 2)  # (T, E * N, H)
        x, memory = self.gru(x, memory)
        return mask_logits(self.output(x).view(avail.shape), avail).log_softmax(-1), memory


class Critic(AgentNetwork):
    """Centralised critic: each agent's value from the environment's state, (..., S) -> (..., N)."""

    def forward(self, state):
        return super().forward(state.unsqueeze(-2)).squeeze(-1)


def mask_logits(logits, avail):
    """Logits (..., A) with those of unavailable actions so low that their probability is exactly 0 in float32."""
    return logits.masked_fill(~avail, -1e9)


# DEPENDENCE GRAPH
def mlp(*sizes):
    """Layers of the given sizes; each hidden one is Linear -> ReLU -> LayerNorm."""
    layers = [nn.Linear(sizes[0], sizes[1])]
    for n_in, n_out in zip(sizes[1:], sizes[2:]):
        layers += [nn.ReLU(), nn.LayerNorm(n_in), nn.Linear(n_in, n_out)]
    return nn.Sequential(*layers)


class ReverseModel(nn.Module):
    """q_psi(a^i | z^j, z'^j, z^i), what i did from what became of j: (..., N, Z) -> logits of a^i, P pairs, (P, A)."""

    def __init__(self, latent_dim, num_actions):
        super().__init__()
        # the first layer sees the three vectors side by side: computed once per agent, added per pair
        self.influencer, self.influenced = nn.Linear(latent_dim, 256), nn.Linear(2 * latent_dim, 256)
        self.head = nn.Sequential(nn.ReLU(), nn.LayerNorm(256), mlp(256, 128, 128, num_actions))

    def forward(self, z, z_next, pairs):
        influenced = self.influenced(torch.cat([z, z_next], -1))  # (..., N_j, 256)
        return self.head((self.influencer(z).unsqueeze(-2) + influenced.unsqueeze(-3))[pairs])


class GraphModels(nn.Module):
    """The networks behind the learned graph: encoder, single-agent reverse model, action predictor, reverse model."""

    def __init__(self, obs_dim, num_actions, encoder=True, latent_dim=64):
        super().__init__()
        latent_dim = latent_dim if encoder else obs_dim
        self.encoder = mlp(obs_dim, 64, 64, latent_dim) if encoder else nn.Identity()
        self.single_reverse_model = mlp(2 * latent_dim, 256, 128, 128, num_actions)
        self.action_predictor = mlp(latent_dim, 256, 128, 128, num_actions)
        self.reverse_model = ReverseModel(latent_dim, num_actions)

    def forward(self, obs, avail, active):
        """Logits of what the living did, unavailable actions masked in all, so that the entropies can be compared.

        obs (T+1, E, N, D), avail (T, E, N, A), active (T, E, N) -> single-agent reverse model, which alone trains the
        encoder, and action predictor (R, A), reverse model (P, A), the pairs (T, E, N_i, N_j) bool.
        """
        latent = self.encoder(obs)  # (T+1, E, N, Z)
        z, z_next, pairs = latent[:-1], latent[1:], living_pairs(active)
        single = self.single_reverse_model(torch.cat([z[active], z_next[active]], -1))
        z, z_next = z.detach(), z_next.detach()
        predicted, reverse = self.action_predictor(z[active]), self.reverse_model(z, z_next, pairs)
        pair_avail = avail.unsqueeze(-2).expand(*pairs.shape, avail.shape[-1])[pairs]  # of the influencer
        single, predicted = (mask_logits(logits, avail[active]) for logits in (single, predicted))
        return single, predicted, mask_logits(reverse, pair_avail), pairs


def living_pairs(active):
    """Pairs of agents that are both alive: active (..., N) bool -> (..., N_i, N_j) bool."""
    return active.unsqueeze(-1) & active.unsqueeze(-2)


def chunks(T, E, N, pair_chunk):
    """Slices of the time axis with at most pair_chunk pairs of agents each (at least one step)."""
    steps = max(1, pair_chunk // (E * N * N))
    return [slice(start, min(start + steps, T)) for start in range(0, T, steps)]


@torch.no_grad()
def learned_graph(models, obs, avail, active, c, pair_chunk):
    """i -> j iff H(q_psi(a^i | z^j, z'^j, z^i)) < c H(q_phi(a^i | z^i)), or i = j; H: entropy in nats.

    Shapes as in GraphModels -> graph (T, E, N_i, N_j) bool, the entropies' means (i = j included), their ratio. The
    dead have no edges but their own.
    """
    T, E, N = active.shape
    graph, totals = torch.zeros((T, E, N, N), dtype=torch.bool, device=obs.device), torch.zeros(4, device=obs.device)
    for part in chunks(T, E, N, pair_chunk):
        following = slice(part.start, part.stop + 1)
        _, predicted, reverse, pairs = models(obs[following], avail[part], active[part])
        logprobs = predicted.log_softmax(-1), reverse.log_softmax(-1)
        predictor_entropy, reverse_entropy = (-(x.exp() * x).sum(-1) for x in logprobs)  # (R), (P)
        own_entropy = torch.zeros(pairs.shape[:-1], device=obs.device).masked_scatter(active[part], predictor_entropy)
        graph[part][pairs] = reverse_entropy < c * own_entropy.unsqueeze(-1).expand(pairs.shape)[pairs]
        totals += torch.stack([predictor_entropy.sum(), active[part].sum(), reverse_entropy.sum(), pairs.sum()])
    graph.diagonal(dim1=-2, dim2=-1).fill_(True)
    means = {"predictor_entropy": totals[0] / totals[1], "reverse_entropy": totals[2] / totals[3]}
    return graph, means | {"entropy_ratio": means["reverse_entropy"] / means["predictor_entropy"]}


def change_edges(graph, drop, add):
    """Remove each edge with probability drop and add each missing one with probability add, but for the diagonal."""
    noise = torch.rand(graph.shape).to(graph.device)
    graph = torch.where(graph, noise >= drop, noise < add)
    graph.diagonal(dim1=-2, dim2=-1).fill_(True)
    return graph


def update_graph_models(models, optimizer, obs, avail, active, actions, pair_chunk):
    """One step on the cross-entropy of each prediction of a^i over all the living, its gradient summed up by chunks."""
    names, metrics = ("single_reverse_model", "action_predictor", "reverse_model"), {}
    counts = active.sum(), active.sum(), living_pairs(active).sum()
    losses = torch.zeros((3, 2))  # loss and accuracy of each model
    optimizer.zero_grad()
    for part in chunks(*active.shape, pair_chunk):
        *logits, pairs = models(obs[part.start : part.stop + 1], avail[part], active[part])
        own, of_influencer = actions[part][active[part]], actions[part].unsqueeze(-1).expand(pairs.shape)[pairs]
        loss = 0
        for k, (logit, target) in enumerate(zip(logits, (own, own, of_influencer))):
            share = nn.functional.cross_entropy(logit, target, reduction="sum") / counts[k]
            loss = loss + share
            losses[k] += torch.stack([share.detach(), (logit.argmax(-1) == target).sum() / counts[k]]).cpu()
        loss.backward()
    norm = nn.utils.clip_grad_norm_(models.parameters(), torch.inf)
    if not (losses.isfinite().all() and norm.isfinite()):
        text = ", ".join(f"{name}_loss is {loss:g}" for name, loss in zip(names, losses[:, 0].tolist()))
        raise UserError(f"{text} and the norm of their gradient {norm.item()}")
    optimizer.step()
    for name, (loss, accuracy) in zip(names, losses):
        metrics |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
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


# ROLLOUT
@torch.no_grad()
def collect(envs, actor, seeds, device, greedy=False):
    """Play one whole episode in every environment, its game drawn from its seed; T is the longest episode's length.

    Returns obs (T+1, E, N, D) and state (T+1, E, S) with those after the last step, avail (T, E, N, A) bool, active
    (T, E, N) bool: the agent was alive, actions, logprobs, rewards (T, E, N), terminated, alive (T, E) bool: the step
    took place, won (E) bool.
    """
    envs.reset_async(seed=[int(seed) for seed in seeds])
    obs, info = envs.reset_wait(timeout=300)
    observations, states, steps = [obs], [info["state"]], []
    running, won, memory = np.ones(len(obs), dtype=bool), np.zeros(len(obs), dtype=bool), None
    while running.any():
        avail, active = info["avail_actions"], info["alive"] & running[:, None]
        inputs = (torch.from_numpy(x).unsqueeze(0).to(device) for x in (obs, avail))
        policy, memory = actor(*inputs, memory)
        policy = policy[0].cpu()  # (E, N, A)
        # Gumbel-max: the argmax of log-probabilities plus Gumbel noise is a sample, at a third of Categorical's cost
        noise = 0.0 if greedy else torch.empty_like(policy).exponential_().log()
        actions = (policy - noise).argmax(-1)
        logprobs = policy.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        envs.step_async(actions.numpy())
        obs, _, terminated, truncated, info = envs.step_wait(timeout=300)
        steps.append((avail, active, actions, logprobs, info["rewards"], terminated & running, running.copy()))
        observations.append(obs)
        states.append(info["state"])
        running, won = running & ~(terminated | truncated), won | info["battle_won"]
    arrays = [np.stack(observations), np.stack(states), *(np.stack(column) for column in zip(*steps)), won]
    return [torch.from_numpy(array).to(device) for array in arrays]


# PPO UPDATE
def gradient_step(optimizer, loss, name, max_grad_norm=torch.inf):
    """One step of the optimizer; UserError if the loss or its gradient is not finite."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    if not (loss.isfinite() and norm.isfinite()):
        raise UserError(f"{name} is {loss.item()} and the norm of its gradient {norm.item()}")
    optimizer.step()


def ppo_update(actor, critic, actor_optimizer, critic_optimizer, batch, args):
    """update_epochs times a critic step, then a policy step, each on the whole batch (Schulman et al. 2017).

    batch: obs (T, E, N, D), state (T, E, S), avail (T, E, N, A), active (T, E, N), alive (T, E), actions, logprobs,
    advantages, returns (T, E, N) -> means over the epochs. The policy learns from the living; the critic from every
    step, since the dead still receive their share of a victory. UserError if a loss is not finite.
    """
    obs, state, avail, active, alive, actions, logprobs, advantages, returns = batch
    advantages, history = advantages[active], []  # (R)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8) if args.norm_adv else advantages
    for _ in range(args.update_epochs):
        value_loss = 0.5 * ((critic(state[alive]) - returns[alive]) ** 2).mean()
        gradient_step(critic_optimizer, value_loss, "value_loss", args.max_grad_norm)

        policy, _ = actor(obs, avail)  # (T, E, N, A)
        entropy = -(policy.exp() * policy).sum(-1)[active].mean()
        logratio = (policy.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - logprobs)[active]  # (R)
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
def evaluate(envs, actor, args, index, device):
    """Play eval_episodes episodes -> per-agent returns (episodes, N), won (episodes) bool.

    The games depend on args.seed and the index of the evaluation alone: every script plays the same ones.
    """
    episodes = args.num_envs * math.ceil(args.eval_episodes / args.num_envs)  # every environment plays each time
    seeds, returns, won = np.random.SeedSequence([args.seed, 1, index]).generate_state(episodes), [], []
    with torch.random.fork_rng(devices=[]):  # training goes on as if there had been no evaluation
        torch.manual_seed(int(seeds[0]))
        for k in range(0, args.eval_episodes, args.num_envs):
            *_, rewards, _, _, wins = collect(envs, actor, seeds[k : k + args.num_envs], device, args.eval_greedy)
            returns.append(rewards.sum(0).cpu())
            won.append(wins.cpu())
    return torch.cat(returns)[: args.eval_episodes], torch.cat(won)[: args.eval_episodes]


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
    envs = make_vector_env(args)
    N, D = envs.single_observation_space.shape
    probe = make_env(args.env_id)
    S, A = probe.state_size, probe.n_actions
    actor = Actor(D, N, A, args.hidden_dim).to(device)
    critic = Critic(S, N, args.hidden_dim, 1).to(device)
    models = GraphModels(D, A, args.encoder).to(device)
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
        torch.set_rng_state(checkpoint["torch_rng"])
    try:
        os.makedirs(run_dir, exist_ok=bool(checkpoint))
    except FileExistsError as error:
        raise UserError(f"the run folder {run_dir} exists and is never overwritten") from error
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if checkpoint else None)
    settings = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + settings)
    print(f"{run_dir}: {N} agents, {D} observations, state {S}, {A} actions, {args.num_envs} games at a time, {device}")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" frames", unit_scale=True, mininterval=1.0)
    start_time, start_step = time.time(), global_step

    while True:
        # EVALUATE (first the untrained policy)
        finished = global_step >= args.total_timesteps
        every, last = args.eval_interval, evaluations[-1]["global_step"] if evaluations else -1
        if not stop_signals and (global_step // every > last // every or finished and global_step > last):
            returns, won = evaluate(envs, actor, args, global_step // every, device)  # (episodes, N), (episodes)
            team, agents = returns.sum(-1), returns.mean(0).tolist()
            row = {"episodic_return": team.mean().item(), "episodic_return_std": team.std(correction=0).item()}
            row |= {"episodes": len(team), "win_rate": won.float().mean().item()}
            row |= {f"episodic_return_agent_{i}": mean for i, mean in enumerate(agents)}
            for name, value in row.items():
                writer.add_scalar(f"eval/{name}", value, global_step)
            evaluations.append({"global_step": global_step} | row)
            text = "".join(",".join(map(str, line)) + "\n" for line in [evaluations[0], *map(dict.values, evaluations)])
            write_atomically(os.path.join(run_dir, "evaluations.csv"), text.encode())

        # SAVE
        every = args.checkpoint_interval
        due = every and (finished or global_step // every > saved_step // every)
        if due or stop_signals or finished and args.save_model:
            snapshot = {name: part.state_dict() for name, part in trained.items()}
            snapshot |= {"script": script, "args": vars(args), "evaluations": evaluations, "iteration": iteration}
            snapshot |= {"global_step": global_step, "torch_rng": torch.get_rng_state()}
            torch.save(snapshot, buffer := io.BytesIO())
            write_atomically(os.path.join(run_dir, "checkpoint.pt"), buffer.getvalue())
            saved_step = global_step
        if finished or stop_signals:
            break

        # COLLECT
        iteration += 1
        seeds = np.random.SeedSequence([args.seed, 0, iteration]).generate_state(args.num_envs)
        rollout = collect(envs, actor, seeds, device)
        obs, state, avail, active, actions, logprobs, rewards, terminated, alive, won = rollout  # (T, E, N, ...)
        global_step += int(alive.sum())

        # DEPENDENCE GRAPH, by models trained up to the iteration before
        probability, entropies = {"random": args.graph_p, "complete": 1.0}.get(args.graph, 0.0), {}
        # random, complete, identity: no edge but one's own, then others added with the probability
        graph = change_edges(torch.zeros((*active.shape, N), dtype=torch.bool, device=device), 0.0, probability)
        if args.graph == "learned":
            graph, entropies = learned_graph(models, obs, avail, active, args.c, args.pair_chunk)
        graph = graph.transpose(-1, -2) if args.transpose_graph else graph
        graph = change_edges(graph, args.edge_drop, args.edge_add) & living_pairs(active)

        # ADVANTAGES
        with torch.no_grad():
            values = critic(state)  # (T+1, E, N)
        experience = rewards, values, terminated, alive
        returns = gae(*experience, args.gamma, args.gae_lambda) + values[:-1]  # the critic's target ignores the graph
        advantages = multi_agent_gae(*experience, graph, args.gamma, args.gae_lambda, args.soft)  # (T, E, N)

        # UPDATE POLICY AND CRITIC, THEN THE GRAPH MODELS
        batch = obs[:-1], state[:-1], avail, active, alive, actions, logprobs, advantages, returns
        try:
            losses = ppo_update(actor, critic, actor_optimizer, critic_optimizer, batch, args)
            if args.graph == "learned":
                data = obs, avail, active, actions, args.pair_chunk
                losses |= update_graph_models(models, models_optimizer, *data)
        except UserError as error:
            bar.close()
            last = f"the last checkpoint is of frame {saved_step}" if saved_step >= 0 else "there is no checkpoint"
            raise UserError(f"iteration {iteration}: {error}; {last}") from error

        # LOG
        losses["explained_variance"] = 1 - (returns - values[:-1])[alive].var() / returns[alive].var()
        episodes = rewards.sum(0).mean(0)  # (N), mean return of each agent
        charts = {"episodic_return": episodes.sum(), "episodic_length": alive.sum(0).float().mean()}
        charts |= {f"episodic_return_agent_{i}": value for i, value in enumerate(episodes)}
        deaths = (alive.unsqueeze(-1) & ~active).any(0).float().sum(-1)  # before the last step
        charts |= {"win_rate": won.float().mean(), "deaths": deaths.mean()}
        charts |= {"learning_rate": args.learning_rate, "SPS": (global_step - start_step) / (time.time() - start_time)}
        edges = (graph.sum() - active.sum()) / active.sum()  # per living agent, besides its own
        statistics = {"density": edges} | entropies
        for group, metrics in (("charts", charts), ("losses", losses), ("graph", statistics)):
            for name, value in metrics.items():
                writer.add_scalar(f"{group}/{name}", float(value), global_step)
        bar.set_postfix(won=f"{evaluations[-1]['win_rate']:.2f}", edges=f"{edges:.2f}", refresh=False)
        bar.update(global_step - bar.n)

    bar.close()
    writer.close()
    envs.close()
    sys.exit(128 + stop_signals[0] if stop_signals else 0)


if __name__ == "__main__":
    try:
        main()
    except (UserError, ImportError) as error:
        print(f"{os.path.basename(__file__)}: {error}", file=sys.stderr)
        sys.exit(2)
    except (EOFError, ConnectionError, multiprocessing.TimeoutError) as error:
        print(f"an environment's process is gone or stuck ({type(error).__name__}); use --resume", file=sys.stderr)
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(1)  # gymnasium would wait for the lost process
