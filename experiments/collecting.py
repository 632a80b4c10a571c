"""From the folders of launch.py's runs to one tidy CSV per grid (`report.py --collect`), and reading CSVs safely."""

import io
import json
import os
import re
import sys
import warnings
from pathlib import Path

from errors import UserError, one_sentence

with one_sentence():
    import numpy as np
    import pandas as pd
    import yaml
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

KEY = ["method", "task", "seed"]
SCALARS = {  # of TensorBoard -> column
    "charts/win_rate": "train_win_rate",
    "graph/density": "edges_per_agent",  # what version 0.1.0 calls it
    "graph/edges_per_agent": "edges_per_agent",
    "graph/entropy_ratio": "entropy_ratio",  # version 0.1.0: over all pairs, i = j included
    "graph/entropy_ratio_others": "entropy_ratio_others",  # over the pairs i != j
    "graph/oracle_precision": "oracle_precision",
    "graph/oracle_recall": "oracle_recall",
    "graph/simulator_edges_per_agent": "simulator_edges_per_agent",
    "graph/simulator_precision": "simulator_precision",
    "graph/simulator_recall": "simulator_recall",
    "graph/average_precision": "average_precision",
    "losses/action_predictor_accuracy": "predictor_accuracy",
    "losses/reverse_model_accuracy": "reverse_accuracy",  # as the entropy ratio
    "losses/reverse_model_accuracy_others": "reverse_accuracy_others",
    "losses/entropy": "policy_entropy",
}
LOGGED = list(dict.fromkeys(SCALARS.values()))
RUN_COLUMNS = ["global_step", "evaluation", "nominal_step", "episodic_return", "episodic_return_std", "episodes"]
# Of SMAClite: of games with sampled actions and of greedy ones. Version 0.1.0 has greedy ones alone, called win_rate
WINS = ["win_rate", "greedy_win_rate"]
COLUMNS = [*KEY, "frames", "evaluation", "nominal_frames", "return", "return_std", "episodes", "finished", "seconds"]
# What the columns of all CSVs hold, if not a number in every line
TEXT = dict.fromkeys(["method", "task", "world", "policy", "observation", "subset", "algorithm"], str)
TEXT |= dict.fromkeys(["model", "stage", "graph", "outcome"], str)
WHOLE = {"global_step", "evaluation", "nominal_step", "seed", "frames", "nominal_frames", "finished"}  # numbers >= 0
OPTIONAL = {"seconds", "precision", "recall", "spurious_rate", "auc"}
OPTIONAL |= {"correlation", "relative_error", "unaffected_error"}


# READ
# An older run does not tell its interval, and guesses have lost evaluations: whoever ran it knows
OLD = "; version 0.1.0 wrote none: insert evaluation = "
OLD_RUN = OLD + "global_step // INTERVAL, nominal_step = evaluation * INTERVAL"
OLD_TABLE = OLD + "frames // INTERVAL, nominal_frames = evaluation * INTERVAL, and call density edges_per_agent"


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
    head = text.split("\n")[0].split(",")
    optional = [name for name in head if name in WINS or re.match("episodic_return_agent_|greedy_", name)]
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
    """{column: {step: value}} of SCALARS in an event file, without the half record that a kill may leave.

    Raises UserError if the file is damaged. TensorBoard's own readers would leave out the rest without a word.
    """
    scalars = {column: {} for column in LOGGED}
    reader = PyRecordReader_New(str(path))
    try:
        while True:
            reader.GetNext()
            event = Event.FromString(reader.record())
            for value in event.summary.value:
                if value.tag in SCALARS:
                    scalars[SCALARS[value.tag]][event.step] = value.simple_value
    except OutOfRangeError:
        return scalars
    except DataLossError as error:
        if "truncated" in error.message:
            return scalars
        raise UserError(f"{path} is damaged: {error.message}") from error


# COLLECT
def means_between(folder, frames):
    """{column: (K,) mean of a TensorBoard scalar over the iterations up to each of the K evaluations, or nan}."""
    events = {column: {} for column in LOGGED}  # by step, since a resumed run repeats what came after its checkpoint
    for path in sorted(folder.glob("events.out.tfevents.*")):  # the order of names is that in which they were begun
        content = path.read_bytes()
        if any(tag.encode() in content for tag in SCALARS):
            for column, values in read_scalars(path).items():
                events[column] |= values
    means = {}
    for column, steps in events.items():
        values = pd.Series(steps, dtype=float).sort_index()
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
    extra = [name for name in (*WINS, "greedy_return", "greedy_return_std", *LOGGED) if name in data]
    extra += sorted((name for name in data if name.startswith("return_agent_")), key=natural)
    columns = [*COLUMNS, *(name for name in extra if data[name].notna().any())]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data.sort_values([*KEY, "frames"])[columns].to_csv(index=False, float_format="%.6g"))


def natural(name):
    """Sort key under which 8x8 comes before 10x10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


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
