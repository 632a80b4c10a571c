"""Star-spread against a plain loop over environments and agents, its graphs and credit, and runs of every method."""

import csv
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load, run, run_folder, run_inside, scalars

sys.path.insert(0, str(ROOT / "experiments"))  # for errors.py
spread = load("experiments/spread.py")

# What main() may call besides the defaults: the name of the run's folder, and the options.
CREDITS = {f"{credit}": ("--credit", credit) for credit in ("dg", "local", "global")}
CREDITS |= {"dg_learned": ("--graph", "learned"), "dg_pairwise": ("--advantage", "pairwise")}
CREDITS |= {"dg_learned_pairwise": ("--graph", "learned", "--advantage", "pairwise")}


def test_the_defaults_are_the_authors_settings():
    args = spread.Args()
    assert (args.hidden_dim, args.ent_coef, args.norm_adv, args.norm_reward) == (64, 0.01, True, True)
    assert (args.credit, args.graph, args.advantage, args.c, args.soft) == ("dg", "known", "published", 0.9, True)


def landmarks(N):
    return [(0.7 * math.cos(2 * math.pi * k / N), 0.7 * math.sin(2 * math.pi * k / N)) for k in range(N)]


def loop_rewards(positions):
    """The definition, for one environment: positions, a list of N points -> N rewards without noise."""
    marks = landmarks(len(positions))
    rewards = [-min(math.dist(point, mark) for mark in marks) for point in positions]
    rewards[0] = -sum(min(math.dist(point, mark) for point in positions) for mark in marks)
    return rewards


def loop_observation(positions, i):
    """Own position, all landmarks, then all agents for the hub, as many zeros for a leaf."""
    others = positions if i == 0 else [(0.0, 0.0)] * len(positions)
    return [x for point in (positions[i], *landmarks(len(positions)), *others) for x in point]


@pytest.mark.parametrize("N, E, step", [(2, 1, 0.1), (5, 3, 0.1), (30, 1, 0.1), (31, 1, 0.05)])
def test_the_environment_is_the_loop(N, E, step):
    env, rng = spread.StarSpread(N, E, seed=3, noise=0.0), np.random.default_rng(0)
    obs = env.reset()
    assert obs.shape == (E, N, 4 * N + 2) == (E, N, env.D) and obs.dtype == np.float32
    positions = env.positions.tolist()
    displacement = [(0, 0), (-step, 0), (step, 0), (0, -step), (0, step)]
    for _ in range(env.episode_length):
        expected = [[loop_observation(points, i) for i in range(N)] for points in positions]
        np.testing.assert_allclose(obs, expected, atol=1e-6)
        actions = rng.integers(env.A, size=(E, N))
        for e in range(E):
            for i in range(N):
                dx, dy = displacement[actions[e, i]]
                x, y = positions[e][i]
                positions[e][i] = (min(max(x + dx, -1), 1), min(max(y + dy, -1), 1))
        obs, rewards = env.step(actions)
        np.testing.assert_allclose(rewards, [loop_rewards(points) for points in positions], atol=1e-9)


def test_nobody_leaves_the_square():
    """At the border a move along it goes on, one across it stops: 40 steps lead from anywhere to any corner."""
    N = 31
    env = spread.StarSpread(N, 2, seed=1)
    env.reset()
    for action, xy, border in ((1, 0, -1), (4, 1, 1), (2, 0, 1), (3, 1, -1)):
        before = env.positions[..., 1 - xy].copy()
        for _ in range(41):
            obs, _ = env.step(np.full((2, N), action))
        assert (env.positions[..., xy] == border).all() and (env.positions[..., 1 - xy] == before).all()
        assert (obs[..., xy] == border).all() and np.abs(obs).max() <= 1


