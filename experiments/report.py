"""From the runs' evaluations to the results tables of README.md and docs/, and to the figures, with their uncertainty.

Collect what `launch.py` has run, at any time (only the grid's methods and tasks if experiments/grids/NAME.yaml exists;
runs that are in the CSV already stay there when their folders are gone):
    python experiments/report.py --collect OUTPUT_DIR --grid NAME    # -> experiments/results/NAME.csv
Make anew, from the committed CSVs alone, the tables in the pages and the figures that they show, and print all tables:
    python experiments/report.py                                     # -> README.md, docs/*.md, experiments/figures/
    python experiments/report.py --grid NAME                         # print and draw those of one grid
    python experiments/report.py --all                               # draw what no page shows, too
    python experiments/report.py --check                             # only compare; exit 1 if a table differs

A page is README.md or docs/*.md. A table goes between its lines `<!-- report:NAME-TABLE begin -->` and
`<!-- report:NAME-TABLE end -->`; TABLE is glance, aggregate, scores, seeds, returns, greedy, training, density, models
or cost. Figures are figures/NAME-FIGURE-light.svg (or dark, or png): a page that names such a file shows it. The tables
known_graph-edges and spread_scale-time and the figure known_graph are made from the CSVs of those experiments.

A row of a grid's CSV is an evaluation of a run (method, task, seed): at how many frames it took place (frames), which
one it was (evaluation: the whole evaluation intervals in these frames) and when it was due (nominal_frames: evaluation
times interval, at the end the run's frames); the team's return, its standard deviation, the episodes; and of the run,
whether it has finished, and its seconds. Evaluations are aligned by nominal_frames; of two with one index, the later
one counts.

The score of a task is the win rate if there is one, or else the team return (on LBF in [0, 1]: nothing is normalised).
On SMAClite an evaluation plays half of its games with sampled actions, whose win rate is the score, and half with the
most likely ones: the table and the figure greedy. In a CSV of version 0.1.0, without greedy_win_rate, all are greedy.
A run's final score is its mean over the evaluations in the last 10% of frames (4.5M-5M of 5M, as in the paper). A run
is complete if it is finished and has the last evaluation that any run of its task has; only complete runs count. The
others are drawn as thin lines, their mean pale where a method has no complete run on a task. What training logs to
TensorBoard and the CSV keeps (a graph's edges per agent besides itself, the models' accuracies, ...) are means over the
iterations since the evaluation before.
Statistics: Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice" (arXiv 2108.13264).
"""

import functools
import itertools
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from errors import UserError, one_sentence

with one_sentence():
    import known_graph_figure
    import matplotlib as mpl
    import numpy as np
    import pandas as pd
    import tyro
    from collecting import COLUMNS, KEY, WINS, collect_grid, natural, read_csv, write_whole
    from matplotlib.lines import Line2D
    from plotting import draw_bands, draw_interval, figures_in, legend_above, list_rows, looks, new_figure, panels, save

# grid -> another one and those of its methods that are compared with the grid's
BESIDE = {"lbf_cdg": ("lbf_mappo", ["mappo_dg", "mappo_global", "mappo_local"])}
DEFAULTS = {"ablation_c": {"mappo_dg": "mappo_dg_c0.9"}}  # in a grid over a setting, the default goes by its value
# The paper's LBF results (arXiv 2601.21523), read off its figures (about +-0.01): the IQM of the team return at 5M
# frames over the six tasks [95% interval, where it is legible], the mean over 4.5M-5M on each task.
PAPER_TASKS = [f"Foraging-{task}-coop-v3" for task in ("8x8-2p-4f", "10x10-2p-3f", "15x15-3p-4f")]
PAPER_TASKS += [f"Foraging-{task}-v3" for task in ("10x10-3p-3f", "15x15-3p-4f", "15x15-4p-3f")]
PAPER = {
    "mappo_dg": ((0.855, 0.814, 0.880), (0.99, 0.92, 0.67, 0.94, 0.54, 0.82)),
    "mappo_global": ((0.775, 0.709, 0.839), (0.94, 0.95, 0.23, 0.88, 0.09, 0.82)),
    "mappo_local": ((0.584, 0.540, 0.620), (0.07, 0.00, 0.67, 0.91, 0.62, 0.90)),
    "ippo_dg": ((0.887, 0.830, 0.921), (0.98, 0.88, 0.84, 0.95, 0.49, 0.85)),
    "ippo_global": ((0.681,), (0.93, 0.96, 0.28, 0.92, 0.09, 0.44)),
    "ippo_local": ((0.663,), (0.07, 0.00, 0.78, 0.91, 0.68, 0.91)),
}
PAPER_FRAMES = 5_000_000
# Its win rates with DG on SMAClite, in greedy games, and after how many frames. It finds local and global rewards about
# as good and claims no gain.
PAPER_WIN_RATES = {"MMM": (1.00, 1_000_000), "MMM2": (0.98, 2_000_000), "25m_vs_30m": (1.00, 2_000_000)}
PAPER_WIN_RATES |= {"bane_vs_bane": (0.23, 2_000_000), "3s5z_vs_3s6z": (0.96, 3_000_000), "corridor": (0.54, 3_000_000)}
ACRONYMS = {"mappo", "ippo", "dg", "cdg"}  # in capitals where a method is named to readers
SOLVED = 0.7  # the IQM that the glance table asks for


