"""Runs a grid of training scripts: methods x tasks x seeds, in parallel, on one machine or on a Ray cluster.

    python experiments/launch.py experiments/grids/lbf_mappo.yaml --workers 2
    python experiments/launch.py experiments/grids/lbf_mappo.yaml --backend ray --ray-address 10.0.0.1:6379

The same command starts a grid, goes on with an interrupted one and does nothing for a finished one; with more
`--total-timesteps` it goes on with a finished one, too. Ctrl-C, SIGTERM or SIGHUP lets every run save before it ends,
a second Ctrl-C kills the runs. Exit status: 0 all finished, 1 some did not finish, 2 bad input, 130 stopped.

A grid file (YAML); every `flags` is optional and is what one would type on the script's command line, without
--env-id, --seed, --total-timesteps and --resume, which the launcher sets:

    total_timesteps: 5000000
    seeds: [1, 2, 3]
    flags: --eval-episodes 100                   # for every run
    methods:
      - {name: mappo_dg, script: mappo_dg_lbf.py}                      # path relative to the repository
      - {name: mappo_dg_transposed, script: mappo_dg_lbf.py, flags: --transpose-graph,
         only_tasks: [Foraging-8x8-2p-4f-coop-v3]}                     # optional: not on the other tasks
    tasks:
      - {env_id: Foraging-8x8-2p-4f-coop-v3}
      - {env_id: Foraging-10x10-3p-3f-v3, flags: --no-winner-take-all, seeds: [1, 2],
         total_timesteps: 1000000}                                     # optional: seeds and frames of its own

The order is seed by seed: all methods and tasks of the first seed, then the second. Each run ("job") has a folder
OUTPUT_DIR/method/env_id/seed1/, the working directory of its script:

    runs/**/        what the script writes: checkpoint.pt, evaluations.csv, TensorBoard events
    log.txt         its output
    attempts.json   when and where it was started, by which command, for how long, and its exit status
    finished.json   exists once the script has exited with status 0: command, seconds of all attempts, run folder
    lock            locked (flock) by the launcher and by the script while either of them runs

Two launchers share an output folder without running a job twice, also when one was killed and its scripts live on.
On a cluster the output folder must be on a shared file system whose flock works between the machines, and the
repository must be at the same path on all of them. Linux and macOS only.
"""

import contextlib
import fcntl
import fnmatch
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from errors import one_sentence

with one_sentence():
    import tyro
    import yaml
    from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
STOP_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
INTERRUPTED = [128 + number for number in STOP_SIGNALS] + [-number for number in STOP_SIGNALS]  # -: before it caught it
SET_BY_THE_JOB = ("--env-id", "--seed", "--total-timesteps", "--resume")
# What a value in a grid or in a job's records must be: in words, and as a test (True and False are no numbers).
COUNT, TEXT, LIST = "a positive whole number", "a text without NUL", "a list that is not empty"
SEEDS = "a list of different whole numbers from 0 to 2^64 - 1"
COMMAND, NUMBER, NUMBER_OR_NULL = "a command with --total-timesteps", "a number", "a number or null"
TESTS = {
    COUNT: lambda value: type(value) is int and value > 0,
    TEXT: lambda value: isinstance(value, str) and "\0" not in value,
    LIST: lambda value: isinstance(value, list) and len(value) > 0,
    SEEDS: lambda value: TESTS[LIST](value) and all(map(is_seed, value)) and len(set(value)) == len(value),
    COMMAND: lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value) and frames_of(value) > 0,
    NUMBER: lambda value: type(value) in (int, float),
    NUMBER_OR_NULL: lambda value: value is None or type(value) in (int, float),
}


@dataclass
class Args:
    grid: tyro.conf.Positional[Path]
    """the grid file (see experiments/grids)"""
    output_dir: Path | None = None
    """folder of the results; if not given, results_raw/NAME_OF_THE_GRID"""
    total_timesteps: int | None = None
    """frames of every run; if not given, the grid's. Finished runs with fewer go on, those with more are left alone"""
    backend: Literal["local", "ray"] = "local"
    """where to run: on this machine, or on a Ray cluster (needs experiments/requirements-ray.txt)"""
    workers: int = 2
    """number of runs at a time (local backend)"""
    ray_address: str = "auto"
    """address of the Ray cluster; auto: the one that this machine belongs to"""
    cpus_per_run: float = 1
    """CPUs that Ray reserves for a run"""
    gpus_per_run: float = 0
    """GPUs that Ray reserves for a run, for grids with --cuda; may be a fraction"""
    retries: int = 2
    """how often a crashed run is resumed, and a run whose Ray node is lost is moved, before it counts as failed"""
    grace_period: float = 60
    """seconds in which a run has to save and exit after Ctrl-C, SIGTERM or SIGHUP; then it is killed"""


