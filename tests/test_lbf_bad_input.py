"""What a user can do wrong: one sentence on stderr, exit status 2, nothing half-written."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LBF_SCRIPTS, ROOT, load, run, run_folder, run_inside

SMALL = ["--env-id", "Foraging-5x5-2p-1f-v3", "--no-winner-take-all", "--num-envs", 2, "--total-timesteps", 300]
SMALL += ["--eval-episodes", 2, "--checkpoint-interval", 100]


def assert_refused(done, cwd, *words):
    """Exit status 2 and one line on stderr that has the words; nothing was written."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    for word in words:
        assert str(word) in line, line
    assert done.stdout == "" and not (cwd / "runs").exists()


def snapshot(folder):
    """Every file below the folder, with a hash of its content."""
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_the_exit_status_of_a_process(tmp_path):
    done = run("ippo_dg_lbf.py", "--c", 1.5, cwd=tmp_path, check=False)
    assert_refused(done, tmp_path, "ippo_dg_lbf.py: ", "c must lie in [0, 1], not 1.5")


@pytest.mark.parametrize(
    "env_id, nearest",
    [
        ("Foraging-8x8-2p-4f-cop-v3", "Foraging-8x8-2p-4f-coop-v3"),
        ("foraging-8x8-2p-4f-coop-v3", "Foraging-8x8-2p-4f-coop-v3"),
        ("Foraging-8x8-2p-4f-coop-v2", "Foraging-8x8-2p-4f-coop-v3"),
        ("Foraging-8x8-2p-4f-coop", "Foraging-8x8-2p-4f-coop-v3"),
        ("Foraging-15x15-3p-4-v3", "Foraging-15x15-3p-4f-v3"),
        ("Foraging-2s-8x8-2p-3p-v3", "Foraging-2s-8x8-2p-3f-v3"),
        ("CartPole-v1", "Foraging-"),
        ("", "Foraging-"),
    ],
)
def test_unknown_environments(env_id, nearest, tmp_path):
    for script in ("mappo_dg_lbf.py", "baselines/ippo_global_lbf.py"):
        done = run_inside(script, "--env-id", env_id, cwd=tmp_path)
        assert_refused(done, tmp_path, f"unknown environment {env_id};", nearest)


@pytest.mark.parametrize("env_id", ["Foraging-grid-8x8-2p-4f-v3", "Foraging-grid-2s-8x8-2p-4f-coop-v3"])
def test_grid_observations(env_id, lbf_script, tmp_path):
    done = run_inside(lbf_script, "--env-id", env_id, cwd=tmp_path)
    assert_refused(done, tmp_path, env_id, "grid observations", "drop '-grid'")


COUNTS = "total_timesteps num_envs eval_interval eval_episodes update_epochs hidden_dim num_threads".split()
AMOUNTS = "seed checkpoint_interval learning_rate clip_coef ent_coef max_grad_norm".split()


@pytest.mark.parametrize("name, value", [*itertools.product(COUNTS, (0, -3)), *itertools.product(AMOUNTS, (-1,))])
def test_counts_and_amounts(name, value, tmp_path):
    for script in ("mappo_dg_lbf.py", "baselines/mappo_local_lbf.py"):
        done = run_inside(script, f"--{name.replace('_', '-')}", value, cwd=tmp_path)
        assert_refused(done, tmp_path, f"{name} must lie in", value)


@pytest.mark.parametrize("value", ["-0.1", "1.1", "nan", "inf", "-inf"])
def test_fractions(value, tmp_path):
    for name in ("gamma", "gae_lambda", "c", "graph_p", "edge_drop", "edge_add"):
        done = run_inside("mappo_dg_lbf.py", f"--{name.replace('_', '-')}={value}", cwd=tmp_path)
        assert_refused(done, tmp_path, f"{name} must lie in [0, 1], not {value}")
    for name in ("gamma", "gae_lambda"):
        done = run_inside("baselines/ippo_local_lbf.py", f"--{name.replace('_', '-')}={value}", cwd=tmp_path)
        assert_refused(done, tmp_path, f"{name} must lie in [0, 1], not {value}")


def test_amounts_that_are_not_numbers(tmp_path):
    for name in ("learning-rate", "clip-coef", "ent-coef", "max-grad-norm"):
        done = run_inside("baselines/ippo_local_lbf.py", f"--{name}=nan", cwd=tmp_path)
        assert_refused(done, tmp_path, f"{name.replace('-', '_')} must lie in", "nan")
    assert_refused(run_inside("mappo_dg_lbf.py", "--oracle-distance", -1, cwd=tmp_path), tmp_path, "oracle_distance")


