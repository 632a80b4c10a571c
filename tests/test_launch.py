"""experiments/launch.py: nothing is lost, nothing runs twice, and a disturbed grid gives what an undisturbed one gives.

Most tests use a small stand-in for the training scripts that keeps their contract (working directory, checkpoint,
--resume, evaluations.csv, exit statuses) and counts instead of learning; one runs a real script.
"""

import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCHER = REPOSITORY / "experiments" / "launch.py"
sys.path.insert(0, str(LAUNCHER.parent))
import launch  # noqa: E402

TRAIN = """
import argparse, fcntl, json, os, pathlib, signal, sys, time

parser = argparse.ArgumentParser()
parser.add_argument("--env-id")
parser.add_argument("--seed", type=int)
parser.add_argument("--total-timesteps", type=int)
parser.add_argument("--resume")
parser.add_argument("--factor", type=int, default=1)
parser.add_argument("--exp-name", default="train")
args = parser.parse_args()
job = "/".join(pathlib.Path.cwd().parts[-3:])

only_one = open("only_one", "w")
try:
    fcntl.flock(only_one, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    pathlib.Path("TWICE").touch()
    sys.exit(1)
if job in os.environ.get("TRAIN_BAD_INPUT", ""):
    print("the input is bad", file=sys.stderr)
    sys.exit(2)

run = pathlib.Path(f"runs/{args.env_id}__{args.exp_name}__{time.time_ns()}")
run = pathlib.Path(args.resume).parent if args.resume else run
run.mkdir(parents=True, exist_ok=True)
state = {"step": 0, "value": 1000 * args.seed + ord(args.env_id), "rows": []}
if args.resume:
    state = json.loads(pathlib.Path(args.resume).read_text())

def ancestors(pid):
    return [pid, *ancestors(int(open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1]))] if pid > 1 else []

def save():
    text = "global_step,episodic_return\\n" + "".join(f"{step},{value}\\n" for step, value in state["rows"])
    (run / "evaluations.csv").write_text(text)
    (run / "checkpoint.tmp").write_text(json.dumps(state))
    os.replace(run / "checkpoint.tmp", run / "checkpoint.pt")

def leave(number, _):
    save()
    sys.exit(128 + number)

save()
signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGINT, leave)
start = {"pid": os.getpid(), "step": state["step"], "ancestors": ancestors(os.getpid()), "time": time.time(),
         "threads": os.environ["OMP_NUM_THREADS"]}
with open("starts.txt", "a") as file:
    file.write(json.dumps(start) + "\\n")
while state["step"] < args.total_timesteps:
    state["step"] += 1
    state["value"] = state["value"] * 16807 * args.factor % 2147483647
    if state["step"] % 10 == 0:
        state["rows"].append([state["step"], state["value"]])
        save()
    if state["step"] == 34 and (job in os.environ.get("TRAIN_CRASH", "") or (
            job in os.environ.get("TRAIN_CRASH_ONCE", "") and not os.path.exists("crashed"))):
        pathlib.Path("crashed").touch()
        raise RuntimeError("this run crashes")
    while state["step"] == 37 and os.path.exists(os.environ.get("TRAIN_HOLD", "")):
        pathlib.Path("held").touch()
        time.sleep(0.02)
    time.sleep(0.002)
"""


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A grid of 8 jobs: 2 methods x 2 tasks x 2 seeds."""
    folder = tmp_path_factory.mktemp("grid")
    (folder / "train.py").write_text(TRAIN)
    content = {
        "total_timesteps": 60,
        "seeds": [1, 2],
        "methods": [
            {"name": "one", "script": str(folder / "train.py")},
            {"name": "two", "script": str(folder / "train.py"), "flags": "--factor 2"},
        ],
        "tasks": [{"env_id": "A"}, {"env_id": "B"}],
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    return folder / "small.yaml"


@pytest.fixture(scope="module")
def undisturbed(grid, tmp_path_factory):
    """The output folder of a grid that nothing has disturbed."""
    output = tmp_path_factory.mktemp("undisturbed")
    assert run(grid, output, "--workers", "1")[0] == 0
    return output


@pytest.fixture
def processes():
    """A list of started processes; those still alive at the end of the test are killed."""
    started = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def command(grid, output, *flags):
    return [sys.executable, str(LAUNCHER), str(grid), "--output-dir", str(output), *flags]


def start(processes, grid, output, *flags, **environment):
    """Starts a launcher in the background."""
    environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    process = subprocess.Popen(
        command(grid, output, *flags), env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    processes.append(process)
    return process


def run(grid, output, *flags, **environment):
    """Runs a launcher to its end -> exit status, what it wrote to stderr."""
    started = []
    launcher = start(started, grid, output, *flags, **environment)
    try:
        return end(launcher)
    finally:
        launcher.kill()


def end(launcher):
    stderr = launcher.communicate(timeout=90)[1]
    return launcher.returncode, stderr


def starts(job_folder):
    path = job_folder / "starts.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def results(output):
    """The evaluations of all finished jobs; each has one run folder, and no job ever ran twice at the same time."""
    assert not list(output.glob("*/*/*/TWICE"))
    jobs = sorted(path.parent for path in output.glob("*/*/seed*/finished.json"))
    runs = {str(job.relative_to(output)): [path for path in job.glob("runs/*") if path.is_dir()] for job in jobs}
    assert all(len(folders) == 1 for folders in runs.values())
    return {job: (folder / "evaluations.csv").read_text() for job, [folder] in runs.items()}


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return value


def held(output):
    """The jobs that wait for the hold file to go."""
    return sorted(path.parent for path in output.glob("*/*/*/held"))


def one_job(folder, script):
    """A grid with one job, which runs this script in folder/output/m/A/seed1."""
    (folder / "script.py").write_text(script, encoding="utf-8")
    content = {"total_timesteps": 60, "seeds": [1], "tasks": [{"env_id": "A"}]}
    content["methods"] = [{"name": "m", "script": str(folder / "script.py")}]
    (folder / "one_job.yaml").write_text(yaml.safe_dump(content))
    return folder / "one_job.yaml"


def is_free(job_folder):
    """Whether no process has the job."""
    with open(job_folder / "lock") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def attempts(job_folder):
    return json.loads((job_folder / "attempts.json").read_text())


# GRID FILES


def test_order_is_seed_by_seed(grid, tmp_path):
    jobs = launch.read_grid(grid, tmp_path)
    order = [(job.seed, job.env_id, job.method) for job in jobs]
    assert order == [(seed, task, method) for seed in (1, 2) for task in "AB" for method in ("one", "two")]
    assert jobs[1].command[2:] == "--env-id A --seed 1 --total-timesteps 60 --factor 2".split()
    assert jobs[1].folder == tmp_path / "two" / "A" / "seed1"


def test_only_tasks_and_seeds_and_frames_of_a_task(grid, tmp_path):
    content = yaml.safe_load(grid.read_text())
    content["methods"][1]["only_tasks"] = ["B"]
    content["tasks"][1] |= {"seeds": [7], "total_timesteps": 80}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    jobs = launch.read_grid(tmp_path / "grid.yaml", tmp_path)
    assert [(job.seed, job.env_id, job.method) for job in jobs] == [
        (1, "A", "one"),
        (2, "A", "one"),
        (7, "B", "one"),
        (7, "B", "two"),
    ]
    assert [job.total_timesteps for job in jobs] == [60, 60, 80, 80]
    assert {job.total_timesteps for job in launch.read_grid(tmp_path / "grid.yaml", tmp_path, 90)} == {90}


@pytest.mark.parametrize(
    "change, word",
    [
        (lambda grid: grid.pop("seeds"), "seeds"),
        (lambda grid: grid.update(seeds=[]), "seeds"),
        (lambda grid: grid.update(seeds=["1"]), "seeds must be"),
        (lambda grid: grid.update(seeds=[True]), "seeds must be"),
        (lambda grid: grid.update(seeds=[-1]), "seeds must be"),
        (lambda grid: grid.update(seeds=[2**64]), "seeds must be"),
        (lambda grid: grid.update(seeds=[1, 2, 2]), "seeds must be"),
        (lambda grid: grid["tasks"][0].update(seeds=[False]), "seeds must be"),
        (lambda grid: grid.update(total_timesteps="5M"), "total_timesteps must be"),
        (lambda grid: grid.update(total_timesteps=True), "total_timesteps must be"),
        (lambda grid: grid.update(total_timesteps=-60), "total_timesteps must be"),
        (lambda grid: grid["tasks"][0].update(total_timesteps=-60), "total_timesteps must be"),
        (lambda grid: grid.update(sedes=[1]), "sedes"),
        (lambda grid: grid["methods"][0].update(script="no_such.py"), "no_such.py"),
        (lambda grid: grid["methods"][0].update(flags=["--c", 1]), "flags"),
        (lambda grid: grid["methods"][0].update(only_tasks=["C"]), "only_tasks"),
        (lambda grid: grid["methods"][0].update(name="two"), "method two on A .* same folder"),
        (lambda grid: grid["methods"][0].update(name="Two"), "method Two on A .* same folder"),
        (lambda grid: grid["tasks"][0].update(env_id="B"), "method one on B .* same folder"),
        (lambda grid: grid.update(tasks=[{"env_id": "a/b"}, {"env_id": "a_b"}]), "on a/b and .* on a_b .* same folder"),
        (lambda grid: grid["tasks"][0].update(env_id=".."), "env_id '..' cannot be"),
        (lambda grid: grid["methods"][0].update(name="a\0b"), "name must be a text without NUL"),
        (lambda grid: grid["methods"][0].update(flags="--factor '2"), "the method one: .* No closing quotation"),
        (lambda grid: grid["tasks"][0].update(flags="--factor '2"), "the task A: .* No closing quotation"),
        (lambda grid: grid.update(flags='"'), "grid.yaml: .* No closing quotation"),
        (lambda grid: grid["tasks"].append("A"), "a task must be a mapping"),
        (lambda grid: grid["tasks"][0].update(total_timesteps=0), "total_timesteps"),
    ],
)
def test_bad_grid(grid, tmp_path, change, word):
    content = yaml.safe_load(grid.read_text())
    change(content)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=word) as error:
        launch.read_grid(tmp_path / "grid.yaml", tmp_path / "output")
    assert str(tmp_path / "grid.yaml") in str(error.value)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../b", "/b", "b/", "ö" * 128])
def test_a_method_that_cannot_be_a_folder_is_refused(grid, tmp_path, name):
    content = yaml.safe_load(grid.read_text())
    content["methods"][0]["name"] = name
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=re.escape(f"grid.yaml: the method's name '{name}' cannot be")):
        launch.read_grid(tmp_path / "grid.yaml", tmp_path / "output")


@pytest.mark.parametrize("part", ["the grid", "a task", "a method"])
@pytest.mark.parametrize(
    "flags",
    [
        "--seed 7",
        "--c 1 --seed=7",
        "--env-id B",
        "--env_id=B",
        "--total-timesteps 5",
        "--total_timesteps=5",
        "--env_id B",
        "'--seed' 7",
        "--resume x/checkpoint.pt",
        "--resume=",
    ],
)
def test_flags_do_not_set_what_the_job_sets(grid, tmp_path, part, flags):
    content = yaml.safe_load(grid.read_text())
    {"the grid": content, "a task": content["tasks"][1], "a method": content["methods"][1]}[part]["flags"] = flags
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    named = {"the grid": "grid.yaml", "a task": "grid.yaml: the task B", "a method": "grid.yaml: the method two"}[part]
    with pytest.raises(ValueError, match=f"{named}: flags must not have --(seed|env|total|resume)"):
        launch.read_grid(tmp_path / "grid.yaml", tmp_path / "output")


def test_all_seeds_that_pytorch_takes_and_other_flags_are_accepted(grid, tmp_path):
    content = yaml.safe_load(grid.read_text())
    content |= {"seeds": [0, 2**64 - 1], "flags": "--seed-offset 3 --exp-name=--seed=7"}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    jobs = launch.read_grid(tmp_path / "grid.yaml", tmp_path)
    assert {job.seed for job in jobs} == {0, 2**64 - 1}
    assert jobs[0].flags == ("--seed-offset", "3", "--exp-name=--seed=7")


def test_a_key_that_stands_twice_is_refused_with_its_line(grid, tmp_path):
    text = yaml.safe_dump({"total_timesteps": 60, "seeds": [1]}) + "methods:\n- {name: a, script: b.py, name: c}\n"
    for content, key, line in ((grid.read_text() + "seeds: [3]\n", "seeds", 14), (text, "name", 5)):
        (tmp_path / "grid.yaml").write_text(content)
        with pytest.raises(
            ValueError, match=f"/grid.yaml: the key {key} stands twice, the second time in line {line}$"
        ):
            launch.read_grid(tmp_path / "grid.yaml", tmp_path)


def test_a_key_may_replace_one_that_is_merged_in(grid, tmp_path):
    content = yaml.safe_load(grid.read_text())
    tasks = "tasks: [&a {env_id: A, seeds: [5]}, &b {<<: *a, env_id: B}, {<<: *b, env_id: C}]\n"
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content | {"tasks": None}).replace("tasks: null\n", tasks))
    jobs = launch.read_grid(tmp_path / "grid.yaml", tmp_path)
    assert [(job.env_id, job.seed) for job in jobs[::2]] == [("A", 5), ("B", 5), ("C", 5)]


def test_bad_input_is_one_sentence_and_status_2(grid, tmp_path):
    (tmp_path / "broken.yaml").write_text("seeds: [1")
    wrong = ["--workers", "0"], ["--gpus-per-run", "-1"], ["--grace-period", "-1"]
    wrong += ["--total-timesteps", "0"], ["--total-timesteps", "-5"]
    for flags in ([tmp_path / "no.yaml"], [tmp_path / "broken.yaml"], *([grid, *flags] for flags in wrong)):
        status, stderr = run(flags[0], tmp_path / "output", *flags[1:])
        assert status == 2 and stderr.startswith("launch.py: ") and stderr.count("\n") == 1
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/no_such_folder"])
def test_an_output_folder_that_cannot_be_made_is_one_sentence_and_status_2(grid, tmp_path, folder):
    (tmp_path / "file").touch()
    status, stderr = run(grid, tmp_path / folder)
    assert status == 2 and stderr.count("\n") == 1
    assert stderr.startswith(f"launch.py: cannot write to the output folder {tmp_path / folder}: ")


def test_a_full_disk_is_one_sentence_and_status_2(grid, tmp_path):
    """Full: no file may become larger than nothing."""
    full = ["sh", "-c", 'ulimit -f 0; exec "$@"', "sh"]
    done = subprocess.run([*full, *command(grid, tmp_path / "output")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"launch.py: cannot write to the output folder {tmp_path / 'output'}: ")


@pytest.mark.parametrize(
    "name, content",
    [
        ("finished.json", b""),
        ("finished.json", b"{"),
        ("finished.json", b"\xff"),
        ("finished.json", b"null"),
        ("finished.json", b"[]"),
        ("finished.json", b"{}"),
        ("finished.json", {"command": None}),
        ("finished.json", {"command": "x --total-timesteps 60"}),
        ("finished.json", {"command": ["python", "train.py", "--total-timesteps"]}),
        ("finished.json", {"command": ["python", "train.py", "--total-timesteps", "-60"]}),
        ("finished.json", {"command": ["python", "train.py", "--total-timesteps", 60]}),
        ("finished.json", {"duration_seconds": "1"}),
        ("attempts.json", b"[{}"),
        ("attempts.json", b"{}"),
        ("attempts.json", b"[5]"),
        ("attempts.json", b"[{}]"),
        ("attempts.json", {"command": []}),
        ("attempts.json", {"started": None}),
        ("attempts.json", {"seconds": True}),
        ("attempts.json", {"exit_status": "0"}),
    ],
)
def test_a_damaged_record_is_named_and_status_2(grid, tmp_path, capsys, name, content):
    """Of a whole record, as the launcher writes it, only one value is wrong, unless the content is given in bytes."""
    job = launch.read_grid(grid, tmp_path)[0]
    job.folder.mkdir(parents=True)
    if isinstance(content, dict):
        attempt = {"command": job.command, "started": 1.0, "host": "", "seconds": 2.0, "exit_status": 0}
        record = {"command": job.command, "duration_seconds": 1.0, "run_folder": "runs/a", "attempts": 1}
        whole = [attempt | content] if name == "attempts.json" else record | content
        content = json.dumps(whole).encode()
    (job.folder / name).write_bytes(content)
    assert launch.main(launch.Args(grid, tmp_path)) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"launch.py: the damaged file {job.folder / name}") and stderr.count("\n") == 1
    assert (job.folder / name).read_bytes() == content
    with tqdm(total=480, file=io.StringIO()) as bar:
        launch.show(bar, [job], {}, 0, since=0)  # damaged while the grid runs: that does not end it


def test_a_finished_run_of_other_settings_is_refused(grid, undisturbed, tmp_path):
    job = launch.read_grid(grid, tmp_path)[0]
    job.folder.mkdir(parents=True)
    shutil.copy(undisturbed / "one/A/seed2/finished.json", job.folder)
    status, stderr = run(grid, tmp_path)
    assert status == 2 and f"{job.folder} was begun with other settings" in stderr and "--seed 2" in stderr


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "experiments" / "grids").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_grid(path, tmp_path):
    for job in launch.read_grid(path, tmp_path):
        vanilla = "Foraging" in job.env_id and "coop" not in job.env_id
        assert ("--no-winner-take-all" in job.flags) == vanilla
        for flag in re.findall(r"--(?:no-)?([a-z][a-z0-9-]*)", " ".join(job.flags)):
            assert f"\n    {flag.replace('-', '_')}: " in job.script.read_text(), f"{job.script.name} has no --{flag}"


def test_all_runs_on_mmm_come_before_those_on_mmm2(tmp_path):
    jobs = launch.read_grid(REPOSITORY / "experiments" / "grids" / "smaclite_mmm.yaml", tmp_path)
    assert [job.env_id for job in jobs] == ["MMM"] * 6 + ["MMM2"] * 3


# LOCAL RUNS


def test_finished_jobs_are_skipped(grid, undisturbed):
    before = results(undisturbed)
    assert len(before) == 8 and len(set(before.values())) == 8
    jobs = [undisturbed / job for job in before]
    by_time = sorted(jobs, key=lambda job: starts(job)[0]["time"])
    assert [job.name for job in by_time] == ["seed1"] * 4 + ["seed2"] * 4
    assert all(starts(job)[0]["threads"] == "1" for job in jobs)
    finished = json.loads((undisturbed / "two/A/seed2/finished.json").read_text())
    assert finished["command"][2:] == "--env-id A --seed 2 --total-timesteps 60 --factor 2".split()
    assert finished["attempts"] == 1 and 0.1 < finished["duration_seconds"] < 60
    assert (undisturbed / "two/A/seed2" / finished["run_folder"] / "checkpoint.pt").exists()

    (undisturbed / "two/A/seed2/finished.json").unlink()
    status, stderr = run(grid, undisturbed)
    assert status == 0 and "done 1, running 0, waiting 0, failed 0, skipped 7" in stderr
    assert run(grid, undisturbed) == (0, "")
    assert results(undisturbed) == before and sum(len(starts(job)) for job in jobs) == 9


def test_finished_with_other_settings(grid, undisturbed, tmp_path):
    (tmp_path / "grid.yaml").write_text(grid.read_text().replace("--factor 2", "--factor 3"))
    status, stderr = run(tmp_path / "grid.yaml", undisturbed, "--total-timesteps", "70")
    assert status == 2 and "--factor 2" in stderr and "--factor 3" in stderr


def test_begun_with_other_settings(grid, undisturbed, tmp_path):
    """An interrupted run would keep a flag that has gone from the grid, since it comes from its checkpoint."""
    assert run(grid, tmp_path / "output", TRAIN_CRASH="two/A/seed1")[0] == 1
    (tmp_path / "grid.yaml").write_text(grid.read_text().replace("flags: --factor 2", "flags: ''"))
    status, stderr = run(tmp_path / "grid.yaml", tmp_path / "output")
    assert status == 2 and "was begun with other settings" in stderr and "--factor 2" in stderr


def test_finished_runs_go_on_to_more_frames(grid, undisturbed, tmp_path):
    """In two steps what an undisturbed grid gives in one; a run that has more frames already is left alone."""
    assert run(grid, tmp_path, "--total-timesteps", "30")[0] == 0
    assert {rows.splitlines()[-1].split(",")[0] for rows in results(tmp_path).values()} == {"30"}
    (tmp_path / "one/A/seed1/finished.json").unlink()
    assert run(grid, tmp_path)[0] == 0
    assert results(tmp_path) == results(undisturbed)
    job = tmp_path / "two/B/seed2"
    assert [start["step"] for start in starts(job)] == [0, 30]
    finished = json.loads((job / "finished.json").read_text())
    assert finished["attempts"] == 2 and finished["command"][-3:] == ["60", "--factor", "2"]
    assert run(grid, tmp_path, "--total-timesteps", "50") == (0, "")
    assert len(starts(job)) == 2 and json.loads((job / "finished.json").read_text()) == finished


def test_failures_are_reported_while_the_others_go_on(grid, undisturbed, tmp_path):
    wrong = {"TRAIN_CRASH": "one/A/seed1", "TRAIN_BAD_INPUT": "two/A/seed1"}
    status, stderr = run(grid, tmp_path, "--retries", "1", **wrong)
    assert status == 1
    assert "one A seed 1: exit status 1" in stderr and "RuntimeError: this run crashes" in stderr
    assert "two A seed 1: exit status 2" in stderr and "the input is bad" in stderr
    assert "done 6, running 0, waiting 0, failed 2, skipped 0" in stderr
    assert [start["step"] for start in starts(tmp_path / "one/A/seed1")] == [0, 30]  # once more, from its checkpoint
    assert [attempt["exit_status"] for attempt in attempts(tmp_path / "two/A/seed1")] == [2]  # never again
    assert len(results(tmp_path)) == 6

    assert run(grid, tmp_path)[0] == 0  # what made them fail has been put right
    assert results(tmp_path) == results(undisturbed)


def test_crash_killed_run_and_killed_launcher(grid, undisturbed, tmp_path, processes):
    hold = tmp_path / "hold"
    hold.touch()
    output = tmp_path / "output"
    first, second = output / "one/A/seed1", output / "two/A/seed1"
    (first / "runs" / "died_before_its_first_checkpoint").mkdir(parents=True)
    (first / "runs" / ".DS_Store").touch()  # as file managers leave it
    launcher = start(processes, grid, output, TRAIN_HOLD=hold, TRAIN_CRASH_ONCE="one/A/seed1")
    wait_until(lambda: held(output) == [first, second])
    os.kill(starts(second)[0]["pid"], signal.SIGKILL)
    wait_until(lambda: len(starts(second)) == 2)
    assert [start["step"] for start in starts(first)] == [0, 30]  # has crashed once
    assert [start["step"] for start in starts(second)] == [0, 30]  # has been killed once
    launcher.kill()
    launcher.wait()

    # Their launcher is gone but the two scripts live: a new launcher takes the other jobs and waits for these two.
    new = start(processes, grid, output)
    wait_until(lambda: len(results(output)) == 6)
    time.sleep(1.5)
    assert new.poll() is None and len(starts(first)) == len(starts(second)) == 2
    hold.unlink()
    assert end(new)[0] == 0
    assert [start["step"] for start in starts(second)] == [0, 30, 60]  # nothing was left to do
    assert results(output) == results(undisturbed)
    finished = json.loads((second / "finished.json").read_text())
    assert finished["attempts"] == len(attempts(second)) == 3
    assert [attempt["exit_status"] for attempt in attempts(second)] == [-signal.SIGKILL, None, 0]
    assert attempts(second)[1]["seconds"] > 1.5  # the time of the run without a launcher is counted
    assert finished["duration_seconds"] == pytest.approx(sum(attempt["seconds"] for attempt in attempts(second)))


def test_two_launchers_at_once(grid, undisturbed, tmp_path, processes):
    launchers = [start(processes, grid, tmp_path) for _ in range(2)]
    assert [end(launcher)[0] for launcher in launchers] == [0, 0]
    assert results(tmp_path) == results(undisturbed)
    assert all(len(starts(tmp_path / job)) == 1 for job in results(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stop_saves_and_a_new_start_goes_on(grid, undisturbed, tmp_path, processes, number):
    hold = tmp_path / "hold"
    hold.touch()
    launcher = start(processes, grid, tmp_path, TRAIN_HOLD=hold)
    jobs = wait_until(lambda: len(held(tmp_path)) == 2 and held(tmp_path))
    os.killpg(launcher.pid, number)  # to its whole process group, as a terminal does
    status, stderr = end(launcher)
    assert status == 130 and "stopping" in stderr and "Traceback" not in stderr
    assert "done 0, running 0, waiting 8, failed 0, skipped 0" in stderr
    for job in jobs:
        assert attempts(job)[-1]["exit_status"] == 143
        assert is_free(job)  # no script is alive
    assert len(list(tmp_path.glob("*/*/*"))) == 2  # no further job was started
    hold.unlink()
    assert run(grid, tmp_path)[0] == 0
    assert all([start["step"] for start in starts(job)] == [0, 37] for job in jobs)
    assert results(tmp_path) == results(undisturbed)


def test_run_that_someone_else_stopped_is_left_for_the_next_start(grid, undisturbed, tmp_path, processes):
    hold = tmp_path / "hold"
    hold.touch()
    launcher = start(processes, grid, tmp_path, TRAIN_HOLD=hold)
    job = wait_until(lambda: held(tmp_path))[0]
    os.kill(starts(job)[0]["pid"], signal.SIGTERM)
    wait_until(lambda: attempts(job)[-1]["exit_status"] == 143)
    hold.unlink()
    status, stderr = end(launcher)
    assert status == 1 and "interrupted: " in stderr and "exit status 143" in stderr
    assert len(results(tmp_path)) == 7 and len(starts(job)) == 1
    assert run(grid, tmp_path)[0] == 0
    assert results(tmp_path) == results(undisturbed)


def test_a_run_that_a_hangup_stopped_is_left_for_the_next_start(tmp_path):
    """129: a script that has saved after SIGHUP."""
    status, stderr = run(one_job(tmp_path, "exit(129)"), tmp_path / "output")
    assert status == 1 and "interrupted: m A seed 1: exit status 129" in stderr
    assert len(attempts(tmp_path / "output/m/A/seed1")) == 1


# Ignores SIGTERM, and so does its worker, which has the lock, too.
DEAF = """
import os, pathlib, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    pathlib.Path("deaf").touch()
time.sleep(100)
"""


def test_a_run_that_does_not_end_in_time_is_killed_with_its_workers(tmp_path, processes):
    job = tmp_path / "output/m/A/seed1"
    launcher = start(processes, one_job(tmp_path, DEAF), tmp_path / "output", "--grace-period", "2")
    wait_until((job / "deaf").exists)
    launcher.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    status, stderr = end(launcher)
    assert 2 < time.monotonic() - begun < 10
    assert status == 130 and "failed: m A seed 1: exit status -9" in stderr and "launch.py: killed" in stderr
    assert attempts(job)[-1]["exit_status"] == -signal.SIGKILL
    wait_until(lambda: is_free(job), 5)


def test_a_second_ctrl_c_kills_the_runs(tmp_path, processes):
    job = tmp_path / "output/m/A/seed1"
    launcher = start(processes, one_job(tmp_path, DEAF), tmp_path / "output")
    wait_until((job / "deaf").exists)
    launcher.send_signal(signal.SIGINT)
    time.sleep(1)
    assert launcher.poll() is None and not is_free(job)
    launcher.send_signal(signal.SIGINT)
    begun = time.monotonic()
    status, stderr = end(launcher)
    assert time.monotonic() - begun < 5
    assert status == 130 and "Traceback" not in stderr
    assert attempts(job)[-1]["exit_status"] == -signal.SIGKILL
    wait_until(lambda: is_free(job), 5)


# Takes two seconds to save.
SLOW = """
import os, pathlib, shutil, signal, sys, time

