"""The SMAClite environment against the package: the same games, rewards per agent that add up, none of its crashes.

What "equal" means here: rewards, masks, ends and the winner exactly; observations and states bit for bit.
Where numpy's library fuses multiplication and addition, a game in a hundred may differ; those played here do not.
"""

import contextlib
import functools
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("smaclite", reason="SMAClite is not on PyPI: pip install -r requirements-smaclite.txt")

from conftest import load
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from smaclite.env import SMACliteEnv
from smaclite.env.maps.map import MapPreset
from smaclite.env.rvo2 import rvo2
from smaclite.env.rvo2.neighbour_finder import NeighbourFinder
from smaclite.env.units.combat_type import CombatType
from smaclite.env.units.unit import Unit

pytestmark = pytest.mark.smaclite
script = load("mappo_dg_smaclite.py")
MultiAgentSMAClite, PairwiseNeighbourFinder = script.MultiAgentSMAClite, script.PairwiseNeighbourFinder
make_map, UserError = script.make_map, script.UserError
MAPS = [preset.value.name for preset in MapPreset] + ["25m_vs_30m"]


def make_stock(name: str, use_cpp_rvo2: bool = False) -> SMACliteEnv:
    with contextlib.redirect_stdout(io.StringIO()):
        return SMACliteEnv(make_map(name), seed=0, use_cpp_rvo2=use_cpp_rvo2)


def scripted_actions(env, mask, rng, aggression: float) -> list[int]:
    """Random available actions; with probability `aggression` attacks the nearest enemy in reach or walks to it."""
    actions = []
    for k, available in enumerate(mask):
        choice = rng.choice(np.flatnonzero(available))
        if rng.random() < aggression and k in env.agents and env.agents[k].damage:
            reachable = [enemy for enemy in env.enemies.values() if available[6 + enemy.id_in_faction]]
            deltas = {e.id_in_faction: e.pos - env.agents[k].pos for e in reachable or env.enemies.values()}
            nearest = min(deltas, key=lambda e: deltas[e] @ deltas[e])
            dx, dy = deltas[nearest]
            towards = 2 + ((0 if dy > 0 else 1) if abs(dy) > abs(dx) else (2 if dx > 0 else 3))
            wanted = 6 + nearest if reachable else towards
            choice = wanted if available[wanted] else choice
        actions.append(int(choice))
    return actions


def refresh(env):
    """Lets the environment see units that a test has moved."""
    for finder in (env.neighbour_finder_all, env.neighbour_finder_ally, env.neighbour_finder_enemy):
        finder.update()
    if isinstance(env, MultiAgentSMAClite):
        env.get_obs()


def stop_all(env) -> list[int]:
    """Action 1 for the living, 0 for the dead."""
    return [int(k in env.agents) for k in range(env.n_agents)]


# Games


def compare_episode(stock, ours, aggression: float, seed: int):
    """Plays an episode on both; asserts that all is equal and that rewards sum to the package's team reward."""
    rng = np.random.default_rng(seed)
    stock.last_actions = np.zeros_like(stock.last_actions)  # reset leaves those of the episode before
    stock_obs, _ = stock.reset(seed=seed)
    obs, info = ours.reset(seed=seed)
    for _ in range(150):
        mask = np.array(stock.get_avail_actions())
        np.testing.assert_array_equal(info["avail_actions"], mask > 0)
        np.testing.assert_array_equal(obs, np.stack(stock_obs))
        np.testing.assert_array_equal(info["state"], stock.get_state())
        np.testing.assert_array_equal(info["alive"], [k in stock.agents for k in range(stock.n_agents)])
        actions = scripted_actions(stock, mask, rng, aggression)
        stock_obs, stock_reward, stock_done, _, stock_info = stock.step(actions)
        obs, reward, terminated, truncated, info = ours.step(np.array(actions))
        assert reward == stock_reward and terminated == stock_done
        assert info["battle_won"] == stock_info["battle_won"]
        assert info["rewards"].sum() == pytest.approx(stock_reward, abs=1e-5)
        if terminated:
            break
    assert terminated or truncated


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("aggression", [0.0, 0.9])
def test_game_is_the_packages_and_rewards_add_up(name, aggression):
    compare_episode(make_stock(name), MultiAgentSMAClite(name), aggression, seed=3)