# STATISTICS
def load(path):
    """The tidy CSV + score, last (nominal frames of the run's last evaluation), complete; UserError if damaged."""
    data = read_csv(path, COLUMNS).sort_values([*KEY, "frames"], ignore_index=True)
    data["method"] = data["method"].replace(DEFAULTS.get(path.stem, {}))
    for column in WINS:
        lacking = data["task"].isin(win_rate_tasks(data, column)) & (column in data and data[column].isna())
        if lacking.any():
            method, task, seed = data.loc[lacking.idxmax(), KEY]
            raise UserError(
                f"{path}: {method} on {task}, seed {seed}, lacks the {column} that other runs on {task} have"
            )
    data["score"] = np.where(data["task"].isin(win_rate_tasks(data)), data.get("win_rate", np.nan), data["return"])
    data = data.drop_duplicates([*KEY, "evaluation"], keep="last")  # the closing one may lie within an interval
    data = data.assign(last=data.groupby(KEY)["nominal_frames"].transform("max"))
    longest = data.groupby("task")["last"].transform("max")
    return data.assign(complete=(data["finished"] == 1) & (data["last"] == longest))


def win_rate_tasks(data, column="win_rate"):
    """The tasks that have a win rate."""
    return data.loc[data[column].notna(), "task"].unique().tolist() if column in data else []


def ordered(data, column):
    """The methods or tasks of a grid: those of the paper first, in its order, then the others."""
    known = list(PAPER) if column == "method" else PAPER_TASKS
    return sorted(data[column].unique(), key=lambda x: (known.index(x) if x in known else len(known), natural(x)))


def run_means(rows, column="score"):
    """Mean score of each run over the rows given: Series indexed by method, task and seed."""
    return rows.groupby(KEY)[column].mean().dropna()


def final_scores(data, column="score"):
    """Mean score of each complete run over its evaluations in the last 10% of frames, as `run_means`."""
    return run_means(data[data["complete"] & (10 * data["nominal_frames"] >= 9 * data["last"])], column)


def scores_by_task(data):
    """{method: final scores of its seeds (rows) on all tasks (columns), nan where a run is not complete}."""
    scores, tasks = final_scores(data), ordered(data, "task")
    methods = [method for method in ordered(data, "method") if method in scores.index]
    return {method: scores[method].unstack("task").reindex(columns=tasks) for method in methods}


def score_matrices(data, least=2):
    """{method: (R, M) final scores of the R seeds that are complete on all M tasks}, for methods with R >= least."""
    matrices = {method: scores.dropna().to_numpy() for method, scores in scores_by_task(data).items()}
    return {method: matrix for method, matrix in matrices.items() if len(matrix) >= least}


def missing_seeds(data):
    """In words, which seeds `score_matrices` leaves out since they are complete on some tasks only; "" if none.

    A method that was not begun on every task is left out as a whole, and not named.
    """
    lacks, begun = {}, data.groupby("method")["task"].nunique()
    for method, scores in scores_by_task(data).items():
        missing = {label(task): scores.index[column.isna()] for task, column in scores.items()}
        places = [f"{', '.join(map(str, seeds))} missing on {task}" for task, seeds in missing.items() if len(seeds)]
        if places and begun[method] == data["task"].nunique():
            lacks.setdefault(" and ".join(places), []).append(label(method))
    details = "; ".join(f"{', '.join(methods)}: {places}" for places, methods in lacks.items())
    return f"Left out are the seeds that are not finished on every task. {details}." if details else ""


def score_curves(data, method):
    """(K) nominal frames of the evaluations that all runs of `score_matrices` have, and their (K, R, M) scores."""
    tasks, runs = ordered(data, "task"), data[data["complete"] & (data["method"] == method)]
    table = runs.pivot(index=["seed", "nominal_frames"], columns="task", values="score").reindex(columns=tasks)
    table = table.dropna().unstack("nominal_frames").dropna(axis=1)  # seeds that all tasks have, then evaluations
    scores = np.stack([table[task].to_numpy().T for task in tasks], axis=-1)
    return table[tasks[0]].columns.to_numpy(), scores


def frames_to(level, data, method):
    """Nominal frames of the first evaluation whose scores over tasks and seeds have this IQM; None if none has."""
    nominal, scores = score_curves(data, method)
    reached = iqm(scores) >= level
    return nominal[reached.argmax()] if reached.any() else None


def comparable(data):
    """Can two methods or more, with two seeds or more, be compared over several tasks with scores in [0, 1]?"""
    several = data["task"].nunique() >= 2 and data["score"].between(0, 1).all()
    return several and len(score_matrices(data)) >= 2


def iqm(scores):
    """Interquartile mean: mean of the middle half of all runs' scores; (..., R, M) -> (...). Agarwal et al. 2021."""
    flat = np.sort(scores.reshape(*scores.shape[:-2], -1), axis=-1)
    cut = flat.shape[-1] // 4
    return flat[..., cut : flat.shape[-1] - cut].mean(-1)


