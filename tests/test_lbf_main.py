"""What main() does between its functions: seen by spies on them, in what it logs and in what it saves."""

import copy
import inspect
import itertools
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DG_SCRIPTS, load, run_folder, run_inside, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NUM_ENVS, EVAL_EPISODES = 4, 7
SMALL = ["--env-id", "Foraging-5x5-3p-2f-v3", "--no-winner-take-all", "--num-envs", NUM_ENVS]
SMALL += ["--total-timesteps", 600, "--eval-episodes", EVAL_EPISODES, "--eval-interval", 200]
SMALL += ["--checkpoint-interval", 0]


def watch(module, monkeypatch, name, before=lambda: None):
    """Spy on a function of the module -> a list with, for each call: its arguments by name, and its `result`.

    Networks are kept as they were before the call, which may train them.
    """
    original, calls = getattr(module, name), []

    def spy(*args, **kwargs):
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        call = {key: copy.deepcopy(x) if isinstance(x, torch.nn.Module) else x for key, x in bound.items()}
        before()
        calls.append(SimpleNamespace(**call, result=original(*args, **kwargs)))
        return calls[-1].result

    monkeypatch.setattr(module, name, spy)
    return calls


def play(module, cwd, *options):
    """Run main() of the module with small settings -> its run folder."""
    cwd.mkdir(exist_ok=True)
    done = run_inside(module, *SMALL, *options, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return run_folder(cwd)


def episodes(collected, num_envs):
    """What the calls of collect() with so many environments returned."""
    return [call.result for call in collected if len(call.envs) == num_envs]


def logged(folder, tag):
    return [value for _, value in scalars(folder)[tag]]


# SETTINGS
def test_every_adam_has_the_learning_rate_and_the_eps_of_the_options(lbf_script, tmp_path):
    """As the checkpoint has them: policy, critic and, where there is a graph, its models."""
    folder = play(load(lbf_script), tmp_path, "--learning-rate", 0.003, "--adam-eps", 1e-7, "--save-model")
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    names = ["actor", "critic", "models"] if lbf_script in DG_SCRIPTS else ["actor", "critic"]
    for name in names:
        optimizer = checkpoint[f"{name}_optimizer"]
        (group,) = optimizer["param_groups"]
        assert (group["lr"], group["eps"], group["betas"], group["weight_decay"]) == (0.003, 1e-7, (0.9, 0.999), 0)
        assert len(optimizer["state"]) == len(checkpoint[name])  # no weight is left out
    assert set(logged(folder, "charts/learning_rate")) == {np.float32(0.003)}


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_determinism_flag_reaches_pytorch_on_a_gpu(lbf_script, deterministic, monkeypatch):
    """There alone: it costs seconds at the start, and what is used on a CPU is deterministic anyway."""
    module, chosen = load(lbf_script), []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", chosen.append)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = module.Args(torch_deterministic=deterministic)
    assert module.choose_device(args).type == "cpu" and chosen == []
    args.cuda = True
    assert module.choose_device(args).type == "cuda" and chosen == [deterministic]
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_the_threads_reach_pytorch(lbf_script, tmp_path, monkeypatch):
    module, threads = load(lbf_script), []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)  # two real ones would wait for a second core
    play(module, tmp_path, "--num-threads", 2, "--total-timesteps", 200)
    assert threads == [2]


def seek_food(obs):
    """Logits of a policy that walks to the one food and loads it; obs (..., 9) of two agents."""
    rows, cols = (obs[..., :2] - obs[..., 3:5]).unbind(-1)
    beside = rows.abs() + cols.abs() == 1
    return 2 * torch.stack(
        [0 * rows, -rows, rows, -cols, cols, 5.0 * beside], -1
    )  # none, north, south, west, east, load