@pytest.mark.parametrize("name", ["MMM2", "corridor"])
def test_game_with_the_cpp_collision_code_is_the_packages(name):
    pytest.importorskip("rvo2", reason="SMAClite-Python-RVO2 is not installed")
    compare_episode(make_stock(name, True), MultiAgentSMAClite(name, use_cpp_rvo2=True), 0.5, seed=3)


@pytest.mark.parametrize("name", MAPS)
def test_win_bonus_is_split_equally_and_rewards_add_up(name):
    """Strong agents against enemies of one hit point; the bonus of 200 goes to all alike, also to the dead."""
    env = MultiAgentSMAClite(name)
    _, info = env.reset(seed=0)
    for enemy in env.enemies.values():
        enemy.hp, enemy.shield, enemy.hp_regen = 1, 0, 0
    for agent in env.agents.values():
        agent.hp = 10_000
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(150):
        enemies = len(env.enemies)
        _, reward, terminated, _, info = env.step(scripted_actions(env, info["avail_actions"], rng, 1.0))
        kills += enemies - len(env.enemies)
        assert info["rewards"].sum() == pytest.approx(reward, abs=1e-5)
        if terminated:
            break
    assert info["battle_won"] and kills == env.n_enemies
    share = 200 / env.n_agents / (env.max_reward / 20)
    assert info["rewards"].min() >= share - 1e-6
    idle = [k for k in range(env.n_agents) if env.earned[k] == 0]
    np.testing.assert_allclose(info["rewards"][idle], share + env.earned[-1] * share / 200, rtol=1e-5)


@pytest.mark.parametrize("health, earned", [(45, 6), (2, 2 + 10)])
def test_damage_and_kill_go_to_the_agent_that_made_them(health, earned):
    """One shot of one marine: 6 points of damage, or the 2 that were left and 10 for the kill."""
    env = MultiAgentSMAClite("10m_vs_11m")
    env.reset(seed=0)
    env.enemies[5].hp = health
    env.agents[3].pos[:] = env.enemies[5].pos - [4, 0]
    refresh(env)
    actions = stop_all(env)
    actions[3] = 6 + 5
    _, _, _, _, info = env.step(actions)
    expected = np.zeros(10)
    expected[3] = earned / (env.max_reward / 20)
    np.testing.assert_allclose(info["rewards"], expected, rtol=1e-6)


def test_what_enemies_do_to_themselves_is_split_equally():
    """bane_vs_bane with agents that only stand: all that is earned is enemy banelings blowing themselves up."""
    env = MultiAgentSMAClite("bane_vs_bane")
    env.reset(seed=0)
    total = 0.0
    for _ in range(60):
        _, reward, terminated, _, info = env.step(stop_all(env))
        assert (info["rewards"] == info["rewards"][0]).all()
        assert info["rewards"].sum() == pytest.approx(reward, abs=1e-5)
        total += reward
        if terminated:
            break
    assert total > 0 and not info["battle_won"]


def test_a_medivac_heals_and_earns_nothing():
    env = MultiAgentSMAClite("MMM")
    env.reset(seed=0)
    medic = next(unit for unit in env.agents.values() if unit.combat_type == CombatType.HEALING)
    patient = next(unit for unit in env.agents.values() if unit is not medic)
    patient.hp = 10
    actions = stop_all(env)
    actions[medic.id_in_faction] = 6 + patient.id_in_faction
    _, _, _, _, info = env.step(actions)
    assert patient.hp > 10 and not info["rewards"].any()
    assert not info["avail_actions"][medic.id_in_faction, 6 + medic.id_in_faction]


