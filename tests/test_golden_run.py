"""Golden runs: every LBF script still computes, to the last bit, what it computed when the values were recorded.

Each script trains 10,000 frames in its default setting and on a task where rewards are frequent (in the default one the
untrained policy almost never earns any), and its evaluations and final weights are compared with golden/lbf.json. The
bits depend on PyTorch and on the kind of processor: elsewhere the runs are skipped.

    python tests/test_golden_run.py --rebase

records the values anew. A rebase is a commit of its own, whose message says why the numbers had to change.
"""

import hashlib
import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LBF_SCRIPTS, run, run_folder

VALUES = Path(__file__).parent / "golden" / "lbf.json"
DEFAULT_TASK = "Foraging-8x8-2p-4f-coop-v3"
SETTINGS = {
    DEFAULT_TASK: [],
    "Foraging-10x10-3p-3f-v3": ["--env-id", "Foraging-10x10-3p-3f-v3", "--no-winner-take-all"],
}
NETWORKS = ("actor", "critic", "models")


def processor():
    """Vendor and family of the processor: the matrix library chooses its kernels by them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    pairs = [line.partition(":") for line in lines]
    about = {name.strip(): value.strip() for name, _, value in reversed(pairs)}
    return f"{about.get('vendor_id', 'unknown')} family {about.get('cpu family', 'unknown')}"


def what_decides_the_bits():
    """Where these differ, other kernels add in another order, and the last bits differ without any fault."""
    return {
        "torch": torch.__version__.partition("+")[0],
        "system": f"{platform.system()} {platform.machine()}",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": processor(),
    }


def what_should_not_matter():
    """Shown when a run differs: these promise the same random numbers and the same games from version to version."""
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("numpy", "gymnasium", "lbforaging")
    }


def weights_hash(state):
    """sha256 over the name, the shape and the bytes of each tensor of a state dict, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = state[name].numpy()
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def is_compared(column):
    """Columns that a later version adds are not compared."""
    return column == "global_step" or column.startswith("episodic_return")


def play(script, options, cwd):
    """10,000 frames with seed 1 -> evaluations (a list of rows) and hashes of the final weights."""
    run(script, "--seed", 1, "--total-timesteps", 10_000, *options, cwd=cwd)
    folder = run_folder(cwd)
    checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    # to the last bit: evaluations.csv is rounded
    rows = [{name: float(row[name]) for name in row if is_compared(name)} for row in checkpoint["evaluations"]]
    hashes = {name: weights_hash(checkpoint[name]) for name in NETWORKS if name in checkpoint}
    return {"evaluations": rows, "weights": hashes}


def golden():
    return json.loads(VALUES.read_text(encoding="utf-8"))


@pytest.mark.parametrize("task", SETTINGS)
def test_a_run_is_the_golden_run(lbf_script, task, tmp_path):
    recorded, here = golden(), what_decides_the_bits()
    if recorded["recorded_on"] != here:
        pytest.skip(f"golden values were recorded on {recorded['recorded_on']}, this is {here}")
    played, expected = play(lbf_script, SETTINGS[task], tmp_path), recorded["runs"][lbf_script][task]
    # evaluations first: their difference is easier to read than that of a hash
    versions = f"recorded with {recorded['recorded_with']}, played with {what_should_not_matter()}"
    assert played["evaluations"] == expected["evaluations"], versions
    assert played["weights"] == expected["weights"], versions


def test_golden_values_cover_every_script_and_setting():
    runs = golden()["runs"]
    assert {script: list(tasks) for script, tasks in runs.items()} == {script: list(SETTINGS) for script in LBF_SCRIPTS}
    for script, tasks in runs.items():
        for task, values in tasks.items():
            assert [row["global_step"] >= 10_000 for row in values["evaluations"]] == [False, True]
            assert len(values["weights"]) == (3 if "_dg_" in script else 2)
    # where rewards are frequent, no two scripts end with the same policy
    hashes = [tasks["Foraging-10x10-3p-3f-v3"]["weights"]["actor"] for tasks in runs.values()]
    assert len(set(hashes)) == len(LBF_SCRIPTS)


def rebase():
    """Record the values of the code as it is."""
    runs = {}
    for script in LBF_SCRIPTS:
        runs[script] = {}
        for task, options in SETTINGS.items():
            with tempfile.TemporaryDirectory() as cwd:
                runs[script][task] = play(script, options, cwd)
            print(f"{script}, {task}: {runs[script][task]['evaluations'][-1]}")
    values = {"recorded_on": what_decides_the_bits(), "recorded_with": what_should_not_matter(), "runs": runs}
    VALUES.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--rebase"]:
        sys.exit("usage: python tests/test_golden_run.py --rebase")
    rebase()