def leave(number, _):
    time.sleep(2)
    sys.exit(143)

signal.signal(signal.SIGTERM, leave)
pathlib.Path("started").touch()
time.sleep(100)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_signal_that_comes_twice_lets_the_runs_save(tmp_path, processes, number):
    """As SIGTERM from timeout(1), to the launcher and to its group, and SIGHUP from a closed terminal and its shell."""
    job = tmp_path / "output/m/A/seed1"
    launcher = start(processes, one_job(tmp_path, SLOW), tmp_path / "output")
    wait_until((job / "started").exists)
    for _ in range(2):
        launcher.send_signal(number)
        time.sleep(0.5)
    assert end(launcher)[0] == 130
    assert attempts(job)[-1]["exit_status"] == 143


@pytest.mark.parametrize(
    "saving, message",
    [
        ("sys.exit('no space left')", "exit status 1; "),
        ("shutil.rmtree(os.getcwd()); sys.exit(143)", "[Errno 2] No such file or directory: "),
    ],
)
def test_a_run_that_cannot_save_when_it_is_stopped_is_reported(tmp_path, processes, saving, message):
    job = tmp_path / "output/m/A/seed1"
    launcher = start(processes, one_job(tmp_path, SLOW.replace("sys.exit(143)", saving)), tmp_path / "output")
    wait_until((job / "started").exists)
    launcher.send_signal(signal.SIGINT)
    status, stderr = end(launcher)
    assert status == 130 and f"failed: m A seed 1: {message}" in stderr and "Traceback" not in stderr
    assert ("no space left" in stderr and len(attempts(job)) == 1) or not job.exists()  # no retry


