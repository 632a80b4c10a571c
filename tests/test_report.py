"""experiments/report.py: collecting, merging, statistics, tables, and that README's tables are those of the CSVs.

The comparison with rliable is skipped where rliable is not installed. It needs pandas < 3, so run it in a fresh
environment: `pip install -r experiments/requirements.txt -r tests/requirements-extra.txt pytest`, then
`pytest --noconftest tests/test_report.py` (conftest needs torch).
"""

import json
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
import report  # noqa: E402

HEADER = "global_step,episodic_return,episodic_return_std,episodes"
TASK = "Foraging-8x8-2p-4f-coop-v3"


def write_run(
    output, method, task, seed, returns, *, agents=2, interval=50_000, seconds=None, name="run", win=False, late=0
):
    """A run folder as the scripts and launch.py leave it; finished if `seconds` is given. Returns the job's folder."""
    job = output / method / task / f"seed{seed}"
    folder = job / "runs" / name
    folder.mkdir(parents=True)
    lines = [HEADER + ",win_rate" * win + "".join(f",episodic_return_agent_{i}" for i in range(agents))]
    for k, value in enumerate(returns):
        frames = k * interval + (k > 0) * (
            (37 * k + 11 * seed) % 400 + late
        )  # the first iteration at or past k * interval
        lines.append(f"{frames},{value},0.25,100" + f",{value}" * win + f",{value / agents}" * agents)
    (folder / "evaluations.csv").write_text("\n".join(lines) + "\n")
    if seconds is not None:
        command = ["--total-timesteps", str(interval * max(1, len(returns) - 1))]
        record = {"command": command, "duration_seconds": seconds, "run_folder": f"runs/{name}", "attempts": 1}
        (job / "finished.json").write_text(json.dumps(record))
    return job


def run(root, **args):
    return report.main(report.Args(**args), root)


def table_of(root, name):
    """The table that report.py writes into a README with one pair of markers."""
    (root / "README.md").write_text(f"<!-- report:{name} begin -->\n<!-- report:{name} end -->\n")
    results = root / "experiments" / "results"
    grids = report.load_grids(results) | report.load_others(results)
    text = report.fill_tables((root / "README.md").read_text(), grids)
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
    assert list(data.columns) == [*report.COLUMNS, "return_agent_0", "return_agent_1"]
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
    with (job / "runs" / "b_resumed" / "evaluations.csv").open("a") as file:
        file.write("150020,0.5")  # killed while writing
    write_run(output, "m", "three", 10, [0, 0.9], agents=3, seconds=60.4)
    write_run(output, "m", "three", 9, [], agents=3)  # started, nothing evaluated yet
    run(tmp_path, collect=output, grid="g")
    data = pd.read_csv(tmp_path / "experiments" / "results" / "g.csv")
    assert list(data.task) == ["three"] * 2 + ["two"] * 3
    assert list(data["return"]) == [0, 0.9, 0, 0.2, 0.4]
    assert list(data.seconds.dropna()) == [60, 60]
    assert data.return_agent_2.isna().tolist() == [False, False, True, True, True]


def test_density_is_the_mean_since_the_evaluation_before(tmp_path):
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
                writer.add_scalar("graph/density", value - 0.25, frames[k] + 500)
                writer.add_scalar("graph/density", value + 0.25, frames[k + 1])
                writer.add_scalar("charts/win_rate", k / 10, frames[k + 1])
                writer.add_scalar("losses/reverse_model_accuracy", k / 20, frames[k + 1])
    run(tmp_path, collect=tmp_path / "output", grid="g")
    data = pd.read_csv(tmp_path / "experiments/results/g.csv")
    assert data[data.method == "mappo_dg"].density.round(6).tolist()[1:] == [0.25] * 6 + [0.75] * 4
    assert data[data.method == "mappo_dg"].train_win_rate.tolist()[1:] == [k / 10 for k in range(10)]
    assert data.density.isna().sum() == 1 + 11  # nothing before the first iteration; no graph
    assert table_of(tmp_path, "g-density")[2:] == [["MAPPO-DG", "0.75"]]
    assert table_of(tmp_path, "g-training")[2:] == [["MAPPO-DG", "0.85"]]
    head = ["task", "method", "edges per agent", "accuracy of q_psi"]
    assert table_of(tmp_path, "g-models")[::2] == [head, ["8x8-2p-4f-coop", "MAPPO-DG", "0.75", "0.43"]]
    with pytest.raises(report.UserError, match="has no density"):
        report.curve_table(data.drop(columns="density"), "density")


def test_collect_takes_only_the_grids_methods_and_tasks(tmp_path):
    for method, task in (("mappo_dg", "a"), ("mappo_dg", "b"), ("mappo_dg_c0", "a")):
        write_run(tmp_path / "output", method, task, 1, [0, 0.5], agents=2 if task == "a" else 3)
    (tmp_path / "experiments" / "grids").mkdir(parents=True)
    grid = "methods: [{name: mappo_dg, script: s.py}]\ntasks: [{env_id: a}]\n"
    (tmp_path / "experiments" / "grids" / "g.yaml").write_text(grid)
    run(tmp_path, collect=tmp_path / "output", grid="g")
    data = pd.read_csv(tmp_path / "experiments" / "results" / "g.csv")
    assert set(zip(data.method, data.task, strict=True)) == {("mappo_dg", "a")}
    assert list(data.columns)[-1] == "return_agent_1"  # no empty column for a task that is not in the grid


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


