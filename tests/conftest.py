"""Loads the scripts as modules (nothing in them runs on import) and runs them, as subprocesses or inside pytest."""

import contextlib
import importlib.util
import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
DG_SCRIPTS = ["mappo_dg_lbf.py", "ippo_dg_lbf.py"]
BASELINES = [
    f"baselines/{algorithm}_{rewards}_lbf.py" for algorithm in ("mappo", "ippo") for rewards in ("local", "global")
]
LBF_SCRIPTS = DG_SCRIPTS + BASELINES
torch.set_num_threads(1)
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")


def pytest_collection_modifyitems(items):
    """Tests that need SMAClite carry the mark smaclite; .ci/run has a step for them."""
    if importlib.util.find_spec("smaclite"):
        return
    missing = pytest.mark.skip(reason="SMAClite is not on PyPI: pip install -r requirements-smaclite.txt")
    for item in items:
        if item.get_closest_marker("smaclite"):
            item.add_marker(missing)


@pytest.fixture(autouse=True)
def seeded():
    """A test that draws random numbers draws the same ones every time."""
    torch.manual_seed(0)


def load(script):
    """The script as a module."""
    name = Path(script).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def run(script, *options, cwd, check=True, timeout=300):
    """Run `python script options` in cwd -> CompletedProcess with text output."""
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def run_inside(script, *options, cwd):
    """Like run with check=False, but in this process, which saves the seconds of the imports.

    A script that is given as a module (see load) runs its main() as it is now, monkeypatched or not.
    """
    signals = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before, argv, status = os.getcwd(), sys.argv, 0
    out, err = io.StringIO(), io.StringIO()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if isinstance(script, str):
                sys.argv = [str(ROOT / script), *map(str, options)]
                runpy.run_path(sys.argv[0], run_name="__main__")
            else:
                sys.argv = [script.__file__, *map(str, options)]
                script.main()
    except SystemExit as end:
        status = end.code
    finally:
        os.chdir(before)
        sys.argv = argv
        for signum, handler in signals.items():
            signal.signal(signum, handler)
    return subprocess.CompletedProcess([str(script), *map(str, options)], status, out.getvalue(), err.getvalue())


def run_folder(cwd):
    """The one folder under cwd/runs."""
    (folder,) = (Path(cwd) / "runs").iterdir()
    return folder


def scalars(folder):
    """TensorBoard's scalars of a run folder: tag -> [(step, value), ...]."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(params=LBF_SCRIPTS)
def lbf_script(request):
    return request.param


@pytest.fixture(params=DG_SCRIPTS)
def dg_script(request):
    return request.param