@pytest.mark.parametrize("status", [0, 2])
def test_what_a_run_leaves_behind_is_killed(tmp_path, status):
    script = f"import os, time; os.fork() and os._exit({status}); time.sleep(100)"
    assert run(one_job(tmp_path, script), tmp_path / "output")[0] == (0 if status == 0 else 1)
    wait_until(lambda: is_free(tmp_path / "output/m/A/seed1"), 5)


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_end_a_grid(tmp_path, closed):
    """Neither does a file get their numbers: a lock numbered 0 or 2 would not reach the script."""
    script = "import os; print([os.path.realpath(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd')])"
    grid = one_job(tmp_path, script)
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh"]
    assert subprocess.run([*shell, *command(grid, tmp_path / "output")], timeout=60).returncode == 0
    job = tmp_path / "output/m/A/seed1"
    assert f"{job}/lock'" in (job / "log.txt").read_text()


def test_a_reader_that_has_gone_away_does_not_end_a_grid(grid, undisturbed, tmp_path):
    statuses = []
    for crash in ("one/A/seed1", "", ""):  # reports a failure; goes on with it; has nothing to do
        reader, writer = os.pipe()
        os.close(reader)
        launcher = [*command(grid, tmp_path), "--retries", "0"]
        environment = os.environ | {"TRAIN_CRASH": crash, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(launcher, stdout=writer, stderr=writer, env=environment, timeout=90)
        os.close(writer)
        statuses.append(done.returncode)
    assert statuses == [1, 0, 0]
    assert results(tmp_path) == results(undisturbed)


def test_files_are_utf_8_whatever_the_locale(tmp_path):
    """In the ASCII locale, without Python's UTF-8 mode; the output folder's name is in the log, as that of --resume."""
    grid = one_job(tmp_path, "print('größer'); exit(2)")
    grid.write_text("# größer\n" + grid.read_text(), encoding="utf-8")
    job = tmp_path / "größe/m/A/seed1"
    (job / "runs/a").mkdir(parents=True)
    (job / "runs/a/checkpoint.pt").touch()
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    status, stderr = run(grid, tmp_path / "größe", **locale)
    assert status == 1 and r"gr\xf6\xdfer" in stderr
    log = (job / "log.txt").read_text(encoding="utf-8")
    assert "größer" in log and "seed1/runs/a/checkpoint.pt" in log


def test_a_name_that_the_terminal_cannot_show_does_not_end_a_grid(grid, undisturbed, tmp_path):
    shutil.copy(grid, tmp_path / "größe.yaml")
    assert run(tmp_path / "größe.yaml", undisturbed, PYTHONIOENCODING="ascii") == (0, "")


def test_a_job_whose_folder_cannot_be_used_fails_alone(grid, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "A").touch()
    status, stderr = run(grid, tmp_path)
    assert status == 1 and "Traceback" not in stderr and len(results(tmp_path)) == 6
    assert all(f"failed: one A seed {seed}: [Errno 20]" in stderr for seed in (1, 2))


def test_the_last_lines_of_a_log_are_what_a_terminal_would_show(tmp_path):
    log = tmp_path / "log.txt"
    bar = "".join(f"\r{percent}%|####      | größe" for percent in range(100))
    log.write_text(f"{bar}\nfirst\n\n{bar}\r          \rsecond\r\n{'x' * 5000}\n{bar}", "utf-8", newline="")
    shown = ["99%|####      | größe", "first", "second", "x" * 500, "99%|####      | größe"]
    assert launch.last_lines(log) == shown
    assert launch.last_lines(log, count=2) == shown[-2:]
    with open(log, "ab") as file:
        file.write(b"\xff\n" + b"y" * 2_000_000 + b"\n")
    assert launch.last_lines(log) == ["y" * 500]


# WHICH RUN GOES ON


def test_a_run_below_another_folder_goes_on(grid, undisturbed, tmp_path):
    """`--exp-name a/b` makes one."""
    content = yaml.safe_load(grid.read_text()) | {"flags": "--exp-name a/b"}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content))
    output = tmp_path / "output"
    crash = {"TRAIN_CRASH": "one/A/seed1"}
    status, stderr = run(tmp_path / "grid.yaml", output, "--retries", "0", **crash)
    assert status == 1 and "done 7, running 0, waiting 0, failed 1" in stderr
    [crashed] = launch.find_files(output / "one/A/seed1/runs", "checkpoint.pt")
    assert crashed.relative_to(output / "one/A/seed1/runs").match("*/b__*/checkpoint.pt")
    assert launch.frames_done(launch.read_grid(tmp_path / "grid.yaml", output)[0]) == 30
    assert run(tmp_path / "grid.yaml", output)[0] == 0
    assert [start["step"] for start in starts(output / "one/A/seed1")] == [0, 30]
    for job in results(undisturbed):
        [evaluations] = launch.find_files(output / job / "runs", "evaluations.csv")
        assert evaluations.read_text() == results(undisturbed)[job]
        finished = json.loads((output / job / "finished.json").read_text())
        assert output / job / finished["run_folder"] == evaluations.parent