def test_a_run_that_goes_on_to_more_frames_is_not_finished(tmp_path):
    job = write_run(tmp_path / "output", "m", "t", 1, np.full(11, 0.5), seconds=5)
    assert report.collect(tmp_path / "output")["finished"].eq(1).all()
    record = (job / "finished.json").read_text()
    (job / "finished.json").write_text(record.replace("500000", "400000"))
    assert report.collect(tmp_path / "output")["finished"].eq(0).all()


def test_collecting_none_of_the_grids_runs_is_an_error(tmp_path):
    write_run(tmp_path / "output", "m", "t", 1, [0, 1])
    (tmp_path / "experiments" / "grids").mkdir(parents=True)
    (tmp_path / "experiments" / "grids" / "g.yaml").write_text("{methods: [{name: other}], tasks: [{env_id: t}]}")
    with pytest.raises(report.UserError, match="holds no evaluations of the grid's methods and tasks"):
        run(tmp_path, collect=tmp_path / "output", grid="g")
    assert not (tmp_path / "experiments" / "results").exists()


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
    assert report.score_curves(data, "mappo_local").shape == (2, 2, 21)
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


def test_win_rate_is_the_score_where_there_is_one(tmp_path):
    write_run(tmp_path / "output", "m", "MMM", 1, np.full(11, 0.5), interval=10_000, seconds=5, win=True)
    path = tmp_path / "output/m/MMM/seed1/runs/run/evaluations.csv"
    path.write_text("\n".join(line.replace(",0.5,0.25", ",12,3", 1) for line in path.read_text().splitlines()) + "\n")
    run(tmp_path, collect=tmp_path / "output", grid="g")
    assert table_of(tmp_path, "g-scores")[2] == ["m", "0.50 (1)"]
    assert table_of(tmp_path, "g-returns")[2] == ["m", "12.00"]
    data = report.load(tmp_path / "experiments/results/g.csv")
    assert report.draw_curves(data, {"m": {}}).axes[0].get_ylim() == (0, 1)
    assert report.draw_curves(data, {"m": {}}, "return", "team return").axes[0].get_ylim()[1] > 11


# README
def test_readme_is_filled_between_markers_and_a_changed_number_is_noticed(root, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    frame = "# Title\n<!-- report:small-scores begin -->\n{}<!-- report:small-scores end -->\n<!-- other -->\n0.82\n"
    readme = root / "README.md"
    readme.write_text(frame.format("old\n"))
    assert run(root, check=True) == 1
    assert readme.read_text() == frame.format("old\n")
    assert run(root) == 0
    start, end = frame.split("{}")
    text = readme.read_text()
    assert text.startswith(start + "| method |") and text.endswith(end)
    assert run(root, check=True) == 0
    readme.write_text(text.replace("0.82 ±", "0.83 ±", 1))
    assert run(root, check=True) == 1
    readme.write_text(text.replace("# Title", "# Another"))
    assert run(root, check=True) == 0


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("<!-- report:small-score begin -->\n<!-- report:small-score end -->\n", "no table small-score;"),
        ("<!-- report:smal-scores begin -->\n<!-- report:smal-scores end -->\n", "no table smal-scores;"),
        ("<!-- report:small-scores begin -->\n", "needs its `end` line"),
        ("<!-- report:a-b begin -->\n<!-- report:c-d begin -->\n<!-- report:a-b end -->\n", "needs its `end` line"),
    ],
)
def test_wrong_markers(root, text, sentence):
    with pytest.raises(report.UserError, match=sentence):
        report.fill_tables(text, report.load_grids(root / "experiments" / "results"))


def test_every_figure_is_drawn_for_light_and_dark_pages(root):
    (root / "experiments" / "results" / "another.csv").write_text("not,a,grid\n1,2,3\n")
    assert run(root) == 0
    names = {path.name for path in (root / "experiments" / "figures").iterdir() if path.stat().st_size > 5000}
    figures = ("curves", "scores", "aggregate", "profile", "efficiency", "improvement")
    assert names == {f"small-{f}-{theme}.{ext}" for f in figures for theme in report.THEMES for ext in ("png", "svg")}


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
    pd.read_csv(path).assign(density=1, oracle_precision=0.6, oracle_recall=0.4).to_csv(path, index=False)
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
        (["--collect", "nowhere", "--grid", "g"], "nowhere holds no evaluations"),
        (["--collect", "nowhere"], "--collect needs --grid NAME"),
        (["--collect", "nowhere", "--grid", "../g"], "letters, digits and underscores"),
        (["--collect", "bad", "--grid", "g"], "it has no column for return"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(tmp_path, arguments, sentence):
    write_run(tmp_path / "bad", "m", "t", 1, [0, 1])
    path = tmp_path / "bad/m/t/seed1/runs/run/evaluations.csv"
    path.write_text(path.read_text().replace("episodic_return,", "reward,"))
    command = [sys.executable, str(ROOT / "experiments" / "report.py"), *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and sentence in result.stderr and result.stderr.count("\n") == 1


def test_the_repositorys_readme_equals_its_csvs():
    assert (ROOT / "README.md").read_text().count("\n<!-- report:") >= 6
    assert run(ROOT, check=True) == 0, "run python experiments/report.py"