@dataclass(frozen=True)
class Job:
    """One run of a grid: a method on a task with a seed."""

    method: str
    env_id: str
    seed: int
    total_timesteps: int
    script: Path
    flags: tuple[str, ...]  # without env_id, seed and total_timesteps
    folder: Path

    @property
    def command(self) -> list[str]:
        run = ["--env-id", self.env_id, "--seed", str(self.seed), "--total-timesteps", str(self.total_timesteps)]
        return [sys.executable, str(self.script), *run, *self.flags]

    @property
    def finished(self) -> bool:
        """Raises ValueError if finished.json is damaged."""
        record = read_finished(self)
        return record is not None and frames_of(record["command"]) >= self.total_timesteps


# GRID
class GridLoader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which PyYAML would keep the second alone."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        first = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault(key.value, key) is not key:
                raise ValueError(f"the key {key.value} stands twice, the second time in line {key.start_mark.line + 1}")
        return node


def read_grid(path: Path, output_dir: Path, total_timesteps: int | None = None) -> list[Job]:
    """The jobs of a grid file in the order in which they are run; raises ValueError if the file is not a valid grid.

    total_timesteps replaces those of the grid and of its tasks, if given.
    """
    try:
        grid = yaml.load(path.read_bytes(), GridLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the grid {path}: {' '.join(str(error).split())}") from None
    required = {"total_timesteps": COUNT, "seeds": SEEDS, "methods": LIST, "tasks": LIST}
    check_keys(grid, str(path), required, {"flags": TEXT})
    grid_flags = read_flags(grid, str(path))
    for method in grid["methods"]:
        check_keys(method, f"{path}: a method", {"name": TEXT, "script": TEXT}, {"flags": TEXT, "only_tasks": LIST})
        check_folder_name(method["name"], f"{path}: the method's name")
        if not (REPOSITORY / method["script"]).is_file():
            raise ValueError(f"{path}: there is no script {method['script']}")
    for task in grid["tasks"]:
        check_keys(task, f"{path}: a task", {"env_id": TEXT}, {"flags": TEXT, "seeds": SEEDS, "total_timesteps": COUNT})
        check_folder_name(task["env_id"].replace("/", "_"), f"{path}: the env_id")
    env_ids = [task["env_id"] for task in grid["tasks"]]
    for method in grid["methods"]:
        for env_id in method.get("only_tasks", []):
            if env_id not in env_ids:
                raise ValueError(f"{path}: {method['name']} has only_tasks {env_id}, which is not a task of the grid")

    jobs = []
    for seed in dict.fromkeys(seed for part in (grid, *grid["tasks"]) for seed in part.get("seeds", [])):
        for task in grid["tasks"]:
            for method in grid["methods"]:
                name, env_id = method["name"], task["env_id"]
                if seed not in task.get("seeds", grid["seeds"]) or env_id not in method.get("only_tasks", env_ids):
                    continue
                frames = total_timesteps or task.get("total_timesteps", grid["total_timesteps"])
                task_flags = read_flags(task, f"{path}: the task {env_id}")
                flags = (*grid_flags, *task_flags, *read_flags(method, f"{path}: the method {name}"))
                folder = output_dir.resolve() / name / env_id.replace("/", "_") / f"seed{seed}"
                jobs.append(Job(name, env_id, seed, frames, REPOSITORY / method["script"], flags, folder))

    owners = {}
    for job in jobs:
        owner = owners.setdefault(str(job.folder).casefold(), job)  # some file systems ignore the case
        if owner is not job:
            pair = [f"method {one.method} on {one.env_id}" for one in (owner, job)]
            raise ValueError(f"{path}: {' and '.join(pair)} would have the same folder, {job.folder}")
    return jobs


def is_seed(value: object) -> bool:
    """A whole number that PyTorch takes as a seed."""
    return type(value) is int and 0 <= value < 2**64


def check_folder_name(name: str, where: str) -> None:
    """Raises ValueError unless a folder can have this name."""
    if name in ("", ".", "..") or "/" in name or len(os.fsencode(name)) > 255:
        raise ValueError(f"{where} {name!r} cannot be the name of a folder")


def check_keys(mapping: object, where: str, required: dict[str, str], optional: dict[str, str]) -> None:
    """Raises ValueError unless `mapping` is a dict with the required keys, no unknown one and values as in TESTS."""
    if not isinstance(mapping, dict):
        raise ValueError(f"{where} must be a mapping with the keys {', '.join(required)}")
    for key in required:
        if key not in mapping:
            raise ValueError(f"{where} lacks the key {key}")
    for key, value in mapping.items():
        expected = {**required, **optional}.get(key)
        if expected is None:
            raise ValueError(f"{where} has an unknown key {key}; the keys are {', '.join([*required, *optional])}")
        if not TESTS[expected](value):
            raise ValueError(f"{where}: {key} must be {expected}, not {value!r}")


def read_flags(part: dict, where: str) -> list[str]:
    """The flags of a grid, task or method; raises ValueError for open quotes and for what the launcher sets."""
    try:
        flags = shlex.split(part.get("flags", ""))
    except ValueError as error:
        raise ValueError(f"{where}: flags {part['flags']!r}: {error}") from None
    for flag in flags:
        name = flag.partition("=")[0].replace("_", "-")  # tyro takes either
        if name in SET_BY_THE_JOB:
            raise ValueError(f"{where}: flags must not have {flag}: the launcher sets {', '.join(SET_BY_THE_JOB)}")
    return flags


def check_settings(job: Job) -> None:
    """Raises ValueError if the job was begun with another script or other flags than the grid has now.

    Under --resume a script takes settings that are not given from the checkpoint: a flag that has gone from the grid
    would still be in force. Also raises it if one of the job's records is damaged.
    """
    for record in (*read_attempts(job)[-1:], read_finished(job)):
        if record is None:
            continue
        was, now = ([Path(command[1]).name, *command[2:]] for command in (record["command"], job.command))
        frames = now.index("--total-timesteps") + 1  # they alone may differ
        if was[:frames] + was[frames + 1 :] != now[:frames] + now[frames + 1 :]:
            raise ValueError(
                f"{job.folder} was begun with other settings: '{shlex.join(was)}', the grid says '{shlex.join(now)}'; "
                "use another --output-dir"
            )


# ONE JOB
class Stop:
    """What the user has asked for: that every run saves and exits, or even that it ends at once.

    Signal handlers set it, so it must not wait for a lock as threading.Event.set() does.
    """

    def __init__(self):
        self.requested = False
        self.at_once = False


def run_job(job: Job, retries: int, grace_period: float, stop: Stop) -> tuple[str, str]:
    """Runs a job until it finishes, crashes `retries` + 1 times or a stop is requested.

    Returns (outcome, message); the outcome is "finished", "failed", "interrupted", or "locked" if another launcher, or
    a script that outlived its launcher, has the job.
    """
    if stop.requested:
        return "interrupted", ""
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.folder / "lock", "ab") as lock:  # closed, not unlocked: a script that is still alive keeps it
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return "locked", ""
            if job.finished:  # by another launcher, since the grid was read
                return "finished", ""
            for _ in range(retries + 1):
                status = run_once(job, lock.fileno(), grace_period, stop)
                if status == 0:
                    return "finished", ""
                if status in INTERRUPTED:
                    return "interrupted", "" if stop.requested else f"exit status {status}"
                if status == 2 or stop.requested:  # 2, bad input or a NaN: it would come out the same again
                    break
            log = job.folder / "log.txt"
            return "failed", "\n    ".join([f"exit status {status}; the end of {log}:", *last_lines(log)])
    except (OSError, ValueError) as error:  # the folder cannot be used, the disk is full or a record is damaged
        return "failed", str(error)