def median(scores):
    """Median over tasks of the mean over runs; (..., R, M) -> (...). Agarwal et al. 2021."""
    return np.median(scores.mean(-2), axis=-1)


def mean(scores):
    """Mean over tasks and runs; (..., R, M) -> (...). Agarwal et al. 2021."""
    return scores.mean((-2, -1))


def optimality_gap(scores):
    """By how much scores, clipped at 1, fall short of 1, on average; (..., R, M) -> (...). Agarwal et al. 2021."""
    return 1 - np.minimum(scores, 1).mean((-2, -1))


METRICS = {"IQM": iqm, "Median": median, "Mean": mean, "Optimality gap": optimality_gap}
THRESHOLDS = np.linspace(0, 1, 101)


def performance_profile(scores):
    """Fraction of all runs that score above each of THRESHOLDS; (..., R, M) -> (..., 101). Agarwal et al. 2021."""
    return np.stack([(scores > threshold).mean((-2, -1)) for threshold in THRESHOLDS], axis=-1)


def probability_of_improvement(x, y):
    """P(a run of x beats one of y on a task), ties half; (..., R, M), (..., S, M) -> (...). Agarwal et al. 2021."""
    return 0.5 + 0.5 * np.sign(x[..., :, None, :] - y[..., None, :, :]).mean((-3, -2, -1))


def estimate(statistic, *scores, reps=5000, seed=0):
    """(3, ...): the statistic and its 95% percentile interval by stratified bootstrap. Agarwal et al. 2021.

    Runs are drawn with replacement within each task (the stratum). scores: one (R, M) array for each argument of the
    statistic, each resampled on its own.
    """
    rng = np.random.default_rng(seed)
    samples = [x[rng.integers(len(x), size=(reps, *x.shape)), np.arange(x.shape[1])] for x in scores]
    return np.stack([statistic(*scores), *np.percentile(statistic(*samples), [2.5, 97.5], axis=0)])


# TABLES
def number(x, digits):
    """Fixed point; exact ties are rounded up, so that another machine's last bit cannot change README."""
    return f"{x + 1e-9:.{digits}f}"


def with_interval(value, *interval):
    """A value and, if given, its interval as text."""
    return number(value, 3) + (f" [{number(interval[0], 3)}, {number(interval[1], 3)}]" if interval else "")


def mean_and_std(values, digits):
    """Mean and, from two values on, sample standard deviation as text."""
    deviation = f" ± {number(np.std(values, ddof=1), digits)}" if len(values) > 1 else ""
    return number(np.mean(values), digits) + deviation if len(values) else "-"


def markdown(header, rows, note):
    """A Markdown table with a note under it."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]]
    return "\n".join([*lines, "", note])


def label(name):
    """A method's name as the paper writes it (MAPPO-DG c0.5 for mappo_dg_c0.5), the short name of a task."""
    if name.split("_")[0] not in ACRONYMS:
        return re.sub(r"^Foraging-|-v\d+$", "", name)
    words = [word.upper() if word in ACRONYMS else word for word in name.split("_")]
    return re.sub("^(MAPPO|IPPO) ", r"\1-", " ".join(words))


def score_name(data):
    """What the score is."""
    wins = win_rate_tasks(data)
    if len(wins) in (0, data["task"].nunique()):
        sampled = ", sampled actions" * (win_rate_tasks(data, "greedy_win_rate") != [])
        return f"win rate{sampled}" if wins else "team return"
    return f"score (win rate on {', '.join(map(label, wins))}, else team return)"


def finished_note(data):
    """How many of the runs are complete, and how long they are."""
    runs = data.groupby(KEY)["complete"].first()
    frames = sorted(data[data["complete"]].groupby("task")["nominal_frames"].max().unique() / 1e6)
    lengths = f" ({', '.join(f'{f:g}M' for f in frames)} frames)" if frames else ""
    return f"{runs.sum()} of the {len(runs)} runs that were begun have finished{lengths}."


def paper_tasks(data):
    """The tasks on which the paper's results are comparable: it has them, and the runs are as long."""
    frames = data.groupby("task")["nominal_frames"].max()
    return [task for task in PAPER_TASKS if task in frames and frames[task] == PAPER_FRAMES]


def paper_iqms(data):
    """{method: the paper's (IQM, low, high)}; {} where the grid has other tasks or fewer frames than the paper."""
    if not paper_tasks(data) == ordered(data, "task") == PAPER_TASKS:
        return {}
    return {method: iqm_and_interval for method, (iqm_and_interval, _) in PAPER.items()}


def paper_win_rates(data):
    """{task: the paper's (win rate, after)}; after: "" or, if its runs are not as long as these, their frames as 2M.

    {} if no task has runs that are as long as the paper's.
    """
    frames = data.groupby("task")["nominal_frames"].max()
    quoted = {}
    for task, (win_rate, length) in PAPER_WIN_RATES.items():
        if task in frames:
            quoted[task] = win_rate, f"{length / 1e6:g}M" * bool(frames[task] != length)
    return quoted if any(after == "" for _, after in quoted.values()) else {}