# Interface


def test_maps_by_name():
    info = make_map("25m_vs_30m")
    assert (info.num_allied_units, info.num_enemy_units) == (25, 30)
    assert [sum(n for _, n in group.units) for group in info.groups] == [25, 30]
    assert make_map("27m_vs_30m").num_allied_units == 27, "the package's map was changed"
    with pytest.raises(UserError, match="unknown SMAClite map 3m; the maps are .*MMM2"):
        make_map("3m")


def test_nothing_is_printed(capfd):
    MultiAgentSMAClite("2s3z").reset(seed=0)
    assert capfd.readouterr() == ("", "")


def test_missing_cpp_library_is_one_clear_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "rvo2", None)
    monkeypatch.delitem(sys.modules, "smaclite.env.rvo2.rvo2_cpp", raising=False)
    with pytest.raises(ImportError, match="--use-cpp-rvo2 needs the Python module rvo2"):
        MultiAgentSMAClite("2s3z", use_cpp_rvo2=True)


def test_the_dead_do_nothing_and_unavailable_actions_are_refused():
    env = MultiAgentSMAClite("2s3z")
    _, info = env.reset(seed=0)
    with pytest.raises(ValueError, match="Invalid action"):
        env.step([0] * 5)  # the living cannot do nothing
    env.agents[2].hp = 0
    del env.agents[2], env.all_units[next(k for k, unit in env.all_units.items() if unit.hp == 0)]
    obs, _, _, _, info = env.step([1, 1, 0, 1, 1])
    assert info["alive"].tolist() == [True, True, False, True, True]
    assert info["avail_actions"][2].tolist() == [True] + [False] * (env.n_actions - 1)
    assert not obs[2].any() and obs[3].any()
    assert obs.shape == env.observation_space.shape and obs.dtype == np.float32
    with pytest.raises(AssertionError):
        env.step([1, 1, 1, 1, 1])