def run_once(job: Job, lock: int, grace_period: float, stop: Stop) -> int:
    """Starts or resumes the job's script, waits for it and returns its exit status (-n: killed by signal n)."""
    checkpoint, attempts = find_checkpoint(job.folder), read_attempts(job)
    if attempts and attempts[-1]["seconds"] is None:  # its launcher was killed: it lasted until its last sign of life
        last_write = max(path.lstat().st_mtime for path in job.folder.rglob("*"))
        attempts[-1]["seconds"] = max(0.0, last_write - attempts[-1]["started"])
    attempts.append({"command": job.command, "started": time.time(), "host": socket.gethostname()})
    attempts[-1] |= {"seconds": None, "exit_status": None}
    write_json(job.folder / "attempts.json", attempts)
    command = job.command + (["--resume", str(checkpoint)] if checkpoint else [])
    # One thread per run; log.txt is in UTF-8 whatever the locale.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    with open(job.folder / "log.txt", "ab", buffering=0) as log:
        log.write(f"\n$ {shlex.join(command)}\n".encode(errors="backslashreplace"))
        # The script inherits the lock, so that it keeps it if the launcher is killed; and it gets a session of its own,
        # so that Ctrl-C in the terminal reaches the launcher alone.
        process = subprocess.Popen(
            command,
            cwd=job.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            start_new_session=True,
        )
        begun = time.monotonic()
        status = wait_for(process, grace_period, stop)
        if status == -signal.SIGKILL and stop.requested:
            with contextlib.suppress(OSError):  # a full disk
                log.write(b"\nlaunch.py: killed, it had not saved and exited in time\n")
    attempts[-1].update(seconds=time.monotonic() - begun, exit_status=status)
    write_json(job.folder / "attempts.json", attempts)
    if status == 0:
        runs = [path.parent for path in find_files(job.folder / "runs", "evaluations.csv")]
        run_folder = max(runs, key=lambda path: path.stat().st_mtime, default=job.folder)
        record = {
            "command": job.command,
            "duration_seconds": sum(attempt["seconds"] or 0.0 for attempt in attempts),
            "run_folder": str(run_folder.relative_to(job.folder)),
            "attempts": len(attempts),
        }
        write_json(job.folder / "finished.json", record)
    return status