def paper_row(data, method):
    """The row of a table that quotes the paper's final scores of a method; [] if it has none."""
    quoted = {}
    if method in PAPER:
        means = dict(zip(PAPER_TASKS, PAPER[method][1], strict=True))
        quoted = {task: f"*{means[task]:.2f}*" for task in paper_tasks(data)}
    if method == "mappo_dg":
        for task, (win_rate, after) in paper_win_rates(data).items():
            quoted[task] = f"*{win_rate:.2f} ({after})*" if after else f"*{win_rate:.2f}*"
    return ["*paper*", *(quoted.get(task, "-") for task in ordered(data, "task"))] if quoted else []


def paper_note(data):
    """What is to be known of the paper's win rates; "" where none is quoted."""
    quoted = paper_win_rates(data)
    if not quoted:
        return ""
    other_length = any(after for _, after in quoted.values())
    return (
        " The paper's are of greedy games" + ", after the frames in brackets if not after as many" * other_length + "."
    )


def scores_table(data):
    """Methods x tasks: mean and standard deviation over seeds of the final score; the paper's mean in the next row."""
    scores, tasks, rows = final_scores(data), ordered(data, "task"), []
    for method in ordered(data, "method"):
        cells = [scores.get((method, task), []) for task in tasks]
        rows.append([label(method), *(mean_and_std(cell, 2) + f" ({len(cell)})" * (len(cell) > 0) for cell in cells)])
        rows.append(paper_row(data, method))
    note = f"Final {score_name(data)} (mean over the last 10% of frames): mean ± standard deviation over (n) seeds. "
    note += finished_note(data) + paper_note(data)
    return markdown(["method", *map(label, tasks)], filter(None, rows), note)


# What else a run has over its frames: figure and table NAME-KEY -> (column of the CSV, what it is)
CURVES = {
    "returns": ("return", "team return"),
    "greedy": ("greedy_win_rate", "win rate of greedy games"),
    "training": ("train_win_rate", "win rate in training"),
    "density": ("edges_per_agent", "edges per agent besides itself"),
}


def curve_table(data, key):
    """Methods x tasks: mean and standard deviation over seeds of the final value of one of CURVES."""
    column, name = CURVES[key]
    if column not in data:
        raise UserError(f"the grid has no {column}")
    values, tasks, rows = final_scores(data, column), ordered(data, "task"), []
    for method in ordered(data[data[column].notna()], "method"):
        rows.append([label(method), *(mean_and_std(values.get((method, task), []), 2) for task in tasks)])
        if column == "greedy_win_rate":
            rows.append(paper_row(data, method))
    note = f"{name.capitalize()}, mean over the last 10% of frames: mean ± standard deviation over seeds."
    if column == "greedy_win_rate":
        note += paper_note(data)
    return markdown(["method", *map(label, tasks)], filter(None, rows), note)


# What tells how the graph and its models are doing: column of the CSV -> head of the column in the table
MODELS = {
    "edges_per_agent": "edges per agent",
    "entropy_ratio": "entropy ratio",
    "entropy_ratio_others": "entropy ratio, i ≠ j",
    "predictor_accuracy": "accuracy of q_phi",
    "reverse_accuracy": "accuracy of q_psi",
    "reverse_accuracy_others": "accuracy of q_psi, i ≠ j",
    "policy_entropy": "policy entropy",
    "simulator_edges_per_agent": "edges per agent, simulator",
    "simulator_precision": "precision, simulator",
    "simulator_recall": "recall, simulator",
    "average_precision": "average precision",
    "oracle_precision": "precision",
    "oracle_recall": "recall",
}


def models_table(data):
    """Tasks x methods with a graph: final values of the columns MODELS."""
    if "edges_per_agent" not in data:
        raise UserError("the grid has no edges_per_agent")
    finals = pd.DataFrame({head: final_scores(data, column) for column, head in MODELS.items() if column in data})
    note = "In training, mean over the last 10% of frames: mean ± standard deviation over seeds. Edges besides an "
    note += "agent's own; entropies in nats"
    if "entropy_ratio" in data or "reverse_accuracy" in data:
        note += "; entropy ratio and q_psi over all pairs, i = j included, which are easier"
    note += "."
    if "recall" in finals:
        note += " Precision and recall against the oracle's graph. By chance: the share of all pairs that the oracle "
        note += "connects, edges × precision / recall / (N - 1)."
        teams = data.filter(like="return_agent_").notna().groupby(data["task"]).any().sum(axis=1)
        others = teams[finals.index.get_level_values("task")].to_numpy() - 1
        chance = finals["edges per agent"] * finals["precision"] / finals["recall"] / others
        finals["precision by chance"] = chance[finals["recall"] > 0.01]
    rows = []
    for task, method in itertools.product(ordered(data, "task"), ordered(data, "method")):
        runs = finals[finals.index.droplevel("seed") == (method, task)]
        if runs["edges per agent"].notna().any():
            rows.append([label(task), label(method), *(mean_and_std(runs[head].dropna(), 2) for head in finals)])
    return markdown(["task", "method", *finals], rows, note)