def test_only_folders_without_any_checkpoint_are_removed(tmp_path):
    runs = tmp_path / "runs"
    for folder in ("empty/below", "copy/of"):
        (runs / folder).mkdir(parents=True)
    (runs / "empty/evaluations.csv").write_text("global_step,x\n50,1\n")
    (runs / "copy/of/old.pt").touch()
    (tmp_path / "elsewhere").mkdir()
    (runs / "link").symlink_to(tmp_path / "elsewhere")
    assert launch.find_checkpoint(tmp_path) is None
    (runs / "a/b/c").mkdir(parents=True)
    (runs / "a/b/c/checkpoint.pt").touch()
    assert launch.find_checkpoint(tmp_path) == runs / "a/b/c/checkpoint.pt"
    assert sorted(path.name for path in runs.iterdir()) == ["a", "copy", "link"] and (runs / "copy/of/old.pt").exists()
    (runs / "a/b/c/checkpoint.pt").rename(tmp_path / "elsewhere" / "checkpoint.pt")
    assert launch.find_checkpoint(tmp_path) == runs / "link/checkpoint.pt"


def test_a_folder_that_cannot_be_read_is_not_taken_for_empty(tmp_path, monkeypatch):
    (tmp_path / "runs/a/b").mkdir(parents=True)
    (tmp_path / "runs/a/b/checkpoint.pt").touch()
    scandir = os.scandir

    def broken(path):
        if str(path).endswith("b"):
            raise OSError("the disk does not answer")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(OSError, match="does not answer"):
        launch.find_checkpoint(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "runs/a/b/checkpoint.pt").exists()