def wait_for(process: subprocess.Popen, grace_period: float, stop: Stop) -> int:
    """The exit status of a script, which is asked to save and exit (SIGTERM) when a stop is requested.

    After the grace period (seconds), or if it is to end at once, the script is killed. When it has ended, so is, in any
    case, what is left of its process group: it could run for ever, and hold the lock.
    """
    deadline = None
    while True:
        try:
            while process.poll() is None:
                if stop.requested and deadline is None:
                    process.terminate()
                    deadline = time.monotonic() + grace_period
                if stop.at_once or (deadline is not None and time.monotonic() > deadline):
                    process.kill()
                time.sleep(0.2)
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nothing is left (macOS: but zombies)
                os.killpg(process.pid, signal.SIGKILL)
            return process.returncode
        except KeyboardInterrupt:  # this is how Ray cancels a task; the second time it is to end at once
            stop.at_once = stop.requested
            stop.requested = True


def find_files(folder: Path, pattern: str) -> list[Path]:
    """The files below a folder, at any depth, whose name matches; none if there is no folder.

    Raises OSError if a folder cannot be read: what is in it is unknown, not absent.
    """

    def fail(error):
        raise error

    if not folder.is_dir():
        return []
    walk = os.walk(folder, onerror=fail, followlinks=True)
    return [Path(parent, name) for parent, _, names in walk for name in fnmatch.filter(names, pattern)]


def find_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the job's run that got furthest, the newest of equals; runs without any *.pt are removed."""
    for run in folder.glob("runs/*"):
        if run.is_dir() and not run.is_symlink() and not find_files(run, "*.pt"):
            shutil.rmtree(run)
    checkpoints = find_files(folder / "runs", "checkpoint.pt")
    return max(
        checkpoints,
        key=lambda path: (last_step(path.with_name("evaluations.csv")), path.stat().st_mtime),
        default=None,
    )


def last_lines(path: Path, count: int = 15, width: int = 500) -> list[str]:
    """The last lines of a log that are not blank, cut to `width`, as a terminal would show them.

    A progress bar is one line, drawn anew after each \\r: its last state counts.
    """
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1_000_000))  # a log can be larger than the memory
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.removesuffix("\r").rpartition("\r")[2] for line in text.split("\n")]
    return [line[:width] for line in lines if line.strip()][-count:]


def frames_of(command: list[str]) -> int:
    """The --total-timesteps of a command, 0 if it has none."""
    match = re.search(r" --total-timesteps ([1-9]\d*)( |$)", " ".join(command))
    return int(match[1]) if match else 0


def read_attempts(job: Job) -> list[dict]:
    """The job's attempts.json: command, started (Unix time), host, seconds and exit_status (None while it runs).

    Raises ValueError if the file is damaged.
    """
    path = job.folder / "attempts.json"
    keys = {"command": COMMAND, "started": NUMBER, "host": TEXT, "seconds": NUMBER_OR_NULL}
    attempts = read_json(path) if path.exists() else []
    if not isinstance(attempts, list):
        raise ValueError(f"the damaged file {path} must be a list")
    for attempt in attempts:
        check_keys(attempt, f"the damaged file {path}: an attempt", keys | {"exit_status": NUMBER_OR_NULL}, {})
    return attempts