def scale_table(data):
    """Star-spread by the number of agents: time of an iteration, its largest parts, memory (spread_scale.py's CSV)."""
    first, rows = data["algorithm"][0], []
    times = data.pivot(index="N", columns="algorithm", values="iteration ms")[data["algorithm"].unique()]
    for _, row in data[data["algorithm"] == first].iterrows():
        cells = [number(time, 0) for time in times.loc[row["N"]]]
        for phase in ("ppo_update", "multi_agent_gae"):
            cells.append(f"{number(100 * row[f'{phase} ms'] / row['iteration ms'], 0)} %")
        cells += [f"{row[f'{what} MB']:.0f} MB" for what in ("process", "multi_agent_gae")]
        rows.append([row["N"], *cells])
    header = ["N", *(f"{name.upper()}, ms per iteration" for name in times), "of it `ppo_update`"]
    header += ["`multi_agent_gae`", "memory of the process", "of `multi_agent_gae` alone"]
    note = f"Shares and memory are {first.upper()}'s. CPU time of one core; 10 episodes of 50 steps."
    return markdown(header, rows, note)


def over_tasks(metric, scores):
    """A metric of (R, M) scores with its interval as text; one seed has a value, but no interval."""
    return with_interval(*estimate(metric, scores)[: 3 if len(scores) > 1 else 1])


def over_tasks_note(data, seeds):
    """What the metrics over several tasks are of."""
    note = f"Final {score_name(data)} over {data['task'].nunique()} tasks and {seeds} finished on all of them "
    note += f"[95% stratified bootstrap interval, from two seeds on]. {finished_note(data)}"
    if missing_seeds(data):
        note += f" {missing_seeds(data)}"
    if paper_iqms(data):
        note += " The paper's IQM is at 5M frames, read off its figure (about ±0.01)."
    return note


def aggregate_table(data):
    """Methods x aggregate metrics with their 95% intervals, with the paper's IQM where it is comparable."""
    rows, paper = [], paper_iqms(data)
    for method, scores in score_matrices(data, least=1).items():
        cells = [over_tasks(metric, scores) for metric in METRICS.values()]
        if paper:
            cells.insert(1, with_interval(*paper[method]) if method in paper else "-")
        rows.append([label(method), *cells, len(scores)])
    header = ["method", "IQM", *["IQM, paper"] * bool(paper), "median", "mean", "optimality gap", "seeds"]
    return markdown(header, rows, over_tasks_note(data, "the seeds"))


def glance_table(data):
    """Methods: IQM beside the paper's, mean, worst task, and after how many frames the IQM is SOLVED."""
    rows, paper, tasks = [], paper_iqms(data), ordered(data, "task")
    matrices = score_matrices(data, least=1)
    for method, scores in matrices.items():
        cells = [over_tasks(iqm, scores)]
        if paper:
            cells.append(with_interval(*paper[method]) if method in paper else "-")
        worst, frames = scores.mean(0).argmin(), frames_to(SOLVED, data, method)
        cells += [number(mean(scores), 3), f"{number(scores.mean(0)[worst], 2)} ({label(tasks[worst])})"]
        rows.append([label(method), *cells, "never" if frames is None else f"{frames / 1e6:.2f}M"])
    header = ["method", "IQM", *["IQM, paper"] * bool(paper), "mean", "worst task", f"frames to IQM {SOLVED}"]
    counts = sorted({len(scores) for scores in matrices.values()})
    seeds = f"the {' or '.join(map(str, counts))} seed{'s' * (counts != [1])}"
    note = f" Frames: the first evaluation whose IQM over tasks and seeds is {SOLVED} or more."
    return markdown(header, rows, over_tasks_note(data, seeds) + note)


def seeds_table(data):
    """Tasks x methods, a column per seed: the mean of the run's last four evaluations."""
    scores = run_means(data[data["complete"]].groupby(KEY).tail(4))
    seeds, rows = sorted(data["seed"].unique()), []
    for task, method in itertools.product(ordered(data, "task"), ordered(data, "method")):
        values = scores.get((method, task), [])
        if len(values):
            cells = [number(values[seed], 3) if seed in values else "-" for seed in seeds]
            rows.append([label(task), label(method), *cells, mean_and_std(values, 3)])
    header = ["task", "method", *(f"seed {seed}" for seed in seeds), "mean ± std"]
    return markdown(header, rows, f"Mean {score_name(data)} of each run's last four evaluations. {finished_note(data)}")


def cost_table(data):
    """Methods: time of the finished runs."""
    runs = data[data["finished"] == 1].groupby(KEY)[["frames", "seconds"]].max()
    methods = [(label(name), runs.xs(name)) for name in ordered(data, "method") if name in runs.index]
    rows = []
    for name, group in [*methods, ("all", runs)] if len(runs) else []:
        seconds, frames = group["seconds"].sum(), group["frames"].sum()
        speed = number(frames / seconds, 0)
        rows.append([name, len(group), number(seconds / 3600, 1), number(seconds / 60 / len(group), 0), speed])
    header = ["method", "finished runs", "hours", "minutes per run", "frames/s"]
    note = (
        "Wall-clock time of training and evaluation, one run beside others on shared cores: what it cost, no benchmark."
    )
    return markdown(header, rows, note)


