"""Loads the scripts as modules (nothing in them runs on import) and runs them as subprocesses."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
DG_SCRIPTS = ["mappo_dg_lbf.py", "ippo_dg_lbf.py"]
BASELINES = [
    f"baselines/{algorithm}_{rewards}_lbf.py" for algorithm in ("mappo", "ippo") for rewards in ("local", "global")
]
LBF_SCRIPTS = DG_SCRIPTS + BASELINES
torch.set_num_threads(1)


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


@pytest.fixture(params=LBF_SCRIPTS)
def lbf_script(request):
    return request.param


@pytest.fixture(params=DG_SCRIPTS)
def dg_script(request):
    return request.param
