"""Faults of the run folder that were once found by trying, from stale resumes to disks that fill at the very end."""

import errno
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load, run_folder, run_inside
from test_lbf_bad_input import assert_refused, last_words, snapshot
from test_lbf_resume import state
from test_run_folder import LONGER, SCRIPTS, TINY, ended, fill_disk, play, resume, start

SCRIPT = "mappo_dg_lbf.py"


@pytest.fixture
def folder(tmp_path):
    """A finished run of 350 frames."""
    return play(SCRIPT, cwd=tmp_path / "run")


def test_another_runs_checkpoint_is_refused_without_run_json_too(folder, tmp_path):
    """The newest checkpoint in the folder knows whose folder it is. Here the other run is further on."""
    other = play(SCRIPT, "--seed", 2, *LONGER, cwd=tmp_path / "other")
    shutil.copy(other / "checkpoint.pt", folder / "other.pt")
    (folder / "run.json").unlink()
    before = snapshot(folder)
    resume(SCRIPT, folder / "other.pt", "--total-timesteps", 2000, status=2)
    assert snapshot(folder) == before


def test_another_scripts_checkpoint_is_refused_without_run_json_too(folder, tmp_path):
    """A whole checkpoint of another script is not damaged: it is not replaced."""
    other = play(SCRIPTS[1], cwd=tmp_path / "other")
    shutil.copy(other / "checkpoint.pt", folder / "other.pt")
    (folder / "run.json").unlink()
    before = snapshot(folder)
    resume(SCRIPTS[1], folder / "other.pt", "--total-timesteps", 2000, status=2)
    assert snapshot(folder) == before


@pytest.mark.parametrize("moment", ["tracking", "lock"])
def test_a_resume_that_waited_while_the_run_went_on_does_not_cut_it_back(moment, folder, tmp_path, monkeypatch):
    """Between the reading of the checkpoint and the lock another process has gone on, and has ended."""
    import fcntl

    lockf = fcntl.lockf

    def go_on(*args, **settings):
        monkeypatch.setattr(fcntl, "lockf", lockf)
        resume(SCRIPT, folder, "--total-timesteps", 900)
        if args:
            lockf(*args)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=go_on))
    if moment == "lock":
        monkeypatch.setattr(fcntl, "lockf", go_on)
    options = ["--track"] if moment == "tracking" else []
    done = run_inside(SCRIPT, "--resume", folder, *options, "--total-timesteps", 400, cwd=tmp_path)
    assert done.returncode == 2 and state(folder)["global_step"] >= 900


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_does_not_keep_a_run_from_starting(number, tmp_path, monkeypatch):
    """Lustre without flock, some NFS: there no other process is at the run."""
    import fcntl

    def lockf(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    play(SCRIPT, cwd=tmp_path)


@pytest.mark.parametrize("lost", ["run_name", "global_step", "iteration", "evaluations", "torch_rng", "critic"])
def test_a_checkpoint_of_an_older_version_is_refused_in_one_sentence(lost, folder):
    """Version 0.1.0 has the same settings, but no run_name: it ends in a traceback and status 1."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    del checkpoint[lost]
    torch.save(checkpoint, folder / "checkpoint.pt")
    before = snapshot(folder)
    done = resume(SCRIPT, folder, status=2)
    assert len(done.stderr.splitlines()) == 1 and snapshot(folder) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_name_that_is_not_utf8_is_refused(script, tmp_path):
    """As bytes of another encoding arrive in argv; TensorBoard cannot name its files so."""
    done = run_inside(script, *TINY, "--exp-name", os.fsdecode(b"a\xffb"), cwd=tmp_path)
    assert_refused(done, tmp_path, "exp_name")


def test_a_folder_whose_path_is_not_utf8_is_refused(folder, tmp_path):
    (other := tmp_path / os.fsdecode(b"a\xffb")).mkdir()
    moved = Path(shutil.move(folder, other / "run"))
    before = snapshot(moved)
    done = resume(SCRIPT, moved, *LONGER, status=2)
    assert len(done.stderr.splitlines()) == 1 and snapshot(moved) == before


def test_a_full_disk_in_tensorboards_thread_is_one_sentence(tmp_path):
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))"
    options = [*TINY, "--total-timesteps", 10**6, "--checkpoint-interval", 0]
    with ended(start(SCRIPT, *options, cwd=tmp_path, prelude=limit)) as process:
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 2 and "Traceback" not in stderr, stderr


def test_a_disk_that_is_full_at_the_very_end(lbf_script, tmp_path, monkeypatch):
    """The sentence is on a line of its own, not behind the progress bar, and says which checkpoint there is."""
    fill_disk(monkeypatch, tmp_path, "checkpoint.pt", 1)
    done = run_inside(lbf_script, *TINY, "--checkpoint-interval", 0, "--save-model", cwd=tmp_path)
    assert done.returncode == 2 and "there is no checkpoint" in last_words(done, lbf_script)


def test_a_full_disk_while_a_stop_is_answered(tmp_path, monkeypatch):
    """The same for the checkpoint of a stopped run."""
    from test_run_folder import kill_me, stopped_at

    module = load(SCRIPT)
    fill_disk(monkeypatch, tmp_path, "checkpoint.pt", 2)
    with pytest.raises(module.UserError, match="the last checkpoint is of frame"):
        stopped_at(SCRIPT, "evaluate", 3, kill_me(15), tmp_path, monkeypatch, "--checkpoint-interval", 10**6)
    assert state(run_folder(tmp_path))["global_step"] > 0


def test_a_wandb_that_cannot_be_imported_is_one_sentence(tmp_path, monkeypatch):
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "wandb":
                raise ImportError("first line\nsecond line")

    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert_refused(run_inside(SCRIPT, *TINY, "--track", cwd=tmp_path), tmp_path, "wandb", "second line")


@pytest.mark.parametrize("option", ["--hidden-dim", "--num-threads", "--eval-episodes", "--oracle-distance"])
def test_numbers_that_no_machine_takes(option, tmp_path):
    done = run_inside(SCRIPT, *TINY, "--graph", "oracle", option, 10**30, cwd=tmp_path)
    assert_refused(done, tmp_path, option.strip("-").replace("-", "_"))