def read_finished(job: Job) -> dict | None:
    """The job's finished.json, None if it has not finished; raises ValueError if the file is damaged."""
    path = job.folder / "finished.json"
    if not path.exists():
        return None
    record = read_json(path)
    keys = {"command": COMMAND, "duration_seconds": NUMBER, "run_folder": TEXT, "attempts": COUNT}
    check_keys(record, f"the damaged file {path}", keys, {})
    return record


def read_json(path: Path) -> object:
    """The content of a JSON file; raises ValueError if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the damaged file {path} is no JSON: {error}") from None


def write_json(path: Path, content: object) -> None:
    """Writes the file as a whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# BACKENDS
class LocalBackend:
    """Runs jobs on this machine, `workers` at a time."""

    def __init__(self, args: Args, stop: Stop):
        self.args, self.stop = args, stop
        self.pool = ThreadPoolExecutor(args.workers)

    def submit(self, job: Job) -> Future:
        return self.pool.submit(run_job, job, self.args.retries, self.args.grace_period, self.stop)

    def close(self) -> None:
        """Drops the waiting jobs, lets the running ones save and exit, and waits for them."""
        self.stop.requested = True
        self.pool.shutdown(cancel_futures=True)


class RayBackend:
    """Runs each job as a Ray task; Ray chooses the machine, and another one when a node is lost."""

    def __init__(self, args: Args, stop: Stop):
        if importlib.util.find_spec("ray") is None:
            raise ValueError("--backend ray needs Ray: pip install -r experiments/requirements-ray.txt")
        import ray

        try:
            if re.fullmatch(r"[^/]+:\d+", args.ray_address):  # Ray itself tries a wrong address for many minutes
                host, _, port = args.ray_address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=args.ray_address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"cannot reach a Ray cluster at {args.ray_address}: {str(error).splitlines()[0]}"
            ) from None

        @ray.remote(num_cpus=args.cpus_per_run, num_gpus=args.gpus_per_run, max_retries=args.retries)
        def run_on_node(job: Job) -> tuple[str, str]:
            return run_job(job, args.retries, args.grace_period, Stop())

        self.ray, self.run_on_node, self.stop = ray, run_on_node, stop
        self.tasks = {}

    def submit(self, job: Job) -> Future:
        task = self.run_on_node.remote(job)
        self.tasks[task] = task.future()
        return self.tasks[task]

    def close(self) -> None:
        """Drops the waiting jobs, lets the running ones save and exit, and waits for them."""
        for task in self.tasks:
            self.ray.cancel(task)
        while wait(self.tasks.values(), timeout=1).not_done and not self.stop.at_once:
            pass
        for task, future in self.tasks.items():
            if not future.done():
                self.ray.cancel(task)  # the second time, see wait_for
        wait(self.tasks.values())
        self.ray.shutdown()


# PROGRESS
def frames_done(job: Job) -> int:
    """The last global_step in the job's evaluations; 0 before the first one."""
    with contextlib.suppress(OSError):  # a run's folder may be removed meanwhile
        steps = [last_step(path) for path in find_files(job.folder / "runs", "evaluations.csv")]
        return min(max(steps, default=0), job.total_timesteps)
    return 0


def last_step(path: Path) -> int:
    """The last global_step in an evaluations.csv; 0 without one."""
    with contextlib.suppress(OSError, ValueError, IndexError):  # no file, no whole row
        return int(path.read_text(encoding="utf-8").splitlines()[-1].partition(",")[0])
    return 0


def is_running(job: Job, since: float) -> bool:
    """Whether the job runs and was started at Unix time `since` or later: an older attempt was not ours."""
    with contextlib.suppress(OSError, ValueError):  # a damaged record is reported when the job is run
        attempts = read_attempts(job)
        return bool(attempts) and attempts[-1]["exit_status"] is None and attempts[-1]["started"] >= since
    return False


