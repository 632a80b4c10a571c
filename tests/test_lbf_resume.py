"""The same seed gives the same run, also when it is killed, interrupted or evaluated differently on the way."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import DG_SCRIPTS, ROOT, load, run_folder, run_inside, scalars

TASK = ["--env-id", "Foraging-6x6-3p-2f-v3", "--no-winner-take-all", "--num-envs", 6]
# some 16 iterations of 250 frames: a checkpoint after each, an evaluation after every second or third
OPTIONS = TASK + ["--total-timesteps", 4000, "--checkpoint-interval", 200, "--eval-interval", 700, "--eval-episodes", 5]
SHORT = TASK + ["--total-timesteps", 1500, "--checkpoint-interval", 200, "--eval-interval", 400, "--eval-episodes", 5]
TRAINED = {"actor", "critic", "actor_optimizer", "critic_optimizer"}
OF_THE_GRAPH = {"models", "models_optimizer"}
KEYS = TRAINED | {"script", "run_name", "args", "global_step", "iteration", "evaluations", "torch_rng", "envs"}


def state(folder):
    """Everything in the checkpoint but the run's name and the path that it was resumed from."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["args"].pop("resume")
    checkpoint.pop("run_name")
    return checkpoint


def same(a, b):
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def curves(folder):
    """All scalars but the speed."""
    return {tag: values for tag, values in scalars(folder).items() if tag != "charts/SPS"}


