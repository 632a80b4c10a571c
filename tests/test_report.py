"""experiments/report.py: collecting, merging, statistics, tables, and that the pages' tables are those of the CSVs.

The comparison with rliable is skipped where rliable is not installed. It needs pandas < 3, so run it in a fresh
environment: `pip install -r experiments/requirements.txt -r tests/requirements-extra.txt pytest`, then
`pytest --noconftest tests/test_report.py` (conftest needs torch).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for package in ("matplotlib", "pandas", "scipy", "yaml"):
    pytest.importorskip(package, reason="needs experiments/requirements.txt")
import pandas as pd  # noqa: E402
from scipy.stats import trim_mean  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import collecting  # noqa: E402
import plotting  # noqa: E402
import report  # noqa: E402

HEADER = "global_step,evaluation,nominal_step,episodic_return,episodic_return_std,episodes"
TASK = "Foraging-8x8-2p-4f-coop-v3"


def write_run(
    output,
    method,
    task,
    seed,
    returns,
    *,
    agents=2,
    interval=50_000,
    seconds=None,
    name="run",
    win=False,
    greedy=None,
    late=0,
    frames=None,
):
    """A run folder as the scripts and launch.py leave it; finished if `seconds` is given. Returns the job's folder.

    The first evaluation is of the untrained policy, the others of the first iteration at or past k * interval, unless
    their frames are given. greedy: the win rate of the greedy games, if there are any.
    """
    goal = interval * max(1, len(returns) - 1) if frames is None else frames[-1]
    if frames is None:
        frames = [k * interval + (k > 0) * ((37 * k + 11 * seed) % 400 + late) for k in range(len(returns))]
    job = output / method / task / f"seed{seed}"
    folder = job / "runs" / name
    folder.mkdir(parents=True)
    both = ",greedy_episodic_return,greedy_episodic_return_std,greedy_win_rate" * (greedy is not None)
    lines = [HEADER + ",win_rate" * win + both + "".join(f",episodic_return_agent_{i}" for i in range(agents))]
    for step, value in zip(frames, returns, strict=True):
        row = f"{step},{step // interval},{step // interval * interval},{value},0.25,100" + f",{value}" * win
        row += f",15.5,2.5,{greedy}" * bool(both)
        lines.append(row + f",{value / agents}" * agents)
    (folder / "evaluations.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if seconds is not None:
        command = ["--total-timesteps", str(goal)]
        record = {"command": command, "duration_seconds": seconds, "run_folder": f"runs/{name}", "attempts": 1}
        (job / "finished.json").write_text(json.dumps(record), encoding="utf-8")
    return job


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def run(root, **args):
    return report.main(report.Args(**args), root)


def markers(name, table=""):
    return f"<!-- report:{name} begin -->\n{table}<!-- report:{name} end -->\n"


def table_of(root, name):
    """The table that report.py writes into a page with one pair of markers."""
    results = root / "experiments" / "results"
    grids = report.load_grids(results) | report.load_others(results)
    text = report.fill_tables(markers(name), grids, "README.md")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[0:1] == "|"]


@pytest.fixture
def root(tmp_path):
    """A repository with one grid: two methods, two tasks, three seeds of 20 evaluations; one run unfinished."""
    output = tmp_path / "output"
    for method, level in (("mappo_dg", 0.8), ("mappo_local", 0.3)):
        for task in (TASK, "Foraging-10x10-3p-3f-v3"):
            for seed in (1, 2, 3):
                unfinished = (method, task, seed) == ("mappo_local", TASK, 3)
                returns = np.minimum(np.arange(21) / 10, 1)[: 9 if unfinished else 21] * (level + 0.01 * seed)
                write_run(output, method, task, seed, returns, seconds=None if unfinished else 1800)
    run(tmp_path, collect=output, grid="small")
    return tmp_path


# STATISTICS
@pytest.mark.parametrize("shape", [(2, 1), (3, 2), (3, 6), (5, 6), (7, 3)])
def test_iqm_is_the_25_percent_trimmed_mean(shape):
    scores = np.random.default_rng(0).random((4, *shape))
    assert np.allclose(report.iqm(scores), [trim_mean(s, 0.25, axis=None) for s in scores])


def test_probability_of_improvement_by_hand():
    x, y = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    # task 0: wins (1>0), (3>2), (3>0), tie (3,3) of 6 pairs: 3.5 / 6; task 1: two ties of 6 pairs: 1 / 6
    assert report.probability_of_improvement(x, y) == pytest.approx((3.5 / 6 + 1 / 6) / 2)
    assert report.probability_of_improvement(y, x) == pytest.approx(1 - (3.5 / 6 + 1 / 6) / 2)


def test_bootstrap_resamples_within_tasks():
    scores = np.tile([0.1, 0.5, 0.9], (4, 1))  # tasks differ, runs do not: no uncertainty
    for metric in report.METRICS.values():
        value, low, high = report.estimate(metric, scores)
        assert value == pytest.approx(low) == pytest.approx(high)


def test_bootstrap_interval_covers_the_true_mean():
    rng, centres = np.random.default_rng(1), np.array([0.1, 0.4, 0.8])
    samples = centres + 0.1 * rng.standard_normal((400, 15, 3))
    intervals = [report.estimate(report.mean, s, reps=400, seed=k)[1:] for k, s in enumerate(samples)]
    covered = np.mean([low <= centres.mean() <= high for low, high in intervals])
    assert 0.90 <= covered <= 0.98  # a percentile bootstrap of 15 runs falls a little short of 95%


def test_agrees_with_rliable():
    try:
        from rliable import library, metrics
    except ImportError:
        pytest.skip("needs rliable: see this file's first lines")
    rng = np.random.default_rng(2)
    x, y = (np.clip(rng.normal(centre, 0.15, (5, 6)), 0, 1) for centre in (0.6, 0.5))
    x[0, :2] = 1.3, 1.1  # above 1, where the optimality gap has its clip
    np.random.seed(0)  # rliable draws from numpy's global generator
    theirs = {
        "IQM": metrics.aggregate_iqm,
        "Median": metrics.aggregate_median,
        "Mean": metrics.aggregate_mean,
        "Optimality gap": metrics.aggregate_optimality_gap,
    }

    def all_metrics(scores):
        return np.array([theirs[name](scores) for name in report.METRICS])

    points, intervals = library.get_interval_estimates({"x": x}, all_metrics, reps=4000)
    ours = np.array([report.estimate(metric, x, reps=20_000) for metric in report.METRICS.values()])
    assert np.allclose(ours[:, 0], points["x"])
    assert np.allclose(ours[:, 1:].T, intervals["x"], atol=0.006)  # interval widths are about 0.1

    points, intervals = library.get_interval_estimates(
        {"x,y": (x, y)}, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), reps=1000
    )
    ours = report.estimate(report.probability_of_improvement, x, y)
    assert ours[0] == pytest.approx(points["x,y"][0])
    assert np.allclose(ours[1:], intervals["x,y"][:, 0], atol=0.03)

    points, intervals = library.create_performance_profile({"x": x}, report.THRESHOLDS, reps=1000)
    ours = report.estimate(report.performance_profile, x)
    assert np.allclose(ours[0], points["x"])
    assert np.allclose(ours[1:], intervals["x"], atol=0.051)  # a step is 1 / 30


# COLLECT AND MERGE
def test_collect_writes_one_row_per_evaluation(root):
    path = root / "experiments" / "results" / "small.csv"
    data = pd.read_csv(path)
    assert list(data.columns) == [*collecting.COLUMNS, "return_agent_0", "return_agent_1"]
    assert len(data) == 11 * 21 + 9
    assert (data.return_agent_0 + data.return_agent_1 - data["return"]).abs().max() < 1e-5
    unfinished = (data.method == "mappo_local") & (data.task == TASK) & (data.seed == 3)
    assert (data.finished == ~unfinished).all() and data.seconds.isna().equals(unfinished)
    before = path.read_bytes()
    run(root, collect=root / "output", grid="small")
    assert path.read_bytes() == before


def test_collect_a_restarted_run_a_half_row_and_agents_that_differ(tmp_path):
    output = tmp_path / "output"
    write_run(output, "m", "two", 1, [0, 0.1], name="a_first_try")
    job = write_run(output, "m", "two", 1, [0, 0.2, 0.4], name="b_resumed")
    with (job / "runs" / "b_resumed" / "evaluations.csv").open("a", encoding="utf-8") as file:
        file.write("150020,0.5")  # killed while writing
    write_run(output, "m", "three", 10, [0, 0.9], agents=3, seconds=60.4)
    write_run(output, "m", "three", 9, [], agents=3)  # started, nothing evaluated yet
    run(tmp_path, collect=output, grid="g")
    data = pd.read_csv(tmp_path / "experiments" / "results" / "g.csv")
    assert list(data.task) == ["three"] * 2 + ["two"] * 3
    assert list(data["return"]) == [0, 0.9, 0, 0.2, 0.4]
    assert list(data.seconds.dropna()) == [60, 60]
    assert data.return_agent_2.isna().tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("tag", ["graph/density", "graph/edges_per_agent"])
def test_edges_per_agent_are_the_mean_since_the_evaluation_before_by_either_name(tmp_path, tag):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs torch")
    folder = write_run(tmp_path / "output", "mappo_dg", TASK, 1, np.zeros(11), seconds=5) / "runs/run"
    write_run(tmp_path / "output", "mappo_local", TASK, 1, np.zeros(11), seconds=5)
    frames = pd.read_csv(folder / "evaluations.csv").global_step
    for first, value in (
        (0, 0.25),
        (6, 0.75),
    ):  # killed after the 7th interval, resumed from a checkpoint after the 6th
        with tensorboard.SummaryWriter(folder, filename_suffix=f".{first}") as writer:
            writer.add_scalar("charts/SPS", 1, 1)
            for k in range(first, 10 if first else 7):
                writer.add_scalar(tag, value - 0.25, frames[k] + 500)
                writer.add_scalar(tag, value + 0.25, frames[k + 1])
                writer.add_scalar("charts/win_rate", k / 10, frames[k + 1])
                writer.add_scalar("losses/reverse_model_accuracy", k / 20, frames[k + 1])
    run(tmp_path, collect=tmp_path / "output", grid="g")
    data = pd.read_csv(tmp_path / "experiments/results/g.csv")
    assert data[data.method == "mappo_dg"].edges_per_agent.round(6).tolist()[1:] == [0.25] * 6 + [0.75] * 4
    assert data[data.method == "mappo_dg"].train_win_rate.tolist()[1:] == [k / 10 for k in range(10)]
    assert data.edges_per_agent.isna().sum() == 1 + 11  # nothing before the first iteration; no graph
    assert table_of(tmp_path, "g-density")[2:] == [["MAPPO-DG", "0.75"]]
    assert table_of(tmp_path, "g-training")[2:] == [["MAPPO-DG", "0.85"]]
    head = ["task", "method", "edges per agent", "accuracy of q_psi"]
    assert table_of(tmp_path, "g-models")[::2] == [head, ["8x8-2p-4f-coop", "MAPPO-DG", "0.75", "0.43"]]
    data.drop(columns="edges_per_agent").to_csv(tmp_path / "experiments/results/g.csv", index=False)
    for table in ("g-density", "g-models"):
        with pytest.raises(report.UserError, match=f"^README.md: no table {table}: the grid has no edges_per_agent"):
            table_of(tmp_path, table)


def test_what_is_measured_over_other_pairs_has_a_column_of_its_own(tmp_path):
    """A run of version 0.1.0, over all pairs, and one of today, over those with i != j; the simulator's edges."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs torch")
    names = "simulator_precision simulator_recall simulator_edges_per_agent average_precision edges_per_agent".split()
    tags = {
        1: ["graph/density", "graph/entropy_ratio", "losses/reverse_model_accuracy"],
        2: ["graph/entropy_ratio_others", "losses/reverse_model_accuracy_others", *(f"graph/{name}" for name in names)],
    }
    for seed in tags:
        folder = write_run(tmp_path / "output", "mappo_dg", TASK, seed, np.zeros(2), seconds=5) / "runs/run"
        with tensorboard.SummaryWriter(folder) as writer:
            for k, tag in enumerate(tags[seed], start=1):
                writer.add_scalar(tag, k / 8, 100)
    run(tmp_path, collect=tmp_path / "output", grid="g")
    old, new = pd.read_csv(tmp_path / "experiments/results/g.csv").groupby("seed").last().to_dict("records")
    graph = ["edges_per_agent", "entropy_ratio", "reverse_accuracy"]
    assert [old[column] for column in graph] == [0.125, 0.25, 0.375]
    assert [new[column] for column in ["entropy_ratio_others", "reverse_accuracy_others", *names]] == [
        k / 8 for k in range(1, 8)
    ]
    assert all(np.isnan(old[f"{column}_others"]) and np.isnan(new[column]) for column in graph[1:])
    heads = table_of(tmp_path, "g-models")[0]
    assert {"entropy ratio", "entropy ratio, i ≠ j", "precision, simulator", "average precision"} < set(heads)