def test_time_limit_truncates_and_an_ended_episode_stays_as_it_is():
    env = MultiAgentSMAClite("2s3z", time_limit=3)
    env.reset(seed=0)
    ends = [env.step([1] * 5)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    obs, reward, terminated, truncated, info = env.step([99] * 5)
    assert (reward, terminated, truncated) == (0.0, False, True) and not info["rewards"].any()
    np.testing.assert_array_equal(env.step([99] * 5)[0], obs)
    env.reset(seed=0)
    assert env.step([1] * 5)[2:4] == (False, False)


def test_reset_depends_on_the_seed_alone():
    used, fresh = MultiAgentSMAClite("2s3z"), MultiAgentSMAClite("2s3z")
    rng = np.random.default_rng(0)
    _, info = used.reset(seed=1)
    for _ in range(30):
        info = used.step(scripted_actions(used, info["avail_actions"], rng, 0.9))[-1]
    (obs, info), (fresh_obs, fresh_info) = used.reset(seed=7), fresh.reset(seed=7)
    for _ in range(40):
        np.testing.assert_array_equal(obs, fresh_obs)
        for key in info:
            np.testing.assert_array_equal(info[key], fresh_info[key])
        actions = scripted_actions(used, info["avail_actions"], rng, 0.9)
        (obs, *_, info), (fresh_obs, *_, fresh_info) = used.step(actions), fresh.step(actions)


def make_vector(members: int) -> AsyncVectorEnv:
    return AsyncVectorEnv(
        [functools.partial(MultiAgentSMAClite, "2s3z", time_limit=60) for _ in range(members)],
        autoreset_mode=AutoresetMode.DISABLED,
    )


def test_async_vector_env_carries_the_arrays_and_collects_whole_episodes():
    envs, single = make_vector(2), MultiAgentSMAClite("2s3z", time_limit=60)
    try:
        obs, info = envs.reset(seed=[5, 6])
        _, single_info = single.reset(seed=6)
        rng, done = np.random.default_rng(0), np.zeros(2, bool)
        lengths = np.zeros(2, int)
        while not done.all():
            assert info["_rewards"].all() and obs.shape == (2, 5, single.obs_size)
            for key, value in single_info.items():
                assert info[key].dtype == np.asarray(value).dtype
                np.testing.assert_array_equal(info[key][1], value)
            actions = np.array([scripted_actions(single, mask, rng, 0.0) for mask in info["avail_actions"]])
            obs, reward, terminated, truncated, info = envs.step(actions)
            single_info = single.step(actions[1])[-1]
            assert not (done & (reward != 0)).any(), "an ended episode went on"
            lengths += ~done
            done |= terminated | truncated
        assert lengths.min() > 5
    finally:
        envs.close()


def test_a_killed_worker_is_an_error_not_a_hang():
    envs = make_vector(2)
    _, info = envs.reset(seed=[5, 6])
    os.kill(envs.processes[1].pid, signal.SIGKILL)
    try:
        with pytest.raises((EOFError, ConnectionError)):
            envs.step(info["avail_actions"].argmax(-1))
    finally:
        for process in envs.processes:
            process.terminate()
        envs.closed = True


# Neighbours


@pytest.mark.parametrize("name", MAPS)
def test_neighbours_are_the_trees_in_the_trees_order(name):
    """Same units, same order within a plane, distances bit for bit, in all the ways the package asks."""
    env = make_stock(name)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    units = list(env.all_units.values())
    planes = {unit.plane for unit in units}
    assert max(sum(unit.plane is plane for unit in units) for plane in planes) <= 80, (
        "more than one leaf: order differs"
    )
    radii = [5 + unit.radius for unit in units]
    tree, pairwise = NeighbourFinder(), PairwiseNeighbourFinder()
    for trial in range(20):
        for unit in units:
            unit.pos[:] = rng.normal(16, 3, 2) if trial % 2 else rng.integers(10, 20, 2)
        tree.set_all_units(env.all_units)
        pairwise.set_all_units(env.all_units)
        for unit in units:
            unit.pos += rng.normal(0, 0.1, 2)  # both must answer for the time of the update
        for query in (
            dict(radius=radii, return_distance=True, same_plane_only=True),
            dict(radius=radii, return_distance=True, targetting_mode=True),
            dict(radius=3.0),
            dict(radius=9, return_distance=True),
        ):
            for expected, found in zip(tree.query_radius(units, **query), pairwise.query_radius(units, **query)):
                for plane in planes:
                    of_tree, of_pairs = (
                        [hit for hit in hits if (hit[0] if isinstance(hit, tuple) else hit).plane is plane]
                        for hits in (expected, found)
                    )
                    assert of_tree == of_pairs
    assert pairwise.query_radius([], []) == []


def test_enemy_at_exactly_the_sight_range():
    """The package's assertion fails when a unit is at distance 9.0; here that unit is not seen."""
    stock, ours = make_stock("10m_vs_11m"), MultiAgentSMAClite("10m_vs_11m")
    for env in (stock, ours):
        env.reset(seed=0)
        env.enemies[0].pos[:] = env.agents[0].pos + [9, 0]
        refresh(env)
    with pytest.raises(AssertionError):
        stock.get_obs()
    assert not ours.get_obs()[0, 4 : 4 + ours.enemy_feat_size].any()


# Velocities and distances

PAIRS = np.random.default_rng(0).normal(size=(100, 2, 2))
INNER_IS_FUSED = any(np.inner(a, b) != a[0] * b[0] + a[1] * b[1] for a, b in PAIRS)  # multiplication and addition


def test_velocities_and_games_are_equal_to_the_bit_where_inner_products_are_not_fused():
    """Among them the game of 80 that is another on a processor that fuses: the package's own is another there, too."""
    code = "from test_smaclite_environment import *\n"
    code += "print('fused' if INNER_IS_FUSED else 'plain')\n"
    code += "for name in MAPS:\n    compare_velocities(name, trials=2)\n"
    code += "compare_episode(make_stock('27m_vs_30m'), MultiAgentSMAClite('27m_vs_30m'), 0.0, seed=106)\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"OPENBLAS_CORETYPE": "Nehalem"},  # an old processor, for numpy's library
        capture_output=True,
        text=True,
    )
    if done.stdout == "fused\n":
        pytest.skip("numpy's library cannot be kept from fusing")
    assert (done.stdout, done.stderr, done.returncode) == ("plain\n", "", 0)