@pytest.mark.parametrize("flag", ["--winner-take-all", "--no-winner-take-all"])
def test_training_and_evaluation_play_the_same_game(lbf_script, flag, tmp_path, monkeypatch):
    """One food that needs both agents: winner-take-all pays one of them, the package's game both."""
    module, paid = load(lbf_script), {NUM_ENVS: [], EVAL_EPISODES: []}
    original = module.collect

    def collect(envs, actor, *args, **kwargs):
        data = original(envs, seek_food, *args, **kwargs)
        paid[len(envs)] += (data[3] > 0).sum(-1)[data[3].any(-1)].tolist()
        return data

    monkeypatch.setattr(module, "collect", collect)
    play(module, tmp_path, "--env-id", "Foraging-5x5-2p-1f-coop-v3", flag, "--total-timesteps", 200)
    for rewarded in paid.values():
        assert len(rewarded) >= 4 and set(rewarded) == {1 if flag == "--winner-take-all" else 2}


def test_the_settings_are_logged(lbf_script, tmp_path):
    """A table with every option, of the run as it was started."""
    folder = play(load(lbf_script), tmp_path, "--gamma", 0.875)
    events = EventAccumulator(str(folder)).Reload()
    (event,) = events.Tensors("hyperparameters/text_summary")
    (text,) = event.tensor_proto.string_val
    lines = text.decode().splitlines()
    assert "|gamma|0.875|" in lines and "|num_envs|4|" in lines
    assert [line.split("|")[1] for line in lines[2:]] == list(vars(load(lbf_script).Args()))


def test_hidden_dim_is_the_width_of_policy_and_critic(lbf_script, tmp_path):
    folder = play(load(lbf_script), tmp_path, "--hidden-dim", 24, "--save-model", "--total-timesteps", 200)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    for name in ("actor", "critic"):
        assert checkpoint[name]["hidden.weight"].shape == (24, 24)


# EVALUATION
def test_every_evaluation_and_every_training_episode_plays_a_board_of_its_own(lbf_script, tmp_path, monkeypatch):
    """The same ones again for the same seed, none of them for another seed."""
    module, played = load(lbf_script), []
    for run, seed in enumerate((1, 1, 2)):
        with monkeypatch.context() as patch:
            collected = watch(module, patch, "collect")
            play(module, tmp_path / str(run), "--env-id", "Foraging-8x8-3p-2f-v3", "--seed", seed)
        evaluated, trained = (
            [[tuple(board.flatten().tolist()) for board in data[0][0]] for data in episodes(collected, number)]
            for number in (EVAL_EPISODES, NUM_ENVS)
        )
        assert len(evaluated) >= 4 and len(trained) >= 3
        boards = list(itertools.chain(*evaluated, *trained))
        assert len(set(boards)) == len(boards)
        played.append(boards)
    assert played[0] == played[1] and not set(played[0]) & set(played[2])


def test_evaluations_are_logged_as_they_were_played(lbf_script, tmp_path, monkeypatch):
    """Mean and standard deviation of the team's return, and each agent's mean, over the episodes."""
    module = load(lbf_script)
    collected = watch(module, monkeypatch, "collect")
    folder = play(module, tmp_path)
    returns = [data[3].sum(0).double() for data in episodes(collected, EVAL_EPISODES)]  # (episodes, N)
    team = [x.sum(-1) for x in returns]
    assert logged(folder, "eval/episodic_return") == pytest.approx([x.mean().item() for x in team], abs=1e-6)
    spread = [x.std(correction=0).item() for x in team]
    assert logged(folder, "eval/episodic_return_std") == pytest.approx(spread, abs=1e-6) and max(spread) > 0.1
    for i in range(3):
        means = [x[:, i].mean().item() for x in returns]
        assert logged(folder, f"eval/episodic_return_agent_{i}") == pytest.approx(means, abs=1e-6)


def test_an_evaluation_says_when_it_was_due(lbf_script):
    """At a multiple of the interval, or at the end, which a run passes by a few frames."""
    module = load(lbf_script)
    args = module.Args(eval_interval=100, total_timesteps=350)
    rows = [module.evaluation_row(torch.ones(2, 3), step, args) for step in (0, 100, 199, 349, 350, 380)]
    assert [row["nominal_step"] for row in rows] == [0, 100, 100, 300, 350, 350]
    assert [row["evaluation"] for row in rows] == [0, 1, 1, 3, 3, 3]