def show(bar: tqdm, jobs: list[Job], outcomes: dict[Job, str], skipped: int, since: float) -> None:
    """Brings the bar up to date. Its rate is that of the frames since this launcher started, at Unix time `since`."""
    counts = {"finished": 0, "running": 0, "failed": 0, "interrupted": 0}
    frames = total = 0
    for job in jobs:
        outcome = outcomes.get(job)
        frames += job.total_timesteps if outcome == "finished" else frames_done(job)
        total += frames_done(job) if outcome in ("failed", "interrupted") else job.total_timesteps
        if outcome is None and is_running(job, since):
            outcome = "running"
        if outcome is not None:
            counts[outcome] += 1
    bar.total = total
    waiting = len(jobs) - sum(counts.values())
    bar.set_postfix_str(
        f"done {counts['finished']}, running {counts['running']}, waiting {waiting}, "
        f"failed {counts['failed'] + counts['interrupted']}, skipped {skipped}",
        refresh=False,
    )
    bar.update(frames - bar.n)


# MAIN
class Stream:
    """A standard stream whose errors are ignored: a sweep does not end because nobody reads what it says."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.flush()


def mend_streams() -> None:
    """Lets no error of stdout or stderr through and opens closed streams, whose numbers other files would get."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")
        stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Stream(stream))


def check_output_dir(folder: Path) -> None:
    """Raises ValueError unless one can write files (of a megabyte) in this folder, which is made if it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1_000_000))
    except OSError as error:
        raise ValueError(f"cannot write to the output folder {folder}: {error.strerror}") from None


def main(args: Args) -> int:
    """Runs the grid and returns the launcher's exit status."""
    stop = Stop()
    output_dir = args.output_dir or Path("results_raw") / args.grid.stem
    try:
        frames = [] if args.total_timesteps is None else [args.total_timesteps]
        if not min(args.workers, args.cpus_per_run, *frames) > 0:
            raise ValueError("--workers, --cpus-per-run and --total-timesteps must be positive")
        if not min(args.retries, args.gpus_per_run, args.grace_period) >= 0:
            raise ValueError("--retries, --gpus-per-run and --grace-period must not be negative")
        jobs = read_grid(args.grid, output_dir, args.total_timesteps)
        for job in jobs:
            check_settings(job)
        waiting = [job for job in jobs if not job.finished]
        skipped = len(jobs) - len(waiting)
        if not waiting:
            print(f"all {skipped} jobs of {args.grid} were finished before")
            return 0
        check_output_dir(output_dir)
        backend = LocalBackend(args, stop) if args.backend == "local" else RayBackend(args, stop)
    except (OSError, ValueError) as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return 2

    def on_signal(number, _):
        if stop.requested and number == signal.SIGINT:  # a closed terminal sends SIGHUP, timeout(1) SIGTERM, twice
            stop.at_once = True
        stop.requested = True

    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP: so do we
            signal.signal(number, on_signal)

    jobs, outcomes, futures, since = list(waiting), {}, {}, time.time()
    bar = tqdm(
        desc=args.grid.stem,
        total=sum(job.total_timesteps for job in jobs),
        initial=sum(frames_done(job) for job in jobs),
        unit="frames",
        unit_scale=True,
        smoothing=0,
        miniters=0,
        mininterval=0.5 if sys.stderr.isatty() else 60,
    )

    def settle(future):
        job = futures.pop(future)
        error = future.exception()
        outcome, message = ("failed", str(error)) if error else future.result()
        if outcome == "locked":
            waiting.append(job)
        elif outcome != "interrupted" or not stop.requested:  # what we have interrupted has not failed
            outcomes[job] = outcome
            if message and not stop.at_once:
                bar.write(f"{outcome}: {job.method} {job.env_id} seed {job.seed}: {message}", file=sys.stderr)

    try:
        while (waiting or futures) and not stop.requested:
            futures.update((backend.submit(job), job) for job in waiting)
            waiting.clear()
            for future in wait(futures, timeout=1, return_when=FIRST_COMPLETED).done:
                settle(future)
            show(bar, jobs, outcomes, skipped, since)
            if waiting:  # another launcher has these: look again in a second
                time.sleep(1)
    finally:
        interrupted = stop.requested
        if interrupted:
            bar.write("stopping: the running jobs save first; Ctrl-C again kills them", file=sys.stderr)
        backend.close()
        for future in list(futures):
            if not future.cancelled() and not future.exception():  # these had been started
                settle(future)
        show(bar, jobs, outcomes, skipped, since)
        bar.close()
    if interrupted:
        return 130
    return 0 if all(outcome == "finished" for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    mend_streams()
    sys.exit(main(tyro.cli(Args, description=__doc__)))