def test_the_note_on_pairs_is_there_for_what_is_over_all_pairs_only(root):
    data = report.load(root / "experiments/results/small.csv").assign(edges_per_agent=1.0, entropy_ratio_others=0.5)
    assert "i = j included" not in report.models_table(data)
    assert "i = j included" in report.models_table(data.assign(reverse_accuracy=0.5))


def test_collect_takes_only_the_grids_methods_and_tasks(tmp_path):
    for method, task in (("mappo_dg", "a"), ("mappo_dg", "b"), ("mappo_dg_c0", "a")):
        write_run(tmp_path / "output", method, task, 1, [0, 0.5], agents=2 if task == "a" else 3)
    (tmp_path / "experiments" / "grids").mkdir(parents=True)
    grid = "methods: [{name: mappo_dg, script: s.py}]\ntasks: [{env_id: a}]\n"
    (tmp_path / "experiments" / "grids" / "g.yaml").write_text(grid, encoding="utf-8")
    run(tmp_path, collect=tmp_path / "output", grid="g")
    data = pd.read_csv(tmp_path / "experiments" / "results" / "g.csv")
    assert set(zip(data.method, data.task, strict=True)) == {("mappo_dg", "a")}
    assert list(data.columns)[-1] == "return_agent_1"  # no empty column for a task that is not in the grid


def write_events(path, values, tag="graph/edges_per_agent"):
    """An event file {step: value} with this very name, which SummaryWriter does not allow."""
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="needs torch")
    folder = path.parent / "events"
    with tensorboard.SummaryWriter(folder) as writer:
        for step, value in values.items():
            writer.add_scalar(tag, value, step)
    (file,) = folder.iterdir()
    file.rename(path)
    folder.rmdir()


def test_event_files_are_read_in_the_order_of_their_names(tmp_path):
    """A resumed run repeats what came after its checkpoint; its earlier files are renamed to seconds 0, 1, ..."""
    folder = write_run(tmp_path / "output", "m", "t", 1, np.zeros(4)) / "runs/run"
    frames = pd.read_csv(folder / "evaluations.csv")["global_step"].tolist()
    parts = {
        "1700000000.b.3.2": 0.75,
        "0000000001.a.9.1": 0.5,
        "0000000000.z.10.0": 0.25,
    }  # the latest is written first
    for first, (name, value) in zip((2, 1, 0), parts.items()):
        write_events(folder / f"events.out.tfevents.{name}", {step: value for step in frames[first + 1 :]})
    assert collecting.collect(tmp_path / "output")["edges_per_agent"].tolist()[1:] == [0.25, 0.5, 0.75]


