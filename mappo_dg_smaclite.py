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

import atexit
import contextlib
import csv
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
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
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

if os.name == "posix":
    import fcntl

HAVE_SMACLITE = all(importlib.util.find_spec(name) for name in ("smaclite", "rtree", "sklearn", "pygame"))
if HAVE_SMACLITE:
    from smaclite.env.maps.map import MapPreset
    from smaclite.env.rvo2 import rvo2
    from smaclite.env.rvo2.neighbour_finder import NeighbourFinder
    from smaclite.env.rvo2.velocity_updater import NumpyVelocityUpdater
    from smaclite.env.smaclite import AGENT_SIGHT_RANGE, AGENT_TARGET_RANGE, REWARD_WIN, SMACliteEnv
    from smaclite.env.terrain.terrain import TerrainType
    from smaclite.env.units.combat_type import CombatType
    from smaclite.env.units.unit import Unit
    from smaclite.env.util import point_inside_circle
    from smaclite.env.util.direction import Direction
    from smaclite.env.util.faction import Faction
    from smaclite.env.util.plane import Plane
else:  # what does not play can be imported without it
    NeighbourFinder = NumpyVelocityUpdater = SMACliteEnv = Unit = object

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
    """episodes of an evaluation: half with sampled actions, half with the most likely ones (greedy)"""
    hidden_dim: int = 64
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

    c: float = 0.9
    """entropy-ratio threshold of an edge: 0: no edges (towards local rewards), 1: most (towards global)"""
    graph: Literal["learned", "random", "complete", "identity"] = "learned"
    """where the dependence graph comes from"""
    graph_p: float = 0.5
    """probability of an edge under --graph random"""
    soft: bool = True
    """count the share 1 - gae_lambda of all TD errors at once; --no-soft: none before a meeting"""
    encoder: bool = True
    """learn the graph on encoded observations; --no-encoder: on raw ones"""
    edge_drop: float = 0.0
    """probability of removing an edge (injected noise)"""
    edge_add: float = 0.0
    """probability of adding a missing edge (injected noise)"""
    transpose_graph: bool = False
    """exchange influencer and influenced, as the authors' code does with the learned graph"""
    pair_chunk: int = 65_536
    """pairs of agents that the reverse model treats at a time: bounds the memory"""


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
    check_range("num_workers", args.num_workers, 1)
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
    if not HAVE_SMACLITE:
        raise UserError(
            "SMAClite or what it needs is not installed: pip install --no-deps -r requirements-smaclite.txt && "
            'pip install -r requirements.txt "gymnasium>=1.4" rtree scikit-learn pygame'
        )
    frames = args.num_envs * make_env(args.env_id, args.use_cpp_rvo2).time_limit
    if args.total_timesteps < frames:
        raise UserError(f"total_timesteps is {args.total_timesteps}, below one iteration ({frames} frames)")


def check_graph_args(args):
    """Raise UserError for the first setting of the dependence graph that makes no sense."""
    check_range("c", args.c, 0, 1)
    check_range("graph_p", args.graph_p, 0, 1)
    check_range("edge_drop", args.edge_drop, 0, 1)
    check_range("edge_add", args.edge_add, 0, 1)
    check_range("pair_chunk", args.pair_chunk, 1)


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


# Skip on first reading, up to MultiAgentSMAClite, and its get_obs, _seen and _masks: they play the package's games,
# only faster: MMM2 4.4, 3s5z_vs_3s6z 3.7, 27m_vs_30m 3.7 times.
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
            self.positions = np.array([unit.pos.tolist() for unit in self.units])  # (n, 2)

    def query_radius(self, units, radius, return_distance=False, same_plane_only=False, targetting_mode=False):
        """Per unit of `units` the list of units, or of (unit, distance), within `radius` cells (a number or a list)."""
        if not units:
            return []
        delta = np.array([unit.pos.tolist() for unit in units])[:, None] - self.positions  # (m, n, 2)
        distance_sq = delta[..., 0] ** 2 + delta[..., 1] ** 2
        # Only the package's get_obs asks with one radius for distances; it asserts that none equals the radius.
        strict = return_distance and np.isscalar(radius)
        near = np.sqrt(distance_sq) < radius if strict else distance_sq <= np.square(radius)[..., None]
        if same_plane_only or targetting_mode:
            for plane in {unit.plane for unit in self.units}:
                columns = np.array([unit.plane is plane for unit in self.units])
                rows = [unit.plane is plane if same_plane_only else plane in unit.valid_targets for unit in units]
                near &= np.logical_or.outer(rows, ~columns)
        rows, columns = near.nonzero()
        neighbours = [[] for _ in units]
        for i, j, distance in zip(rows.tolist(), columns.tolist(), np.sqrt(distance_sq[rows, columns])):
            neighbours[i].append((self.units[j], distance) if return_distance else self.units[j])
        return neighbours


def avoidance_line(gap, sideways, distance, reach, approach):
    """ORCA (van den Berg et al., 2011) for a unit and another: the end of the forbidden relative velocities.

    Forbidden is what brings the two within `reach`, the sum of their radii, in a second; if they overlap already, what
    leaves them so for another tick. These velocities are a cone, cut off by a disc.

    gap (x, y) is the way to the other, of length `distance`; sideways: gap * reach; approach (x, y): the unit's
    velocity minus the other's. Returns (change x, y, direction x, y): from the approach to the nearest end of the
    forbidden, and of its boundary there: what is allowed lies to the left. ZeroDivisionError if the two are at one.
    """
    (gap_x, gap_y), (approach_x, approach_y) = gap, approach
    distance_sq, reach_sq = distance**2, reach**2
    overlapping = distance_sq <= reach_sq
    rate = 16.0 if overlapping else 1.0  # 1 / seconds
    x, y = approach_x - rate * gap_x, approach_y - rate * gap_y  # from the center of the disc
    length_sq = x * x + y * y
    ahead = x * gap_x + y * gap_y
    if overlapping or (ahead < 0 and ahead**2 > reach_sq * length_sq):
        length = math.sqrt(length_sq)
        x, y = x / length, y / length
        push = reach * rate - length
        return push * x, push * y, y, -x
    leg = math.sqrt(distance_sq - reach_sq)
    if gap_x * y - gap_y * x <= 0:
        leg = -leg  # the right tangent to the disc instead of the left one
    x, y = (gap_x * leg - sideways[1]) / distance_sq, (sideways[0] + gap_y * leg) / distance_sq
    along = approach_x * x + approach_y * y
    return along * x - approach_x, along * y - approach_y, x, y