def crowd(name: str, seed: int) -> SMACliteEnv:
    """The package, its units somewhere in a square, in each other's way, at random velocities and wishes."""
    env = make_stock(name)
    env.reset(seed=0)
    rng = np.random.default_rng(seed)
    for unit in env.all_units.values():
        unit.pos[:] = rng.uniform(12, 12 + rng.choice([3, 6, 12]), 2)
        single = rng.random() < 0.2
        unit.velocity, wish = (
            (rng.normal(size=2) * unit.max_velocity).astype(np.float32 if single else np.float64) for _ in range(2)
        )
        unit.pref_velocity = wish if rng.random() < 0.8 else np.zeros(2)
    env.neighbour_finder_all.update()
    return env


@pytest.mark.parametrize("name", ["MMM2", "3s5z_vs_3s6z", "27m_vs_30m", "corridor", "bane_vs_bane"])
def test_velocities_are_the_packages_to_rounding(name):
    assert compare_velocities(name, trials=10) > 100


def compare_velocities(name: str, trials: int) -> int:
    """In crowds where nearly all have to give way, and many cannot; the arrays' precision is the package's, too.

    Returns how many velocities are not the wished ones.
    """
    changed = 0
    for seed in range(trials):
        env = crowd(name, seed)
        units = env.all_units.values()
        with contextlib.redirect_stdout(io.StringIO()):
            updater = script.QuickVelocityUpdater(
                env.neighbour_finder_all, env.max_unit_radius, env.map_info.terrain, None
            )
        updater.reset_all_units(env.all_units)
        env.velocity_updater.compute_new_velocities(env.all_units)
        expected = [unit.next_velocity for unit in units]
        updater.compute_new_velocities(env.all_units)
        for unit, velocity in zip(units, expected):
            np.testing.assert_allclose(unit.next_velocity, velocity, rtol=0, atol=1e-9 if INNER_IS_FUSED else 0)
            assert unit.next_velocity.dtype == velocity.dtype
            changed += (velocity != unit.pref_velocity).any()
    return changed


def test_units_that_do_not_touch_yet_avoid_each_other_as_in_the_package():
    """Two marines as far apart as they notice each other, who would pass to the left or right, or collide."""
    env = make_stock("MMM2")
    env.reset(seed=0)
    marines = [unit for unit in env.all_units.values() if unit.type.name == "MARINE"][:2]
    units = dict(enumerate(marines))
    env.neighbour_finder_all.set_all_units(units)
    with contextlib.redirect_stdout(io.StringIO()):
        updater = script.QuickVelocityUpdater(env.neighbour_finder_all, env.max_unit_radius, env.map_info.terrain, None)
    updater.reset_all_units(units)
    rng = np.random.default_rng(0)
    changed = 0
    for _ in range(500):
        angle = rng.uniform(0, 2 * np.pi)
        distance = rng.uniform(2 * marines[0].radius, marines[0].radius + env.max_unit_radius)
        way = np.array([np.cos(angle), np.sin(angle)])
        marines[1].pos[:] = rng.uniform((0.5, 12), (3, 16))  # near 0 the gap has more digits than single precision
        marines[0].pos[:] = marines[1].pos - distance * way
        for sign, marine in zip((1, -1), marines):
            marine.velocity = sign * rng.uniform(0, 2) * way + rng.normal(size=2)
            marine.pref_velocity = sign * way * marine.max_velocity + rng.normal(size=2)
        env.neighbour_finder_all.update()
        env.velocity_updater.compute_new_velocities(units)
        expected = [marine.next_velocity for marine in marines]
        updater.compute_new_velocities(units)
        for marine, velocity in zip(marines, expected):
            np.testing.assert_allclose(marine.next_velocity, velocity, rtol=0, atol=1e-12)
            changed += np.abs(velocity - marine.pref_velocity).max() > 0.1
    assert changed > 300