def test_event_files_are_read_as_tensorboard_reads_them(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path = tmp_path / "events.out.tfevents.1.host.1.0"
    write_events(path, {step: step / 7 for step in range(0, 3000, 100)})
    events = (
        accumulator.EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload().Scalars("graph/edges_per_agent")
    )
    whole = collecting.read_scalars(path)["edges_per_agent"]
    assert whole == {event.step: event.value for event in events} and len(whole) == 30
    path.write_bytes(path.read_bytes()[:-3])  # killed while writing
    assert collecting.read_scalars(path)["edges_per_agent"] == {step: whole[step] for step in range(0, 2900, 100)}


@pytest.mark.filterwarnings("error")
def test_merge_keeps_what_reaches_further_and_what_is_gone(tmp_path):
    def returns_of(name, *runs):
        for seed, returns, seconds, *late in runs:
            write_run(tmp_path / name, "m", "t", seed, returns, seconds=seconds, late=sum(late))
        run(tmp_path, collect=tmp_path / name, grid="g")
        data = pd.read_csv(tmp_path / "experiments" / "results" / "g.csv")
        last = data.groupby("seed").last()
        return dict(zip(last.index, zip(last["return"], last.finished, strict=True), strict=True))

    assert returns_of("a", (1, [0, 1], None), (2, [0, 1, 2], 5)) == {1: (1, 0), 2: (2, 1)}
    shutil.rmtree(tmp_path / "a")
    assert returns_of("b", (1, [0, 1, 3], None)) == {1: (3, 0), 2: (2, 1)}  # 1 got further, 2's folder is gone
    assert returns_of("c", (1, [0, 4], 5), (2, [0, 1, 5], None)) == {1: (3, 0), 2: (2, 1)}  # shorter; not finished
    assert returns_of("d", (1, [0, 1, 6], 5), (3, [0], None)) == {1: (6, 1), 2: (2, 1), 3: (0, 0)}  # finished now
    assert returns_of("e", (2, [0, 1, 7], 5, -5)) == {
        1: (6, 1),
        2: (7, 1),
        3: (0, 0),
    }  # as long; ends some frames earlier


def test_of_two_copies_that_got_as_far_the_one_with_more_evaluations_stays(tmp_path):
    for name, rows in (("whole", [0, 1, 2]), ("gap", [0, 2])):
        frames = [50_000 * k for k in rows]
        write_run(tmp_path / name, "m", "t", 1, rows, frames=frames, seconds=5)
        run(tmp_path, collect=tmp_path / name, grid="g")
    assert pd.read_csv(tmp_path / "experiments/results/g.csv")["return"].tolist() == [0, 1, 2]


def test_a_run_that_goes_on_to_more_frames_is_not_finished(tmp_path):
    job = write_run(tmp_path / "output", "m", "t", 1, np.full(11, 0.5), seconds=5)
    assert collecting.collect(tmp_path / "output")["finished"].eq(1).all()
    edit(job / "finished.json", "500000", "400000")
    assert collecting.collect(tmp_path / "output")["finished"].eq(0).all()


def test_collecting_none_of_the_grids_runs_is_an_error(tmp_path):
    write_run(tmp_path / "output", "m", "t", 1, [0, 1])
    (tmp_path / "experiments" / "grids").mkdir(parents=True)
    (tmp_path / "experiments" / "grids" / "g.yaml").write_text(
        "{methods: [{name: other}], tasks: [{env_id: t}]}", encoding="utf-8"
    )
    with pytest.raises(report.UserError, match="holds no evaluations of the grid's methods and tasks"):
        run(tmp_path, collect=tmp_path / "output", grid="g")
    assert not (tmp_path / "experiments" / "results").exists()


# WHICH EVALUATION A ROW IS
@pytest.mark.parametrize("interval", [40_000, 30_000, 33_333, 1000, 50_000])
def test_no_evaluation_is_lost_whatever_the_interval(tmp_path, interval):
    for task, length in (("t", 21), ("u", 12)):
        for seed in (1, 2):
            returns = np.arange(length) / 100
            write_run(tmp_path / "output", "m", task, seed, returns, interval=interval, seconds=5)
    run(tmp_path, collect=tmp_path / "output", grid="g")
    data = report.load(tmp_path / "experiments/results/g.csv")
    assert data["complete"].all() and len(data) == 2 * (21 + 12)
    run_1 = data[(data["task"] == "t") & (data["seed"] == 1)]
    assert run_1["nominal_frames"].tolist() == [k * interval for k in range(21)]
    nominal, curves = report.score_curves(data, "m")  # up to the end of the shorter task
    assert nominal.tolist() == [k * interval for k in range(12)]
    assert np.allclose(curves, np.arange(12)[:, None, None] / 100)
    assert table_of(tmp_path, "g-scores")[2] == ["m", "0.19 ± 0.00 (2)", "0.11 ± 0.00 (2)"]


def test_runs_with_intervals_of_their_own_are_compared_at_the_frames_that_all_have(tmp_path):
    for task, seed, interval in (("t", 1, 20_000), ("u", 1, 30_000), ("t", 2, 30_000), ("u", 2, 30_000)):
        returns = np.arange(0, 300_001, interval) / 1e6
        write_run(tmp_path / "output", "m", task, seed, returns, interval=interval, seconds=5)
    run(tmp_path, collect=tmp_path / "output", grid="g")
    data = report.load(tmp_path / "experiments/results/g.csv")
    assert data["complete"].all()
    nominal, curves = report.score_curves(data, "m")
    assert nominal.tolist() == list(range(0, 300_001, 60_000))
    assert curves.shape == (6, 2, 2) and np.allclose(curves, nominal[:, None, None] / 1e6)


def test_of_two_evaluations_of_one_index_the_later_one_counts(tmp_path):
    """Both a closing evaluation within an interval, and that of a run that was taken up again to more frames."""
    frames = [0, 40_010, 80_020, 99_990, 120_030, 125_000]
    write_run(tmp_path / "output", "m", "t", 1, [0, 1, 2, 3, 4, 5], interval=40_000, frames=frames, seconds=5)
    run(tmp_path, collect=tmp_path / "output", grid="g")
    path = tmp_path / "experiments/results/g.csv"
    assert pd.read_csv(path)["frames"].tolist() == frames
    data = report.load(path)
    assert data["return"].tolist() == [0, 1, 3, 5] and data["evaluation"].tolist() == [0, 1, 2, 3]
    assert table_of(tmp_path, "g-seeds")[2] == ["t", "m", "2.250", "2.250"]  # the last four evaluations


def test_files_of_older_versions_are_named_and_not_guessed_at(tmp_path):
    job = write_run(tmp_path / "output", "m", "t", 1, [0, 1], seconds=5)
    run(tmp_path, collect=tmp_path / "output", grid="g")
    grid = tmp_path / "experiments/results/g.csv"
    pd.read_csv(grid).drop(columns=["evaluation", "nominal_frames"]).to_csv(grid, index=False)
    with pytest.raises(
        report.UserError, match=r"g\.csv has no column evaluation; .* frames // INTERVAL, nominal_frames"
    ):
        run(tmp_path)
    path = job / "runs/run/evaluations.csv"
    pd.read_csv(path).drop(columns=["evaluation", "nominal_step"]).to_csv(path, index=False)
    with pytest.raises(
        report.UserError, match=r"evaluations\.csv has no column evaluation; .* global_step // INTERVAL"
    ):
        run(tmp_path, collect=tmp_path / "output", grid="h")


def test_the_committed_evaluations_are_every_50k_frames_on_smaclite_every_25k():
    for grid, data in report.load_grids(ROOT / "experiments/results").items():
        interval = 25_000 if grid == "smaclite" else 50_000
        assert (data["evaluation"] == data["frames"] // interval).all()
        assert (data["nominal_frames"] == data["evaluation"] * interval).all()
        assert (data.groupby(report.KEY)["evaluation"].diff().dropna() == 1).all()


# WHAT LIES ABOUT
def test_what_lies_beside_the_runs_is_ignored_and_named(tmp_path, capsys):
    output = tmp_path / "output"
    job = write_run(output, "m", "t", 1, [0, 0.5], seconds=5)
    for name in ("seed1_2", "seed01", "seed1 copy", "seed", "seed1\u0661", "seed18446744073709551616"):
        shutil.copytree(job, job.parent / name)
    write_run(output, "a/b", "t", 3, [0, 1])  # a method named a/b
    (output / "notes.txt").touch()
    (output / "m" / "notes.txt").touch()
    (job.parent / "seed7").touch()
    (output / ".DS_Store").touch()
    runs = collecting.collect(output)
    assert runs["seed"].unique().tolist() == [1] and runs["return"].tolist() == [0, 0.5]
    warning = capsys.readouterr().err
    assert warning.startswith("report.py: not METHOD/TASK/seedN, hence ignored: ") and warning.count("\n") == 1
    names = "notes.txt m/notes.txt a/b/t m/t/seed m/t/seed01 m/t/seed1_2 m/t/seed7 m/t/seed18446744073709551616".split()
    assert set(warning.strip().split(": ")[-1].split(", ")) == {*names, "m/t/seed1 copy", "m/t/seed1\u0661"}


def test_seeds_of_64_bits_and_names_like_numbers_stay_as_they_are(tmp_path):
    seeds = [3, 2**63 - 1, 2**64 - 1]
    methods = {"null", "007", "m\u00e4", "\u00b2", "a_name_that_is_longer_than_the_legend_is_wide" * 3}
    for seed in seeds:  # merged with those before
        for method in methods:
            write_run(tmp_path / "output", method, "1e5", seed, [0, 0.5], seconds=5)
        run(tmp_path, collect=tmp_path / "output", grid="g")
    data = report.load(tmp_path / "experiments/results/g.csv")
    assert sorted(data["seed"].unique().tolist()) == seeds and data["task"].unique() == ["1e5"]
    assert report.score_matrices(data).keys() == methods
    report.draw_curves(data, report.looks(report.ordered(data, "method"), "light"))


def test_runs_may_lie_at_any_depth_and_behind_links(tmp_path):
    write_run(tmp_path / "output", "m", "t", 1, [0, 1], name="env__a/b__1__2/c")
    job = write_run(tmp_path / "output", "m", "t", 2, [0, 2])
    shutil.move(job / "runs/run", tmp_path / "elsewhere")
    (job / "runs/run").symlink_to(tmp_path / "elsewhere")
    assert collecting.collect(tmp_path / "output")["return"].tolist() == [0, 1, 0, 2]


def damage_event_file(job):
    path = job / "runs/run/events.out.tfevents.1.host.1.0"
    write_events(path, {100: 0.5, 200: 0.5})
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    return path


def damaged(name, old, new):
    def damage(job):
        edit(job / name, old, new)
        return job / name

    return damage


EVALUATIONS, ROW = "runs/run/evaluations.csv", "\n100000,2,100000,"
DAMAGE = {
    "a word in place of a number": damaged(EVALUATIONS, ROW, "\n100000,2,many,"),
    "half a frame": damaged(EVALUATIONS, ROW, "\n100000.5,2,100000,"),
    "a row too long": damaged(EVALUATIONS, ROW, "\n100000,2,100000,9,"),
    "a row too short": damaged(EVALUATIONS, ROW, "\n100000,100000,"),
    "a row that lacks its end": damaged(EVALUATIONS, ",100,1.0,1.0", ",100,1.0"),
    "all rows too long": damaged(EVALUATIONS, ",episodic_return_agent_1", ""),
    "no head": damaged(EVALUATIONS, "global_step,", ""),
    "frames that decrease": damaged(EVALUATIONS, ROW, "\n10,2,100000,"),
    "another encoding": lambda job: (job / EVALUATIONS).write_bytes(b"\xff\xfe\n") and job / EVALUATIONS,
    "half a record": damaged("finished.json", "]", ""),
    "another record": damaged("finished.json", "command", "order"),
    "a list": lambda job: (job / "finished.json").write_bytes(b"[1]") and job / "finished.json",
    "a record without frames": damaged("finished.json", "--total-timesteps", "--frames"),
    "a flipped bit in the events": damage_event_file,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_of_a_run_is_named(tmp_path, damage):
    job = write_run(tmp_path / "output", "m", "t", 1, [0, 1, 2, 3], frames=[0, 50_000, 100_000, 150_000], seconds=5)
    collecting.collect(tmp_path / "output")
    path = damage(job)
    with pytest.raises(report.UserError, match=f"^{path} (is damaged: |has no column )"):
        collecting.collect(tmp_path / "output")


def test_damage_in_a_grids_csv_is_named(root):
    path = root / "experiments/results/small.csv"
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole.replace("\n", "\n<<<<<<< HEAD\n", 1), encoding="utf-8")  # a conflict of two branches
    for arguments in ({}, {"collect": root / "output", "grid": "small"}):
        with pytest.raises(report.UserError, match=f"^{path} is damaged: line 2 has no proper task"):
            run(root, **arguments)
    path.write_bytes(whole.encode("utf-16"))
    with pytest.raises(report.UserError, match=f"^{path} is damaged: "):
        run(root, collect=root / "output", grid="small")


@pytest.mark.parametrize("text", ["methods: [", "methods: [a]\ntasks: []", "[]", "methods: []"])
def test_a_damaged_grid_is_named(root, text):
    (root / "experiments/grids").mkdir()
    path = root / "experiments/grids/small.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(report.UserError, match=f"^{path} is not a grid of launch.py"):
        run(root, collect=root / "output", grid="small")


def test_a_finished_run_without_evaluations_is_named(tmp_path):
    write_run(tmp_path / "output", "m", "t", 1, [0, 1], seconds=5)
    job = write_run(tmp_path / "output", "m", "t", 2, [0, 1], seconds=5)
    (job / EVALUATIONS).unlink()
    with pytest.raises(report.UserError, match=f"^{job} has finished, but holds no evaluations"):
        collecting.collect(tmp_path / "output")


def test_a_folder_that_cannot_be_read_is_an_error_and_no_missing_run(tmp_path, monkeypatch):
    """As root one can read everything, hence the patch."""
    job = write_run(tmp_path / "output", "m", "t", 1, [0, 1])
    write_run(tmp_path / "output", "m", "t", 2, [0, 1])
    scan = os.scandir

    def refuse(path):
        if Path(path) == job / "runs/run":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        collecting.collect(tmp_path / "output")


# TABLES
def test_ties_are_rounded_up():
    assert (report.number(0.125, 2), report.number(0.375 - 1e-16, 2), report.number(0.1249, 2)) == (
        "0.13",
        "0.38",
        "0.12",
    )


def test_scores_are_means_over_the_last_tenth_of_complete_runs(root):
    header, dg, local = (row for row in table_of(root, "small-scores") if row[0] != "---")
    assert header == ["method", "8x8-2p-4f-coop", "10x10-3p-3f"]
    assert dg == ["MAPPO-DG", "0.82 ± 0.01 (3)", "0.82 ± 0.01 (3)"]
    assert local == ["MAPPO-local", "0.32 ± 0.01 (2)", "0.32 ± 0.01 (3)"]  # 0.315, its tie rounded up
    seeds = [row for row in table_of(root, "small-seeds") if "MAPPO-local" in row]
    assert seeds[0][2:] == ["0.310", "0.320", "-", "0.315 ± 0.007"] and seeds[1][-1] == "0.320 ± 0.010"


def test_only_finished_runs_of_full_length_count(tmp_path):
    write_run(tmp_path / "output", "m", "t", 1, np.full(21, 0.1), seconds=5)
    write_run(tmp_path / "output", "m", "t", 2, np.full(21, 0.2))  # reached the end, did not finish
    write_run(tmp_path / "output", "m", "t", 3, np.full(11, 0.3), seconds=5)  # finished, at half the frames
    run(tmp_path, collect=tmp_path / "output", grid="g")
    assert table_of(tmp_path, "g-scores")[2] == ["m", "0.10 (1)"]
    text = report.scores_table(report.load(tmp_path / "experiments" / "results" / "g.csv"))
    assert text.endswith("1 of the 3 runs that were begun have finished (1M frames).")


def test_final_score_and_last_four_evaluations_use_the_right_rows(tmp_path):
    returns = np.zeros(101)
    returns[89:] = [9, *range(11)]  # 4.45M must not count, 4.5M to 5M must
    write_run(tmp_path / "output", "m", "t", 1, returns, seconds=5)
    run(tmp_path, collect=tmp_path / "output", grid="g")
    assert table_of(tmp_path, "g-scores")[2] == ["m", "5.00 (1)"]
    assert table_of(tmp_path, "g-seeds")[2] == ["t", "m", "8.500", "8.500"]


def test_aggregates_take_only_seeds_complete_on_all_tasks(root):
    data = report.load(root / "experiments" / "results" / "small.csv")
    shapes = {method: scores.shape for method, scores in report.score_matrices(data).items()}
    assert shapes == {"mappo_dg": (3, 2), "mappo_local": (2, 2)}
    nominal, curves = report.score_curves(data, "mappo_local")
    assert nominal.tolist() == list(range(0, 1_050_000, 50_000)) and curves.shape == (21, 2, 2)
    header, dg, local = (row for row in table_of(root, "small-aggregate") if row[0] != "---")
    assert header == ["method", "IQM", "median", "mean", "optimality gap", "seeds"]
    assert dg[1].startswith("0.820 [0.81") and dg[-1] == "3"
    assert local[3] == "0.315 [0.310, 0.320]" and local[-1] == "2"


def test_one_seed_has_values_but_no_interval(tmp_path):
    for task in ("t", "u"):
        write_run(tmp_path / "output", "m", task, 1, np.full(21, 0.25), seconds=5)
    run(tmp_path, collect=tmp_path / "output", grid="g")
    assert table_of(tmp_path, "g-aggregate")[2] == ["m", "0.250", "0.250", "0.250", "0.750", "1"]


def test_paper_is_quoted_for_its_tasks_and_frames_only(tmp_path):
    for interval in (50_000, 10_000):
        for task in report.PAPER_TASKS:
            for seed in (1, 2):
                output = tmp_path / str(interval)
                write_run(output, "mappo_dg", task, seed, np.full(101, 0.5), interval=interval, seconds=3600)
        run(tmp_path, collect=output, grid=f"g{interval}")
    long = table_of(tmp_path, "g50000-aggregate")
    assert long[0][2] == "IQM, paper" and long[2][1:3] == ["0.500 [0.500, 0.500]", "0.855 [0.814, 0.880]"]
    assert table_of(tmp_path, "g50000-scores")[3] == ["*paper*", *"*0.99* *0.92* *0.67* *0.94* *0.54* *0.82*".split()]
    assert "paper" not in str(table_of(tmp_path, "g10000-aggregate") + table_of(tmp_path, "g10000-scores"))
    assert table_of(tmp_path, "g50000-cost")[-1] == ["all", "12", "12.0", "60", "1389"]


def test_a_glance_has_the_worst_task_and_the_frames_to_an_iqm_of_07(tmp_path):
    """An IQM is that of an evaluation's scores over tasks and seeds: .7 for m when seed 2 has it on both tasks."""
    for method, task, seed, k in (("m", "t", 1, 4), ("m", "t", 2, 6), ("m", "u", 1, 5), ("m", "u", 2, 6)):
        returns = np.where(np.arange(21) >= k, 0.9 if task == "t" else 0.75, 0.1)
        write_run(tmp_path / "output", method, task, seed, returns, seconds=5)
    for task, level in (("t", 0.69), ("u", 0.2)):
        write_run(tmp_path / "output", "slow", task, 1, np.full(21, level), seconds=5)
    write_run(tmp_path / "output", "part", "t", 1, np.full(21, 0.9), seconds=5)  # not begun on u
    run(tmp_path, collect=tmp_path / "output", grid="g")
    head, _, m, slow = table_of(tmp_path, "g-glance")
    assert head == ["method", "IQM", "mean", "worst task", "frames to IQM 0.7"]
    assert m == ["m", "0.825 [0.825, 0.825]", "0.825", "0.75 (u)", "0.30M"]
    assert slow == ["slow", "0.445", "0.445", "0.20 (u)", "never"]
    data = report.load(tmp_path / "experiments/results/g.csv")
    note = (
        "over 2 tasks and the 1 or 2 seeds finished on all of them [95% stratified bootstrap interval, from two seeds"
    )
    assert note in report.glance_table(data) and "(1M frames)" in report.glance_table(data)


def test_the_committed_lbf_runs_at_a_glance():
    table = table_of(ROOT, "lbf_mappo-glance")
    assert [row[0] for row in table[2:]] == ["MAPPO-DG", "MAPPO-global", "MAPPO-local"]
    assert [row[-1] for row in table[2:]] == ["1.70M", "3.15M", "never"]
    assert table[2][1:3] == ["0.841 [0.815, 0.869]", "0.855 [0.814, 0.880]"]
    assert table[3][-2] == "0.09 (15x15-3p-4f)"


def test_win_rate_is_the_score_where_there_is_one(tmp_path):
    write_run(tmp_path / "output", "m", "MMM", 1, np.full(11, 0.5), interval=10_000, seconds=5, win=True)
    edit(tmp_path / "output/m/MMM/seed1/runs/run/evaluations.csv", ",0.5,0.25,100", ",12,3,100")
    run(tmp_path, collect=tmp_path / "output", grid="g")
    assert table_of(tmp_path, "g-scores")[2] == ["m", "0.50 (1)"]
    assert table_of(tmp_path, "g-returns")[2] == ["m", "12.00"]
    data = report.load(tmp_path / "experiments/results/g.csv")
    assert report.draw_curves(data, {"m": {}}).axes[0].get_ylim() == (0, 1)
    assert report.draw_curves(data, {"m": {}}, "return", "team return").axes[0].get_ylim()[1] > 11


def test_the_score_is_the_win_rate_on_the_tasks_that_have_one(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path / "output", "mappo_dg", TASK, seed, np.full(11, 0.7), seconds=5)
        job = write_run(tmp_path / "output", "mappo_dg", "MMM", seed, np.full(11, 0.5), seconds=5, win=True)
        edit(job / EVALUATIONS, ",0.5,0.25,100", ",12,3,100")
    run(tmp_path, collect=tmp_path / "output", grid="g")
    assert table_of(tmp_path, "g-scores")[2] == ["MAPPO-DG", "0.70 ± 0.00 (2)", "0.50 ± 0.00 (2)"]
    assert table_of(tmp_path, "g-aggregate")[2][3] == "0.600 [0.600, 0.600]"
    data = report.load(tmp_path / "experiments/results/g.csv")
    assert "Final score (win rate on MMM, else team return) (mean" in report.scores_table(data)
    data = data.assign(edges_per_agent=1.0)  # the oracle is known on LBF alone
    data.loc[data["task"] == TASK, ["oracle_precision", "oracle_recall"]] = 0.5
    assert report.models_table(data).splitlines()[3] == "| MMM | MAPPO-DG | 1.00 ± 0.00 | - | - | - |"


def test_a_run_without_the_win_rate_that_others_of_its_task_have_is_named(tmp_path):
    write_run(tmp_path / "output", "m", "MMM", 1, [0, 0.5], win=True)
    write_run(tmp_path / "output", "m", "MMM", 2, [0, 0.5])
    run(tmp_path, collect=tmp_path / "output", grid="g")
    with pytest.raises(report.UserError, match=r"g\.csv: m on MMM, seed 2, lacks the win_rate"):
        run(tmp_path)


def test_sampled_games_are_the_score_and_greedy_ones_have_a_table_and_a_figure(tmp_path):
    for seed, greedy in ((1, 1.0), (2, 0.0)):
        job = write_run(tmp_path / "output", "m", "2s3z", seed, np.full(11, 0.25), seconds=5, win=True, greedy=greedy)
        edit(job / EVALUATIONS, ",0.25,0.25,100", ",12,3,100")
    run(tmp_path, collect=tmp_path / "output", grid="g")
    kept = pd.read_csv(tmp_path / "experiments/results/g.csv")
    columns = ["return", "return_std", "win_rate", "greedy_return", "greedy_return_std", "greedy_win_rate"]
    assert kept.iloc[0][columns].tolist() == [12, 3, 0.25, 15.5, 2.5, 1]
    assert table_of(tmp_path, "g-scores")[2] == ["m", "0.25 ± 0.00 (2)"]
    assert table_of(tmp_path, "g-greedy") == [["method", "2s3z"], ["---"] * 2, ["m", "0.50 ± 0.71"]]
    data = report.load(tmp_path / "experiments/results/g.csv")
    assert "Final win rate, sampled actions (mean" in report.scores_table(data)
    assert {"greedy", "returns"} <= report.kinds(data)
    assert report.FIGURES["greedy"](data, {"m": {}}).axes[0].get_ylim() == (0, 1)


def test_a_run_with_greedy_games_alone_is_not_mixed_with_runs_of_both_kinds(tmp_path):
    """Version 0.1.0 calls the win rate of greedy games win_rate."""
    write_run(tmp_path / "output", "m", "MMM", 1, [0, 0.5], win=True)
    run(tmp_path, collect=tmp_path / "output", grid="old")
    data = report.load(tmp_path / "experiments/results/old.csv")
    assert "Final win rate (mean" in report.scores_table(data) and "greedy" not in report.kinds(data)
    write_run(tmp_path / "output", "m", "MMM", 2, [0, 0.5], win=True, greedy=1)
    run(tmp_path, collect=tmp_path / "output", grid="mixed")
    with pytest.raises(report.UserError, match=r"mixed\.csv: m on MMM, seed 1, lacks the greedy_win_rate"):
        report.load(tmp_path / "experiments/results/mixed.csv")


def smaclite_grid(tmp_path, intervals):
    """Runs of ten intervals; interval: that of each task."""
    for method in ("mappo_dg", "mappo_local"):
        for task, interval in intervals.items():
            settings = {"interval": interval, "seconds": 5, "win": True, "greedy": 0.75}
            write_run(tmp_path / "output", method, task, 1, np.full(11, 0.5), **settings)
    run(tmp_path, collect=tmp_path / "output", grid="g")
    return report.load(tmp_path / "experiments/results/g.csv")


def test_the_papers_win_rates_stand_beside_runs_of_its_length(tmp_path):
    """Those of DG alone; beside shorter runs with the paper's frames, and not at all if no runs are as long."""
    data = smaclite_grid(tmp_path, {"2s3z": 100_000, "MMM": 100_000, "MMM2": 100_000})
    paper = ["*paper*", "-", "*1.00*", "*0.98 (2M)*"]
    for table, ours in (("scores", "0.50 (1)"), ("greedy", "0.75")):
        rows = [["MAPPO-DG", *[ours] * 3], paper, ["MAPPO-local", *[ours] * 3]]
        assert table_of(tmp_path, f"g-{table}")[2:] == rows
        note = "The paper's are of greedy games, after the frames in brackets if not after as many."
        assert report.TABLES[table](data).endswith(note)
    assert "paper" not in str(table_of(tmp_path, "g-returns"))
    for figure, drawn in (("curves", True), ("greedy", True), ("returns", False)):
        drawing = report.FIGURES[figure](data, {"mappo_dg": {}, "mappo_local": {}})
        levels = [[line.get_ydata()[0] for line in ax.lines if line.get_linestyle() == ":"] for ax in drawing.axes]
        assert levels == ([[], [1.0], [0.98]] if drawn else [[], [], []])
        names = [text.get_text() for text in drawing.legends[0].get_texts()]
        assert names[2:] == ["the paper's MAPPO-DG, greedy, in the end (MMM2: after 2M)"] * drawn
    short = data[data["task"] != "MMM"]
    assert "paper" not in report.scores_table(short) and not report.paper_win_rates(short)
    equal = data[data["task"] == "MMM"]
    assert report.scores_table(equal).endswith("The paper's are of greedy games.")


def test_seeds_that_differ_by_task_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    for method, task, seeds in (("a", "t", (1, 2)), ("a", "u", (2, 3)), ("b", "t", (1,)), ("b", "u", (3,))):
        for seed in seeds:
            write_run(tmp_path / "output", method, task, seed, np.full(11, 0.5), seconds=5)
    write_run(tmp_path / "output", "c", "t", 1, np.full(11, 0.5), seconds=5)  # not begun on u
    for task in ("t", "u"):
        write_run(tmp_path / "output", "d", task, 1, np.full(11, 0.5), seconds=5)
    run(tmp_path, collect=tmp_path / "output", grid="g")
    sentence = "Left out are the seeds that are not finished on every task. "
    sentence += "a: 3 missing on t and 1 missing on u; b: 3 missing on t and 1 missing on u."
    sentence = sentence.replace("a: 3 missing on t and 1 missing on u; b: ", "a, b: ")
    data = report.load(tmp_path / "experiments/results/g.csv")
    assert report.aggregate_table(data).endswith(sentence)
    assert [row[0] for row in table_of(tmp_path, "g-aggregate")[2:]] == ["a", "d"]
    run(tmp_path)
    assert sentence in capsys.readouterr().err
    assert report.missing_seeds(data[data["method"].isin(["c", "d"])]) == ""


# PAGES
@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_a_page_is_filled_between_markers_and_a_changed_number_is_noticed(root, page, capsys):
    path, other = root / page, root / "docs/other.md"
    path.parent.mkdir(exist_ok=True)
    other.parent.mkdir(exist_ok=True)
    cost = report.fill_tables(markers("small-cost"), report.load_grids(root / "experiments/results"), "other.md")
    other.write_text(cost, encoding="utf-8")
    frame = "# Title\n" + markers("small-scores", "{}") + "<!-- other -->\n0.82\n"

    def check():
        capsys.readouterr()
        status, printed = run(root, check=True), capsys.readouterr().out
        assert printed == (
            f"{page}: its tables differ from the CSVs: run python experiments/report.py\n"
            if status
            else f"The tables equal the CSVs: {', '.join(sorted([page, 'docs/other.md']))}\n"
        )
        return status

    path.write_text(frame.format("old\n"), encoding="utf-8")
    assert check() == 1
    assert path.read_text(encoding="utf-8") == frame.format("old\n")
    assert run(root) == 0
    start, end = frame.split("{}")
    text = path.read_text(encoding="utf-8")
    assert text.startswith(start + "| method |") and text.endswith(end)
    assert check() == 0
    path.write_text(text.replace("0.82 ±", "0.83 ±", 1), encoding="utf-8")
    assert check() == 1
    path.write_text(text.replace("# Title", "# Another"), encoding="utf-8")
    assert check() == 0


def test_a_disk_that_is_full_leaves_the_old_readme(root, monkeypatch):
    readme = root / "README.md"
    readme.write_text(markers("small-scores"), encoding="utf-8")
    before = readme.read_bytes()

    def write_half(path, text, **_):
        path.write_bytes(text[:10].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError):
        run(root)
    assert readme.read_bytes() == before


@pytest.mark.parametrize(
    "text, sentence",
    [
        (markers("small-score"), "no table small-score;"),
        (markers("smal-scores"), "no table smal-scores;"),
        (markers("small-density"), "no table small-density: the grid has no edges_per_agent"),
        ("<!-- report:small-scores begin -->\n", "needs its `end` line"),
        ("<!-- report:a-b begin -->\n<!-- report:c-d begin -->\n<!-- report:a-b end -->\n", "needs its `end` line"),
    ],
)
def test_wrong_markers_are_named_with_their_page(root, text, sentence):
    (root / "docs").mkdir()
    (root / "docs/page.md").write_text(text, encoding="utf-8")
    with pytest.raises(report.UserError, match=f"^docs/page.md: .*{sentence}"):
        run(root, check=True)


def test_a_page_that_is_not_utf_8_is_named(root):
    (root / "docs").mkdir()
    (root / "docs/page.md").write_bytes(b"\xff")
    with pytest.raises(report.UserError, match=r"docs/page\.md is not UTF-8"):
        run(root)


def figures(root):
    """{name: content} of the figures of a repository."""
    return {path.name: path.read_bytes() for path in (root / "experiments/figures").glob("*")}


def test_every_figure_is_drawn_for_light_and_dark_pages_if_asked(root):
    (root / "experiments" / "results" / "another.csv").write_text("not,a,grid\n1,2,3\n", encoding="utf-8")
    assert run(root, all=True) == 0
    names = {name for name, content in figures(root).items() if len(content) > 5000}
    kinds = ("curves", "scores", "aggregate", "profile", "efficiency", "improvement")
    assert names == {f"small-{f}-{theme}.{ext}" for f in kinds for theme in plotting.THEMES for ext in ("png", "svg")}


def test_the_figures_that_pages_show_are_drawn_and_no_others(root):
    (root / "docs").mkdir()
    text = "![curves](experiments/figures/small-curves-light.svg) and small-scores-light.png,\n"
    (root / "README.md").write_text(text + "experiments/figures/other-curves-light.svg", encoding="utf-8")
    text = '<source srcset="../experiments/figures/small-efficiency-dark.png"> (../experiments/figures/watch-dark.gif).'
    (root / "docs/page.md").write_text(text, encoding="utf-8")
    assert run(root) == 0
    assert figures(root).keys() == {"small-curves-light.svg", "small-efficiency-dark.png"}


def test_a_figure_has_the_same_bytes_each_time_and_whatever_is_drawn_beside_it(root):
    shown = {"small-curves-light.svg", "small-aggregate-dark.png", "small-improvement-dark.svg"}
    links = [f"![](experiments/figures/{name})" for name in shown]
    (root / "README.md").write_text("\n".join(links), encoding="utf-8")
    run(root)
    before = figures(root)
    assert before.keys() == shown
    run(root, all=True)
    assert {name: figures(root)[name] for name in shown} == before


def test_a_grid_alone_is_printed_and_drawn_while_the_pages_are_filled_as_a_whole(root, capsys):
    run(root, collect=root / "output", grid="second")
    path = root / "experiments/results/second.csv"
    pd.read_csv(path).assign(edges_per_agent=1).to_csv(path, index=False)
    text = "".join(markers(f"{grid}-scores") for grid in ("small", "second"))
    text += "".join(f"experiments/figures/{grid}-curves-dark.svg\n" for grid in ("small", "second"))
    (root / "README.md").write_text(text, encoding="utf-8")
    assert run(root, grid="second") == 0
    assert figures(root).keys() == {"second-curves-dark.svg"}
    page, printed = (root / "README.md").read_text(encoding="utf-8"), capsys.readouterr().out
    assert page.count("| MAPPO-DG | 0.82 ± 0.01 (3) |") == 2
    names = [line for line in printed.splitlines() if line.startswith(("second-", "small-"))]
    assert names == [f"second-{name}" for name in "glance aggregate scores seeds density models cost".split()]
    grids = report.load_grids(root / "experiments/results")
    assert f"second-seeds\n\n{report.seeds_table(grids['second'])}\n" in printed
    with pytest.raises(report.UserError, match="^no grid third in experiments/results; there are second, small$"):
        run(root, grid="third")


def test_a_grid_is_compared_with_methods_of_another_one(root, monkeypatch):
    """They are in its tables, are no rows of its CSV, and it is asked whether its own ones are better."""
    output = root / "cdg"
    for task in (TASK, "Foraging-10x10-3p-3f-v3"):
        for seed in (1, 2):
            write_run(output, "mappo_cdg", task, seed, np.minimum(np.arange(21) / 10, 1) * 0.9, seconds=1800)
    run(root, collect=output, grid="ours")
    monkeypatch.setattr(report, "BESIDE", {"ours": ("small", ["mappo_dg"]), "nowhere": ("small", ["mappo_dg"])})
    assert [row[0] for row in table_of(root, "ours-scores")] == ["method", "---", "MAPPO-DG", "MAPPO-CDG"]
    assert "| MAPPO-DG |" not in report.scores_table(report.load(root / "experiments/results/ours.csv"))
    assert set(report.load_grids(root / "experiments/results")["small"]["method"]) == {"mappo_dg", "mappo_local"}
    data = report.load_grids(root / "experiments/results")["ours"]
    figure = report.draw_improvement(data, report.looks(report.ordered(data, "method"), "light"))
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["MAPPO-CDG over MAPPO-DG"]


def test_an_experiment_that_is_no_grid_is_printed_and_drawn(tmp_path, capsys):
    results = tmp_path / "experiments/results"
    results.mkdir(parents=True)
    for name in ("known_graph", "spread_scale"):
        shutil.copy(ROOT / f"experiments/results/{name}.csv", results)
    (tmp_path / "README.md").write_text("experiments/figures/known_graph-light.png", encoding="utf-8")
    run(tmp_path, grid="spread_scale")
    assert capsys.readouterr().out.startswith("spread_scale-time\n\n| N | ") and not figures(tmp_path)
    run(tmp_path, grid="known_graph")
    assert capsys.readouterr().out.startswith("known_graph-edges\n\n| world, policy | N | ")
    assert figures(tmp_path).keys() == {"known_graph-light.png"}


def test_methods_are_named_as_the_paper_names_them_and_tasks_in_short():
    names = {"mappo_dg": "MAPPO-DG", "ippo_local": "IPPO-local", "mappo_dg_c0.5": "MAPPO-DG c0.5", "happo": "happo"}
    names |= {"mappo_cdg": "MAPPO-CDG", "mappo_cdg_learned": "MAPPO-CDG learned", "MMM": "MMM"}
    names |= {"cdg_predictable_private": "CDG predictable private", TASK: "8x8-2p-4f-coop", "a_b": "a_b"}
    assert {name: report.label(name) for name in names} == names


@pytest.mark.parametrize("theme", plotting.THEMES)
def test_every_method_has_a_look_of_its_own_which_others_do_not_change(theme):
    paper = list(report.PAPER)
    assert paper == plotting.PAPER_METHODS
    ours = ["mappo_cdg", "mappo_cdg_learned"]
    choices = [f"cdg_{name}" for name in ("blind", "pairwise", "predictable", "published")]
    everything = report.looks([*paper, *ours, *choices, "mappo_dg_transposed"], theme)
    assert len({tuple(look.values()) for look in everything.values()}) == len(everything)
    for methods in (paper, paper[:3], ours, ["mappo_dg", "mappo_cdg"], [paper[0], *ours]):
        assert report.looks(methods, theme) == {method: everything[method] for method in methods}
    transposed = report.looks(["mappo_dg", "mappo_dg_transposed"], theme)["mappo_dg_transposed"]
    assert transposed == report.looks(["mappo_dg", *ours, "mappo_dg_transposed"], theme)["mappo_dg_transposed"]


def test_the_comparing_figures_show_their_statistics(root):
    """DG's final scores are .81, .82, .83 on both tasks, those of local .31, .32; all rise for 10 evaluations."""
    data = report.load(root / "experiments" / "results" / "small.csv")
    look = report.looks(["mappo_dg", "mappo_local"], "light")
    (improvement,) = report.draw_improvement(data, look).axes
    assert [line.get_xdata()[0] for line in improvement.lines if line.get_marker() == "o"] == [1]
    assert [text.get_text() for text in improvement.get_yticklabels()] == ["MAPPO-DG over MAPPO-local"]
    (efficiency,) = report.draw_efficiency(data, look).axes
    dg, local = ({round(x, 3): y for x, y in line.get_xydata()} for line in efficiency.lines)
    assert (dg[0.0], dg[0.5], dg[1.0]) == pytest.approx((0, 0.82, 0.82))
    assert (local[0.25], local[1.0]) == pytest.approx((0.5 * 0.315, 0.315))
    (profile,) = report.draw_profile(data, look).axes
    dg, local = ({round(x, 3): y for x, y in line.get_xydata()} for line in profile.lines)
    assert (dg[0.8], dg[0.82], dg[0.84]) == pytest.approx((1, 1 / 3, 0)) and (local[0.3], local[0.33]) == (1, 0)
    points = {}
    for ax in report.draw_aggregate(data, look).axes:
        points[ax.get_title()] = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o"]
    assert points["IQM"] == pytest.approx([0.82, 0.315]) and points["Optimality gap"] == pytest.approx([0.18, 0.685])


def test_a_setting_that_is_swept_has_a_figure_over_its_values(tmp_path):
    names = {"mappo_dg": 0.5, "mappo_dg_drop0.1": 0.4, "mappo_dg_drop0.5": 0.3, "mappo_dg_add0.1": 0.2}
    names |= {"mappo_dg_random0.3": 0.6, "mappo_dg_random0.7": 0.6, "mappo_dg_hard": 0.1}
    for method, value in names.items():
        for seed in (1, 2):
            write_run(tmp_path / "output", method, "t", seed, np.full(11, value + seed / 100), seconds=5)
    run(tmp_path, collect=tmp_path / "output", grid="g")
    data = report.load(tmp_path / "experiments/results/g.csv")
    sweep = {0: "mappo_dg", 0.1: "mappo_dg_drop0.1", 0.5: "mappo_dg_drop0.5"}
    assert report.sweeps(data) == {"mappo_dg_drop": sweep}  # add has two values; random at 0 is not mappo_dg
    figure = report.draw_sweep(data, report.looks(["mappo_dg_drop"], "light"))
    (ax,) = figure.axes
    line = next(line for line in ax.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 3)
    assert line.get_xydata() == pytest.approx(np.array([[0, 0.515], [0.1, 0.415], [0.5, 0.315]]))
    dots = [xy for line in ax.lines if line.get_marker() == "o" for xy in line.get_xydata().round(3).tolist()]
    assert dots == [[x, round(y + seed / 100, 3)] for x, y in ((0, 0.5), (0.1, 0.4), (0.5, 0.3)) for seed in (1, 2)]
    assert figure.get_supxlabel() == "drop"


def test_the_default_goes_by_its_value_where_it_is_swept(tmp_path):
    for method in ("mappo_dg", "mappo_dg_c0", "mappo_dg_c1"):
        write_run(tmp_path / "output", method, "t", 1, np.full(11, 0.5), seconds=5)
    for grid in ("ablation_c", "other"):
        run(tmp_path, collect=tmp_path / "output", grid=grid)
    rows = {grid: [row[0] for row in table_of(tmp_path, f"{grid}-scores")[2:]] for grid in ("ablation_c", "other")}
    assert rows["ablation_c"] == ["MAPPO-DG c0", "MAPPO-DG c0.9", "MAPPO-DG c1"]
    assert rows["other"] == ["MAPPO-DG", "MAPPO-DG c0", "MAPPO-DG c1"]
    assert list(report.sweeps(report.load(tmp_path / "experiments/results/ablation_c.csv"))) == ["mappo_dg_c"]


def test_precision_by_chance_is_the_oracles_share_of_all_pairs(tmp_path):
    """3 agents, 2 pairs each, of which the oracle connects 1.5; the graph has 1 edge, right in .6: a recall of .4."""
    write_run(tmp_path / "output", "mappo_dg", "t", 1, np.zeros(11), agents=3, seconds=5)
    run(tmp_path, collect=tmp_path / "output", grid="g")
    path = tmp_path / "experiments/results/g.csv"
    pd.read_csv(path).assign(edges_per_agent=1, oracle_precision=0.6, oracle_recall=0.4).to_csv(path, index=False)
    rows = table_of(tmp_path, "g-models")
    assert rows[0][2:] == ["edges per agent", "precision", "recall", "precision by chance"]
    assert rows[2][2:] == ["1.00", "0.60", "0.40", "0.75"]


def test_every_panel_shows_all_of_its_curves(tmp_path):
    write_run(tmp_path / "output", "m", "star-1", 1, np.arange(11), seconds=5)
    write_run(tmp_path / "output", "m", "star-2", 1, 3 * np.arange(31), seconds=5)
    run(tmp_path, collect=tmp_path / "output", grid="g")
    for ax in report.draw_curves(report.load(tmp_path / "experiments/results/g.csv"), {"m": {}}).axes:
        assert ax.get_xlim()[1] >= 1.5 and ax.get_ylim()[1] >= 90


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--collect", "nowhere", "--grid", "g"], "No such file or directory: 'nowhere'"),
        (["--collect", "bad/m", "--grid", "g"], "bad/m holds no evaluations"),
        (["--grid", "g"], "no grid g in experiments/results; there are "),
        (["--collect", "bad", "--grid", "g", "--check"], "for a second command"),
        (["--collect", "bad", "--grid", "g", "--all"], "for a second command"),
        (["--check", "--grid", "lbf_mappo"], "without --grid and --all"),
        (["--check", "--all"], "without --grid and --all"),
        (["--collect", "nowhere"], "--collect needs --grid NAME"),
        (["--collect", "nowhere", "--grid", "../g"], "letters, digits and underscores"),
        (["--collect", "bad", "--grid", "g"], "evaluations.csv has no column episodic_return"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(tmp_path, arguments, sentence):
    write_run(tmp_path / "bad", "m", "t", 1, [0, 1])
    edit(tmp_path / "bad/m/t/seed1/runs/run/evaluations.csv", "episodic_return,", "reward,")
    command = [sys.executable, str(ROOT / "experiments" / "report.py"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and sentence in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("report.py: ")


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def program(name, *arguments, before="", **settings):
    """Runs a file of experiments/ as a program, after the lines `before`."""
    path = ROOT / "experiments" / name
    code = f"import runpy, sys\nsys.argv[0] = {str(path)!r}\n{before}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(path.parent), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, **settings)


def test_an_import_that_fails_in_an_edit_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError), report.one_sentence():
        import matplotlib.no_such_part  # noqa: F401
    with pytest.raises(ImportError), report.one_sentence():
        from json import no_such_name  # noqa: F401


@pytest.mark.parametrize("arguments", [["--check"], ["--help"]])
def test_a_reader_that_has_gone_is_one_sentence(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = program("report.py", *arguments, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (2, "report.py: the reader of its output has gone\n")


def test_closed_output_is_no_error():
    done = program("report.py", "--check", before="sys.stdout = None", stdout=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")


def test_text_is_utf_8_whatever_the_locale(root, tmp_path_factory):
    """README's own characters survive, and what is read and written with another locale is the same."""
    name = "mappo_dg_\u03bb"
    for seed in (1, 2, 3):
        write_run(root / "output", name, TASK, seed, np.full(21, 0.5), seconds=5)
    frame = "# \u03bb \u2192 \u00b1\n" + markers("small-scores")
    (root / "README.md").write_text(frame, encoding="utf-8")
    (root / "experiments/grids").mkdir()
    grid = f"# \u03bb\nmethods: [{{name: {name}}}, {{name: mappo_dg}}]\ntasks: [{{env_id: {TASK}}}]\n"
    (root / "experiments/grids/small.yaml").write_text(grid, encoding="utf-8")
    other = tmp_path_factory.mktemp("other") / "root"
    shutil.copytree(root, other)
    code = "import sys, pathlib, report; report.draw = lambda *_: None; root = pathlib.Path(sys.argv[1]); "
    code += "report.main(report.Args(collect=root / 'output', grid='small'), root); report.main(report.Args(), root)"
    for folder, locale in ((root, {"PYTHONUTF8": "1"}), (other, ASCII)):
        environment = os.environ | {"PYTHONPATH": str(ROOT / "experiments")} | locale
        subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, check=True)
    for path in ("README.md", "experiments/results/small.csv"):
        content = (root / path).read_bytes()
        assert content == (other / path).read_bytes() and name.rpartition("_")[2] in content.decode("utf-8")


def test_the_repositorys_pages_equal_its_csvs():
    assert sum(text.count("\n<!-- report:") for text in report.read_pages(ROOT).values()) >= 40
    assert run(ROOT, check=True) == 0, "run python experiments/report.py"
