"""From the runs' evaluations to README's results tables and to the figures, with their uncertainty.

Collect what `launch.py` has run, at any time (only the grid's methods and tasks if experiments/grids/NAME.yaml exists;
runs that are in the CSV already stay there when their folders are gone):
    python experiments/report.py --collect OUTPUT_DIR --grid NAME    # -> experiments/results/NAME.csv
Make every figure and every results table in README anew from the committed CSVs alone, or only compare the tables:
    python experiments/report.py                                     # -> experiments/figures/, README.md
    python experiments/report.py --check                             # exit 1 if a table differs from the CSVs

In README a table goes between the lines `<!-- report:NAME-TABLE begin -->` and `<!-- report:NAME-TABLE end -->`, where
TABLE is scores, aggregate, seeds, cost, returns, training, density or models. Figures are
figures/NAME-FIGURE-light.png (and dark, and svg). The tables known_graph-edges and spread_scale-time and the figure
known_graph are made from the CSVs of those experiments.

A row of a grid's CSV is an evaluation of a run (method, task, seed): at how many frames it took place (frames), which
one it was (evaluation: the whole evaluation intervals in these frames) and when it was due (nominal_frames: evaluation
times interval, at the end the run's frames); the team's return, its standard deviation, the episodes; and of the run,
whether it has finished, and its seconds. Evaluations are aligned by nominal_frames; of two with one index, the later
one counts.

The score of a task is the win rate if there is one, or else the team return (on LBF in [0, 1]: nothing is normalised).
A run's final score is its mean over the evaluations in the last 10% of frames (4.5M-5M of 5M, as in the paper). A run
is complete if it is finished and has the last evaluation that any run of its task has; only complete runs count. The
others are drawn as thin lines, their mean pale where a method has no complete run on a task. What training logs to
TensorBoard and the CSV keeps (the density of a learned graph, in edges per agent besides itself, the models'
accuracies, ...) are means over the iterations since the evaluation before.
Statistics: Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice" (arXiv 2108.13264).
"""

import functools
import io
import itertools
import json
import math
import os
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from errors import UserError, one_sentence

with one_sentence():
    import known_graph_figure
    import matplotlib as mpl
    import numpy as np
    import pandas as pd
    import tyro
    import yaml
    from matplotlib.lines import Line2D
    from plotting import THEMES, new_figure, save
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

KEY = ["method", "task", "seed"]
SCALARS = {  # of TensorBoard -> column
    "charts/win_rate": "train_win_rate",
    "graph/density": "density",
    "graph/entropy_ratio": "entropy_ratio",
    "graph/oracle_precision": "oracle_precision",
    "graph/oracle_recall": "oracle_recall",
    "losses/action_predictor_accuracy": "predictor_accuracy",
    "losses/reverse_model_accuracy": "reverse_accuracy",
    "losses/entropy": "policy_entropy",
}
DEFAULTS = {"ablation_c": {"mappo_dg": "mappo_dg_c0.9"}}  # in a grid over a setting, the default goes by its value
RUN_COLUMNS = ["global_step", "evaluation", "nominal_step", "episodic_return", "episodic_return_std", "episodes"]
COLUMNS = [*KEY, "frames", "evaluation", "nominal_frames", "return", "return_std", "episodes", "finished", "seconds"]
# What the columns of all CSVs hold, if not a number in every line
TEXT = dict.fromkeys(["method", "task", "world", "policy", "observation", "subset", "algorithm"], str)
WHOLE = {"global_step", "evaluation", "nominal_step", "seed", "frames", "nominal_frames", "finished"}  # numbers >= 0
OPTIONAL = {"seconds", "precision", "recall", "spurious_rate", "auc"}
# The paper's LBF results (arXiv 2601.21523), read off its figures (about +-0.01): its name of a method, the IQM of the
# team return at 5M frames over the six tasks [95% interval, where it is legible], the mean over 4.5M-5M on each task.
PAPER_TASKS = [f"Foraging-{task}-coop-v3" for task in ("8x8-2p-4f", "10x10-2p-3f", "15x15-3p-4f")]
PAPER_TASKS += [f"Foraging-{task}-v3" for task in ("10x10-3p-3f", "15x15-3p-4f", "15x15-4p-3f")]
PAPER = {
    "mappo_dg": ("MAPPO-DG", (0.855, 0.814, 0.880), (0.99, 0.92, 0.67, 0.94, 0.54, 0.82)),
    "mappo_global": ("MAPPO-global", (0.775, 0.709, 0.839), (0.94, 0.95, 0.23, 0.88, 0.09, 0.82)),
    "mappo_local": ("MAPPO-local", (0.584, 0.540, 0.620), (0.07, 0.00, 0.67, 0.91, 0.62, 0.90)),
    "ippo_dg": ("IPPO-DG", (0.887, 0.830, 0.921), (0.98, 0.88, 0.84, 0.95, 0.49, 0.85)),
    "ippo_global": ("IPPO-global", (0.681,), (0.93, 0.96, 0.28, 0.92, 0.09, 0.44)),
    "ippo_local": ("IPPO-local", (0.663,), (0.07, 0.00, 0.78, 0.91, 0.68, 0.91)),
}
PAPER_FRAMES = 5_000_000