def nearest_allowed(lines, speed, velocity, wish=None, towards=None):
    """A linear program in the plane, line by line: the best velocity to the left of all lines, not above `speed`.

    lines: (x, y, direction x, y) each. Best is what is nearest to the wish (x, y), or furthest in direction `towards`.
    velocity (x, y) is the best where there are no lines. Returns how many lines are satisfied, all or those before
    the first that cannot be, and the velocity: the same object if no line has changed it.
    """
    for number, (x, y, dx, dy) in enumerate(lines):
        if dx * (y - velocity[1]) - dy * (x - velocity[0]) <= 0:
            continue
        # The best velocity is on this line, x + t * dx, y + t * dy: where speed and the lines before leave of it
        along = x * dx + y * dy
        half_sq = along**2 + speed**2 - (x * x + y * y)
        if half_sq < 0:
            return number, velocity
        half = math.sqrt(half_sq)
        low, high = -along - half, -along + half
        for other_x, other_y, other_dx, other_dy in lines[:number]:
            slope = dx * other_dy - dy * other_dx
            offset = other_dx * (y - other_y) - other_dy * (x - other_x)
            if slope >= 1e-5:
                high = min(high, offset / slope)
            elif slope <= -1e-5:
                low = max(low, offset / slope)
            elif offset < 0:
                return number, velocity
            if low > high:
                return number, velocity
        if towards:
            t = high if towards[0] * dx + towards[1] * dy > 0 else low
        else:
            t = min(max(dx * (wish[0] - x) + dy * (wish[1] - y), low), high)
        velocity = x + t * dx, y + t * dy
    return len(lines), velocity


def least_violating(lines, first, speed, velocity):
    """Where nearest_allowed has failed at line number `first`: the velocity whose largest violation is smallest."""
    violation = 0.0
    for number in range(first, len(lines)):
        x, y, dx, dy = lines[number]
        if dx * (y - velocity[1]) - dy * (x - velocity[0]) <= violation:
            continue
        balanced = []  # where this line and one before it are violated equally
        for other_x, other_y, other_dx, other_dy in lines[:number]:
            slope = dx * other_dy - dy * other_dx
            if abs(slope) > 1e-5:
                t = (other_dx * (y - other_y) - other_dy * (x - other_x)) / slope
                point = x + t * dx, y + t * dy
            elif dx * other_dx + dy * other_dy > 0:
                continue  # the two say the same
            else:
                point = 0.5 * (x + other_x), 0.5 * (y + other_y)
            change_x, change_y = other_dx - dx, other_dy - dy
            length = math.sqrt(change_x * change_x + change_y * change_y)
            balanced.append((*point, change_x / length, change_y / length))
        inwards = -dy, dx
        satisfied, better = nearest_allowed(balanced, speed, (-dy * speed, dx * speed), towards=inwards)
        if satisfied == len(balanced):
            velocity = better
        violation = dx * (y - velocity[1]) - dy * (x - velocity[0])
    return velocity