def finish(script, *options, cwd):
    """Run to the end in this process -> the run folder."""
    cwd.mkdir(exist_ok=True)
    done = run_inside(script, *options, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return run_folder(cwd)


def assert_same_run(folder, reference):
    assert (folder / "evaluations.csv").read_bytes() == (reference / "evaluations.csv").read_bytes()
    mine, other = state(folder), state(reference)
    assert mine.keys() == other.keys()
    assert [key for key in mine if not same(mine[key], other[key])] == []
    assert curves(folder) == curves(reference)  # no scalar is lost, none is there twice


def test_same_seed_same_run(lbf_script, tmp_path):
    a = finish(lbf_script, *SHORT, cwd=tmp_path / "a")
    b = finish(lbf_script, *SHORT, cwd=tmp_path / "b")
    assert_same_run(a, b)
    other = finish(lbf_script, *SHORT, "--seed", 2, "--total-timesteps", 300, cwd=tmp_path / "other")
    for tag in ("losses/policy_loss", "eval/episodic_return"):
        assert curves(other)[tag][0] != curves(a)[tag][0]


def test_a_checkpoint_is_complete(lbf_script, tmp_path):
    """All that is trained and drawn from; resuming the finished run changes nothing."""
    folder = finish(lbf_script, *SHORT, cwd=tmp_path)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint.keys() == KEYS | (OF_THE_GRAPH if lbf_script in DG_SCRIPTS else set())
    assert checkpoint["args"].keys() == vars(load(lbf_script).Args()).keys()
    assert len(checkpoint["envs"]) == 6 and checkpoint["script"] + ".py" == os.path.basename(lbf_script)
    steps = 4 * checkpoint["iteration"]
    for name in TRAINED - {"actor", "critic"}:
        assert {int(moments["step"]) for moments in checkpoint[name]["state"].values()} == {steps}
    assert not list(folder.glob("*.tmp"))

    before, text, drawn = state(folder), (folder / "evaluations.csv").read_bytes(), curves(folder)
    assert finish(lbf_script, *SHORT, "--resume", folder / "checkpoint.pt", cwd=tmp_path) == folder
    assert same(state(folder), before)
    assert (folder / "evaluations.csv").read_bytes() == text and curves(folder) == drawn


class Death(BaseException):
    """Stands for the end of the process."""


def test_resume_is_exact(lbf_script, tmp_path, monkeypatch):
    """Every script, with the options that draw random numbers: an end in the middle of an iteration, then --resume."""
    options = [*SHORT, "--env-id", "Foraging-2s-6x6-3p-2f-v3", "--norm-adv"]
    if lbf_script in DG_SCRIPTS:
        options += ["--edge-drop", 0.1, "--edge-add", 0.1, "--no-encoder"]
    reference = finish(lbf_script, *options, cwd=tmp_path / "reference")
    module, left = load(lbf_script), [4]
    original = module.ppo_update

    def ppo_update(*args):
        losses = original(*args)
        left[0] -= 1
        if left[0] == 0:
            raise Death
        return losses

    (cwd := tmp_path / "killed").mkdir()
    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(module, "ppo_update", ppo_update)
        run_inside(module, *options, cwd=cwd)
    folder = run_folder(cwd)
    assert 0 < state(folder)["global_step"] < state(reference)["global_step"]
    assert finish(lbf_script, "--resume", folder / "checkpoint.pt", cwd=cwd) == folder
    assert (folder / "evaluations.csv").read_bytes() == (reference / "evaluations.csv").read_bytes()
    assert same(state(folder), state(reference))


def test_a_finished_run_goes_on(lbf_script, tmp_path):
    """To a later --total-timesteps: what a run of that length is, but for the closing evaluation on the way."""
    reference = finish(lbf_script, *OPTIONS, cwd=tmp_path / "reference")
    folder = finish(lbf_script, *OPTIONS, "--total-timesteps", 1000, cwd=tmp_path / "longer")
    ended = state(folder)["global_step"]
    assert finish(lbf_script, "--resume", folder / "checkpoint.pt", "--total-timesteps", 4000, cwd=folder.parents[1])
    rows = [row for row in state(folder)["evaluations"] if row["global_step"] != ended]
    assert len(rows) == len(state(folder)["evaluations"]) - 1 and rows == state(reference)["evaluations"]
    assert same(state(folder) | {"evaluations": rows}, state(reference))


def start(script, *options, cwd, die_before=""):
    """Start the script as a process of its own; die_before "NAME:K" kills it right before the K-th renaming to NAME."""
    driver = """
import os, runpy, signal, sys
name, _, left = sys.argv.pop(1).partition(":")
left, replace, sys.argv = int(left or 0), os.replace, sys.argv[1:]

def replace_or_die(source, target):
    global left
    if os.path.basename(target) == name:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_or_die
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    command = [sys.executable, "-c", driver, die_before, str(ROOT / script), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for_writes(process, cwd, name, count):
    """Wait until runs/*/name was written count more times."""
    seen, deadline = [last_write(cwd, name)], time.monotonic() + 240
    while len(seen) <= count:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or hangs"
        if (now := last_write(cwd, name)) != seen[-1]:
            seen.append(now)
        time.sleep(0.002)


def last_write(cwd, name):
    return max((path.stat().st_mtime_ns for path in cwd.glob(f"runs/*/{name}")), default=None)


KILLS = {  # where to kill: before a renaming, or some seconds after so many checkpoints
    "mappo_dg_lbf.py": ["checkpoint.pt:4", "evaluations.csv:1", (2, 0.0), (2, None)],
    "baselines/ippo_local_lbf.py": ["evaluations.csv:2", (2, None)],
}


@pytest.mark.parametrize("script", KILLS)
def test_sigkill_and_resume(script, tmp_path):
    """A real kill -9, again and again: the same weights, evaluations.csv and curves as an uninterrupted run."""
    reference = finish(script, *OPTIONS, cwd=tmp_path / "reference")
    (cwd := tmp_path / "killed").mkdir()
    resume, steps = [], []
    for kill in KILLS[script]:
        # with the whole command line or with nothing but --resume
        options = [*OPTIONS, *resume] if len(steps) % 2 == 0 else resume
        process = start(script, *options, cwd=cwd, die_before=kill if isinstance(kill, str) else "")
        if not isinstance(kill, str):
            wait_for_writes(process, cwd, "checkpoint.pt", kill[0])
            time.sleep(0.05 if kill[1] is None else kill[1])
            process.kill()
        assert process.wait(timeout=240) == -signal.SIGKILL
        folder = run_folder(cwd)
        checkpoint = state(folder)  # whole, and the evaluations on disk are ahead of it or level with it
        text = (folder / "evaluations.csv").read_text()
        assert (reference / "evaluations.csv").read_text().startswith(text)
        assert len(text.splitlines()) - 1 >= len(checkpoint["evaluations"])
        steps.append(checkpoint["global_step"])
        resume = ["--resume", folder / "checkpoint.pt"]
    assert steps == sorted(steps) and 0 < steps[-1] < 4000
    assert finish(script, *resume, cwd=cwd) == folder
    assert_same_run(folder, reference)


@pytest.mark.parametrize(
    "script, signum, status",
    [("mappo_dg_lbf.py", signal.SIGINT, 130), ("baselines/ippo_local_lbf.py", signal.SIGTERM, 143)],
)
def test_stop_signals(script, signum, status, tmp_path):
    """SIGINT and SIGTERM save first, whatever the checkpoint interval is."""
    options = [*OPTIONS, "--checkpoint-interval", 0]
    reference = finish(script, *options, "--save-model", cwd=tmp_path / "reference")
    (cwd := tmp_path / "stopped").mkdir()
    process = start(script, *options, cwd=cwd)
    wait_for_writes(process, cwd, "evaluations.csv", 2)
    process.send_signal(signum)
    assert process.wait(timeout=240) == status
    folder = run_folder(cwd)
    assert 0 < state(folder)["global_step"] < 4000
    assert finish(script, "--save-model", "--resume", folder / "checkpoint.pt", cwd=cwd) == folder
    assert (folder / "evaluations.csv").read_bytes() == (reference / "evaluations.csv").read_bytes()
    assert curves(folder) == curves(reference)
    mine, other = state(folder), state(reference)
    mine["args"].pop("save_model"), other["args"].pop("save_model")
    assert same(mine, other)


def test_a_run_is_resumed_where_its_folder_is(tmp_path, monkeypatch):
    """The folder was moved and the path is relative: the run goes on there, no other folder appears."""
    script = "baselines/mappo_global_lbf.py"
    reference = finish(script, *SHORT, cwd=tmp_path / "reference")
    module = load(script)
    original, left = module.collect, [8]

    def collect(*args):
        left[0] -= 1
        if left[0] == 0:
            raise Death
        return original(*args)

    (cwd := tmp_path / "killed").mkdir()
    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(module, "collect", collect)
        run_inside(module, *SHORT, cwd=cwd)
    moved = run_folder(cwd).rename(tmp_path / "moved")
    assert run_inside(script, "--resume", "moved/checkpoint.pt", cwd=tmp_path).returncode == 0
    assert same(state(moved), state(reference))
    assert (moved / "evaluations.csv").read_bytes() == (reference / "evaluations.csv").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"reference", "killed", "moved"}