def test_the_run_that_got_furthest_goes_on(tmp_path):
    """Not the newest: that can be a copy of an older state."""
    for age, (name, frames) in enumerate({"copy": 50, "run": 100, "early": None}.items()):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "checkpoint.pt").touch()
        if frames:
            (tmp_path / "runs" / name / "evaluations.csv").write_text(f"global_step,x\n{frames},1\n")
        os.utime(tmp_path / "runs" / name / "checkpoint.pt", (1000 - age, 1000 - age))
    assert launch.find_checkpoint(tmp_path) == tmp_path / "runs/run/checkpoint.pt"
    shutil.copy(tmp_path / "runs/run/evaluations.csv", tmp_path / "runs/copy")
    assert launch.find_checkpoint(tmp_path) == tmp_path / "runs/copy/checkpoint.pt"  # the newer of equals


# PROGRESS


def test_progress(grid, tmp_path):
    job = launch.read_grid(grid, tmp_path)[0]
    assert launch.frames_done(job) == 0
    (job.folder / "runs" / "a").mkdir(parents=True)
    csv = job.folder / "runs" / "a" / "evaluations.csv"
    for text, frames in [("", 0), ("global_step,x\n", 0), ("global_step,x\n0,1\n40,2\n", 40), ("x\n65,1\n", 60)]:
        csv.write_text(text)
        assert launch.frames_done(job) == frames