# TRAINING
@pytest.mark.parametrize("options", [[], ["--gamma", 0.8, "--gae-lambda", 0.6]], ids=["default", "other"])
def test_what_the_update_learns_from(lbf_script, options, tmp_path, monkeypatch):
    """The steps that took place; advantages and the critic's target from the values before the update.

    The target ignores the graph; with the complete graph DG's advantages are the team's.
    """
    module = load(lbf_script)
    collected, updates = (watch(module, monkeypatch, name) for name in ("collect", "ppo_update"))
    dg = lbf_script in DG_SCRIPTS
    play(module, tmp_path, *options, *(["--graph", "complete", "--no-soft"] if dg else []))
    discounts = (0.8, 0.6) if options else (0.99, 0.95)
    trained = episodes(collected, NUM_ENVS)
    assert len(updates) == len(trained) >= 3
    for update, (obs, actions, logprobs, rewards, terminated, alive) in zip(updates, trained):
        with torch.no_grad():
            values = update.critic(obs)
        rewards = rewards.sum(-1, keepdim=True).expand_as(rewards) if "global" in lbf_script else rewards
        own = module.gae(rewards, values, terminated, alive, *discounts)
        advantages = own.sum(-1, keepdim=True).expand_as(own) if dg else own
        for name, expected in (("obs", obs[:-1]), ("actions", actions), ("logprobs", logprobs)):
            assert torch.equal(getattr(update.batch, name), expected[alive]), name
        torch.testing.assert_close(update.batch.value_targets, (own + values[:-1])[alive])
        torch.testing.assert_close(update.batch.advantages, advantages[alive], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(update.batch.advantages, update.batch.value_targets)


def test_explained_variance_is_that_of_the_values_before_the_update(lbf_script, tmp_path, monkeypatch):
    module = load(lbf_script)
    updates = watch(module, monkeypatch, "ppo_update")
    folder = play(module, tmp_path)
    expected = []
    for update in updates:
        with torch.no_grad():
            unexplained = (update.batch.value_targets - update.critic(update.batch.obs)).double()
        expected.append(1 - (unexplained.var() / update.batch.value_targets.double().var()).item())
    assert logged(folder, "losses/explained_variance") == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert any(abs(value) > 0.05 for value in expected)


def test_training_episodes_are_logged_as_they_were_played(lbf_script, tmp_path, monkeypatch):
    module = load(lbf_script)
    collected = watch(module, monkeypatch, "collect")
    folder = play(module, tmp_path)
    trained = episodes(collected, NUM_ENVS)
    frames = list(itertools.accumulate(int(data[5].sum()) for data in trained))
    assert [step for step, _ in scalars(folder)["charts/episodic_return"]] == frames
    means = torch.stack([data[3].sum(0).mean(0) for data in trained])  # (iterations, N)
    assert logged(folder, "charts/episodic_return") == pytest.approx(means.sum(-1).tolist(), abs=1e-6)
    for i in range(3):
        assert logged(folder, f"charts/episodic_return_agent_{i}") == pytest.approx(means[:, i].tolist(), abs=1e-6)
    lengths = [data[5].sum().item() / NUM_ENVS for data in trained]
    assert logged(folder, "charts/episodic_length") == pytest.approx(lengths)


@pytest.mark.parametrize("graph", ["learned", "oracle"])
def test_the_oracle_looks_at_the_positions_after_the_step(dg_script, graph, tmp_path, monkeypatch):
    """As the next step's observations show them: in the graph that is used and in the charts of its quality."""
    module = load(dg_script)
    collected, credited = (watch(module, monkeypatch, name) for name in ("collect", "multi_agent_gae"))
    options = ["--env-id", "Foraging-8x8-5p-2f-v3", "--oracle-distance", 4]
    folder = play(module, tmp_path, *options, "--graph", graph, *(["--c", 1] if graph == "learned" else []))
    shown = {name: logged(folder, f"graph/oracle_{name}") for name in ("precision", "recall")}
    differ = 0
    for iteration, ((obs, *_, alive), call) in enumerate(zip(episodes(collected, NUM_ENVS), credited)):
        own_cells = obs[..., 3 * 2 : 3 * 2 + 2]  # behind row, column and level of two foods
        before, after = (oracle(own_cells[window][alive]) for window in (slice(None, -1), slice(1, None)))
        differ += int((before != after).sum())
        used, others = call.graph[alive], ~torch.eye(5, dtype=torch.bool)
        if graph == "oracle":
            assert torch.equal(used, after)
        hits = (used & after & others).sum().item()
        assert shown["precision"][iteration] == pytest.approx(hits / (used & others).sum().item())
        assert shown["recall"][iteration] == pytest.approx(hits / (after & others).sum().item())
    assert differ > 100


def oracle(cells, distance=4, nearest=3):
    """The oracle graph as loops: cells (B, N, 2) -> (B, N_i, N_j)."""
    graph = torch.zeros(len(cells), 5, 5, dtype=torch.bool)
    for b, positions in enumerate(cells.int().tolist()):
        for i, (row, col) in enumerate(positions):
            far = [abs(r - row) + abs(c - col) for r, c in positions]
            for j in sorted(range(5), key=lambda j: (far[j], j))[:nearest]:
                graph[b, i, j] = far[j] <= distance
    return graph


# CHECKPOINTS
def test_checkpoints_are_written_when_they_are_due(lbf_script, tmp_path, monkeypatch):
    """After the first iteration, after the first one at or past each multiple of the interval, and at the end."""
    saved, rename = [], os.replace

    def replace(source, target):
        rename(source, target)
        if str(target).endswith("checkpoint.pt"):
            saved.append(torch.load(target, weights_only=True)["global_step"])

    monkeypatch.setattr(os, "replace", replace)
    folder = play(load(lbf_script), tmp_path, "--total-timesteps", 2100, "--checkpoint-interval", 500)
    frames = [step for step, _ in scalars(folder)["losses/entropy"]]
    multiples = itertools.pairwise([0, *frames])
    due = [after for before, after in multiples if after // 500 > before // 500]
    assert saved == sorted({frames[0], *due, frames[-1]}) and len(saved) < len(frames)


def test_when_a_checkpoint_is_due(lbf_script):
    """Where none is saved, and as soon as a multiple of the interval is reached; the end has one of its own."""
    module = load(lbf_script)
    args = module.Args(checkpoint_interval=100, total_timesteps=1000)
    steps = [(None, 40), (40, 99), (40, 100), (100, 199), (100, 200), (100, 350), (900, 999), (900, 1000), (900, 1010)]
    due = [module.checkpoint_is_due(saved_step, global_step, args) for saved_step, global_step in steps]
    assert due == [True, False, True, False, True, True, False, False, False]
    args.checkpoint_interval = 0
    assert not any(module.checkpoint_is_due(saved_step, global_step, args) for saved_step, global_step in steps)


# SPEED
def test_frames_per_second_count_from_the_start_of_the_process(lbf_script, tmp_path, monkeypatch):
    """A resumed run does not claim the frames of the processes before it. Here each iteration takes a second."""
    module, clock = load(lbf_script), [1_700_000_000.0]
    now = lambda: clock[0]  # noqa: E731
    fake = SimpleNamespace(**vars(time) | {name: now for name in ("time", "monotonic", "perf_counter")})
    original = module.collect

    def collect(envs, *args, **kwargs):
        clock[0] += len(envs) == NUM_ENVS  # an evaluation takes no time
        return original(envs, *args, **kwargs)

    monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(module, "collect", collect)
    folder = play(module, tmp_path, "--save-model")
    first = scalars(folder)["charts/SPS"]
    assert len(first) >= 3
    end = first[-1][0]
    (resumed := tmp_path / "resumed").mkdir()
    (folder / "checkpoint.pt").rename(resumed / "checkpoint.pt")
    options = ["--resume", resumed / "checkpoint.pt", "--total-timesteps", 1200]
    assert run_inside(module, *options, cwd=tmp_path).returncode == 0
    second = scalars(resumed)["charts/SPS"]
    assert len(second) >= 3 and second[0][0] > end
    for start, curve in ((0, first), (end, second)):
        for seconds, (frames, speed) in enumerate(curve, start=1):
            assert speed == pytest.approx((frames - start) / seconds)
