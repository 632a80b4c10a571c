"""However a SMAClite script ends, it ends soon, says why, and none of its environments' processes stays behind.

On the fake of the environment, around which the worker processes are real; and on SMAClite where it is installed.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from fake_smaclite import SMACLITE_SCRIPTS

DG, LOCAL, GLOBAL = SMACLITE_SCRIPTS
SOON = 60  # seconds: a hang is told from a stop even with ten processes beside it on two cores
OPTIONS = ["--num-envs", 3, "--num-workers", 2, "--total-timesteps", 10**6, "--hidden-dim", 8, "--eval-episodes", 3]
OPTIONS += ["--eval-interval", 200, "--checkpoint-interval", 200]
needs_smaclite = pytest.mark.smaclite


def worlds(real):
    """Every script on the fake, and one of them on SMAClite."""
    return [(script, "fake") for script in SMACLITE_SCRIPTS] + [pytest.param(real, "smaclite", marks=needs_smaclite)]


class Run:
    """A script as a process that leads a session of its own, in which its workers are found."""

    def __init__(self, script, cwd, *options, world="fake", fault=""):
        task = ["--env-id", "2s_vs_1sc"] if world == "smaclite" else []
        driver = Path(__file__).parent / "fake_smaclite.py"
        command = [sys.executable, driver, world, fault, ROOT / script, *OPTIONS, *task, *options]
        settings = {"cwd": cwd, "env": os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}}
        self.cwd, self.errors = cwd, cwd / "stderr"
        with open(self.errors, "wb") as stderr:  # a pipe would be held open by a worker that stays
            settings |= {"stdout": subprocess.DEVNULL, "stderr": stderr, "start_new_session": True}
            self.process = subprocess.Popen(list(map(str, command)), **settings)
        self.pid = self.process.pid

    def living(self):
        """The processes of the session: the script's own and its workers."""
        listing = subprocess.run(["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True).stdout
        found = []
        for pid, status in map(str.split, listing.splitlines()):
            try:
                if os.getsid(int(pid)) == self.pid and not status.startswith("Z"):
                    found.append(int(pid))
            except OSError:  # it is gone, or another user's
                pass
        return found

    def workers(self):
        return [pid for pid in self.living() if pid != self.pid]

    def stderr(self):
        """Its lines, without the progress bar."""
        lines = re.sub(r"[^\r\n]* frames/s[^\]]*\]", "\n", self.errors.read_text()).splitlines()
        return [line for line in lines if line.strip()]

    def wait_for(self, condition):
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end, "waited too long"
            time.sleep(0.05)

    def wait_for_words(self):
        """Until it says something on stderr, or has ended."""
        self.wait_for(lambda: self.stderr() or self.process.poll() is not None)

    def wait_for_training(self):
        """Until the first evaluation after some training is on paper."""

        def evaluated_twice():
            assert self.process.poll() is None, self.stderr()[-20:]
            return any(len(path.read_text().splitlines()) > 2 for path in self.cwd.glob("runs/*/evaluations.csv"))

        self.wait_for(evaluated_twice)
        assert len(self.workers()) == 3

    def end(self):
        """Its exit status; it and its workers have SOON seconds."""
        deadline = time.monotonic() + SOON
        try:
            status = self.process.wait(SOON)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it hangs, after {self.stderr()[-3:]}")
        while self.living() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not self.living(), "processes are left"
        return status


@pytest.fixture
def start(tmp_path):
    """Run(...) in tmp_path; what a failed test leaves is killed."""
    runs = []

    def begin(script, *options, **settings):
        runs.append(Run(script, tmp_path, *options, **settings))
        return runs[-1]

    yield begin
    for run in runs:
        for pid in run.living():
            os.kill(pid, signal.SIGKILL)
        run.process.wait()


# ERRORS
@pytest.mark.parametrize("script, world", worlds(DG))
def test_an_error_in_an_update_ends_the_run(script, world, start):
    run = start(script, world=world, fault="update")
    run.wait_for_words()
    assert run.end() == 1
    assert run.stderr()[-1] == "RuntimeError: injected"
    assert [line for line in run.stderr() if "Traceback" in line] == run.stderr()[:1]


@pytest.mark.parametrize("script, world", worlds(LOCAL))
def test_a_loss_that_is_not_finite_is_one_sentence(script, world, start):
    run = start(script, "--learning-rate", 1e38, world=world)
    run.wait_for_words()
    assert run.end() == 2
    (sentence,) = run.stderr()
    assert re.match(rf"{Path(script).name}: iteration \d+: value_loss is nan\b.*; there is no checkpoint$", sentence)


@pytest.mark.parametrize("script, world", [(DG, "fake"), pytest.param(GLOBAL, "smaclite", marks=needs_smaclite)])
def test_a_run_whose_folder_is_deleted_ends(script, world, start):
    run = start(script, world=world)
    run.wait_for_training()
    for _ in range(2):  # a file may be written meanwhile
        shutil.rmtree(run.cwd / "runs", ignore_errors=True)
    assert run.end() in (1, 2)
    assert run.stderr()


def test_a_run_without_a_place_for_its_folder_ends(start, tmp_path):
    (tmp_path / "runs").write_text("a file")
    run = start(DG)
    run.wait_for_words()
    assert run.end() in (1, 2)


def test_an_error_in_a_game_ends_the_run(start):
    run = start(DG, fault="game")
    run.wait_for_words()
    assert run.end() == 1
    assert "RuntimeError: injected" in run.stderr()


@pytest.mark.parametrize("script, world", [(LOCAL, "fake"), pytest.param(LOCAL, "smaclite", marks=needs_smaclite)])
def test_a_worker_that_is_told_to_end_does_and_ends_the_run(script, world, start):
    """It does not have the main process's handlers, which save first."""
    run = start(script, world=world)
    run.wait_for_training()
    os.kill(run.workers()[1], signal.SIGTERM)
    assert run.end() == 1
    (sentence,) = run.stderr()
    assert "an environment's process is gone" in sentence


# SIGNALS
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize("signum", STATUS, ids=lambda signum: signum.name)
@pytest.mark.parametrize("script, world", [(DG, "fake"), pytest.param(LOCAL, "smaclite", marks=needs_smaclite)])
def test_a_signal_ends_the_run_and_its_workers(script, world, signum, start):
    run = start(script, "--checkpoint-interval", 0, world=world)
    run.wait_for_training()
    run.process.send_signal(signum)
    assert run.end() == STATUS[signum]
    assert run.stderr() == []
    assert list(run.cwd.glob("runs/*/checkpoint.pt"))


def test_ctrl_c_goes_to_the_whole_group_in_the_foreground(start):
    """It ends the run as if it had been for the main process alone, which saves first."""
    run = start(GLOBAL, "--checkpoint-interval", 0)
    run.wait_for_training()
    os.killpg(run.pid, signal.SIGINT)
    assert run.end() == 130
    assert run.stderr() == []
    assert list(run.cwd.glob("runs/*/checkpoint.pt"))


def test_a_second_signal_ends_a_run_that_is_stuck(start):
    """A game that does not come back leaves the first one unanswered."""
    run = start(DG, fault="stuck")
    run.wait_for(lambda: run.cwd.glob("runs/*/evaluations.csv"))
    for _ in range(2):
        time.sleep(2)
        run.process.send_signal(signal.SIGTERM)
    assert run.end() in (143, -signal.SIGTERM)


def test_workers_end_with_a_run_that_is_killed(start):
    run = start(DG)
    run.wait_for_training()
    run.process.kill()
    assert run.end() == -signal.SIGKILL