# READ
# An older run does not tell its interval, and guesses have lost evaluations: whoever ran it knows
OLD_RUN = (
    "; version 0.1.0 wrote none: insert evaluation = global_step // INTERVAL, nominal_step = evaluation * INTERVAL"
)
OLD_TABLE = OLD_RUN.replace("global_step", "frames").replace("nominal_step", "nominal_frames")


def read_csv(path, columns, text=None):
    """The CSV (or its text) as a DataFrame; UserError, naming the file, if one of the columns is missing or damaged."""
    source = path if text is None else io.StringIO(text)
    names = {"dtype": TEXT, "keep_default_na": False, "na_values": [""]}  # neither "null" nor "007" is a number
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # lines with more fields than the head
            table = pd.read_csv(source, encoding="utf-8", index_col=False, **names)
    except (ValueError, pd.errors.ParserWarning) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    for column in columns:
        if column not in table:
            older = OLD_TABLE if "frames" in columns else OLD_RUN
            raise UserError(f"{path} has no column {column}{older * (column == 'evaluation')}")
        written = table[column]
        if column not in TEXT:
            table[column] = pd.to_numeric(written, errors="coerce")
        wrong = table[column].isna() & (written.notna() | (column not in OPTIONAL))
        if column in WHOLE:
            wrong |= (table[column] < 0) | (table[column] % 1 != 0)
        if wrong.any():
            raise UserError(f"{path} is damaged: line {wrong.idxmax() + 2} has no proper {column}")
    return table.astype({column: "int64" for column in columns if column in WHOLE and table[column].dtype == float})


