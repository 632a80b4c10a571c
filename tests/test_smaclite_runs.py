"""The SMAClite scripts as subprocesses: what they write, resume, signals, a worker that dies. Needs smaclite."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load, run, run_folder, run_inside
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = pytest.mark.smaclite

SCRIPTS = ["mappo_dg_smaclite.py", "baselines/mappo_local_smaclite.py", "baselines/mappo_global_smaclite.py"]
SHORT = [
    "--env-id",
    "2s_vs_1sc",
    "--num-envs",
    2,
    "--total-timesteps",
    900,
    "--eval-episodes",
    2,
    "--eval-interval",
    400,
]


def start(script, *options, cwd):
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=240):
    """Poll until condition() holds while the process lives."""
    end = time.time() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.time() < end, "waited too long"
        time.sleep(0.02)


def checkpoints(folder):
    return list(Path(folder).glob("runs/*/checkpoint.pt"))


def result(folder):
    """evaluations.csv as text, and the final weights."""
    (run_folder,) = Path(folder).glob("runs/*")
    state = torch.load(run_folder / "checkpoint.pt", weights_only=True)
    weights = {f"{part}.{k}": v for part in ("actor", "critic", "models") for k, v in state.get(part, {}).items()}
    return (run_folder / "evaluations.csv").read_text(), weights


def assert_same(a, b):
    assert a[0] == b[0] and a[1].keys() == b[1].keys()
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_run_gives(script, tmp_path):
    run(script, *SHORT, cwd=tmp_path)
    (folder,) = tmp_path.glob("runs/*")
    events = EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"charts/episodic_return", "charts/win_rate", "charts/SPS", "eval/win_rate", "eval/episodic_return"} <= tags
    assert {"eval/greedy_win_rate", "eval/greedy_episodic_return"} <= tags
    assert {"losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/explained_variance"} <= tags
    assert ("graph/edges_per_agent" in tags) == ("losses/reverse_model_accuracy_others" in tags) == ("_dg_" in script)
    assert all(event.value == pytest.approx(1, abs=1e-4) for event in events.Scalars("losses/first_ratio"))
    rows = list(csv.DictReader(open(folder / "evaluations.csv")))
    assert list(rows[0])[:3] == ["global_step", "evaluation", "nominal_step"]
    assert list(rows[0])[3:7] == ["episodic_return", "episodic_return_std", "episodes", "win_rate"]
    greedy = ["greedy_episodic_return", "greedy_episodic_return_std", "greedy_win_rate"]
    assert list(rows[0])[7:10] == greedy
    assert int(rows[0]["global_step"]) == 0 and int(rows[-1]["global_step"]) >= 900
    for row in rows:
        agents = [float(row[f"episodic_return_agent_{i}"]) for i in range(2)]
        assert float(row["episodic_return"]) == pytest.approx(sum(agents), abs=1e-4)
        assert 0 <= float(row["win_rate"]) <= 1 and 0 <= float(row["greedy_win_rate"]) <= 1 and row["episodes"] == "1"


def test_deaths_are_counted_while_games_last(tmp_path, monkeypatch):
    """charts/deaths: agents that lived and died before their game's last step, per game; padding is no death."""
    module, counts = load(SCRIPTS[1]), []
    collect = module.collect

    def recorded(*args):
        rollout = collect(*args)
        active, alive = rollout[3].tolist(), rollout[8].tolist()  # (T, E, N), (T, E)
        games = range(len(alive[0]))
        lengths = [sum(step[e] for step in alive) for e in games]
        counts.append(sum(not living for e in games for living in active[lengths[e] - 1][e]) / len(games))
        return rollout

    with monkeypatch.context() as patch:
        patch.setattr(module, "collect", recorded)
        options = ["--env-id", "3s_vs_5z", "--num-envs", 3, "--total-timesteps", 450, "--eval-episodes", 3]
        done = run_inside(module, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(run_folder(tmp_path))).Reload()
    logged = [event.value for event in events.Scalars("charts/deaths")]
    assert logged == pytest.approx(counts[2 : 2 + len(logged)]) and max(logged) > 0  # the first are an evaluation's


def test_a_killed_run_resumes_exactly(tmp_path):
    """SIGKILL after a checkpoint, then --resume: the same weights and evaluations, with fewer workers too."""
    options = [*SHORT, "--checkpoint-interval", 100]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    run(SCRIPTS[0], *options, cwd=whole)
    process = start(SCRIPTS[0], *options, cwd=killed)
    wait_for(lambda: checkpoints(killed), process)
    first = checkpoints(killed)[0].stat().st_mtime_ns
    wait_for(lambda: checkpoints(killed)[0].stat().st_mtime_ns != first, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert torch.load(checkpoints(killed)[0], weights_only=True)["global_step"] < 900
    run(SCRIPTS[0], "--resume", checkpoints(killed)[0], "--num-workers", 1, cwd=killed)
    assert_same(result(whole), result(killed))


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_first(signum, status, tmp_path):
    process = start(SCRIPTS[1], *SHORT, "--checkpoint-interval", 0, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/*/evaluations.csv")), process)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == status, stderr[-2000:]
    assert "Traceback" not in stderr
    assert checkpoints(tmp_path)


def children(process):
    """The environments' processes."""
    listing = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listing.split()]


def test_a_dead_worker_ends_the_run_with_its_checkpoint(tmp_path):
    """No hang: a clear message, exit status 1, no process left, and a whole checkpoint."""
    process = start(SCRIPTS[1], *SHORT, "--total-timesteps", 4000, "--checkpoint-interval", 100, cwd=tmp_path)
    wait_for(lambda: checkpoints(tmp_path), process)
    workers = children(process)
    assert len(workers) >= 2
    os.kill(workers[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "an environment's process is gone" in stderr and "Traceback" not in stderr
    time.sleep(1)
    for pid in workers:
        assert not os.path.exists(f"/proc/{pid}") or "Z" in open(f"/proc/{pid}/stat").read().split()[2]
    assert torch.load(checkpoints(tmp_path)[0], weights_only=True)["script"] == "mappo_local_smaclite"


def test_bad_input(tmp_path):
    done = run(SCRIPTS[0], "--env-id", "2s3y", cwd=tmp_path, check=False)
    assert done.returncode == 2 and "2s3z" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    done = run(SCRIPTS[0], "--total-timesteps", 1000, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "1500" in done.stderr
    assert not (tmp_path / "runs").exists()
