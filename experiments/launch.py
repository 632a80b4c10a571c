"""Runs a grid of training scripts: methods x tasks x seeds, in parallel, on one machine or on a Ray cluster.

    python experiments/launch.py experiments/grids/lbf_mappo.yaml --workers 2
    python experiments/launch.py experiments/grids/lbf_mappo.yaml --backend ray --ray-address 10.0.0.1:6379

The same command starts a grid, goes on with an interrupted one and does nothing for a finished one; with more
`--total-timesteps` it goes on with a finished one, too. Ctrl-C lets every run save before it ends. Exit status: 0 all
finished, 1 some did not finish, 2 bad input, 130 after Ctrl-C or SIGTERM.

A grid file (YAML); every `flags` is optional and is what one would type on the script's command line:

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

    runs/*/         what the script writes: checkpoint.pt, evaluations.csv, TensorBoard events
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
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
import yaml
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
INTERRUPTED = (130, 143, -signal.SIGINT, -signal.SIGTERM)  # the negative ones: before the script could catch the signal


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
        return self.frames_finished >= self.total_timesteps

    @property
    def frames_finished(self) -> int:
        """The --total-timesteps with which the run has finished, 0 if it has not."""
        path = self.folder / "finished.json"
        if not path.exists():
            return 0
        command = json.loads(path.read_text())["command"]
        return int(command[command.index("--total-timesteps") + 1])


# GRID
def read_grid(path: Path, output_dir: Path, total_timesteps: int | None = None) -> list[Job]:
    """The jobs of a grid file in the order in which they are run; raises ValueError if the file is not a valid grid.

    total_timesteps replaces those of the grid and of its tasks, if given.
    """
    try:
        grid = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the grid {path}: {' '.join(str(error).split())}") from None
    required = {"total_timesteps": int, "seeds": list, "methods": list, "tasks": list}
    check_keys(grid, str(path), required, {"flags": str})
    for method in grid["methods"]:
        check_keys(method, f"{path}: a method", {"name": str, "script": str}, {"flags": str, "only_tasks": list})
        if not (REPOSITORY / method["script"]).is_file():
            raise ValueError(f"{path}: there is no script {method['script']}")
    for task in grid["tasks"]:
        check_keys(task, f"{path}: a task", {"env_id": str}, {"flags": str, "seeds": list, "total_timesteps": int})
    all_seeds = [seed for part in (grid, *grid["tasks"]) for seed in part.get("seeds", [])]
    for seed in all_seeds:
        if not isinstance(seed, int):
            raise ValueError(f"{path}: a seed must be a whole number, not {seed!r}")
    env_ids = [task["env_id"] for task in grid["tasks"]]
    for method in grid["methods"]:
        for env_id in method.get("only_tasks", []):
            if env_id not in env_ids:
                raise ValueError(f"{path}: {method['name']} has only_tasks {env_id}, which is not a task of the grid")

    jobs = []
    for seed in dict.fromkeys(all_seeds):
        for task in grid["tasks"]:
            for method in grid["methods"]:
                name, env_id = method["name"], task["env_id"]
                if seed not in task.get("seeds", grid["seeds"]) or env_id not in method.get("only_tasks", env_ids):
                    continue
                frames = total_timesteps or task.get("total_timesteps", grid["total_timesteps"])
                flags = tuple(shlex.split(" ".join(part.get("flags", "") for part in (grid, task, method))))
                folder = output_dir.resolve() / name / env_id.replace("/", "_") / f"seed{seed}"
                jobs.append(Job(name, env_id, seed, frames, REPOSITORY / method["script"], flags, folder))
    if len({job.folder for job in jobs}) < len(jobs):
        raise ValueError(f"{path}: two methods have the same name, or two tasks the same env_id")
    return jobs


def check_keys(mapping: object, where: str, required: dict[str, type], optional: dict[str, type]) -> None:
    """Raises ValueError unless `mapping` is a dict with the required keys, no unknown one and values of these types."""
    if not isinstance(mapping, dict):
        raise ValueError(f"{where} must be a mapping with the keys {', '.join(required)}")
    for key in required:
        if key not in mapping:
            raise ValueError(f"{where} lacks the key {key}")
    for key, value in mapping.items():
        kind = {**required, **optional}.get(key)
        if kind is None:
            raise ValueError(f"{where} has an unknown key {key}; the keys are {', '.join([*required, *optional])}")
        if not isinstance(value, kind) or value in ([], 0):
            expected = {int: "a positive whole number", str: "a text", list: "a list that is not empty"}[kind]
            raise ValueError(f"{where}: {key} must be {expected}, not {value!r}")


def check_settings(job: Job) -> None:
    """Raises ValueError if the job was begun with another script or other flags than the grid has now.

    Under --resume a script takes settings that are not given from the checkpoint: a flag that has gone from the grid
    would still be in force.
    """
    attempts = read_attempts(job)
    if not attempts:
        return
    was, now = ([Path(command[1]).name, *command[2:]] for command in (attempts[-1]["command"], job.command))
    frames = now.index("--total-timesteps") + 1  # they alone may differ
    if was[:frames] + was[frames + 1 :] != now[:frames] + now[frames + 1 :]:
        raise ValueError(
            f"{job.folder} was begun with other settings: '{shlex.join(was)}', the grid says '{shlex.join(now)}'; "
            "use another --output-dir"
        )


# ONE JOB
def run_job(job: Job, retries: int, stop: threading.Event) -> tuple[str, str]:
    """Runs a job until it finishes, crashes `retries` + 1 times or `stop` is set.

    Returns (outcome, message); the outcome is "finished", "failed", "interrupted", or "locked" if another launcher, or
    a script that outlived its launcher, has the job.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(job.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return "locked", ""
    try:
        if job.finished:  # by another launcher, since the grid was read
            return "finished", ""
        for _ in range(retries + 1):
            if stop.is_set():
                return "interrupted", ""
            status = run_once(job, lock, stop)
            if status == 0:
                return "finished", ""
            if stop.is_set() or status in INTERRUPTED:
                return "interrupted", f"exit status {status}"
            if status == 2:  # bad input or a NaN: it would come out the same again
                break
        tail = (job.folder / "log.txt").read_text(errors="replace").splitlines()[-15:]
        return "failed", "\n    ".join([f"exit status {status}; the end of {job.folder / 'log.txt'}:", *tail])
    finally:
        os.close(lock)  # a closed, not an unlocked, lock stays with a script that is still alive


def run_once(job: Job, lock: int, stop: threading.Event) -> int:
    """Starts or resumes the job's script, waits for it and returns its exit status (-n: killed by signal n)."""
    attempts = read_attempts(job)
    if attempts and attempts[-1]["seconds"] is None:  # its launcher was killed: it lasted until its last sign of life
        last_write = max(path.stat().st_mtime for path in job.folder.rglob("*"))
        attempts[-1]["seconds"] = max(0.0, last_write - attempts[-1]["started"])
    attempts.append({"command": job.command, "started": time.time(), "host": socket.gethostname()})
    attempts[-1] |= {"seconds": None, "exit_status": None}
    write_json(job.folder / "attempts.json", attempts)
    checkpoint = find_checkpoint(job.folder)
    command = job.command + (["--resume", str(checkpoint)] if checkpoint else [])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # one thread per run
    with open(job.folder / "log.txt", "ab") as log:
        log.write(f"\n$ {shlex.join(command)}\n".encode())
        log.flush()
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
    status = wait_for(process, stop)
    attempts[-1].update(seconds=time.time() - attempts[-1]["started"], exit_status=status)
    write_json(job.folder / "attempts.json", attempts)
    if status == 0:
        run_folder = max(run_folders(job.folder), key=lambda path: path.stat().st_mtime, default=job.folder)
        record = {
            "command": job.command,
            "duration_seconds": sum(attempt["seconds"] for attempt in attempts),
            "run_folder": str(run_folder.relative_to(job.folder)),
            "attempts": len(attempts),
        }
        write_json(job.folder / "finished.json", record)
    return status


def wait_for(process: subprocess.Popen, stop: threading.Event) -> int:
    """The exit status of the process, which is asked to save and exit (SIGTERM) when `stop` is set."""
    asked = False
    while True:
        try:
            while process.poll() is None:
                if stop.is_set() and not asked:
                    process.terminate()
                    asked = True
                time.sleep(0.2)
            return process.returncode
        except KeyboardInterrupt:  # this is how Ray cancels a task
            stop.set()


def run_folders(folder: Path) -> list[Path]:
    """The folders that the scripts have made for a job's runs."""
    return [path for path in folder.glob("runs/*") if path.is_dir()]


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint among a job's runs; runs that have none are removed."""
    checkpoints = []
    for run in run_folders(folder):
        if (run / "checkpoint.pt").exists():
            checkpoints.append(run / "checkpoint.pt")
        else:
            shutil.rmtree(run)
    return max(checkpoints, key=lambda path: path.stat().st_mtime, default=None)


def read_attempts(job: Job) -> list[dict]:
    """The job's attempts.json: command, started (Unix time), host, seconds and exit_status (None while it runs)."""
    path = job.folder / "attempts.json"
    return json.loads(path.read_text()) if path.exists() else []


def write_json(path: Path, content: object) -> None:
    """Writes the file as a whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# BACKENDS
class LocalBackend:
    """Runs jobs on this machine, `workers` at a time."""

    def __init__(self, args: Args):
        self.retries = args.retries
        self.stop = threading.Event()
        self.pool = ThreadPoolExecutor(args.workers)

    def submit(self, job: Job) -> Future:
        return self.pool.submit(run_job, job, self.retries, self.stop)

    def close(self) -> None:
        """Drops the waiting jobs, lets the running ones save and exit, and waits for them."""
        self.stop.set()
        self.pool.shutdown(cancel_futures=True)


class RayBackend:
    """Runs each job as a Ray task; Ray chooses the machine, and another one when a node is lost."""

    def __init__(self, args: Args):
        try:
            import ray
        except ImportError:
            raise ValueError("--backend ray needs Ray: pip install -r experiments/requirements-ray.txt") from None
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
            return run_job(job, args.retries, threading.Event())

        self.ray, self.run_on_node, self.tasks = ray, run_on_node, []

    def submit(self, job: Job) -> Future:
        self.tasks.append(self.run_on_node.remote(job))
        return self.tasks[-1].future()

    def close(self) -> None:
        """Drops the waiting jobs, lets the running ones save and exit, and waits for them."""
        for task in self.tasks:
            self.ray.cancel(task)
        for task in self.tasks:
            self.ray.wait([task])
        self.ray.shutdown()


# PROGRESS
def frames_done(job: Job) -> int:
    """The last global_step in the job's evaluations.csv; 0 before the first evaluation."""
    steps = [0]
    for path in job.folder.glob("runs/*/evaluations.csv"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # removed meanwhile, or no row yet
            steps.append(int(path.read_text().splitlines()[-1].partition(",")[0]))
    return min(max(steps), job.total_timesteps)


def show(bar: tqdm, jobs: list[Job], outcomes: dict[Job, str], skipped: int, since: float) -> None:
    """Brings the bar up to date. Its rate is that of the frames since this launcher started, at Unix time `since`."""
    counts = {"finished": 0, "running": 0, "failed": 0, "interrupted": 0}
    frames = total = 0
    for job in jobs:
        outcome = outcomes.get(job)
        frames += job.total_timesteps if outcome == "finished" else frames_done(job)
        total += frames_done(job) if outcome in ("failed", "interrupted") else job.total_timesteps
        if outcome is None and (attempts := read_attempts(job)):
            # An older attempt without an exit status was not started by us.
            outcome = "running" if attempts[-1]["exit_status"] is None and attempts[-1]["started"] >= since else None
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
def main(args: Args) -> int:
    """Runs the grid and returns the launcher's exit status."""
    try:
        if args.workers < 1 or args.cpus_per_run <= 0 or (args.total_timesteps or 1) < 1:
            raise ValueError("--workers, --cpus-per-run and --total-timesteps must be positive")
        if min(args.retries, args.gpus_per_run) < 0:
            raise ValueError("--retries and --gpus-per-run must not be negative")
        jobs = read_grid(args.grid, args.output_dir or Path("results_raw") / args.grid.stem, args.total_timesteps)
        for job in jobs:
            check_settings(job)
        waiting = [job for job in jobs if not job.finished]
        skipped = len(jobs) - len(waiting)
        if not waiting:
            print(f"all {skipped} jobs of {args.grid} were finished before")
            return 0
        backend = LocalBackend(args) if args.backend == "local" else RayBackend(args)
    except ValueError as error:
        print(f"launch.py: {error}", file=sys.stderr)
        return 2

    stop = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if name != signal.SIGHUP or signal.getsignal(name) != signal.SIG_IGN:  # nohup ignores SIGHUP: so do we
            signal.signal(name, lambda *_: stop.set())

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
    try:
        while (waiting or futures) and not stop.is_set():
            futures.update((backend.submit(job), job) for job in waiting)
            waiting = []
            for future in wait(futures, timeout=1, return_when=FIRST_COMPLETED).done:
                job = futures.pop(future)
                error = future.exception()
                outcome, message = ("failed", str(error)) if error else future.result()
                if outcome == "locked":
                    waiting.append(job)
                    continue
                outcomes[job] = outcome
                if message and not stop.is_set():
                    bar.write(f"{outcome}: {job.method} {job.env_id} seed {job.seed}: {message}", file=sys.stderr)
            show(bar, jobs, outcomes, skipped, since)
            if waiting:  # another launcher has these: look again in a second
                stop.wait(1)
    finally:
        if stop.is_set():
            bar.write("stopping: the running jobs save first", file=sys.stderr)
        backend.close()
        show(bar, jobs, outcomes, skipped, since)
        bar.close()
    if stop.is_set():
        return 130
    return 0 if all(outcome == "finished" for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args, description=__doc__)))