def test_starts_landmarks_and_noise():
    env = spread.StarSpread(7, 2000, seed=1)
    np.testing.assert_allclose(np.linalg.norm(env.landmarks, axis=-1), 0.7)
    np.testing.assert_allclose(
        np.linalg.norm(env.landmarks - np.roll(env.landmarks, 1, 0), axis=-1), 1.4 * math.sin(math.pi / 7)
    )
    env.reset()
    assert (np.abs(env.positions) <= 1).all() and np.abs(env.positions.mean((0, 1))).max() < 0.03
    np.testing.assert_allclose(env.positions.std((0, 1)), 3**-0.5, rtol=0.03)
    _, rewards = env.step(np.zeros((2000, 7), dtype=int))
    noise = rewards - [loop_rewards(points) for points in env.positions.tolist()]
    np.testing.assert_allclose(noise.mean(0), 0, atol=0.1)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(7), atol=0.15)  # N(0, 1), each agent's own
    first, again, other = (spread.StarSpread(3, 2, seed).reset() for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_whom_an_agent_influences():
    """The known graph by experiment: moving agent i changes the rewards of the hub and of i, of nobody else."""
    N = 6
    graph = spread.known_graph(N)
    assert graph[:, 0].all() and graph.diagonal().all() and graph.sum() == 2 * N - 1  # row: influencer
    influence = torch.eye(N, dtype=torch.bool)
    for seed in range(50):
        for i in range(N):
            still, moved = (spread.StarSpread(N, 1, seed) for _ in range(2))
            still.reset(), moved.reset()
            actions = np.zeros((1, N), dtype=int)
            rewards = still.step(actions)[1]
            actions[0, i] = 1
            influence[i] |= torch.from_numpy(moved.step(actions)[1] != rewards)[0]
    assert torch.equal(influence, graph)


def test_credit_of_the_known_graph():
    """A leaf's advantage counts its own and the hub's TD errors, the hub's its own alone."""
    T, E, N = 10, 2, 4
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn((T, E, N), generator=g), torch.randn((T + 1, E, N), generator=g)
    alive = torch.ones((T, E), dtype=torch.bool)
    experience = rewards, values, ~alive, alive
    own = spread.gae(*experience, 0.99, 0.95)
    graph = spread.known_graph(N).expand(T, E, N, N)
    hard = spread.multi_agent_gae(*experience, graph, 0.99, 0.95, soft=False)
    torch.testing.assert_close(hard[..., 0], own[..., 0])
    torch.testing.assert_close(hard[..., 1:], own[..., 1:] + own[..., :1])
    torch.testing.assert_close(  # the cut after 50 steps is no terminal state
        own[-1], rewards[-1] + 0.99 * values[-1] - values[-2]
    )


def test_standardisation_is_that_of_all_rewards_so_far_and_of_all_agents():
    standardise, batches = spread.RunningStandardisation(), []
    for k in range(5):
        batches.append(torch.randn((4, 2, 3)) * torch.tensor([1.0, 5.0, 0.5]) + k)
        seen = torch.stack(batches).double()
        expected = (batches[-1] - seen.mean()) / seen.std(correction=0)
        torch.testing.assert_close(standardise(batches[-1]), expected.float(), rtol=1e-3, atol=1e-3)
    assert standardise(torch.ones((4, 2, 3))).isfinite().all()


def test_one_scale_keeps_the_weights_of_the_agents_in_the_teams_reward():
    """The sums over agents of two steps differ by the same factor as the standardised ones."""
    standardise = spread.RunningStandardisation()
    rewards = torch.randn((50, 10, 4)) * torch.tensor([8.0, 1.0, 1.0, 1.0])
    team, standardised = rewards.sum(-1).flatten(), standardise(rewards).sum(-1).flatten()
    assert torch.corrcoef(torch.stack([team, standardised]))[0, 1] == pytest.approx(1, abs=1e-5)


def test_what_the_critics_see():
    env = spread.StarSpread(4, 3)
    obs = torch.from_numpy(env.reset()).requires_grad_()
    for algorithm, seen in (("mappo", {0}), ("ippo", {2})):
        _, critic = spread.make_networks(spread.Args(algorithm=algorithm), env)
        values = critic(obs)
        assert values.shape == (3, 4)
        (gradient,) = torch.autograd.grad(values[1, 2], obs)
        assert {int(i) for i in gradient[1].abs().sum(-1).nonzero()} == seen  # the hub's observation is the state
        assert (gradient[0] == 0).all() and (gradient[2] == 0).all()
    state = torch.cat([torch.from_numpy(env.landmarks.ravel()), torch.from_numpy(env.positions[1].ravel())])
    torch.testing.assert_close(obs[1, 0, 2:].detach(), state.float())


def test_a_pair_has_a_value_of_what_the_first_agent_sees():
    env = spread.StarSpread(4, 3)
    obs = torch.from_numpy(env.reset()).requires_grad_()
    for algorithm, seen in (("mappo", {0}), ("ippo", {2})):
        _, critic = spread.make_networks(spread.Args(algorithm=algorithm, advantage="pairwise"), env)
        values = critic(obs)
        assert values.shape == (3, 4, 4) and len(values[1, 2].unique()) == 4
        (gradient,) = torch.autograd.grad(values[1, 2, 3], obs)
        assert {int(i) for i in gradient[1].abs().sum(-1).nonzero()} == seen


# THE PAIRWISE ADVANTAGE
def random_experience(T=10, E=2, N=4):
    g = torch.Generator().manual_seed(0)
    return torch.randn((T, E, N), generator=g), torch.randn((T + 1, E, N), generator=g)


def of_pairs(graph, values):
    """W[i, j] = V^j where i influences j, else 0; graph (N, N), values (T+1, E, N)."""
    return values.unsqueeze(-2) * graph


def test_pairwise_with_the_known_graph_is_the_published_one_where_the_values_are_those_of_the_influenced():
    """All edges are there from the start: what differs are the baselines of the pairs, which are learned."""
    rewards, values = random_experience()
    known = spread.known_graph(4)
    graph = known.expand(*rewards.shape, 4)
    pairwise = spread.Args(advantage="pairwise")
    result, targets = spread.credit(pairwise, rewards, of_pairs(known, values), graph)
    expected, own_targets = spread.credit(spread.Args(soft=False), rewards, values, graph)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(targets, of_pairs(known, own_targets))


@pytest.mark.parametrize("edges, credit", [("complete", "global"), ("identity", "local")])
def test_the_limits_of_pairwise_are_global_and_local_rewards(edges, credit):
    rewards, values = random_experience()
    graph = torch.ones((4, 4), dtype=torch.bool) if edges == "complete" else torch.eye(4, dtype=torch.bool)
    pair_values = of_pairs(graph, values)
    result, targets = spread.credit(
        spread.Args(advantage="pairwise"), rewards, pair_values, graph.expand(*rewards.shape, 4)
    )
    if credit == "global":  # the value of the team's reward is the sum of all values
        rewards, values = (x.sum(-1, keepdim=True).expand_as(x) for x in (rewards, values))
    expected, team_targets = spread.credit(spread.Args(credit=credit), rewards, values, None)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(targets.sum(-1), team_targets)


# RUNS
def options(*more):
    return "--num-envs", 4, "--total-timesteps", 600, "--eval-interval", 400, "--eval-episodes", 6, *more


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
@pytest.mark.parametrize("credit", CREDITS)
def test_a_short_run(tmp_path, algorithm, credit):
    method = "--algorithm", algorithm, *CREDITS[credit], "--env-id", "star-spread-3"
    done = run_inside(spread, *options(*method), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = run_folder(tmp_path)
    assert folder.name.startswith(f"star-spread-3__spread_{algorithm}_{credit}__1__")
    rows = list(csv.DictReader(open(folder / "evaluations.csv", encoding="utf-8")))
    assert [int(row["global_step"]) for row in rows] == [0, 400, 600] and rows[0]["episodes"] == "6"
    assert list(rows[0])[:4] == ["global_step", "evaluation", "nominal_step", "episodic_return"]
    assert [(row["evaluation"], row["nominal_step"]) for row in rows] == [("0", "0"), ("1", "400"), ("1", "600")]
    for row in rows:
        agents = sum(float(row[f"episodic_return_agent_{i}"]) for i in range(3))
        assert (
            agents == pytest.approx(float(row["episodic_return"]), rel=1e-4) and agents < -20
        )  # raw, not standardised
    logged = scalars(folder)
    assert [step for step, _ in logged["charts/hub_return"]] == [200, 400, 600]
    assert all(value == pytest.approx(1, abs=1e-4) for _, value in logged["losses/first_ratio"])
    of_the_graph = {name for name in logged if name.startswith("graph/")}
    assert bool(of_the_graph) == ("learned" in credit) == ("losses/reverse_model_loss" in logged)
    assert {"graph/edges_per_agent", "graph/oracle_recall"} <= of_the_graph or not of_the_graph


@pytest.mark.parametrize("credit", CREDITS)
def test_what_each_credit_trains_on(tmp_path, monkeypatch, credit):
    """The rewards that `main` gives to gae, the graph, and whose advantages and targets reach ppo_update."""
    calls = {}

    def spied(name):
        function = getattr(spread, name)

        def spy(*inputs, **settings):
            output = function(*inputs, **settings)
            if name not in calls or "gae" not in calls:  # of the first iteration: evaluate, too, calls collect
                calls[name] = inputs, output
            return output

        monkeypatch.setattr(spread, name, spy)

    for name in ("collect", "learned_graph", "gae", "multi_agent_gae", "pairwise_targets", "ppo_update"):
        spied(name)
    method = *CREDITS[credit], "--no-norm-reward", "--env-id", "star-spread-3"
    if "learned" in credit:
        method += "--c", 0.999
    done = run_inside(spread, *options(*method), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    raw = calls["collect"][1][3]  # (T, E, N)
    team = raw.sum(-1, keepdim=True).expand_as(raw)
    assert torch.equal(calls["gae"][0][0], team if credit == "global" else raw)
    batch = calls["ppo_update"][0][4]
    pairwise = "pairwise" in credit
    if pairwise:
        (_, pair_values, *_), targets = calls["pairwise_targets"]
        assert torch.equal(batch.value_targets, targets.flatten(0, 1))
        assert torch.equal(batch.advantages, (targets - pair_values[:-1]).sum(-1).flatten(0, 1))
    else:
        source = "multi_agent_gae" if credit.startswith("dg") else "gae"
        assert torch.equal(batch.advantages, calls[source][1].flatten(0, 1))
        values = calls["gae"][0][1][:-1]
        assert torch.equal(batch.value_targets, (calls["gae"][1] + values).flatten(0, 1))
    assert ("multi_agent_gae" in calls, "pairwise_targets" in calls) == (credit in ("dg", "dg_learned"), pairwise)
    if credit.startswith("dg"):
        known = spread.known_graph(3).expand(*raw.shape, 3)
        used = calls["pairwise_targets" if pairwise else "multi_agent_gae"][0][4]
        if "learned" in credit:
            learned = calls["learned_graph"][1][0].view_as(used)
            assert torch.equal(used, learned) and (learned != known).any() and not learned.all()
        else:
            assert torch.equal(used, known) and "learned_graph" not in calls


def test_the_graph_models_learn_after_the_graph_is_made(tmp_path, monkeypatch):
    """Once an iteration, on its actions; the graph is that of the models as they were."""
    order, actions, collect = [], [], spread.collect
    for name in ("learned_graph", "ppo_update", "update_graph_models"):
        function = getattr(spread, name)

        def spy(*inputs, name=name, function=function):
            order.append(name)
            if name == "update_graph_models":
                actions.append(inputs[1])
            return function(*inputs)

        monkeypatch.setattr(spread, name, spy)
    played = []
    monkeypatch.setattr(spread, "collect", lambda *inputs: played.append(collect(*inputs)) or played[-1])
    assert run_inside(spread, *options("--graph", "learned"), cwd=tmp_path).returncode == 0
    assert order == 3 * ["learned_graph", "ppo_update", "update_graph_models"]
    batches = [batch[1].flatten(0, 1) for batch in played]
    assert all(any(torch.equal(used, batch) for batch in batches) for used in actions)


@pytest.mark.parametrize("credit", ["dg", "dg_learned", "dg_learned_pairwise"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, credit):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    assert run_inside(spread, *options(*CREDITS[credit]), cwd=tmp_path / "whole").returncode == 0
    update, calls = spread.ppo_update, []

    def interrupted(*inputs):
        calls.append(1)
        return update(*inputs) if len(calls) < 3 else spread.gradient_step(None, None, None)

    with monkeypatch.context() as patch:
        patch.setattr(spread, "ppo_update", interrupted)
        with pytest.raises(AttributeError):  # a crash in the third iteration, after the checkpoint of the second
            run_inside(spread, *options(*CREDITS[credit], "--checkpoint-interval", 200), cwd=tmp_path / "parts")
    folder = run_folder(tmp_path / "parts")
    assert torch.load(folder / "checkpoint.pt")["global_step"] == 400
    done = run_inside(spread, *options("--resume", folder / "checkpoint.pt"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    whole, parts = (run_folder(tmp_path / name) for name in ("whole", "parts"))
    assert (whole / "evaluations.csv").read_text(encoding="utf-8") == (parts / "evaluations.csv").read_text(
        encoding="utf-8"
    )
    ends = [torch.load(path / "checkpoint.pt") for path in (whole, parts)]
    models = ["models", "models_optimizer"] if "learned" in credit else []
    for name in ("actor", "actor_optimizer", "critic", "critic_optimizer", "standardise", *models):
        mine, other = (flattened(end[name]) for end in ends)
        assert mine.keys() == other.keys() and len(mine) > 0
        for key, value in mine.items():
            assert torch.equal(value, other[key]), (name, key)


def flattened(state):
    """The tensors of a state_dict, of an optimizer's, too."""
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
    for index, values in state.get("state", {}).items():
        tensors |= {(index, key): value for key, value in values.items()}
    return tensors


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path):
    """Its evaluations lack two columns: rows of both kinds in one file could not be read."""
    assert run_inside(spread, *options(), cwd=tmp_path).returncode == 0
    path = run_folder(tmp_path) / "checkpoint.pt"
    checkpoint = torch.load(path)
    for row in checkpoint["evaluations"]:
        del row["evaluation"], row["nominal_step"]
    torch.save(checkpoint, path)
    done = run("experiments/spread.py", "--resume", path, "--total-timesteps", 800, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "another version" in done.stderr and done.stderr.count("\n") == 1


def test_dg_learns(tmp_path):
    """40k frames of two agents: the return leaves the level of the untrained policy far behind."""
    done = run_inside(
        spread, "--env-id", "star-spread-2", "--total-timesteps", 40_000, "--learning-rate", 2e-3, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(open(run_folder(tmp_path) / "evaluations.csv", encoding="utf-8")))
    first, last = float(rows[0]["episodic_return"]), float(rows[-1]["episodic_return"])
    assert last > 0.6 * first, (first, last)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (("--env-id", "star-spread-1"), "star-spread-1"),
        (("--env-id", "spread-5"), "spread-5"),
        (("--total-timesteps", 10), "total_timesteps"),
        (("--gamma", 2), "gamma"),
        (("--c", -1), "c must"),
        (("--credit", "local", "--graph", "learned"), "--credit local"),
        (("--credit", "global", "--advantage", "pairwise"), "--credit global"),
        (("--c", 0.5), "c has no effect"),
        (("--advantage", "pairwise", "--no-soft"), "soft has no effect"),
        (("--credit", "local", "--no-soft"), "soft has no effect"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, wrong, words):
    done = run("experiments/spread.py", *wrong, cwd=tmp_path, check=False)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_scale_table(tmp_path):
    done = run("experiments/spread_scale.py", "--num-agents", 3, "--iterations", 1, "--csv", "t.csv", cwd=tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "t.csv", encoding="utf-8")))
    assert [(row["algorithm"], row["N"]) for row in rows] == [("ippo", "3"), ("mappo", "3")]
    assert len(done.stdout.splitlines()) == 3
    for row in rows:
        phases = [float(row[f"{name} ms"]) for name in ("collect", "values", "gae", "multi_agent_gae", "ppo_update")]
        assert min(phases) > 0 and sum(phases) <= float(row["iteration ms"]) + 0.5
        assert float(row["process MB"]) > 50


@pytest.mark.parametrize(
    "wrong, words",
    [
        (("--num-agents", 1), "--num-agents"),
        (("--iterations", 0), "--iterations"),
        (("--csv", "missing/t.csv"), "there is no such folder"),
    ],
)
def test_bad_settings_of_the_scale_are_one_sentence(tmp_path, wrong, words):
    done = run("experiments/spread_scale.py", *wrong, cwd=tmp_path, check=False)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_multi_agent_gae_of_100_agents_stays_under_2_gb():
    code = "import spread_scale; print(spread_scale.measure_memory(100))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "experiments", capture_output=True, text=True)
    assert 20 < float(done.stdout) < 2000, done.stderr  # MB; 20 is the size of the meeting times
