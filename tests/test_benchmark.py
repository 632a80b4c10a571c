"""experiments/benchmark.py --quick: every table is printed and whole; nothing about time, which the machine decides."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, load

LBF = r"Foraging-\d+x\d+-\dp-\df(-coop)?-v3"
NUMBER = r"-?[\d,]+(\.\d+)?"
RATIO = rf"{NUMBER} \| {NUMBER} \| {NUMBER} \| {NUMBER}\.\.{NUMBER}"  # reference, ours, ratio, its range
VERDICT = r">= [\d.]+ \| (yes|NO) \([+-]\d+ %\)"
TABLES = {  # title -> what each of its rows looks like, and how many there are
    "Environment steps/s without and with": (rf"{LBF} \| {RATIO} \| {VERDICT}", 6),
    "pairwise_targets": (rf"\(\d+, 10, \d+\) \| {RATIO} \| {VERDICT}", 2),
    "Environment steps/s (": (rf"{LBF} \| {RATIO} \| ({VERDICT}| \| )", 6),
    "Training frames/s": (rf"\S+_lbf\.py \| {RATIO} \| {VERDICT}", 2),
    "multi_agent_gae": (rf"\(\d+, 10, \d+\) \| {RATIO} \| {VERDICT} \| \de-\d\d \| yes \(-\d+ %\)", 2),
    "Phases of an iteration": (rf"\S+_lbf\.py \| {LBF}( \| \d+\.\d){{7}}", 4),
    "Peak memory": (r"mappo_dg_lbf\.py \| \d+ MB \| < 1000 MB \| (yes|NO) \([+-]\d+ %\)", 1),
    "An iteration of mappo_dg_lbf.py": (r"\d+ \| \d+( \| \d+\.\d){6} \| \d+", 2),
}


SMACLITE = r"\S+_smaclite\.py"
SMACLITE_TABLES = {
    "SMAClite, environment steps/s, collisions by numpy": (rf"MMM2 \| {RATIO} \| {VERDICT}", 1),
    "Training frames/s with two workers": (rf"{SMACLITE} \| {RATIO} \| {VERDICT} \| \d+ %", 2),
    "Phases of an iteration": (rf"{SMACLITE}( \| \d+){{7}}", 2),
}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return measure(tmp_path_factory)


@pytest.fixture(scope="module")
def smaclite_output(tmp_path_factory):
    return measure(tmp_path_factory, "--smaclite")


def measure(tmp_path_factory, *options):
    command = [sys.executable, str(ROOT / "experiments" / "benchmark.py"), "--quick", *options]
    folder = tmp_path_factory.mktemp("benchmark")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not os.listdir(folder), "the benchmark leaves nothing behind"
    return done.stdout


@pytest.mark.parametrize("title", TABLES)
def test_table_is_whole(output, title):
    assert_whole(output, title, *TABLES[title])


@pytest.mark.smaclite
@pytest.mark.parametrize("title", SMACLITE_TABLES)
def test_smaclite_table_is_whole(smaclite_output, title):
    assert_whole(smaclite_output, title, *SMACLITE_TABLES[title])


def assert_whole(output, title, pattern, count):
    sections = [part for part in output.split("\n### ") if part.startswith(title)]
    assert len(sections) == 1
    header, _, *rows = [line for line in sections[0].splitlines() if line.startswith("|")]
    assert len(rows) == count
    for row in rows:
        assert row.count("|") == header.count("|")
        assert re.fullmatch(rf"\| {pattern} \|", row), row


def test_equals_the_definition(output):
    differences = re.findall(r"\| (\de-\d\d) \|", output)
    assert len(differences) == 2
    assert all(float(difference) <= 1e-4 for difference in differences)


def test_bad_settings_are_one_sentence(tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "benchmark.py"), "--repeats", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "benchmark.py: --repeats must be at least 1, not 0\n")


@pytest.mark.smaclite
def test_the_same_games_for_stock_and_ours():
    """What is compared plays the same steps: the random actions depend on the masks, which must be equal."""
    sys.path.insert(0, str(ROOT / "experiments"))
    import benchmark

    masks, choose = [], benchmark.random_actions
    benchmark.random_actions = lambda mask, rng: masks.append(mask.copy()) or choose(mask, rng)
    try:
        stock, ours = benchmark.smaclite_players(
            load("mappo_dg_smaclite.py"), "2s3z", False, 200
        )  # past the stock player's reset
        stock()
        ours()
    finally:
        benchmark.random_actions = choose
    assert len(masks) == 400 and all((a == b).all() for a, b in zip(masks[:200], masks[200:]))


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    import benchmark

    yield benchmark
    for name in ("mappo_dg_lbf", "mappo_local_lbf"):
        sys.modules.pop(name, None)  # the wrapped one


@pytest.mark.parametrize("script, absent", [("DG", []), ("LOCAL", ["graph", "model update"])])
def test_the_phases_of_an_iteration_take_the_time_of_what_is_called_in_them(benchmark, script, absent):
    """Every reading of this clock is a second after the one before, and 100 seconds pass in each of the functions."""
    module = benchmark.load(getattr(benchmark, script))
    now, before = [0], []
    slow = {
        "collect": module,
        "player_positions": module,
        "forward": module.Critic,
        "ppo_update": module,
        "update_graph_models": module,
        "log_scalars": module,
    }
    calls = dict(zip(slow, (1, 1, 1 + 4, 1, 1, 1)))  # the critic's other calls are those of ppo_update's epochs
    names = dict(zip(slow, benchmark.PHASES))
    for name, owner in slow.items():
        benchmark.wrap(owner, name, lambda: now.__setitem__(0, now[0] + 100))

    def clock():
        now[0] += 1
        return now[0]

    training = benchmark.Training(
        module, "--num-envs=2", before=lambda: before.append(now[0]) or len(before), turns=2, iterations=3, timer=clock
    )
    assert len(training.history) == 6 and [reference for reference, _ in training.pairs] == [1, 2]
    expected = {names[name]: 100 * count for name, count in calls.items()}
    expected["advantages"] = 100
    expected["policy update"] += 400
    for record in training.history:
        for phase in benchmark.PHASES:
            if phase in absent:
                assert record[phase] == 0
            else:
                assert expected[phase] < record[phase] < expected[phase] + 50, phase
    frames = sum(record["frames"] for record in training.history[3:])
    assert 6 <= frames <= 2 * 3 * 50
    seconds = sum(record[phase] for record in training.history[3:] for phase in benchmark.PHASES)
    assert training.pairs[1][1] == frames / seconds


def test_a_phase_that_never_begins_is_an_error(benchmark, monkeypatch):
    monkeypatch.setitem(benchmark.PHASES, "log", ["a_function_that_has_another_name_now"])
    with pytest.raises(AssertionError, match="log"):
        benchmark.Training(benchmark.load(benchmark.DG), "--num-envs=2")


def test_says_on_what_it_was_measured(output):
    assert re.match(r".+, \d+ cores, of which one is used; \w+, Python 3\.\d+\.\d+, torch \d+\.\d+", output)