TABLES = {"glance": glance_table, "aggregate": aggregate_table, "scores": scores_table, "seeds": seeds_table}
TABLES |= {key: functools.partial(curve_table, key=key) for key in CURVES}
TABLES |= {"models": models_table, "cost": cost_table, "edges": known_graph_figure.table, "time": scale_table}
OTHERS = {"known_graph": "edges", "spread_scale": "time"}  # CSVs that are not a grid's -> their table
OTHER_COLUMNS = {"known_graph": known_graph_figure.COLUMNS, "spread_scale": ["algorithm", "N", "iteration ms"]}
OTHER_COLUMNS["spread_scale"] += ["ppo_update ms", "multi_agent_gae ms", "process MB", "multi_agent_gae MB"]


# FIGURES
def add_legend(figure, look):
    """One legend of the methods above all panels."""
    legend_above(figure, {label(method): line for method, line in look.items()})


def task_panels(data, height):
    """A figure with a panel of the given height for each task, and its (axes, task) pairs."""
    tasks = ordered(data, "task")
    figure, axes = panels([label(task) for task in tasks], height)
    return figure, list(zip(axes, tasks, strict=True))


def draw_curves(data, look, column="score", name=None):
    """Curves over frames: each run thin, the mean of the complete ones thick (without any: that of all, pale)."""
    data = data[data[column].notna()]
    look = {method: line for method, line in look.items() if method in set(data["method"])}
    figure, pairs = task_panels(data, 2.7)
    paper = paper_win_rates(data) if column in ("score", "greedy_win_rate") else {}
    paper_line = {"color": mpl.rcParams["text.color"], "ls": ":"}
    for ax, task in pairs:
        if task in paper:
            ax.axhline(paper[task][0], lw=1.2, clip_on=False, **paper_line)
        for method, line in look.items():
            runs = data[(data["task"] == task) & (data["method"] == method)]
            for _, run in runs.groupby("seed"):
                ax.plot(run["nominal_frames"] / 1e6, run[column], lw=0.6, alpha=0.5, **line)
            complete = runs["complete"].any()
            average = runs[runs["complete"] if complete else runs["nominal_frames"] <= runs["last"].min()]
            average = average.groupby("nominal_frames")[column].mean()
            ax.plot(average.index / 1e6, average, lw=2.2 if complete else 1.2, alpha=1 if complete else 0.5, **line)
    ax.set_xlim(0)  # shared, hence after the last panel: limits end the autoscaling of all
    if data[column].min() >= 0:
        shares = ("score", "greedy_win_rate", "train_win_rate")
        ax.set_ylim(0, 1 if column in shares and data[column].max() <= 1 else None)
    figure.supxlabel("environment frames (millions)", fontsize=11)
    figure.supylabel(name or score_name(data), fontsize=11)
    lines = {label(method): line for method, line in look.items()}
    if paper:
        longer = ", ".join(f"{label(task)}: after {after}" for task, (_, after) in paper.items() if after)
        lines["the paper's MAPPO-DG, greedy, in the end" + f" ({longer})" * bool(longer)] = paper_line
    legend_above(figure, lines)
    return figure


def draw_scores(data, look):
    """Final scores: a dot for each complete run, a bar at the mean over seeds."""
    scores = final_scores(data)
    figure, pairs = task_panels(data, 0.28 * len(look) + 0.6)
    for ax, task in pairs:
        for y, (method, line) in enumerate(look.items()):
            values = scores.get((method, task), [])
            ax.plot(values, [y] * len(values), "o", ms=5, alpha=0.7, color=line["color"], mew=0)
            if len(values):
                ax.plot(np.mean(values), y, "|", ms=13, mew=2.5, color=line["color"])
        list_rows(ax, [label(method) for method in look])
    figure.supxlabel(f"final {score_name(data)}", fontsize=11)
    return figure


def sweeps(data):
    """{stem: {value: method}} of settings with three values or more, in methods that are named like mappo_dg_c0.5.

    For a probability of noise, the method without it is the value 0.
    """
    found, methods = {}, ordered(data, "method")
    for method in methods:
        base, _, setting = method.rpartition("_")
        if match := re.fullmatch(r"([a-z]+)([\d.]+)", setting):
            start = {0.0: base} if match[1] in ("add", "drop") and base in methods else {}
            found.setdefault(f"{base}_{match[1]}", start)[float(match[2])] = method
    return {stem: values for stem, values in found.items() if len(values) >= 3}