def test_linear_programs_are_the_packages_with_parallel_lines_too():
    """Many lines are parallel, in the same direction or the opposite one, and many leave nothing between them."""
    rng = np.random.default_rng(0)
    failed = 0
    for _ in range(3000):
        angles = rng.choice(rng.uniform(0, 2 * np.pi, 4), rng.integers(1, 7))
        angles += rng.choice([0, np.pi], len(angles))
        angles += rng.uniform(-2e-6, 2e-6, len(angles))  # parallel still; at exactly 0 a sign is a matter of rounding
        directions = np.stack([np.cos(angles), np.sin(angles)], -1)
        points = rng.normal(size=(len(angles), 2)) * rng.choice([0.3, 1.0])
        wish = rng.normal(size=2)
        wish /= max(1.0, np.linalg.norm(wish))
        packages = [rvo2.Line(direction, point) for direction, point in zip(directions, points)]
        expected_count, expected = rvo2.linear_program_2(packages, 1.0, wish, False)
        lines = np.hstack([points, directions]).tolist()
        count, velocity = script.nearest_allowed(lines, 1.0, tuple(wish.tolist()), wish=wish.tolist())
        assert count == expected_count
        np.testing.assert_allclose(velocity, expected, rtol=0, atol=1e-9)
        if count < len(lines):
            failed += 1
            expected = rvo2.linear_program_3(packages, 0, count, 1.0, expected)
            velocity = script.least_violating(lines, count, 1.0, velocity)
            np.testing.assert_allclose(velocity, expected, rtol=0, atol=1e-9)
    assert failed > 1000


@pytest.mark.parametrize("name", ["MMM2", "27m_vs_30m"])
def test_few_units_are_left_to_the_packages_collision_code(name, monkeypatch):
    left, moved = [], []
    monkeypatch.setattr(script.QuickVelocityUpdater, "_avoid", counted(script.QuickVelocityUpdater._avoid, moved))
    monkeypatch.setattr(script.rvo2, "compute_new_velocity", counted(rvo2.compute_new_velocity, left))
    env = MultiAgentSMAClite(name)
    _, info = env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(40):
        *_, info = env.step(scripted_actions(env, info["avail_actions"], rng, 0.5))
    assert len(left) < 0.1 * len(moved)


def counted(function, calls: list):
    """The function, which also appends to calls."""

    def call(*args):
        calls.append(None)
        return function(*args)

    return call


def test_distances_at_the_edge_of_a_reach_are_the_packages():
    """Targets at a distance that equals the reach but for a few units in the last place of single precision."""
    env = MultiAgentSMAClite("2s3z")
    env.reset(seed=0)
    agent, target = env.agents[0], env.enemies[0]
    rng = np.random.default_rng(0)
    answers = set()
    for reach in (script.AGENT_TARGET_RANGE, agent.attack_range + agent.radius + target.radius):
        for _ in range(1000):
            angle = rng.uniform(0, 2 * np.pi)
            agent.pos[:] = rng.uniform(8, 24, 2)
            target.pos[:] = agent.pos + (reach + rng.normal() * 1e-6) * np.array([np.cos(angle), np.sin(angle)])
            inside = bool(script.point_inside_circle(target.pos, agent.pos, reach))
            if reach == script.AGENT_TARGET_RANGE:
                assert script.in_reach([agent], [target], reach).tolist() == [[inside]]
            else:
                assert agent.has_within_attack_range(target) == Unit.has_within_attack_range(agent, target)
            answers.add((reach, inside))
    assert len(answers) == 4