class QuickVelocityUpdater(NumpyVelocityUpdater):
    """The package's numpy collision avoidance with Python's floats: numpy is slow on arrays of two numbers.

    Velocities equal the package's to the bit where its np.inner multiplies and adds. On many processors it fuses the
    two; then they differ in the last bits of double precision. Positions are single precision: 79 of 80 games were
    equal nevertheless, and the other one the package itself plays in two ways, depending on the processor. The rare
    units near a wall, or met by another while both have velocities in single precision, are left to the package's code.

    To report upstream: rvo2.compute_new_velocity writes np.array(a, b) where the vector (a, b) is meant, three times.
    The second argument is a dtype; numpy 1.24 to 2.4 take a scalar for its own dtype, so the "vector" is the number a
    and the half-plane of a wall is misplaced by up to 1.2 radii (a horizontal wall's by one radius, a vertical one's
    not at all), in every game. We keep that: the package's trajectories are the benchmark. Should a numpy refuse the
    call, the unit disregards walls for that tick. Also, two units in one place at one velocity get the velocity nan,
    on which the package fails; here they walk as they wished.
    """

    def __init__(self, kd_tree, max_radius, terrain, planes):
        super().__init__(kd_tree, max_radius, terrain, planes)
        boxes = np.array([(wall.cx, wall.cy, wall.half_width, wall.half_height) for wall in self.obstacles])
        self.wall_centers, self.wall_halves = boxes[:, :2], boxes[:, 2:]  # (walls, 2)
        cells = itertools.product(range(len(terrain[0])), range(len(terrain)))
        # of each cell (x, y) how far its nearest point is from a wall
        self.clearance = {cell: self._wall_distance(np.add(cell, 0.5), half=0.5) for cell in cells}

    def reset_all_units(self, all_units):
        """A new episode."""
        self.known = None

    def compute_new_velocities(self, all_units):
        """Sets next_velocity (cells per second) of every unit; who does not want to move stays, as in the package."""
        units = list(all_units.values())
        for unit in units:
            unit.next_velocity = unit.pref_velocity
        wishes = [unit.pref_velocity.tolist() for unit in units]
        movers = [n for n, wish in enumerate(wishes) if any(wish)]  # m of the n units
        if not movers:
            return
        if len(units) != self.known:
            self._learn(units)
        velocities = [unit.velocity.tolist() for unit in units]
        single = [unit.velocity.dtype == np.float32 for unit in units]
        for n, neighbours in zip(movers, self._neighbours(units, movers)):
            unit = units[n]
            both_single = single[n] and any(single[other] for other, *_ in neighbours)
            if both_single or self._near_wall(unit):
                unit.next_velocity = self._ask_package(unit, [(units[row[0]], row[-1]) for row in neighbours])
                continue
            x, y = velocities[n]
            lines = []
            try:
                for other, gap, sideways, reach, distance in neighbours:
                    approach = x - velocities[other][0], y - velocities[other][1]
                    change_x, change_y, *direction = avoidance_line(gap, sideways, distance, reach, approach)
                    share = 0.5 if any(wishes[other]) else 1.0  # who moves as well does half of it
                    lines.append((x + share * change_x, y + share * change_y, *direction))
            except ZeroDivisionError:  # in one place
                continue
            unit.next_velocity = self._avoid(unit, wishes[n], lines)

    def _learn(self, units):
        """What stays the same until a unit dies: for two units (n, n) the sum of their radii and how far one looks."""
        self.known = len(units)
        radii = np.array([unit.radius for unit in units])
        planes = np.array([list(Plane).index(unit.plane) for unit in units])
        self.reaches = radii[:, None] + radii
        self.limits_sq = np.where(planes[:, None] == planes, np.square(self.max_radius + radii)[:, None], -1.0)
        np.fill_diagonal(self.limits_sq, -1.0)

    def _neighbours(self, units, movers):
        """For each mover a list of (other's index, gap (x, y), gap * reach, reach, distance)."""
        positions = np.array([unit.pos.tolist() for unit in units])  # (n, 2)
        deltas = positions - positions[movers, None]  # (m, n, 2)
        distances_sq = deltas[..., 0] ** 2 + deltas[..., 1] ** 2
        numbers, others = (distances_sq <= self.limits_sq[movers]).nonzero()
        gaps = deltas[numbers, others].astype(np.float32)  # as precise as the package's
        reaches = self.reaches[movers][numbers, others]
        sideways = gaps * reaches.astype(np.float32)[:, None]
        columns = numbers, others, gaps, sideways, reaches, np.sqrt(distances_sq[numbers, others])
        found = [[] for _ in movers]
        for number, *row in zip(*(column.tolist() for column in columns)):
            found[number].append(row)
        return found

    def _near_wall(self, unit):
        """Whether a wall is within a second's walk: only there does the package's slow search find one."""
        if unit.plane is not Plane.GROUND:
            return False
        x, y = unit.pos.tolist()
        limit = unit.radius + unit.max_velocity + 0.01
        return self.clearance.get((x // 1, y // 1), 0) < limit and self._wall_distance((x, y)) < limit

    def _wall_distance(self, center, half=0.0):
        """Of a point, or of a square of that half side."""
        gaps = np.maximum(np.abs(center - self.wall_centers) - self.wall_halves - half, 0)
        return np.sqrt((gaps**2).sum(-1)).min()

    def _ask_package(self, unit, neighbours):
        """The velocity by the package; neighbours: (unit, distance) each."""
        walls = self.obstacle_finder.query(unit) if unit.plane is Plane.GROUND else []
        try:
            velocity = rvo2.compute_new_velocity(unit, neighbours, walls)
        except TypeError:
            velocity = rvo2.compute_new_velocity(unit, neighbours, [])
        return velocity if math.isfinite(velocity[0] + velocity[1]) else unit.pref_velocity

    def _avoid(self, unit, wish, lines):
        """The velocity (2) nearest to the wish (x, y), or else the one that violates the lines least."""
        velocity, speed = unit.pref_velocity, unit.max_velocity
        length_sq = wish[0] * wish[0] + wish[1] * wish[1]
        if velocity.dtype == np.float32:  # to be shortened in single precision, too
            if rvo2.vec_len_sq(velocity) > speed**2:
                velocity = rvo2.normalize(velocity) * speed
        elif length_sq > speed**2:
            length = math.sqrt(length_sq)
            velocity = np.array((wish[0] / length * speed, wish[1] / length * speed))
        start = tuple(velocity.tolist())
        satisfied, best = nearest_allowed(lines, speed, start, wish=wish)
        if satisfied < len(lines):
            best = least_violating(lines, satisfied, speed, best)
        return velocity if best is start else np.array(best)


def in_reach(units, targets, reach):
    """Which targets (m) each unit (n) has within that distance: (n, m) bool, to the bit the package's answers."""
    positions = np.array([unit.pos.tolist() for unit in units])
    excess = ((positions[:, None] - np.array([target.pos.tolist() for target in targets])) ** 2).sum(-1) - reach**2
    near = excess <= 0
    for n, m in zip(*(np.abs(excess) < 1e-3).nonzero()):  # single precision may matter
        near[n, m] = point_inside_circle(targets[m].pos, units[n].pos, reach)
    return near


def looks(map_info, unit, has_shields):
    """What a unit looks like to others: health, shield if there are any, and its kind one-hot if there are several."""
    kinds = [0.0] * map_info.num_unit_types
    if kinds:
        kinds[map_info.unit_type_ids[unit.type]] = 1.0
    return [unit.hp / unit.max_hp, *([unit.shield / unit.max_shield] if has_shields else []), *kinds]


class QuickUnit(Unit):
    """A unit of the package that books what it earns, and measures with Python's floats."""

    def enter(self, ledger):
        """ledger (N + 1): what is earned by agent; the last: what is nobody's, as when an enemy blows itself up."""
        self.ledger = ledger
        self.account = self.id_in_faction if self.faction is Faction.ALLY else -1
        self.valid_targets = tuple(self.valid_targets)  # whose `in` compares, where a set's hashes by slow Python code

    def game_step(self, **kwargs):
        """A tick. Returns what was earned."""
        try:
            reward = super().game_step(**kwargs)
        except ValueError:  # the package's colossus fails when its target has just died and nobody else stands there
            return 0
        if reward:
            self.ledger[self.account] += reward
        return reward

    def has_within_attack_range(self, target):
        """As the package, which is asked where single precision may matter."""
        x, y = self.pos.tolist()
        other_x, other_y = target.pos.tolist()
        reach = self.attack_range + target.radius + self.radius
        excess = (x - other_x) ** 2 + (y - other_y) ** 2 - reach**2
        return excess < 0 if abs(excess) > 1e-3 else super().has_within_attack_range(target)


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
                self.velocity_updater = QuickVelocityUpdater(
                    self.neighbour_finder_all, self.max_unit_radius, map_info.terrain, None
                )
        self.time_limit = time_limit
        self.walkable = np.array([[cell is TerrainType.NORMAL for cell in row] for row in map_info.terrain])  # (y, x)
        self.steps = np.array([direction.dx_dy for direction in Direction])  # (4, 2)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (self.n_agents, self.obs_size), np.float32)
        self.action_space = gym.spaces.MultiDiscrete([self.n_actions] * self.n_agents)

    def reset(self, seed=None, options=None):
        """Starts an episode. The package leaves the last episode's actions in the first state; here they are 0."""
        self.last_actions = np.zeros_like(self.last_actions)
        obs, _ = super().reset(seed=seed)
        self.earned = np.zeros(self.n_agents + 1)
        for unit in self.all_units.values():
            unit.__class__ = QuickUnit
            unit.enter(self.earned)
        self.elapsed, self.ended = 0, None
        return obs, self._info(np.zeros(self.n_agents, np.float32))

    def step(self, actions):
        """Half a second of the game. ValueError or AssertionError if an action is not available."""
        if self.ended:
            return self.ended
        self.earned[:] = 0
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
        """What the package's get_obs says, as one array (N, D)."""
        self.avail_actions = self._masks()
        obs = np.zeros((self.n_agents, self.obs_size), np.float32)
        if not self.agents:
            return obs
        agents, enemies = list(self.agents.values()), list(self.enemies.values())
        rows = np.array(list(self.agents))
        of_enemies, enemies_near = self._seen(agents, enemies, self.n_enemies, self.map_info.enemy_has_shields)
        of_allies, allies_near = self._seen(agents, agents, self.n_agents, self.map_info.ally_has_shields)
        others = np.arange(self.n_agents) != rows[:, None]
        # Of a healer the package's first feature of enemy k is whether ally k can be healed
        healing = np.zeros_like(enemies_near)
        columns = min(self.n_enemies, self.n_agents)
        healing[:, :columns] = (allies_near & others)[:, :columns]
        healers = np.array([agent.combat_type is CombatType.HEALING for agent in agents])
        of_enemies[..., 0] *= np.where(healers[:, None], healing, enemies_near)
        own = [looks(self.map_info, agent, self.map_info.ally_has_shields) for agent in agents]
        parts = self.avail_actions[rows, 2:6], of_enemies, of_allies[others], own
        obs[rows] = np.concatenate([np.reshape(part, (len(rows), -1)) for part in parts], 1)
        return obs

    def _seen(self, agents, units, count, has_shields):
        """Of n agents what each sees of `count` units, of which these live, and whether in reach of an attack.

        Features (n, count, F): 1 if seen, distance, x, y, looks; 0 if not. In reach: (n, count) bool.
        """
        size = 5 + has_shields + self.map_info.num_unit_types
        features = np.zeros((len(agents), count, size), np.float32)
        near = np.zeros((len(agents), count), bool)
        if not units:
            return features, near
        positions = np.array([agent.pos.tolist() for agent in agents])[:, None]
        deltas = np.array([unit.pos.tolist() for unit in units]) - positions  # (n, units, 2)
        distances = np.sqrt(deltas[..., 0] ** 2 + deltas[..., 1] ** 2)
        found = np.ones((*distances.shape, size), np.float32)
        found[..., 1] = distances / AGENT_SIGHT_RANGE
        found[..., 2:4] = deltas.astype(np.float32) / AGENT_SIGHT_RANGE
        found[..., 4:] = [looks(self.map_info, unit, has_shields) for unit in units]
        columns = [unit.id_in_faction for unit in units]
        features[:, columns] = np.where((distances < AGENT_SIGHT_RANGE)[..., None], found, 0)
        near[:, columns] = distances <= AGENT_TARGET_RANGE
        return features, near

    def get_avail_actions(self):
        """The mask (N, A) of the current step: computed once, for info and for the package's own check."""
        return self.avail_actions

    def _masks(self):
        """What the package's get_avail_actions says, as an array (N, A) bool."""
        masks = np.zeros((self.n_agents, self.n_actions), bool)
        masks[:, 0] = True
        agents = list(self.agents.values())
        if not agents:
            return masks
        living = list(self.agents)
        masks[living, 0], masks[living, 1] = False, True
        ahead = np.array([agent.pos.tolist() for agent in agents])[:, None] + self.steps  # (living, 4, 2)
        x, y = ahead[..., 0], ahead[..., 1]
        inside = (y >= 0) & (y < self.map_info.width) & (x >= 0) & (x < self.map_info.height)
        masks[living, 2:6] = (
            inside & self.walkable[np.where(inside, y, 0).astype(int), np.where(inside, x, 0).astype(int)]
        )
        fighters = [agent for agent in agents if agent.combat_type is not CombatType.HEALING]
        healers = [agent for agent in agents if agent.combat_type is CombatType.HEALING]
        for units, targets in ((fighters, list(self.enemies.values())), (healers, fighters)):
            if units and targets:
                rows = [unit.id_in_faction for unit in units]
                columns = [6 + target.id_in_faction for target in targets]
                masks[np.ix_(rows, columns)] = in_reach(units, targets, AGENT_TARGET_RANGE)
        return masks

    def _info(self, rewards):
        alive = np.array([k in self.agents for k in range(self.n_agents)])
        info = {"rewards": rewards, "avail_actions": self.avail_actions, "state": self.get_state(), "alive": alive}
        return info | {"battle_won": not self.enemies}


def make_env(env_id, use_cpp_rvo2=False):
    """An environment that computes only; UserError for a map or a library that is not there."""
    try:
        return MultiAgentSMAClite(env_id, use_cpp_rvo2)
    except ImportError as error:
        raise UserError(str(error)) from error


def make_vector_env(args):
    """args.num_envs environments, each in a process of its own, which ends with this one, however that comes about."""

    def make_worker_env():
        if multiprocessing.parent_process() is not None:
            os.setpgrp()  # Ctrl-C in the terminal is for the main process, which saves first
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.SIG_DFL)  # the main process's handlers would be inherited
        return make_env(args.env_id, args.use_cpp_rvo2)

    envs = AsyncVectorEnv(
        [make_worker_env] * args.num_envs,
        autoreset_mode=AutoresetMode.DISABLED,
        max_concurrency=args.num_workers,
    )
    atexit.register(end_workers, envs)
    return envs


def end_workers(envs):
    """End the environments' processes, whatever they are doing."""
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()
    envs.closed = True  # gymnasium's own close() would wait for a step that is under way


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


class Actor(nn.Module):
    """Recurrent policy, shared by all agents: Linear, GRU, Linear. What an agent may not do has probability 0."""

    def __init__(self, obs_dim, num_agents, num_actions, hidden_dim):
        super().__init__()
        bound = (obs_dim + num_agents) ** -0.5  # PyTorch's for a linear layer on [obs, one-hot agent id]
        self.input = nn.Linear(obs_dim, hidden_dim)
        self.agent_id = nn.Parameter(torch.empty(num_agents, hidden_dim).uniform_(-bound, bound))
        self.gru = nn.GRU(hidden_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, num_actions)

    def forward(self, obs, avail, memory=None):
        """obs (T, E, N, D), avail (T, E, N, A) bool, memory (1, E * N, H) -> log-probabilities (T, E, N, A), memory."""
        x = torch.relu(self.input(obs) + self.agent_id)  # (T, E, N, H)
        x, memory = self.gru(x.flatten(1, 2), memory)  # (T, E * N, H)
        logits = self.output(x).view(avail.shape)
        return mask_logits(logits, avail).log_softmax(-1), memory


class Critic(AgentNetwork):
    """Centralised critic: each agent's value from the environment's state, (..., S) -> (..., N)."""

    def forward(self, state):
        return super().forward(state.unsqueeze(-2)).squeeze(-1)


def mask_logits(logits, avail):
    """Logits (..., A) with those of unavailable actions so low that their probability is exactly 0 in float32."""
    return logits.masked_fill(~avail, -1e9)


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

    It is mlp(3 * Z, 256, 128, 128, A) on pairs of agents, the first layer split to save time.
    """

    def __init__(self, latent_dim, num_actions):
        super().__init__()
        self.input = nn.Linear(3 * latent_dim, 256)  # of [z^j, z'^j, z^i]
        self.head = nn.Sequential(nn.ReLU(), nn.LayerNorm(256), mlp(256, 128, 128, num_actions))

    def forward(self, z, z_next, pairs):
        """z and z_next (..., N, Z), pairs (..., N_i, N_j) bool, P of them true -> (P, A)."""
        # the widest layer is computed once per agent and added per pair
        latent_dim = z.shape[-1]
        influenced_weight = self.input.weight[:, : 2 * latent_dim]
        influencer_weight = self.input.weight[:, 2 * latent_dim :]
        influenced = torch.cat([z, z_next], -1) @ influenced_weight.T  # (..., N_j, 256)
        influencer = z @ influencer_weight.T + self.input.bias  # (..., N_i, 256)
        return self.head((influencer.unsqueeze(-2) + influenced.unsqueeze(-3))[pairs])


class GraphLogits(NamedTuple):
    """What the graph models predict of a^i, unavailable actions masked in all, so that entropies can be compared."""

    single_reverse_model: torch.Tensor  # (R, A)
    action_predictor: torch.Tensor  # (R, A)
    reverse_model: torch.Tensor


class GraphModels(nn.Module):
    """The networks behind the learned graph.

    encoder               z = f(o), so that merely seeing another agent gives no edge
    single_reverse_model  q(a^i | z^i, z'^i): trains the encoder to keep what actions change; no other use
    action_predictor      q_phi(a^i | z^i)
    reverse_model         q_psi(a^i | z^j, z'^j, z^i) for all pairs (i, j) of the living, i = j included
    """

    def __init__(self, obs_dim, num_actions, encoder=True, latent_dim=64):
        super().__init__()
        if encoder:
            self.encoder = mlp(obs_dim, 64, 64, latent_dim)
        else:
            self.encoder = nn.Identity()
            latent_dim = obs_dim
        self.single_reverse_model = mlp(2 * latent_dim, 256, 128, 128, num_actions)
        self.action_predictor = mlp(latent_dim, 256, 128, 128, num_actions)
        self.reverse_model = ReverseModel(latent_dim, num_actions)

    def forward(self, obs, avail, active):
        """obs (T+1, E, N, D), avail (T, E, N, A) bool, active (T, E, N) bool -> GraphLogits of what the living did."""
        latent = self.encoder(obs)  # (T+1, E, N, Z)
        z = latent[:-1]
        z_next = latent[1:]
        single = self.single_reverse_model(torch.cat([z[active], z_next[active]], -1))
        # the two others do not train the encoder
        z = z.detach()
        z_next = z_next.detach()
        predictor = self.action_predictor(z[active])
        pairs = living_pairs(active)
        reverse = self.reverse_model(z, z_next, pairs)
        own_avail = avail[active]
        pair_avail = avail.unsqueeze(-2).expand(*pairs.shape, avail.shape[-1])[pairs]  # the influencer's
        return GraphLogits(
            mask_logits(single, own_avail), mask_logits(predictor, own_avail), mask_logits(reverse, pair_avail)
        )


def living_pairs(active):
    """Pairs of agents that are both alive: active (..., N) bool -> (..., N_i, N_j) bool."""
    return active.unsqueeze(-1) & active.unsqueeze(-2)


def time_chunks(T, E, N, pair_chunk):
    """Slices of the time axis with at most pair_chunk pairs of agents each (at least one step): bounds the memory."""
    steps = max(1, pair_chunk // (E * N * N))
    return [slice(start, min(start + steps, T)) for start in range(0, T, steps)]


def entropy(logits):
    """Entropy in nats of the distributions with these logits, (..., A) -> (...)."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def other_agents(graph):
    """The pairs (N_i, N_j) bool with i != j, where graph is any tensor (..., N_i, N_j)."""
    return ~torch.eye(graph.shape[-1], dtype=torch.bool, device=graph.device)


def num_other_pairs(active):
    """How many pairs i != j of the living there are, at least 1; active (..., N) bool."""
    return (living_pairs(active).sum() - active.sum()).clamp(min=1)


@torch.no_grad()
def learned_graph(graph_models, obs, avail, active, c, pair_chunk):
    """i -> j iff H(q_psi(a^i | z^j, z'^j, z^i)) < c H(q_phi(a^i | z^i)), or i = j; H: entropy in nats.

    Shapes as in GraphModels -> graph (T, E, N_i, N_j) bool and, to be logged, the entropies' means and their
    ratio, those of q_psi over the pairs i != j, which alone decide anything. The dead have no edges but their own.
    """
    T, E, N = active.shape
    graph = torch.zeros((T, E, N, N), dtype=torch.bool, device=obs.device)
    predictor_total = torch.zeros((), device=obs.device)
    reverse_total = torch.zeros((), device=obs.device)
    for part in time_chunks(T, E, N, pair_chunk):
        with_next = slice(part.start, part.stop + 1)
        logits = graph_models(obs[with_next], avail[part], active[part])
        pairs = living_pairs(active[part])
        predictor_entropy = entropy(logits.action_predictor)  # (R)
        reverse_entropy = entropy(logits.reverse_model)  # (P)
        own_entropy = torch.zeros(active[part].shape, device=obs.device)  # (T, E, N)
        own_entropy[active[part]] = predictor_entropy
        influencer_entropy = own_entropy.unsqueeze(-1).expand(pairs.shape)[pairs]  # (P)
        graph[part][pairs] = reverse_entropy < c * influencer_entropy
        predictor_total += predictor_entropy.sum()
        reverse_total += reverse_entropy[other_agents(pairs).expand(pairs.shape)[pairs]].sum()
    graph.diagonal(dim1=-2, dim2=-1).fill_(True)
    predictor_mean = predictor_total / active.sum()
    reverse_mean = reverse_total / num_other_pairs(active)
    statistics = {
        "predictor_entropy": predictor_mean,
        "reverse_entropy_others": reverse_mean,
        "entropy_ratio_others": reverse_mean / predictor_mean,
    }
    return graph, statistics


def change_edges(graph, drop, add):
    """Remove each edge with probability drop, add each missing one with probability add; not on the diagonal."""
    noise = torch.rand(graph.shape).to(graph.device)  # drawn on the CPU, whose generator a checkpoint keeps
    graph = torch.where(graph, noise >= drop, noise < add)
    graph.diagonal(dim1=-2, dim2=-1).fill_(True)
    return graph


def dependence_graph(args, graph_models, obs, avail, active):
    """The graph that the options ask for, (T, E, N_i, N_j) bool, and what is to be logged of a learned one.

    obs (T+1, E, N, D), avail (T, E, N, A) bool, active (T, E, N) bool. The dead have no edges but their own.
    """
    N = active.shape[-1]
    identity = torch.eye(N, dtype=torch.bool, device=active.device).expand(*active.shape, N)
    charts = {}
    if args.graph == "learned":
        graph, charts = learned_graph(graph_models, obs, avail, active, args.c, args.pair_chunk)
    elif args.graph == "random":
        graph = change_edges(identity, drop=0.0, add=args.graph_p)
    elif args.graph == "complete":
        graph = torch.ones_like(identity)
    else:
        graph = identity
    if args.transpose_graph:
        graph = graph.transpose(-1, -2)
    if args.edge_drop or args.edge_add:
        graph = change_edges(graph, args.edge_drop, args.edge_add)
    return graph & living_pairs(active), charts


def graph_statistics(graph, active):
    """Edges per living agent besides its own; graph (T, E, N, N), without edges of the dead, active (T, E, N)."""
    return {"edges_per_agent": (graph.sum() - active.sum()) / active.sum()}


def summed_cross_entropy(logits, actions):
    """Sum of the cross-entropies of predicted actions; logits (R, A), actions (R)."""
    return nn.functional.cross_entropy(logits, actions, reduction="sum")


def hits(logits, actions):
    """How many of the actions are the most likely ones; logits (R, A), actions (R)."""
    return (logits.argmax(-1) == actions).sum()


def update_graph_models(graph_models, optimizer, obs, avail, active, actions, pair_chunk):
    """One step on the cross-entropy of each prediction of a^i over all the living, its gradient summed up by chunks.

    Shapes as in GraphModels, actions (T, E, N) -> losses and accuracies. UserError if a loss is not finite.
    """
    num_own = active.sum()
    num_pairs = living_pairs(active).sum()
    metrics = defaultdict(float)
    optimizer.zero_grad()
    for part in time_chunks(*active.shape, pair_chunk):
        with_next = slice(part.start, part.stop + 1)
        logits = graph_models(obs[with_next], avail[part], active[part])
        pairs = living_pairs(active[part])
        own_actions = actions[part][active[part]]  # (R)
        pair_actions = actions[part].unsqueeze(-1).expand(pairs.shape)[pairs]  # (P): the target of (i, j) is a^i
        single_loss = summed_cross_entropy(logits.single_reverse_model, own_actions) / num_own
        predictor_loss = summed_cross_entropy(logits.action_predictor, own_actions) / num_own
        reverse_loss = summed_cross_entropy(logits.reverse_model, pair_actions) / num_pairs
        # one sum, one Adam: no two of the losses share a weight and Adam treats every weight by itself
        loss = single_loss + predictor_loss + reverse_loss
        loss.backward()
        metrics["single_reverse_model_loss"] += single_loss.detach()
        metrics["single_reverse_model_accuracy"] += hits(logits.single_reverse_model, own_actions) / num_own
        metrics["action_predictor_loss"] += predictor_loss.detach()
        metrics["action_predictor_accuracy"] += hits(logits.action_predictor, own_actions) / num_own
        metrics["reverse_model_loss"] += reverse_loss.detach()
        others = other_agents(pairs).expand(pairs.shape)[pairs]  # (P): i = j is easier
        other_hits = hits(logits.reverse_model[others], pair_actions[others])
        metrics["reverse_model_accuracy_others"] += other_hits / num_other_pairs(active)
    norm = nn.utils.clip_grad_norm_(graph_models.parameters(), torch.inf)
    if not norm.isfinite():
        losses = ", ".join(f"{name} is {value:g}" for name, value in metrics.items() if name.endswith("_loss"))
        raise UserError(f"{losses} and the norm of their gradient {norm.item()}")
    optimizer.step()
    return dict(metrics)


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


# ROLLOUT
class Rollout(NamedTuple):
    """One whole game of every environment; T is the length of the longest."""

    obs: torch.Tensor  # (T+1, E, N, D), with the observation after the last step
    state: torch.Tensor  # (T+1, E, S)
    avail: torch.Tensor  # (T, E, N, A) bool: the actions that are available
    active: torch.Tensor  # (T, E, N) bool: the step took place and the agent was living
    actions: torch.Tensor  # (T, E, N) int64
    logprobs: torch.Tensor  # (T, E, N)
    rewards: torch.Tensor  # (T, E, N), each agent's own
    terminated: torch.Tensor  # (T, E) bool: the step ended the game in a terminal state
    alive: torch.Tensor  # (T, E) bool: the step took place; what follows a game's end is padding
    won: torch.Tensor


@torch.no_grad()
def collect(envs, actor, seeds, device, greedy=False, generator=None):
    """Play one whole game in every environment, drawn from its seed -> Rollout.

    Random draws: the generator's, or PyTorch's own.
    """
    envs.reset_async(seed=[int(seed) for seed in seeds])
    obs, info = envs.reset_wait(timeout=300)
    steps = defaultdict(list)
    running = np.ones(len(obs), dtype=bool)
    won = np.zeros(len(obs), dtype=bool)
    memory = None
    while running.any():
        steps["obs"].append(obs)
        steps["state"].append(info["state"])
        steps["avail"].append(info["avail_actions"])
        steps["active"].append(info["alive"] & running[:, None])
        steps["alive"].append(running)
        obs_now = torch.from_numpy(obs).unsqueeze(0).to(device)  # (1, E, N, D)
        avail_now = torch.from_numpy(info["avail_actions"]).unsqueeze(0).to(device)
        all_logprobs, memory = actor(obs_now, avail_now, memory)
        all_logprobs = all_logprobs[0].cpu()  # (E, N, A)
        if greedy:
            actions = all_logprobs.argmax(-1)
        else:
            # Gumbel-max: -log of an exponential is Gumbel noise; a third of the cost of Categorical
            exponential = torch.empty_like(all_logprobs).exponential_(generator=generator)
            actions = (all_logprobs - exponential.log()).argmax(-1)
        logprobs = all_logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        envs.step_async(actions.numpy())
        obs, _, terminated, truncated, info = envs.step_wait(timeout=300)
        steps["actions"].append(actions.numpy())
        steps["logprobs"].append(logprobs.numpy())
        steps["rewards"].append(info["rewards"])
        steps["terminated"].append(terminated & running)
        running = running & ~(terminated | truncated)
        won = won | info["battle_won"]
    steps["obs"].append(obs)
    steps["state"].append(info["state"])
    tensors = {name: torch.from_numpy(np.stack(arrays)).to(device) for name, arrays in steps.items()}
    return Rollout(**tensors, won=torch.from_numpy(won).to(device))


def episode_charts(rollout):
    """Means over the games of a rollout, for TensorBoard."""
    agent_returns = rollout.rewards.sum(0).mean(0)  # (N)
    dead = rollout.alive.unsqueeze(-1) & ~rollout.active  # (T, E, N), before the last step
    charts = {
        "episodic_return": agent_returns.sum(),
        "episodic_length": rollout.alive.sum(0).float().mean(),
        "win_rate": rollout.won.float().mean(),
        "deaths": dead.any(0).float().sum(-1).mean(),
    }
    for i, agent_return in enumerate(agent_returns):
        charts[f"episodic_return_agent_{i}"] = agent_return
    return charts


# PPO UPDATE
def ppo_update(actor, critic, actor_optimizer, critic_optimizer, rollout, advantages, value_targets, args):
    """update_epochs times a critic step, then a policy step, each on the whole batch (Schulman et al. 2017).

    advantages, value_targets (T, E, N) -> means over the epochs. The policy learns from the living; the critic from
    every step, since the dead still receive their share of a victory. UserError if a loss is not finite.
    """
    active = rollout.active
    alive = rollout.alive
    state = rollout.state[:-1][alive]  # (B, S)
    value_targets = value_targets[alive]  # (B, N)
    advantages = advantages[active]  # (R)
    old_logprobs = rollout.logprobs[active]
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    history = defaultdict(list)
    for _ in range(args.update_epochs):
        value_loss = 0.5 * ((critic(state) - value_targets) ** 2).mean()
        gradient_step(critic_optimizer, value_loss, "value_loss", args.max_grad_norm)

        all_logprobs, _ = actor(rollout.obs[:-1], rollout.avail)  # (T, E, N, A)
        mean_entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)[active].mean()
        logprobs = all_logprobs.gather(-1, rollout.actions.unsqueeze(-1)).squeeze(-1)[active]  # (R)
        logratio = logprobs - old_logprobs
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


def evaluate(envs, actor, args, index, device):
    """Play with sampled, then with the most likely actions -> per-agent returns (2, episodes, N), won (2, episodes).

    Either way half of eval_episodes, rounded up. The games depend on args.seed and the evaluation's index alone: all
    scripts here play the same ones, and both halves of an evaluation begin with the same.
    """
    episodes = math.ceil(args.eval_episodes / 2)
    rounds = math.ceil(episodes / args.num_envs)  # every environment plays each time
    seeds = np.random.SeedSequence([args.seed, 1, index]).generate_state(rounds * args.num_envs)
    # an own generator: none of training's random numbers are used up
    generator = torch.Generator().manual_seed(int(seeds[0]))
    agent_returns = []
    won = []
    for greedy in (False, True):
        for round_seeds in seeds.reshape(rounds, args.num_envs):
            rollout = collect(envs, actor, round_seeds, device, greedy, generator)
            agent_returns.append(rollout.rewards.sum(0).cpu())
            won.append(rollout.won.cpu())
    by_kind = (2, rounds * args.num_envs)
    agent_returns = torch.cat(agent_returns).unflatten(0, by_kind)
    won = torch.cat(won).unflatten(0, by_kind)
    return agent_returns[:, :episodes], won[:, :episodes]


def evaluation_row(agent_returns, won, global_step, args):
    """A row of evaluations.csv from what evaluate has returned; greedy games have columns of their own."""
    sampled_returns, greedy_returns = agent_returns.sum(-1)  # (episodes) each
    win_rate, greedy_win_rate = won.float().mean(-1).tolist()
    index = global_step // args.eval_interval
    at_end = global_step >= args.total_timesteps
    row = {
        "global_step": global_step,
        "evaluation": index,
        # when it was due
        "nominal_step": args.total_timesteps if at_end else index * args.eval_interval,
        "episodic_return": sampled_returns.mean().item(),
        "episodic_return_std": sampled_returns.std(correction=0).item(),
        "episodes": len(sampled_returns),
        "win_rate": win_rate,
        "greedy_episodic_return": greedy_returns.mean().item(),
        "greedy_episodic_return_std": greedy_returns.std(correction=0).item(),
        "greedy_win_rate": greedy_win_rate,
    }
    for i, mean in enumerate(agent_returns[0].mean(0).tolist()):
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
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
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


def get_random_state():
    """All that the following iterations draw from; a game depends on its seed alone."""
    return {"torch_rng": torch.get_rng_state()}


def set_random_state(random_state):
    """Back to what get_random_state has returned."""
    torch.set_rng_state(random_state["torch_rng"])


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
        win_rates = f"win rate {last['win_rate']:.2f}, of greedy games {last['greedy_win_rate']:.2f}"
        print(f"last evaluation: {win_rates}, at {last['global_step']:,} frames")
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

    envs = make_vector_env(args)
    probe = make_env(args.env_id)
    N, D = envs.single_observation_space.shape
    S = probe.state_size
    A = probe.n_actions
    actor = Actor(D, N, A, args.hidden_dim).to(device)
    critic = Critic(S, N, args.hidden_dim, 1).to(device)
    graph_models = GraphModels(D, A, args.encoder).to(device)
    adam = {"lr": args.learning_rate, "eps": args.adam_eps, "fused": True}
    actor_optimizer = torch.optim.Adam(actor.parameters(), **adam)
    critic_optimizer = torch.optim.Adam(critic.parameters(), **adam)
    models_optimizer = torch.optim.Adam(graph_models.parameters(), **adam)
    trained = {
        "actor": actor,
        "actor_optimizer": actor_optimizer,
        "critic": critic,
        "critic_optimizer": critic_optimizer,
        "models": graph_models,
        "models_optimizer": models_optimizer,
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
        set_random_state(checkpoint)
    random_state = get_random_state()

    if args.track:
        start_wandb(args, run_name)
    run_name, run_dir, run_file = open_run_folder(run_name, args, checkpoint)
    writer = open_log(run_dir, args, global_step, resumed=checkpoint is not None)
    if evaluations:
        write_evaluations(run_dir, evaluations)
    graph_rule = f"learned, c = {args.c}" if args.graph == "learned" else args.graph
    print(f"{run_dir}: {N} agents, {D} observations, state {S}, {A} actions, {args.num_envs} games per iteration")
    print(f"dependence graph: {graph_rule}; device: {device}")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" frames", unit_scale=True, mininterval=1.0)
    start_time = time.time()
    start_step = global_step

    try:
        # EVALUATE the untrained policy, or what a stop signal has kept from being evaluated
        if evaluation_is_due(evaluations, global_step, args):
            with stop_signals.raised():
                agent_returns, won = evaluate(envs, actor, args, global_step // args.eval_interval, device)
            row = evaluation_row(agent_returns, won, global_step, args)
            log_evaluation(writer, run_dir, evaluations, row)

        while global_step < args.total_timesteps:
            # COLLECT
            seeds = np.random.SeedSequence([args.seed, 0, iteration + 1]).generate_state(args.num_envs)
            with stop_signals.raised():
                rollout = collect(envs, actor, seeds, device)  # (T, E, N, ...)
            alive = rollout.alive
            active = rollout.active
            iteration += 1
            global_step += int(alive.sum())

            # DEPENDENCE GRAPH, by models trained up to the iteration before
            # (T, E, N_i, N_j)
            graph, graph_charts = dependence_graph(args, graph_models, rollout.obs, rollout.avail, active)

            # ADVANTAGES
            with torch.no_grad():
                values = critic(rollout.state)  # (T+1, E, N)
            experience = (rollout.rewards, values, rollout.terminated, alive)
            # a value is that of the agent's own return: its target ignores the graph
            value_targets = gae(*experience, args.gamma, args.gae_lambda) + values[:-1]
            advantages = multi_agent_gae(*experience, graph, args.gamma, args.gae_lambda, args.soft)

            # UPDATE POLICY AND CRITIC, THEN THE GRAPH MODELS
            losses = ppo_update(
                actor, critic, actor_optimizer, critic_optimizer, rollout, advantages, value_targets, args
            )
            if args.graph == "learned":
                losses |= update_graph_models(
                    graph_models, models_optimizer, rollout.obs, rollout.avail, active, rollout.actions, args.pair_chunk
                )
            losses["explained_variance"] = explained_variance(values[:-1][alive], value_targets[alive])
            # the iteration is whole: a stop from here on resumes after it
            random_state = get_random_state()

            # LOG
            charts = episode_charts(rollout)
            charts["learning_rate"] = args.learning_rate
            charts["SPS"] = (global_step - start_step) / max(time.time() - start_time, 1e-9)
            graph_charts |= graph_statistics(graph, active)
            log_scalars(writer, global_step, {"charts": charts, "losses": losses, "graph": graph_charts})

            # EVALUATE
            if evaluation_is_due(evaluations, global_step, args):
                with stop_signals.raised():
                    agent_returns, won = evaluate(envs, actor, args, global_step // args.eval_interval, device)
                row = evaluation_row(agent_returns, won, global_step, args)
                log_evaluation(writer, run_dir, evaluations, row)

            # SHOW
            win_rate = evaluations[-1]["win_rate"]
            edges = graph_charts["edges_per_agent"]
            bar.set_postfix(won=f"{win_rate:.2f}", edges=f"{edges:.2f}", refresh=False)
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
    end_workers(envs)
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
    except (EOFError, ConnectionError, multiprocessing.TimeoutError) as error:
        print(
            f"{SCRIPT}.py: an environment's process is gone or stuck ({type(error).__name__}); use --resume",
            file=sys.stderr,
        )
        sys.exit(1)