def test_less_than_one_iteration(lbf_script, tmp_path):
    done = run_inside(lbf_script, "--total-timesteps", 499, cwd=tmp_path)
    assert_refused(done, tmp_path, "total_timesteps is 499", "below one iteration (500 frames)")
    options = ["--num-envs", 20, "--total-timesteps", 999]
    assert_refused(run_inside(lbf_script, *options, cwd=tmp_path), tmp_path, "999", "1000 frames")


@pytest.mark.parametrize(
    "options", [["--learning-rat", 1], ["--graph", "learnt"], ["--seed", "x"], ["--num-envs", 2.5]]
)
def test_what_tyro_refuses(options, tmp_path):
    done = run_inside("mappo_dg_lbf.py", *options, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "runs").exists()
    assert str(options[0]).strip("-") in done.stderr.lower()


def test_track_without_wandb(lbf_script, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    assert_refused(run_inside(lbf_script, *SMALL, "--track", cwd=tmp_path), tmp_path, "wandb")
    assert run_inside(lbf_script, *SMALL, cwd=tmp_path).returncode == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA")
def test_cuda_falls_back_to_the_cpu(lbf_script, tmp_path):
    done = run_inside(lbf_script, *SMALL, "--cuda", cwd=tmp_path)
    assert done.returncode == 0 and "device: cpu\n" in done.stdout
    assert "CUDA is not available, the CPU is used" in done.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Checkpoints of a small run of mappo_dg_lbf.py and of a baseline."""
    paths = {}
    for script in ("mappo_dg_lbf.py", "baselines/mappo_local_lbf.py"):
        cwd = tmp_path_factory.mktemp("finished")
        assert run_inside(script, *SMALL, cwd=cwd).returncode == 0
        paths[script] = run_folder(cwd) / "checkpoint.pt"
    return paths


BROKEN = {
    "missing": lambda path, whole: None,
    "empty": lambda path, whole: path.write_bytes(b""),
    "first byte": lambda path, whole: path.write_bytes(whole[:1]),
    "half": lambda path, whole: path.write_bytes(whole[: len(whole) // 2]),
    "last byte missing": lambda path, whole: path.write_bytes(whole[:-1]),
    "text": lambda path, whole: path.write_text("global_step,episodic_return\n0,0.0\n"),
    "folder": lambda path, whole: path.mkdir(),
    "weights only": lambda path, whole: torch.save({"weight": torch.zeros(3)}, path),
    "tensor": lambda path, whole: torch.save(torch.zeros(3), path),
    "pickled object": lambda path, whole: torch.save(SimpleNamespace(script="mappo_dg_lbf", args={}), path),
    "no settings": lambda path, whole: torch.save({"script": "mappo_dg_lbf", "args": None}, path),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_resume_from_what_is_no_checkpoint(broken, finished, tmp_path):
    (folder := tmp_path / "run").mkdir()
    path = folder / "checkpoint.pt"
    BROKEN[broken](path, finished["mappo_dg_lbf.py"].read_bytes())
    before = snapshot(folder)
    done = run_inside("mappo_dg_lbf.py", *SMALL, "--resume", path, cwd=tmp_path)
    assert_refused(done, tmp_path, "--resume", path)
    assert snapshot(folder) == before


def test_resume_from_another_script(finished, tmp_path):
    path = finished["mappo_dg_lbf.py"]
    before = snapshot(path.parent)
    for script in LBF_SCRIPTS[1:]:
        done = run_inside(script, "--resume", path, cwd=tmp_path)
        assert_refused(done, tmp_path, "--resume", "written by mappo_dg_lbf.py")
    path = finished["baselines/mappo_local_lbf.py"]
    for script in ("mappo_dg_lbf.py", "baselines/ippo_local_lbf.py", "baselines/mappo_global_lbf.py"):
        done = run_inside(script, "--resume", path, cwd=tmp_path)
        assert_refused(done, tmp_path, "--resume", "written by mappo_local_lbf.py")
    assert snapshot(finished["mappo_dg_lbf.py"].parent) == before


def test_resume_from_a_script_with_the_same_settings(lbf_script, finished, tmp_path):
    """What differs is the name of the script alone."""
    kin = [script for script in LBF_SCRIPTS if script != lbf_script and ("_dg_" in script) == ("_dg_" in lbf_script)]
    written = finished["mappo_dg_lbf.py" if "_dg_" in lbf_script else "baselines/mappo_local_lbf.py"]
    checkpoint = torch.load(written, weights_only=True)
    for other in kin:
        checkpoint["script"] = Path(other).stem
        torch.save(checkpoint, path := tmp_path / "checkpoint.pt")
        done = run_inside(lbf_script, "--resume", path, cwd=tmp_path)
        assert_refused(done, tmp_path, "--resume", f"written by {Path(other).name}")


def test_resume_from_another_version_of_the_script(finished, tmp_path):
    checkpoint = torch.load(finished["mappo_dg_lbf.py"], weights_only=True)
    checkpoint["args"]["oracle_radius"] = checkpoint["args"].pop("oracle_distance")
    torch.save(checkpoint, path := tmp_path / "checkpoint.pt")
    assert_refused(run_inside("mappo_dg_lbf.py", "--resume", path, cwd=tmp_path), tmp_path, "another version")


@pytest.mark.parametrize(
    "options, name, here, there",
    [
        (["--seed", 2], "seed", 2, 1),
        (["--c", 0.5], "c", 0.5, 0.9),
        (["--no-soft"], "soft", False, True),
        (["--graph", "oracle"], "graph", "oracle", "learned"),
        (["--env-id", "Foraging-5x5-2p-2f-v3"], "env_id", "Foraging-5x5-2p-2f-v3", "Foraging-5x5-2p-1f-v3"),
        (["--num-envs", 10], "num_envs", 10, 2),  # the default, but the run has another
        (["--total-timesteps", 200], "total_timesteps", 200, 300),  # a later one would do
        (["--winner-take-all"], "winner_take_all", True, False),
        (["--exp-name", "other"], "exp_name", "other", "mappo_dg_lbf"),
    ],
)
def test_resume_with_other_settings(options, name, here, there, finished, tmp_path):
    path = finished["mappo_dg_lbf.py"]
    before = snapshot(path.parent)
    done = run_inside("mappo_dg_lbf.py", "--resume", path, *options, cwd=tmp_path)
    assert_refused(done, tmp_path, f"--resume: {name} is {here} here, {there} in the checkpoint")
    assert snapshot(path.parent) == before


def test_resume_with_settings_that_do_not_touch_the_numbers(lbf_script, tmp_path):
    """How often it is saved may change, and how long the run is may grow."""
    assert run_inside(lbf_script, *SMALL, cwd=tmp_path).returncode == 0
    path = run_folder(tmp_path) / "checkpoint.pt"
    before = torch.load(path, weights_only=True)["global_step"]
    options = ["--checkpoint-interval", 150, "--save-model", "--total-timesteps", before + 100]
    options += ["--wandb-project-name", "other", "--wandb-entity", "me"]
    done = run_inside(lbf_script, "--resume", path, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.load(path, weights_only=True)["global_step"] >= before + 100


def last_words(done, script):
    """The one line of stderr that the script itself wrote, apart from the progress bar."""
    lines = done.stderr.replace("\r", "\n").splitlines()
    (line,) = (line for line in lines if line.startswith(script.split("/")[-1]))
    return line


def assert_whole(folder, message):
    """What a run that went wrong leaves: the finite checkpoint that the message names, and nothing half-written."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["global_step"] == int(re.search(r"last checkpoint is of frame (\d+)$", message).group(1))
    names = [name for name in ("actor", "critic", "models") if name in checkpoint]
    assert all(weight.isfinite().all() for name in names for weight in checkpoint[name].values())
    assert (folder / "evaluations.csv").exists() and not list(folder.glob("*.tmp"))


def test_divergence(lbf_script, tmp_path):
    """The sentence is on a line of its own, not behind the progress bar."""
    done = run_inside(lbf_script, *SMALL, "--learning-rate", 1e30, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    words = last_words(done, lbf_script)
    assert re.search(r": iteration 1: (value|policy)_loss is \S+ and the norm of its gradient \S+;", words), words
    assert words.endswith("; there is no checkpoint") and not (run_folder(tmp_path) / "checkpoint.pt").exists()
    assert (run_folder(tmp_path) / "evaluations.csv").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_loss_that_is_not_finite(lbf_script, value, tmp_path, monkeypatch):
    """In the third iteration the critic's target is spoilt; the run then goes on from the checkpoint before it."""
    module, calls = load(lbf_script), []
    original = module.gae

    def gae(*args):
        calls.append(args)
        return original(*args) + (float(value) if len(calls) == 3 else 0.0)

    with monkeypatch.context() as patch:
        patch.setattr(module, "gae", gae)
        if "dg" in lbf_script:  # whose advantages call gae too
            patch.setattr(module, "multi_agent_gae", lambda rewards, *args: torch.zeros_like(rewards))
        with pytest.raises(module.UserError, match=r"^iteration 3: value_loss is (nan|inf) ") as stop:
            run_inside(module, *SMALL, cwd=tmp_path)
    folder = run_folder(tmp_path)
    assert_whole(folder, str(stop.value))
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["iteration"] == 2
    assert run_inside(lbf_script, "--resume", folder / "checkpoint.pt", cwd=tmp_path).returncode == 0


def test_a_gradient_that_is_not_finite(lbf_script):
    """The loss is 0, its slope is infinite: no step is made."""
    module, weight = load(lbf_script), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with pytest.raises(module.UserError, match="^some_loss is 0.0 and the norm of its gradient (inf|nan)$"):
        module.gradient_step(optimizer, weight.sqrt().sum(), "some_loss", 10.0)
    assert weight.item() == 0


def test_every_loss_is_named(dg_script, tmp_path, monkeypatch):
    """Advantages spoil the policy's loss, latents the losses of the graph models."""
    module = load(dg_script)
    with monkeypatch.context() as patch:
        patch.setattr(module, "multi_agent_gae", lambda rewards, *args: torch.full_like(rewards, torch.nan))
        with pytest.raises(module.UserError, match="^iteration 1: policy_loss is nan .*; there is no checkpoint$"):
            run_inside(module, *SMALL, cwd=tmp_path)
    original = module.GraphModels.forward
    for i, name in enumerate(("single_reverse_model", "action_predictor", "reverse_model")):

        def forward(self, obs, alive, spoilt=i):
            logits = original(self, obs, alive)
            return logits._replace(**{logits._fields[spoilt]: logits[spoilt] * torch.nan})

        (cwd := tmp_path / name).mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(module.GraphModels, "forward", forward)
            with pytest.raises(
                module.UserError, match=f"^iteration 1: .*{name}_loss.* is nan .*; there is no checkpoint$"
            ):
                run_inside(module, *SMALL, cwd=cwd)


def test_divergence_without_a_checkpoint(tmp_path):
    """There is no frame -1."""
    options = [*SMALL, "--checkpoint-interval", 0, "--learning-rate", 1e30]
    done = run_inside("baselines/mappo_local_lbf.py", *options, cwd=tmp_path)
    assert done.returncode == 2 and "iteration 1: value_loss" in done.stderr and "-1" not in done.stderr
    assert not (run_folder(tmp_path) / "checkpoint.pt").exists()


def frozen_clock():
    """A clock that stays in one second and never stands still."""
    ticks = itertools.count()
    return lambda: 1_700_000_000 + next(ticks) * 1e-6


def test_a_run_folder_is_never_overwritten(lbf_script, tmp_path, monkeypatch):
    """Two runs of one second, one after the other."""
    monkeypatch.setattr(time, "time", frozen_clock())
    assert run_inside(lbf_script, *SMALL, cwd=tmp_path).returncode == 0
    folder = run_folder(tmp_path)
    before = snapshot(folder)
    monkeypatch.setattr(time, "time", frozen_clock())
    assert run_inside(lbf_script, *SMALL, cwd=tmp_path).returncode == 0
    assert snapshot(folder) == before
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {folder.name, folder.name + "_2"}
    second = folder.with_name(folder.name + "_2")
    assert json.loads((second / "run.json").read_text())["run_name"] == second.name
    assert (second / "evaluations.csv").read_bytes() == (folder / "evaluations.csv").read_bytes()
    assert run_inside(lbf_script, "--resume", second, "--total-timesteps", 400, cwd=tmp_path).returncode == 0
    assert snapshot(folder) == before


def test_two_runs_that_start_at_the_same_moment(tmp_path):
    """Each gets a folder of its own."""
    driver = """
import os, runpy, sys, time
import gymnasium, lbforaging, torch.utils.tensorboard, tqdm, tyro  # first, so that only the start itself is raced
me, real, sys.argv = sys.argv[1], time.time, sys.argv[2:]
open("ready" + me, "w").close()
while not (os.path.exists("ready0") and os.path.exists("ready1")):
    pass
time.time = lambda: 1_700_000_000 + real() % 1000 * 1e-4
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    script = str(ROOT / "baselines/mappo_local_lbf.py")
    command = [sys.executable, "-c", driver]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen([*command, str(i), script, *map(str, SMALL)], cwd=tmp_path, **quiet) for i in range(2)]
    errors = [process.communicate(timeout=240)[1] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], errors
    first, second = sorted((tmp_path / "runs").iterdir())
    assert second.name == first.name + "_2"
    assert all(len(list(folder.glob("events*"))) == 1 for folder in (first, second))