def test_the_display_counts_jobs_and_frames(grid, tmp_path):
    """Of 8 jobs of 60 frames one is done, one failed at 40, one runs, at 30, and one of an earlier start is at 10."""
    jobs = launch.read_grid(grid, tmp_path)
    outcomes = {jobs[0]: "finished", jobs[1]: "failed"}
    for job, frames, started in ((jobs[1], 40, 100), (jobs[2], 30, 100), (jobs[3], 10, 99)):
        (job.folder / "runs" / "a").mkdir(parents=True)
        (job.folder / "runs" / "a" / "evaluations.csv").write_text(f"global_step,x\n{frames},1\n")
        attempt = {"command": job.command, "started": started, "host": "", "seconds": None, "exit_status": None}
        (job.folder / "attempts.json").write_text(json.dumps([attempt]))
    with tqdm(total=480, initial=80, file=io.StringIO()) as bar:
        launch.show(bar, jobs, outcomes, 3, since=100)
        assert (bar.n, bar.total) == (60 + 40 + 30 + 10, 60 + 40 + 6 * 60)
        assert bar.postfix == "done 1, running 1, waiting 5, failed 1, skipped 3"


def test_real_script(tmp_path, processes):
    content = {
        "total_timesteps": 15000,
        "seeds": [1],
        "flags": "--eval-interval 1000 --eval-episodes 2 --checkpoint-interval 500",
        "methods": [{"name": "mappo_local", "script": "baselines/mappo_local_lbf.py"}],
        "tasks": [{"env_id": "Foraging-10x10-3p-3f-v3", "flags": "--no-winner-take-all"}],
    }
    grid = tmp_path / "real.yaml"
    grid.write_text(yaml.safe_dump(content))
    undisturbed = start(processes, grid, tmp_path / "undisturbed")
    job = launch.read_grid(grid, tmp_path / "disturbed")[0]
    launcher = start(processes, grid, tmp_path / "disturbed")
    wait_until(lambda: launch.frames_done(job) >= 1000, seconds=120)
    launcher.send_signal(signal.SIGINT)
    assert end(launcher)[0] == 130
    assert run(grid, tmp_path / "disturbed")[0] == 0
    assert end(undisturbed)[0] == 0
    expected = results(tmp_path / "undisturbed")
    [rows] = expected.values()
    assert len(rows.splitlines()) == 17  # the header and the evaluations at 0, 1000, ..., 15000
    assert results(tmp_path / "disturbed") == expected
    (job.folder / "finished.json").unlink()  # as after a launcher that was killed while the script finished
    assert run(grid, tmp_path / "disturbed")[0] == 0
    assert results(tmp_path / "disturbed") == expected