def draw_sweep(data, look):
    """Final score and density of the graph over the values of a setting: a dot for each run, a line at the mean."""
    tasks, found = ordered(data, "task"), sweeps(data)
    columns = {"score": f"final {score_name(data)}"}
    if "edges_per_agent" in data:
        columns["edges_per_agent"] = "final edges per agent"
    size = max(6.5, 3.6 * len(tasks)), 2.6 * len(columns) + 0.4
    figure, axes = new_figure(len(columns), len(tasks), *size, sharex=True, sharey="row")
    for row, (column, name) in zip(axes, columns.items(), strict=True):
        finals = final_scores(data, column)
        for ax, task in zip(row, tasks, strict=True):
            for stem, methods in found.items():
                runs = {x: finals.get((method, task), []) for x, method in sorted(methods.items())}
                runs = {x: scores for x, scores in runs.items() if len(scores)}
                for x, scores in runs.items():
                    ax.plot([x] * len(scores), scores, "o", ms=4, alpha=0.5, mew=0, color=look[stem]["color"])
                ax.plot(list(runs), [scores.mean() for scores in runs.values()], lw=2, **look[stem])
            ax.set_title(label(task) if column == "score" else "")
        row[0].set(ylabel=name, ylim=(0, 1 if column == "score" and data["score"].between(0, 1).all() else None))
    figure.supxlabel(", ".join(dict.fromkeys(stem.rpartition("_")[2] for stem in found)), fontsize=11)
    if len(found) > 1:
        add_legend(figure, look)
    return figure


def draw_aggregate(data, look):
    """IQM, median, mean, optimality gap, 95% intervals; the paper's IQM hollow, beneath ours. Agarwal et al. 2021."""
    matrices, paper, ink = score_matrices(data), paper_iqms(data), mpl.rcParams["text.color"]
    figure, axes = new_figure(1, len(METRICS), 10.2, 0.45 * len(matrices) + 0.8, sharey=True)
    for ax, (name, metric) in zip(axes.flat, METRICS.items(), strict=True):
        for y, (method, scores) in enumerate(matrices.items()):
            draw_interval(ax, y, estimate(metric, scores), look[method]["color"])
            known = paper.get(method, ()) if name == "IQM" else ()
            ax.plot(known[1:], [y + 0.32] * len(known[1:]), lw=1, color=ink)
            ax.plot(known[:1], [y + 0.32] * len(known[:1]), "D", ms=4.5, mfc=mpl.rcParams["axes.facecolor"], color=ink)
        ax.set_title(name)
        list_rows(ax, [label(method) for method in matrices])
    if paper.keys() & matrices.keys():
        diamond = Line2D([], [], ls="-", lw=1, marker="D", ms=4.5, mfc=mpl.rcParams["axes.facecolor"], color=ink)
        figure.legend([diamond], ["the paper's IQM"], loc="outside lower left")
    return figure


def draw_profile(data, look):
    """Performance profile: the fraction of runs above each score, with 95% bands. Agarwal et al. 2021."""
    bands = {}
    for method, scores in score_matrices(data).items():
        bands[label(method)] = THRESHOLDS, estimate(performance_profile, scores), look[method]
    return draw_bands(bands, xlabel=f"final {score_name(data)} τ", ylabel="fraction of runs above τ")


def draw_efficiency(data, look):
    """Sample-efficiency curve: the IQM over tasks and seeds against frames, with 95% bands. Agarwal et al. 2021."""
    bands = {}
    for method in score_matrices(data):
        nominal, curves = score_curves(data, method)
        band = np.stack([estimate(iqm, scores, reps=2000) for scores in curves], axis=1)
        bands[label(method)] = nominal / 1e6, band, look[method]
    ylabel = f"IQM of {score_name(data)}"
    return draw_bands(bands, xlabel="environment frames (millions)", ylabel=ylabel, ylim=(0, 1))


def draw_improvement(data, look):
    """Probability that a CDG (or DG, or else the first) method improves on the others. Agarwal et al. 2021."""
    matrices = score_matrices(data)
    ours = [method for method in matrices if "cdg" in method]
    ours = ours or [method for method in matrices if method in ("mappo_dg", "ippo_dg")] or list(matrices)[:1]
    pairs = [(x, y) for k, x in enumerate(ours) for y in matrices if y not in ours[: k + 1]]
    figure, ((ax,),) = new_figure(1, 1, 6.5, 0.42 * len(pairs) + 1)
    for row, (x, y) in enumerate(pairs):
        draw_interval(ax, row, estimate(probability_of_improvement, matrices[x], matrices[y]), look[x]["color"])
    ax.axvline(0.5, color=mpl.rcParams["text.color"], lw=1, ls=":")
    ax.set(xlim=(-0.02, 1.02), xlabel="probability of improvement on the same task")
    list_rows(ax, [f"{label(x)} over {label(y)}" for x, y in pairs])
    return figure


FIGURES = {"curves": draw_curves, "scores": draw_scores, "sweep": draw_sweep, "aggregate": draw_aggregate}
FIGURES |= {"profile": draw_profile, "efficiency": draw_efficiency, "improvement": draw_improvement}
FIGURES |= {key: functools.partial(draw_curves, column=column, name=name) for key, (column, name) in CURVES.items()}


def kinds(data):
    """Which of TABLES and FIGURES tell something about this grid: a set of names."""
    names = {"scores", "seeds", "cost", "curves"}
    for key, (column, _) in CURVES.items():
        if column in data and (column != "return" or win_rate_tasks(data)):  # otherwise the return is the score
            names.add(key)
    if "edges_per_agent" in data:
        names.add("models")
    if comparable(data):
        names |= {"glance", "aggregate", "profile", "efficiency", "improvement"}
    if sweeps(data):
        names.add("sweep")
    return names