def read_evaluations(path):
    """One run's evaluations.csv with the tidy column names, without the half row that a kill may leave at its end."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    text = text[: text.rfind("\n") + 1] or ",".join(RUN_COLUMNS)
    optional = [name for name in text.split("\n")[0].split(",") if re.match("win_rate|episodic_return_agent_", name)]
    table = read_csv(path, RUN_COLUMNS + optional, text)
    for column in ("global_step", "evaluation", "nominal_step"):
        if not table[column].is_monotonic_increasing:
            raise UserError(f"{path} is damaged: its {column} does not increase")
    table.columns = table.columns.str.replace("episodic_return", "return")
    return table.rename(columns={"global_step": "frames", "nominal_step": "nominal_frames"})


def read_finished(path):
    """(frames, seconds) of a job's finished.json; (inf, nan) if there is none, UserError if it is damaged."""
    if not path.exists():
        return np.inf, np.nan
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        command = record["command"]
        return int(command[command.index("--total-timesteps") + 1]), float(record["duration_seconds"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def read_scalars(path):
    """{tag: {step: value}} of the tags in SCALARS in an event file, without the half record that a kill may leave.

    Raises UserError if the file is damaged. TensorBoard's own readers would leave out the rest without a word.
    """
    scalars, reader = {tag: {} for tag in SCALARS}, PyRecordReader_New(str(path))
    try:
        while True:
            reader.GetNext()
            event = Event.FromString(reader.record())
            for value in event.summary.value:
                if value.tag in SCALARS:
                    scalars[value.tag][event.step] = value.simple_value
    except OutOfRangeError:
        return scalars
    except DataLossError as error:
        if "truncated" in error.message:
            return scalars
        raise UserError(f"{path} is damaged: {error.message}") from error


# COLLECT
def means_between(folder, frames):
    """{column: (K,) mean of a TensorBoard scalar over the iterations up to each of the K evaluations, or nan}."""
    events = {tag: {} for tag in SCALARS}  # by step, since a resumed run repeats what came after its checkpoint
    for path in sorted(folder.glob("events.out.tfevents.*")):  # the order of names is that in which they were begun
        content = path.read_bytes()
        if any(tag.encode() in content for tag in SCALARS):
            for tag, values in read_scalars(path).items():
                events[tag] |= values
    means = {}
    for tag, column in SCALARS.items():
        values = pd.Series(events[tag], dtype=float).sort_index()
        means[column] = values.groupby(np.searchsorted(frames, values.index)).mean().reindex(range(len(frames)))
    return means


def seed_of(folder):
    """The seed of a folder seed<k>; None for another name, also for seed01, seed1_2 and "seed1 copy"."""
    match = re.fullmatch("seed(0|[1-9][0-9]*)", folder.name)
    return int(match[1]) if match and int(match[1]) < 2**64 else None


def name_of(path):
    """The folder's name as UTF-8 whatever the locale, with a question mark for bytes that are not."""
    return path.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def job_folders(output):
    """The folders output/<method>/<task>/seed<k>, and whatever else lies beside them or on the way to them."""
    folders, others = [output], []
    for depth in range(3):
        entries = [path for folder in folders for path in sorted(folder.iterdir()) if path.name[0] != "."]
        folders = [path for path in entries if path.is_dir()]
        if depth == 2:
            folders = [path for path in folders if seed_of(path) is not None]
        others += sorted(set(entries) - set(folders))
    return folders, others


def evaluation_files(job):
    """The evaluations.csv of a job's runs, at any depth below its folder runs."""

    def fail(error):  # os.walk would leave out what it cannot read
        raise error

    if not (job / "runs").exists():
        return []
    walk = os.walk(job / "runs", onerror=fail, followlinks=True)
    return sorted(Path(folder, "evaluations.csv") for folder, _, files in walk if "evaluations.csv" in files)


def collect(output, methods=None, tasks=None):
    """Tidy table of the runs in output/<method>/<task>/seed<k>/; of a job's run folders, the one that got furthest.

    Without methods and tasks (as the folders are named): all runs. What lies beside the jobs is named on stderr.
    Raises UserError if there is no run, or if a file of a run is damaged.
    """
    runs, (folders, others) = [], job_folders(output)
    if others:
        names = ", ".join(str(path.relative_to(output)) for path in others[:10]) + ", ..." * (len(others) > 10)
        print(f"report.py: not METHOD/TASK/seedN, hence ignored: {names}", file=sys.stderr)
    for folder in folders:
        method, task = name_of(folder.parents[1]), name_of(folder.parent)
        if (methods and method not in methods) or (tasks and task not in tasks):
            continue
        tables = [(path.parent, read_evaluations(path)) for path in evaluation_files(folder)]
        tables = sorted((pair for pair in tables if len(pair[1])), key=lambda pair: pair[1]["frames"].max())
        goal, seconds = read_finished(folder / "finished.json")
        if goal < np.inf and not tables:
            raise UserError(f"{folder} has finished, but holds no evaluations (runs/**/evaluations.csv)")
        job = {"method": method, "task": task, "seed": np.uint64(seed_of(folder))}
        for run_folder, table in tables[-1:]:
            # two evaluations past the goal: the run was taken up again, to more frames, and has not finished since
            finished = goal < np.inf and (table["frames"] >= goal).sum() <= 1
            means = means_between(run_folder, table["frames"])
            runs.append(table.assign(**job, finished=int(finished), seconds=np.round(seconds), **means))
    if not runs:
        whose = " of the grid's methods and tasks" if methods else ""
        raise UserError(f"{output} holds no evaluations{whose} (METHOD/TASK/seed1/runs/**/evaluations.csv)")
    return pd.concat(runs, ignore_index=True)


def merge(old, new):
    """Runs of both tables; of a run in both, the one that got further (at a tie: finished, more evaluations, new)."""
    data = pd.concat([old.astype({"seed": "uint64"}).assign(new=0), new.assign(new=1)], ignore_index=True)
    reach = {"last": ("nominal_frames", "max"), "finished": ("finished", "max"), "rows": ("frames", "size")}
    runs = data.groupby([*KEY, "new"], as_index=False).agg(**reach)
    best = runs.sort_values([*reach, "new"]).drop_duplicates(KEY, keep="last")
    return data.merge(best[[*KEY, "new"]]).drop(columns="new")


def write_whole(path, text):
    """Writes the file as a whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write(data, path):
    """Writes the tidy CSV in an order that keeps diffs small."""
    extra = [name for name in ("win_rate", *SCALARS.values()) if name in data]
    extra += sorted((name for name in data if name.startswith("return_agent_")), key=natural)
    columns = [*COLUMNS, *(name for name in extra if data[name].notna().any())]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data.sort_values([*KEY, "frames"])[columns].to_csv(index=False, float_format="%.6g"))


# STATISTICS
def natural(name):
    """Sort key under which 8x8 comes before 10x10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def load(path):
    """The tidy CSV + score, last (nominal frames of the run's last evaluation), complete; UserError if damaged."""
    data = read_csv(path, COLUMNS).sort_values([*KEY, "frames"], ignore_index=True)
    data["method"] = data["method"].replace(DEFAULTS.get(path.stem, {}))
    wins = data["task"].isin(win_rate_tasks(data))
    data["score"] = np.where(wins, data.get("win_rate", np.nan), data["return"])
    if data["score"].isna().any():
        method, task, seed = data.loc[data["score"].isna().idxmax(), KEY]
        raise UserError(f"{path}: {method} on {task}, seed {seed}, lacks the win_rate that other runs on {task} have")
    data = data.drop_duplicates([*KEY, "evaluation"], keep="last")  # the closing one may lie within an interval
    data = data.assign(last=data.groupby(KEY)["nominal_frames"].transform("max"))
    longest = data.groupby("task")["last"].transform("max")
    return data.assign(complete=(data["finished"] == 1) & (data["last"] == longest))


def win_rate_tasks(data):
    """The tasks that have a win rate."""
    return data.loc[data["win_rate"].notna(), "task"].unique().tolist() if "win_rate" in data else []


def ordered(data, column):
    """The methods or tasks of a grid: those of the paper first, in its order, then the others."""
    known = list(PAPER) if column == "method" else PAPER_TASKS
    return sorted(data[column].unique(), key=lambda x: (known.index(x) if x in known else len(known), natural(x)))


def run_means(rows, column="score"):
    """Mean score of each run over the rows given: {(method, task): Series indexed by seed}."""
    means = rows.groupby(KEY)[column].mean().dropna()
    return {pair: scores.droplevel(["method", "task"]) for pair, scores in means.groupby(["method", "task"])}


def final_scores(data, column="score"):
    """Mean score of each complete run over its evaluations in the last 10% of frames, as `run_means`."""
    return run_means(data[data["complete"] & (10 * data["nominal_frames"] >= 9 * data["last"])], column)


def score_matrices(data, least=2):
    """{method: (R, M) final scores of the R seeds that are complete on all M tasks}, for methods with R >= least."""
    scores, tasks, matrices = final_scores(data), ordered(data, "task"), {}
    for method in ordered(data, "method"):
        columns = [scores.get((method, task), pd.Series(dtype=float)) for task in tasks]
        matrices[method] = pd.concat(columns, axis=1, join="inner").to_numpy()
    return {method: matrix for method, matrix in matrices.items() if len(matrix) >= least}


def missing_seeds(data):
    """In words, which seeds `score_matrices` leaves out since they are complete on some tasks only; "" if none.

    A method that was not begun on every task is left out as a whole, and not named.
    """
    scores, tasks, lacks = final_scores(data), ordered(data, "task"), {}
    for method in ordered(data, "method"):
        if data.loc[data["method"] == method, "task"].nunique() < len(tasks):
            continue
        seeds = {task: set(scores[method, task].index) if (method, task) in scores else set() for task in tasks}
        missing = {label(task): sorted(set.union(*seeds.values()) - seeds[task]) for task in tasks}
        places = [f"{', '.join(map(str, some))} missing on {task}" for task, some in missing.items() if some]
        lacks.setdefault(" and ".join(places), []).append(label(method))
    lacks.pop("", None)
    details = "; ".join(f"{', '.join(methods)}: {places}" for places, methods in lacks.items())
    return f"Left out are the seeds that are not finished on every task. {details}." if details else ""


def score_curves(data, method):
    """(K) nominal frames of the evaluations that all runs of `score_matrices` have, and their (R, M, K) scores."""
    tasks, runs = ordered(data, "task"), data[data["complete"] & (data["method"] == method)]
    table = runs.pivot(index=["seed", "nominal_frames"], columns="task", values="score").reindex(columns=tasks)
    table = table.dropna().unstack("nominal_frames").dropna(axis=1)  # seeds that all tasks have, then evaluations
    return table[tasks[0]].columns.to_numpy(), np.stack([table[task].to_numpy() for task in tasks], axis=1)


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
    """The paper's name of a method (with what a variant changes), the short name of a task."""
    base = next((method for method in PAPER if f"{name}_".startswith(f"{method}_")), None)
    return PAPER[base][0] + name[len(base) :].replace("_", " ") if base else re.sub(r"^Foraging-|-v\d+$", "", name)


def score_name(data):
    """What the score is."""
    wins = win_rate_tasks(data)
    if len(wins) in (0, data["task"].nunique()):
        return "win rate" if wins else "team return"
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


def paper_iqm(data, method):
    """The paper's (IQM, low, high), or () where there is none or the grid has other tasks or fewer frames."""
    return PAPER[method][1] if method in PAPER and paper_tasks(data) == ordered(data, "task") == PAPER_TASKS else ()


def scores_table(data):
    """Methods x tasks: mean and standard deviation over seeds of the final score; the paper's mean in the next row."""
    scores, tasks, rows = final_scores(data), ordered(data, "task"), []
    for method in ordered(data, "method"):
        cells = [scores.get((method, task), []) for task in tasks]
        rows.append([label(method), *(mean_and_std(cell, 2) + f" ({len(cell)})" * (len(cell) > 0) for cell in cells)])
        paper = dict(zip(PAPER_TASKS, PAPER[method][2], strict=True)) if method in PAPER and paper_tasks(data) else {}
        if paper:
            rows.append(["*paper*", *(f"*{paper[task]:.2f}*" if task in paper_tasks(data) else "-" for task in tasks)])
    note = f"Final {score_name(data)} (mean over the last 10% of frames): mean ± standard deviation over (n) seeds. "
    return markdown(["method", *map(label, tasks)], rows, note + finished_note(data))


# What else a run has over its frames: figure and table NAME-KEY -> (column of the CSV, what it is)
CURVES = {
    "returns": ("return", "team return"),
    "training": ("train_win_rate", "win rate in training"),
    "density": ("density", "edges per agent besides itself"),
}


def curve_table(data, key):
    """Methods x tasks: mean and standard deviation over seeds of the final value of one of CURVES."""
    column, name = CURVES[key]
    if column not in data:
        raise UserError(f"README.md: the grid of a table *-{key} has no {column}")
    values, tasks, rows = final_scores(data, column), ordered(data, "task"), []
    for method in ordered(data[data[column].notna()], "method"):
        rows.append([label(method), *(mean_and_std(values.get((method, task), []), 2) for task in tasks)])
    note = f"{name.capitalize()}, mean over the last 10% of frames: mean ± standard deviation over seeds."
    return markdown(["method", *map(label, tasks)], rows, note)


# What tells how the graph and its models are doing: column of the CSV -> head of the column in the table
MODELS = {"density": "edges per agent", "entropy_ratio": "entropy ratio", "predictor_accuracy": "accuracy of q_phi"}
MODELS |= {"reverse_accuracy": "accuracy of q_psi", "policy_entropy": "policy entropy"}
MODELS |= {"oracle_precision": "precision", "oracle_recall": "recall"}


def models_table(data):
    """Tasks x methods with a graph: final values of the columns MODELS."""
    columns, rows = [column for column in MODELS if column in data], []
    finals = {column: final_scores(data, column) for column in columns}
    if "oracle_recall" in finals:  # the oracle's edges are density * precision / recall of each agent's N - 1 pairs
        columns.append("chance")
        finals["chance"] = {}
        for method, task in finals["oracle_recall"]:
            density = finals["density"][method, task]
            pairs = data.loc[data["task"] == task].filter(like="return_agent_").notna().any().sum() - 1
            precision, recall = (finals[f"oracle_{name}"][method, task] for name in ("precision", "recall"))
            finals["chance"][method, task] = (density * precision / recall / pairs)[recall > 0.01]
    for task, method in itertools.product(ordered(data, "task"), ordered(data, "method")):
        if (method, task) in finals.get("density", {}):
            cells = [mean_and_std(finals[column].get((method, task), []), 2) for column in columns]
            rows.append([label(task), label(method), *cells])
    columns = [MODELS.get(column, "precision by chance") for column in columns]
    note = "In training, mean over the last 10% of frames: mean ± standard deviation over seeds. Edges besides an "
    note += "agent's own; entropies in nats; entropy ratio and q_psi over all pairs, i = j included, which are easier."
    note += " Precision and recall against the oracle's graph." * ("oracle_recall" in finals)
    note += " By chance: the share of all pairs that the oracle connects, edges × precision / recall / (N - 1)." * (
        "precision by chance" in columns
    )
    return markdown(["task", "method", *columns], rows, note)


def scale_table(data):
    """Star-spread by the number of agents: time of an iteration, its largest parts, memory (spread_scale.py's CSV)."""
    rows, algorithms = [], data["algorithm"].unique()
    for N, group in data.groupby("N"):
        group = group.set_index("algorithm")
        cells = [f"{number(group.loc[name, 'iteration ms'], 0)}" for name in algorithms]
        first = group.loc[algorithms[0]]
        shares = [100 * first[f"{phase} ms"] / first["iteration ms"] for phase in ("ppo_update", "multi_agent_gae")]
        memory = [f"{first[f'{what} MB']:.0f} MB" for what in ("process", "multi_agent_gae")]
        rows.append([N, *cells, *(f"{number(share, 0)} %" for share in shares), *memory])
    header = ["N", *(f"{name.upper()}, ms per iteration" for name in algorithms), "of it `ppo_update`"]
    header += ["`multi_agent_gae`", "memory of the process", "of `multi_agent_gae` alone"]
    note = f"Shares and memory are {algorithms[0].upper()}'s. CPU time of one core; 10 episodes of 50 steps."
    return markdown(header, rows, note)


def aggregate_table(data):
    """Methods x aggregate metrics with their 95% intervals, with the paper's IQM where it is comparable."""
    rows, paper = [], paper_tasks(data) == ordered(data, "task") == PAPER_TASKS
    for method, scores in score_matrices(data, least=1).items():
        known = 3 if len(scores) > 1 else 1  # one seed has a value, but no interval
        cells = [with_interval(*estimate(metric, scores)[:known]) for metric in METRICS.values()]
        if paper:
            cells.insert(1, with_interval(*paper_iqm(data, method)) if paper_iqm(data, method) else "-")
        rows.append([label(method), *cells, len(scores)])
    header = ["method", "IQM", *["IQM, paper"] * paper, "median", "mean", "optimality gap", "seeds"]
    note = f"Final {score_name(data)} over {data['task'].nunique()} tasks and the seeds finished on all of them "
    note += f"[95% stratified bootstrap interval, from two seeds on]. {finished_note(data)}"
    note += f" {missing_seeds(data)}" if missing_seeds(data) else ""
    note += " The paper's IQM is at 5M frames, read off its figure (about ±0.01)." * paper
    return markdown(header, rows, note)


def seeds_table(data):
    """Tasks x methods, a column per seed: the mean of the run's last four evaluations."""
    scores = run_means(data[data["complete"]].groupby(KEY).tail(4))
    seeds, rows = sorted(data["seed"].unique()), []
    for task, method in itertools.product(ordered(data, "task"), ordered(data, "method")):
        if (values := scores.get((method, task))) is not None:
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


TABLES = {"scores": scores_table, "aggregate": aggregate_table, "seeds": seeds_table, "cost": cost_table}
TABLES |= {"models": models_table, "edges": known_graph_figure.table, "time": scale_table}
OTHERS = {"known_graph": "edges", "spread_scale": "time"}  # CSVs that are not a grid's -> their table
OTHER_COLUMNS = {"known_graph": known_graph_figure.COLUMNS, "spread_scale": ["algorithm", "N", "iteration ms"]}
OTHER_COLUMNS["spread_scale"] += ["ppo_update ms", "multi_agent_gae ms", "process MB", "multi_agent_gae MB"]
TABLES |= {key: functools.partial(curve_table, key=key) for key in CURVES}


# FIGURES
def looks(methods, theme):
    """{method: line style}: the colour is the reward scheme, IPPO is dashed; other methods share the other colours."""
    colours = THEMES[theme][3:]
    look = {m: {"color": colours[k % 3], "ls": "--" if k >= 3 else "-"} for k, m in enumerate(PAPER) if m in methods}
    free = colours[3:] if look else colours
    for k, method in enumerate(method for method in methods if method not in PAPER):
        look[method] = {"color": free[k % len(free)], "ls": ["-", "--", ":", "-."][k // len(free) % 4]}
    return look


def add_legend(figure, look):
    """One legend above all panels, as wide as the figure, which grows by its height."""
    handles = [Line2D([], [], lw=2.2, label=label(method), **line) for method, line in look.items()]
    widest = max(len(handle.get_label()) for handle in handles)
    rows = math.ceil(len(handles) / max(1, int(figure.get_figwidth() * 11 / (widest + 7))))
    figure.set_figheight(figure.get_figheight() + 0.23 * rows)
    figure.legend(handles=handles, loc="outside upper center", ncols=math.ceil(len(handles) / rows))


def task_panels(data, height):
    """A figure with a panel of the given height for each task, and its (axes, task) pairs."""
    tasks = ordered(data, "task")
    columns = min(3, len(tasks))
    rows = math.ceil(len(tasks) / columns)
    figure, axes = new_figure(rows, columns, max(6.5, 3.4 * columns), height * rows + 0.4, sharex=True, sharey=True)
    for ax in axes.flat[len(tasks) :]:
        ax.set_visible(False)
    for ax in axes.flat[len(tasks) - columns : len(tasks)]:  # nothing but the page below them
        ax.tick_params(labelbottom=True)
    for ax, task in zip(axes.flat, tasks, strict=False):
        ax.set_title(label(task))
    return figure, list(zip(axes.flat, tasks, strict=False))


def draw_interval(ax, y, values, colour):
    """A point and its interval as a horizontal bar."""
    ax.plot(values[1:], [y, y], lw=8, alpha=0.45, solid_capstyle="butt", color=colour)
    ax.plot(values[0], y, "o", ms=6, color=colour)


def list_rows(ax, names):
    """Names the rows of a horizontal plot, the first at the top."""
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)


def draw_curves(data, look, column="score", name=None):
    """Curves over frames: each run thin, the mean of the complete ones thick (without any: that of all, pale)."""
    data = data[data[column].notna()]
    look = {method: line for method, line in look.items() if method in set(data["method"])}
    figure, panels = task_panels(data, 2.7)
    for ax, task in panels:
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
        ax.set_ylim(0, 1 if column in ("score", "train_win_rate") and data[column].max() <= 1 else None)
    figure.supxlabel("environment frames (millions)", fontsize=11)
    figure.supylabel(name or score_name(data), fontsize=11)
    add_legend(figure, look)
    return figure


def draw_scores(data, look):
    """Final scores: a dot for each complete run, a bar at the mean over seeds."""
    scores = final_scores(data)
    figure, panels = task_panels(data, 0.28 * len(look) + 0.6)
    for ax, task in panels:
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
    columns |= {"density": "final edges per agent"} if "density" in data else {}
    size = max(6.5, 3.6 * len(tasks)), 2.6 * len(columns) + 0.4
    figure, axes = new_figure(len(columns), len(tasks), *size, sharex=True, sharey="row")
    for row, (column, name) in zip(axes, columns.items(), strict=True):
        finals = final_scores(data, column)
        for ax, task in zip(row, tasks, strict=True):
            for stem, methods in found.items():
                runs = {x: finals[method, task] for x, method in sorted(methods.items()) if (method, task) in finals}
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
    matrices, ink = score_matrices(data), mpl.rcParams["text.color"]
    figure, axes = new_figure(1, len(METRICS), 10.2, 0.45 * len(matrices) + 0.8, sharey=True)
    for ax, (name, metric) in zip(axes.flat, METRICS.items(), strict=True):
        for y, (method, scores) in enumerate(matrices.items()):
            draw_interval(ax, y, estimate(metric, scores), look[method]["color"])
            paper = paper_iqm(data, method) if name == "IQM" else ()
            ax.plot(paper[1:], [y + 0.32] * len(paper[1:]), lw=1, color=ink)
            ax.plot(paper[:1], [y + 0.32] * len(paper[:1]), "D", ms=4.5, mfc=mpl.rcParams["axes.facecolor"], color=ink)
        ax.set_title(name)
        list_rows(ax, [label(method) for method in matrices])
    if any(paper_iqm(data, method) for method in matrices):
        diamond = Line2D([], [], ls="-", lw=1, marker="D", ms=4.5, mfc=mpl.rcParams["axes.facecolor"], color=ink)
        figure.legend([diamond], ["the paper's IQM"], loc="outside lower left")
    return figure


def draw_bands(estimates, look, **axes):
    """Lines with 95% bands; estimates: {method: (x, (line, low, high))}."""
    figure, ((ax,),) = new_figure(1, 1, 6.5, 3.8)
    for method, (x, (line, low, high)) in estimates.items():
        ax.fill_between(x, low, high, color=look[method]["color"], alpha=0.15, lw=0)
        ax.plot(x, line, lw=2.2, **look[method])
    ax.set(**axes)
    ax.margins(x=0)
    add_legend(figure, {method: look[method] for method in estimates})
    return figure


def draw_profile(data, look):
    """Performance profile: the fraction of runs above each score, with 95% bands. Agarwal et al. 2021."""
    estimates = {m: (THRESHOLDS, estimate(performance_profile, scores)) for m, scores in score_matrices(data).items()}
    return draw_bands(estimates, look, xlabel=f"final {score_name(data)} τ", ylabel="fraction of runs above τ")


def draw_efficiency(data, look):
    """Sample-efficiency curve: the IQM over tasks and seeds against frames, with 95% bands. Agarwal et al. 2021."""
    estimates = {}
    for method in score_matrices(data):
        nominal, curves = score_curves(data, method)
        curves = np.moveaxis(curves, -1, 0)  # (K, R, M)
        estimates[method] = nominal / 1e6, np.stack([estimate(iqm, scores, reps=2000) for scores in curves], axis=1)
    ylabel = f"IQM of {score_name(data)}"
    return draw_bands(estimates, look, xlabel="environment frames (millions)", ylabel=ylabel, ylim=(0, 1))


def draw_improvement(data, look):
    """Probability that a DG method (or else the first) improves on each other, 95% intervals. Agarwal et al. 2021."""
    matrices = score_matrices(data)
    ours = [method for method in matrices if method in ("mappo_dg", "ippo_dg")] or list(matrices)[:1]
    pairs = [(x, y) for k, x in enumerate(ours) for y in matrices if y not in ours[: k + 1]]
    figure, ((ax,),) = new_figure(1, 1, 6.5, 0.42 * len(pairs) + 1)
    for row, (x, y) in enumerate(pairs):
        draw_interval(ax, row, estimate(probability_of_improvement, matrices[x], matrices[y]), look[x]["color"])
    ax.axvline(0.5, color=mpl.rcParams["text.color"], lw=1, ls=":")
    ax.set(xlim=(-0.02, 1.02), xlabel="probability of improvement on the same task")
    list_rows(ax, [f"{label(x)} over {label(y)}" for x, y in pairs])
    return figure


def draw(grid, data, folder):
    """Saves a grid's figures; those over several tasks only if two methods and two tasks can be compared in [0, 1]."""
    figures = {"curves": draw_curves, "scores": draw_scores}
    for key, (column, name) in CURVES.items():
        if column in data and (win_rate_tasks(data) or column != "return"):  # otherwise the return is the score
            figures[key] = functools.partial(draw_curves, column=column, name=name)
    if len(score_matrices(data)) >= 2 and data["task"].nunique() >= 2 and data["score"].between(0, 1).all():
        figures |= {"aggregate": draw_aggregate, "profile": draw_profile}
        figures |= {"efficiency": draw_efficiency, "improvement": draw_improvement}
    if sweeps(data):
        figures["sweep"] = draw_sweep
    for name, function in figures.items():
        lines = list(sweeps(data)) if name == "sweep" else ordered(data, "method")

        def themed(theme, function=function, lines=lines):
            return function(data, looks(lines, theme))

        save(themed, folder, f"{grid}-{name}")


# MAIN
def fill_tables(text, grids):
    """README's text with the table between each pair of markers made anew, everything else as it is."""
    pattern = re.compile(r"^(<!-- report:(\S+) begin -->\n).*?^(<!-- report:\2 end -->)", re.DOTALL | re.MULTILINE)
    markers = re.findall(r"^<!-- report:(\S+) (begin|end) -->", text, re.MULTILINE)
    if markers != [(match[2], end) for match in pattern.finditer(text) for end in ("begin", "end")]:
        raise UserError("README.md: every `report:... begin` line needs its `end` line before the next one begins")

    def table(match):
        grid, _, name = match[2].rpartition("-")
        if grid not in grids or name not in TABLES or OTHERS.get(grid, name) != name:
            raise UserError(f"README.md: no table {match[2]}; grids: {', '.join(grids)}; tables: {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[name](grids[grid])}\n{match[3]}"

    return pattern.sub(table, text)


def load_grids(folder):
    """{name: data} of the tidy CSVs in the folder; UserError if one of them is damaged."""
    head = f"{','.join(KEY)},".encode()
    return {path.stem: load(path) for path in sorted(folder.glob("*.csv")) if path.read_bytes().startswith(head)}


def load_others(folder):
    """{name: data} of the CSVs that are not a grid's but have a table in README; UserError if one is damaged."""
    paths = {name: folder / f"{name}.csv" for name in OTHERS}
    return {name: read_csv(path, OTHER_COLUMNS[name]) for name, path in paths.items() if path.exists()}


@dataclass
class Args:
    collect: Path | None = None
    """output folder of launch.py, whose runs go into experiments/results/GRID.csv"""
    grid: str | None = None
    """name of the grid that is collected"""
    check: bool = False
    """change nothing; exit 1 if a table in README.md differs from what the CSVs give"""


def read_grid(path):
    """(methods, tasks) of a grid of launch.py, as its folders are named; UserError if the file is no grid."""
    try:
        grid = yaml.safe_load(path.read_text(encoding="utf-8"))
        methods = [method["name"] for method in grid["methods"]]
        return methods, [task["env_id"].replace("/", "_") for task in grid["tasks"]]
    except (UnicodeDecodeError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a grid of launch.py: {type(error).__name__}: {error}") from error


def collect_grid(output, grid, experiments):
    """Merges the runs in the output folder that belong to the grid into its CSV."""
    if not grid or not re.fullmatch(r"\w+", grid):
        raise UserError("--collect needs --grid NAME, a name of letters, digits and underscores")
    path, definition = experiments / f"results/{grid}.csv", experiments / f"grids/{grid}.yaml"
    runs = collect(output, *(read_grid(definition) if definition.exists() else ()))  # grids may share an output folder
    write(merge(read_csv(path, COLUMNS), runs) if path.exists() else runs, path)


def main(args, root):
    """Does what the flags say in the repository at root and returns the exit status; raises UserError."""
    readme, experiments = root / "README.md", root / "experiments"
    if args.collect is not None:
        if args.check:
            raise UserError("--collect and --check are two commands")
        collect_grid(args.collect, args.grid, experiments)
        return 0
    if args.grid is not None:
        raise UserError("--grid is for --collect: figures and tables are made of all grids")
    grids, others = load_grids(experiments / "results"), load_others(experiments / "results")
    try:
        old = readme.read_text(encoding="utf-8") if readme.exists() else ""
    except UnicodeDecodeError as error:
        raise UserError(f"{readme} is not UTF-8: {error}") from error
    new = fill_tables(old, grids | others)
    if args.check:
        print("README.md's tables " + ("equal the CSVs" if new == old else "differ: run python experiments/report.py"))
        return int(new != old)
    if new != old:
        write_whole(readme, new)
    for grid, data in grids.items():
        draw(grid, data, experiments / "figures")
        print(f"{grid}: {finished_note(data)}")
        if missing_seeds(data):
            print(f"report.py: {grid}, aggregates over tasks: {missing_seeds(data)}", file=sys.stderr)
    if "known_graph" in others:
        draw_known_graph = functools.partial(known_graph_figure.draw, others["known_graph"])
        save(draw_known_graph, experiments / "figures", "known_graph")
    return 0


if __name__ == "__main__":
    with one_sentence():
        status = main(tyro.cli(Args, description=__doc__), Path(__file__).resolve().parents[1])
    sys.exit(status)