# RAY


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray cluster of one node with one CPU, and the file that holds the runs on it."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    hold = tmp_path_factory.mktemp("ray") / "hold"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAIN_HOLD", str(hold))
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "include_dashboard": False,
                "_system_config": {"health_check_period_ms": 500},
            },
        )
        yield cluster, hold
        cluster.shutdown()


def raylet_pid(node):
    return node.all_processes["raylet"][0].process.pid


def test_ray_node_is_killed(cluster, grid, undisturbed, tmp_path, processes):
    cluster, hold = cluster
    hold.touch()
    node = cluster.add_node(num_cpus=1)
    head_raylet, node_raylet = raylet_pid(cluster.head_node), raylet_pid(node)
    launcher = start(processes, grid, tmp_path, "--backend", "ray", "--ray-address", cluster.address)
    jobs = wait_until(lambda: len(held(tmp_path)) == 2 and held(tmp_path), 60)
    where = {job: starts(job)[0]["ancestors"] for job in jobs}
    assert sum(head_raylet in ancestors for ancestors in where.values()) == 1
    [victim] = [job for job in jobs if node_raylet in where[job]]

    # A lost machine: its raylet, its workers and the scripts that they run die together.
    ancestors = where[victim]
    for pid in reversed(ancestors[: ancestors.index(node_raylet)]):
        os.kill(pid, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)
    hold.unlink()
    assert end(launcher)[0] == 0
    assert [start["step"] for start in starts(victim)] == [0, 30]
    assert head_raylet in starts(victim)[1]["ancestors"]
    assert results(tmp_path) == results(undisturbed)