def test_evaluating_and_saving_do_not_disturb_training(lbf_script, tmp_path):
    often = finish(lbf_script, *SHORT, cwd=tmp_path / "often")
    options = ["--eval-interval", 10**6, "--eval-episodes", 2, "--eval-greedy", "--checkpoint-interval", 0]
    seldom = finish(lbf_script, *SHORT, *options, "--save-model", cwd=tmp_path / "seldom")
    lines = [len((folder / "evaluations.csv").read_text().splitlines()) for folder in (often, seldom)]
    assert lines[0] > lines[1] == 3
    a, b = state(often), state(seldom)
    assert [key for key in a.keys() - {"args", "evaluations"} if not same(a[key], b[key])] == []


@pytest.mark.parametrize("dies_in", ["fsync", "replace"])
def test_write_atomically_leaves_the_old_file(lbf_script, dies_in, tmp_path, monkeypatch):
    module, path = load(lbf_script), tmp_path / "file"
    module.write_atomically(str(path), b"old")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]

    def die(*args):
        raise Death

    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(os, dies_in, die)
        module.write_atomically(str(path), b"new and longer")
    assert path.read_bytes() == b"old"
    module.write_atomically(str(path), b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["file"]


def test_write_atomically_removes_what_it_cannot_finish(lbf_script, tmp_path, monkeypatch):
    """On a full disk, which half a file would not make emptier."""
    module, path = load(lbf_script), tmp_path / "file"
    module.write_atomically(str(path), b"old")

    def fail(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(module.UserError, match=os.strerror(errno.ENOSPC)):
        module.write_atomically(str(path), b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_write_atomically_syncs_before_it_renames(lbf_script, tmp_path, monkeypatch):
    module, order = load(lbf_script), []
    for name in ("fsync", "replace"):

        def spy(*args, name=name, original=getattr(os, name)):
            order.append(name)
            return original(*args)

        monkeypatch.setattr(os, name, spy)
    module.write_atomically(str(tmp_path / "file"), b"data")
    assert order == ["fsync", "replace"]