def draw(grid, data, folder, shown=None):
    """Saves a grid's figures; of their files only those shown (None: all)."""
    names = kinds(data)
    for name, function in FIGURES.items():
        if name in names:
            lines = list(sweeps(data)) if name == "sweep" else ordered(data, "method")

            def themed(theme, function=function, lines=lines):
                return function(data, looks(lines, theme))

            save(themed, folder, f"{grid}-{name}", shown)


# MAIN
def fill_tables(text, grids, page):
    """A page's text with the table between each pair of markers made anew, everything else as it is."""
    pattern = re.compile(r"^(<!-- report:(\S+) begin -->\n).*?^(<!-- report:\2 end -->)", re.DOTALL | re.MULTILINE)
    markers = re.findall(r"^<!-- report:(\S+) (begin|end) -->", text, re.MULTILINE)
    if markers != [(match[2], end) for match in pattern.finditer(text) for end in ("begin", "end")]:
        raise UserError(f"{page}: every `report:... begin` line needs its `end` line before the next one begins")

    def table(match):
        grid, _, name = match[2].rpartition("-")
        if grid not in grids or name not in TABLES or OTHERS.get(grid, name) != name:
            raise UserError(f"{page}: no table {match[2]}; grids: {', '.join(grids)}; tables: {', '.join(TABLES)}")
        try:
            return f"{match[1]}{TABLES[name](grids[grid])}\n{match[3]}"
        except UserError as error:
            raise UserError(f"{page}: no table {match[2]}: {error}") from error

    return pattern.sub(table, text)


def read_pages(root):
    """{"README.md" or "docs/NAME.md": its text} of the pages that there are."""
    pages = {}
    for path in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        try:
            if path.exists():
                pages[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8: {error}") from error
    return pages


def load_grids(folder):
    """{name: data} of the tidy CSVs in the folder, with what is compared; UserError if one of them is damaged."""
    head = f"{','.join(KEY)},".encode()
    grids = {path.stem: load(path) for path in sorted(folder.glob("*.csv")) if path.read_bytes().startswith(head)}
    for name, (other, methods) in BESIDE.items():
        if name in grids and other in grids:
            compared = grids[other][grids[other]["method"].isin(methods)]
            grids[name] = pd.concat([grids[name], compared], ignore_index=True)
    return grids


def load_others(folder):
    """{name: data} of the CSVs that are not a grid's but have a table; UserError if one is damaged."""
    paths = {name: folder / f"{name}.csv" for name in OTHERS}
    return {name: read_csv(path, OTHER_COLUMNS[name]) for name, path in paths.items() if path.exists()}


@dataclass
class Args:
    collect: Path | None = None
    """output folder of launch.py, whose runs go into experiments/results/GRID.csv"""
    grid: str | None = None
    """name of the grid that is collected, or else of the only one that is printed and drawn"""
    check: bool = False
    """change nothing; exit 1 if a table in a page differs from what the CSVs give"""
    all: bool = False
    """draw every figure, as PNG and SVG, not only those that README.md and docs/ show"""


def report_grid(grid, data, folder, shown):
    """Prints a grid's tables and draws its figures."""
    names = {OTHERS[grid]} if grid in OTHERS else kinds(data)
    for name, table in TABLES.items():
        if name in names:
            print(f"{grid}-{name}\n\n{table(data)}\n")
    if grid == "known_graph":
        save(functools.partial(known_graph_figure.draw, data), folder, grid, shown)
    if grid in OTHERS:
        return
    if missing_seeds(data):
        print(f"report.py: {grid}, aggregates over tasks: {missing_seeds(data)}", file=sys.stderr)
    draw(grid, data, folder, shown)


def main(args, root):
    """Does what the flags say in the repository at root and returns the exit status; raises UserError."""
    experiments = root / "experiments"
    if args.collect is not None:
        if args.check or args.all:
            raise UserError("--collect draws and compares nothing: --check and --all are for a second command")
        collect_grid(args.collect, args.grid, experiments)
        return 0
    if args.check and (args.grid or args.all):
        raise UserError("--check compares the tables of all grids and draws nothing: without --grid and --all")
    grids = load_grids(experiments / "results") | load_others(experiments / "results")
    if args.grid is not None and args.grid not in grids:
        raise UserError(f"no grid {args.grid} in experiments/results; there are {', '.join(grids)}")
    pages = read_pages(root)
    filled = {page: fill_tables(text, grids, page) for page, text in pages.items()}
    changed = [page for page in pages if filled[page] != pages[page]]
    if args.check:
        for page in changed:
            print(f"{page}: its tables differ from the CSVs: run python experiments/report.py")
        if not changed:
            print(f"The tables equal the CSVs: {', '.join(pages)}")
        return int(len(changed) > 0)
    for page in changed:
        write_whole(root / page, filled[page])
    if sys.stdout is not None:  # None: closed by whoever started the program
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has no ± prints its code
    shown = None if args.all else figures_in(pages.values())
    for grid, data in grids.items():
        if args.grid in (None, grid):
            report_grid(grid, data, experiments / "figures", shown)
    return 0


if __name__ == "__main__":
    with one_sentence():
        status = main(tyro.cli(Args, description=__doc__), Path(__file__).resolve().parents[1])
    sys.exit(status)