def test_ray_stop_saves_and_the_local_backend_goes_on(cluster, grid, undisturbed, tmp_path, processes):
    cluster, hold = cluster
    hold.touch()
    launcher = start(processes, grid, tmp_path, "--backend", "ray", "--ray-address", cluster.address)
    [job] = wait_until(lambda: held(tmp_path), 60)
    launcher.send_signal(signal.SIGINT)
    assert end(launcher)[0] == 130
    assert attempts(job)[-1]["exit_status"] == 143
    hold.unlink()
    assert run(grid, tmp_path)[0] == 0
    assert [start["step"] for start in starts(job)] == [0, 37]
    assert results(tmp_path) == results(undisturbed)


def test_ray_without_a_cluster(grid, tmp_path):
    pytest.importorskip("ray")
    status, stderr = run(grid, tmp_path, "--backend", "ray", "--ray-address", "127.0.0.1:1")
    assert status == 2 and stderr.startswith("launch.py: ") and stderr.count("\n") == 1


def test_ray_second_ctrl_c_kills_the_runs(cluster, tmp_path, processes):
    cluster, _ = cluster
    job = tmp_path / "output/m/A/seed1"
    flags = "--backend", "ray", "--ray-address", cluster.address
    launcher = start(processes, one_job(tmp_path, DEAF), tmp_path / "output", *flags)
    wait_until((job / "deaf").exists, 60)
    launcher.send_signal(signal.SIGINT)
    time.sleep(3)
    assert launcher.poll() is None and not is_free(job)
    launcher.send_signal(signal.SIGINT)
    begun = time.monotonic()
    assert end(launcher)[0] == 130
    assert time.monotonic() - begun < 15
    assert attempts(job)[-1]["exit_status"] == -signal.SIGKILL
    wait_until(lambda: is_free(job), 5)
