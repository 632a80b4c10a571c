"""The environment of the scripts against lbforaging's own, and its winner-take-all variant against a re-derivation."""

import gymnasium as gym
import lbforaging  # noqa: F401, registers the ids
import numpy as np
import pytest
from conftest import load

dg = load("mappo_dg_lbf.py")

VANILLA = ["Foraging-15x15-4p-3f-v3", "Foraging-15x15-3p-4f-v3", "Foraging-10x10-3p-3f-v3"]
COOP = ["Foraging-8x8-2p-4f-coop-v3", "Foraging-10x10-2p-3f-coop-v3", "Foraging-15x15-3p-4f-coop-v3"]
OTHERS = [
    "Foraging-2s-8x8-3p-3f-v3",
    "Foraging-2s-10x10-2p-2f-coop-v3",
    "Foraging-12x12-9p-4f-v3",
    "Foraging-2s-5x5-5p-1f-v3",
]


def stock(env_id, seed):
    env = gym.make(env_id, disable_env_checker=True).unwrapped
    env.seed(seed)
    return env


def same_observations(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b))


def towards_food(env, rng):
    """Random actions, three quarters of them steps towards the nearest food, so that food is loaded often."""
    actions = rng.integers(0, 6, env.n_agents).tolist()
    foods = np.argwhere(env.field)
    for i, player in enumerate(env.players):
        if len(foods) and rng.random() < 0.75:
            row, col = (foods - player.position)[np.abs(foods - player.position).sum(1).argmin()]
            vertical, horizontal = (2 if row > 0 else 1), (4 if col > 0 else 3)
            options = [5] if abs(row) + abs(col) == 1 else [vertical] * abs(row) + [horizontal] * abs(col)
            actions[i] = int(rng.choice(options))
    return actions


@pytest.mark.parametrize("env_id", VANILLA + COOP + OTHERS)
def test_bit_equal_to_the_package(env_id):
    """Observations, rewards, ends, valid actions and the random stream, over thousands of steps of many episodes."""
    ours, theirs = dg.make_env(env_id, False, seed=7), stock(env_id, 7)
    rng = np.random.default_rng(0)
    loaded = episodes = 0
    assert same_observations(ours.reset()[0], theirs.reset()[0])
    for _ in range(2500):
        actions = towards_food(theirs, rng)
        a, b = ours.step(actions), theirs.step(actions)
        assert same_observations(a[0], b[0])
        assert a[1:] == b[1:]
        for mine, other in zip(ours.players, theirs.players):
            assert ours._valid_actions[mine] == theirs._valid_actions[other]
        assert ours.np_random.bit_generator.state == theirs.np_random.bit_generator.state
        loaded += sum(b[1]) > 0
        if b[2]:
            episodes += 1
            assert same_observations(ours.reset()[0], theirs.reset()[0])
    assert loaded >= 3 and episodes >= 50  # three agents at one food are rare


@pytest.mark.parametrize("env_id", COOP + ["Foraging-8x8-5p-4f-coop-v3"])
def test_winner_take_all(env_id):
    """The team's reward is the package's; all of a food's share goes to its strongest loader, ties to the first."""
    env, twin = dg.make_env(env_id, True, seed=3), dg.make_env(env_id, False, seed=3)
    rng = np.random.default_rng(1)
    shared = ties = 0
    env.reset()
    for _ in range(6000):
        # the twin is the package's game on the same board, with its own way of sharing
        twin.field, twin.current_step, twin._food_spawned = env.field.copy(), env.current_step, env._food_spawned
        for mine, other in zip(env.players, twin.players):
            other.setup(mine.position, mine.level, env.field_size)
        twin._gen_valid_moves()
        before, where = env.field.copy(), [player.position for player in env.players]
        actions = towards_food(env, rng)
        _, rewards, terminated, _, _ = env.step(actions)
        _, split, twin_terminated, _, _ = twin.step(actions)
        assert sum(rewards) == pytest.approx(sum(split)) and terminated == twin_terminated

        expected = [0.0] * env.n_agents
        for row, col in np.argwhere((before > 0) & (env.field == 0)):
            beside = [i for i, (r, c) in enumerate(where) if abs(r - row) + abs(c - col) == 1]
            loaders = [i for i in beside if actions[i] == 5]
            assert sum(env.players[i].level for i in loaders) >= before[row, col]
            strongest = max(env.players[i].level for i in loaders)
            best = [i for i in loaders if env.players[i].level == strongest]
            expected[best[0]] += before[row, col] / env._food_spawned
            shared += len(loaders) > 1
            ties += len(best) > 1
        assert rewards == pytest.approx(expected)
        if terminated:
            env.reset()
    assert shared > 50 and ties > 5


@pytest.mark.parametrize("env_id", COOP)
def test_winner_take_all_food_levels(env_id):
    """Every food's level is the sum of the two lowest player levels; an episode's team return is at most 1."""
    env = dg.make_env(env_id, True, seed=5)
    for _ in range(50):
        env.reset()
        lowest = sum(sorted(player.level for player in env.players)[:2])
        assert set(env.field[env.field > 0]) == {lowest}
        assert env._food_spawned == lowest * np.count_nonzero(env.field)


def test_level_two_agent_can_load_alone():
    """Known and kept: with levels (1, 1, 2) a food has level 2 and the level-2 agent needs nobody."""
    env = dg.make_env("Foraging-15x15-3p-4f-coop-v3", True, seed=0)
    while sorted(player.level for player in env.players if player.level) != [1, 1, 2]:
        env.reset()
    strong = next(i for i, player in enumerate(env.players) if player.level == 2)
    row, col = np.argwhere(env.field)[0]
    for i, player in enumerate(env.players):  # the strong one beside the food, the others in corners
        player.position = (int(row) - 1, int(col)) if i == strong else ((0, 0), (14, 14))[i % 2]
    env._gen_valid_moves()
    rewards = env.step([5 if i == strong else 0 for i in range(3)])[1]
    assert rewards[strong] == pytest.approx(0.25) and sum(rewards) == rewards[strong]


def test_the_board_of_a_fresh_environment_depends_on_its_seed_alone():
    boards = [dg.make_env("Foraging-8x8-2p-4f-coop-v3", True, seed=9).reset()[0] for _ in range(2)]
    assert same_observations(*boards)
    other = dg.make_env("Foraging-8x8-2p-4f-coop-v3", True, seed=10).reset()[0]
    assert not same_observations(boards[0], other)


def test_unusable_ids_are_named():
    with pytest.raises(dg.UserError, match="Foraging-8x8-2p-4f-coop-v3"):
        dg.make_env("Foraging-8x8-2p-4f-cop-v3")
    with pytest.raises(dg.UserError, match="grid"):
        dg.make_env("Foraging-grid-8x8-2p-4f-v3")
