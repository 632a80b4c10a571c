"""experiments/loads.py: what it counts, on boards made by hand, and its table."""

import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import run, run_folder

for package in ("matplotlib", "pandas", "PIL"):
    pytest.importorskip(package, reason="needs experiments/requirements.txt")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import loads  # noqa: E402

lbf = loads.lbf
NONE, LOAD = 0, 5


def board(levels, food_level):
    """An environment whose reset puts one food in the middle and the players around it."""
    env = lbf.make_env(f"Foraging-5x5-{len(levels)}p-1f-v3", seed=1)
    reset = env.reset

    def by_hand(**kwargs):
        reset(**kwargs)
        env.field[:] = 0
        env.field[2, 2] = food_level
        env._food_spawned = env.field.sum()
        for player, level, cell in zip(env.players, levels, [(1, 2), (3, 2), (2, 1), (2, 3)], strict=False):
            player.level = level
            player.position = cell
        env._gen_valid_moves()
        return env._make_gym_obs(), {}

    env.reset = by_hand
    return env


@pytest.mark.parametrize(
    "levels, food, actions, expected",
    [
        ([1, 1], 2, [LOAD, LOAD], {"loads": 1}),
        ([1, 1, 1], 2, [LOAD, LOAD, LOAD], {"loads": 1, "more than needed": 1, "nobody decisive": 1}),
        ([2, 1, 1], 3, [LOAD, LOAD, LOAD], {"loads": 1, "more than needed": 1}),
        ([1, 1, 1], 2, [LOAD, LOAD, NONE], {"loads": 1}),
        ([2, 2], 2, [LOAD, NONE], {"loads": 1}),
    ],
)
def test_who_could_be_missed(levels, food, actions, expected):
    team_return, length, counts = loads.watch_loads(board(levels, food), lambda obs: actions)
    needed = loads.agents_needed(food, levels)
    assert team_return == pytest.approx(1) and length == 1
    assert +counts == Counter(expected | {("there", needed): 1})


def test_what_nobody_loads_is_left():
    env = board([1, 1, 2], 4)
    _, length, counts = loads.watch_loads(env, lambda obs: [LOAD, LOAD, NONE])
    assert length == env._max_episode_steps
    assert +counts == Counter({("there", 3): 1, ("left", 3): 1})


def test_the_strongest_agents_come_first():
    assert [loads.agents_needed(level, [1, 2, 1]) for level in (1, 2, 3, 4)] == [1, 1, 2, 3]
    with pytest.raises(loads.UserError):
        loads.agents_needed(5, [1, 2, 1])


def test_the_table(tmp_path):
    options = ["--env-id", "Foraging-5x5-2p-1f-v3", "--no-winner-take-all", "--num-envs", 2, "--total-timesteps", 200]
    run("baselines/mappo_local_lbf.py", *options, "--eval-episodes", 1, cwd=tmp_path)
    first, second = (
        run("experiments/loads.py", run_folder(tmp_path), "--episodes", 20, cwd=tmp_path).stdout for _ in range(2)
    )
    assert first == second
    head, _, row = first.splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells["run"] == run_folder(tmp_path).name and 0 <= float(cells["left, needs 1"]) <= 1
    assert 0 <= float(cells["nobody decisive"]) <= float(cells["more than needed"]) <= 1


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["nowhere"], "nowhere does not exist"),
        ([], "give the folder of a run"),
        (["nowhere", "--episodes", 0], "--episodes must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(wrong, words, tmp_path):
    done = run("experiments/loads.py", *wrong, cwd=tmp_path, check=False)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