@pytest.mark.parametrize("name", ["MMM2", "corridor"])
def test_masks_are_the_packages_wherever_agents_stand(name):
    """Also outside of the map, and in a wall."""
    env = MultiAgentSMAClite(name)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(50):
        for unit in env.all_units.values():
            unit.pos[:] = rng.uniform(-2, 34, 2)
        expected = SMACliteEnv.get_avail_actions(env)
        np.testing.assert_array_equal(env._masks(), np.array(expected, bool))


# Crashes of the package


def into_the_wall(env, steps: int):
    """All agents walk north-west, where corridor's wall is."""
    env.reset(seed=0)
    for step in range(steps):
        mask = np.array(env.get_avail_actions()) > 0
        for direction in (2, 5) if step % 2 else (5, 2):
            actions = np.where(mask[:, direction], direction, mask[:, 1].astype(int))
            if (actions == direction).any():
                break
        env.step([int(action) for action in actions])


def test_wall_lines_take_a_scalar_for_a_dtype(monkeypatch):
    """The walls bug is reached by walking along a wall; with a numpy that refuses the call the package dies, we do not.

    `picky` stands for such a numpy; the present one gives a single number where a vector is meant.
    """
    assert np.array(-0.8, np.float64(0.6)).shape == ()
    calls = []

    def array(*args, **kwargs):
        if len(args) > 1:
            calls.append(args)
            raise TypeError(f"Cannot interpret '{args[1]}' as a data type")
        return np.array(*args, **kwargs)

    picky = SimpleNamespace(**{key: getattr(np, key) for key in ("zeros", "inner", "sqrt", "inf", "linalg", "ndarray")})
    monkeypatch.setattr(rvo2, "np", SimpleNamespace(**vars(picky), array=array))
    with pytest.raises(TypeError):
        into_the_wall(make_stock("corridor"), 20)
    calls.clear()
    env = MultiAgentSMAClite("corridor")
    into_the_wall(env, 20)
    assert calls and all(np.isfinite(unit.pos).all() for unit in env.all_units.values())


def test_units_in_one_place_do_not_end_the_game():
    """Their velocity is 0 / 0; the package's positions become nan and its KD-tree refuses them."""
    stock, ours = make_stock("10m_vs_11m"), MultiAgentSMAClite("10m_vs_11m")
    for env in (stock, ours):
        env.reset(seed=0)
        env.enemies[0].pos[:] = env.enemies[1].pos
        refresh(env)
    with np.errstate(invalid="ignore"):
        with pytest.raises(ValueError, match="NaN"):
            stock.step([1] * 10)
        ours.step([1] * 10)
    assert all(np.isfinite(unit.pos).all() for unit in ours.all_units.values())


def test_beam_at_a_target_that_has_just_died():
    """Two colossi, one zergling with one hit point and nobody near it: the second shot meets an empty array."""
    stock, ours = make_stock("2c_vs_64zg"), MultiAgentSMAClite("2c_vs_64zg")
    for env in (stock, ours):
        env.reset(seed=0)
        env.enemies[0].pos[:] = env.agents[0].pos + [1, 5]
        env.enemies[0].hp, env.enemies[0].hp_regen, env.agents[1].cooldown = 1, 0, 0.25
        refresh(env)
    with pytest.raises(ValueError, match="not aligned"):
        stock.step([6, 6])
    _, _, _, _, info = ours.step([6, 6])
    np.testing.assert_allclose(info["rewards"], [(1 + 10) * 20 / ours.max_reward, 0], rtol=1e-6)
    assert ours.agents[1].cooldown > 0, "the second shot was fired"
