"""collect, evaluate and whole runs of the SMAClite scripts on a fake of the environment: none of this needs smaclite.

What a run did is recorded on the way (see fake_smaclite.py) and compared with the same games played alone.
"""

import collections
import csv
import functools
import os
import signal
import types

import numpy as np
import pytest
import torch
from conftest import load, run_folder, run_inside, scalars
from fake_smaclite import (
    ATTACK,
    HEAL,
    ROLLOUT,
    SMACLITE_SCRIPTS,
    A,
    D,
    FakeGame,
    FakeVectorEnv,
    N,
    S,
    handlers_kept,
    install,
    replay_greedily,
    replays,
    spy,
)
from test_advantages import loop_gae, loop_multi_agent_gae

DG = SMACLITE_SCRIPTS[0]
CPU = torch.device("cpu")
GAMMA, LAMBDA, LEARNING_RATE = 0.9, 0.8, 3e-3
SETTINGS = ["--num-envs", 4, "--total-timesteps", 180, "--hidden-dim", 8, "--seed", 3, "--checkpoint-interval", 50]
SETTINGS += ["--gamma", GAMMA, "--gae-lambda", LAMBDA, "--learning-rate", LEARNING_RATE, "--update-epochs", 2]
SETTINGS += ["--eval-interval", 60, "--eval-episodes", 12]


@pytest.fixture(params=SMACLITE_SCRIPTS)
def script(request):
    return request.param


def play(script, cwd, *options, change=None, status=0):
    """A whole run on the fake, in this process -> the calls that it made; change(module, patch) goes in first."""
    cwd.mkdir(exist_ok=True)
    module = load(script)
    with pytest.MonkeyPatch.context() as patch, handlers_kept():
        install(module, patch)
        if change:
            change(module, patch)
        calls = spy(module, patch)
        done = run_inside(module, *options, cwd=cwd)
    assert done.returncode == status, done.stderr
    return calls


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """script -> (calls, folder) of its run with SETTINGS, which is made once."""

    @functools.cache
    def run(script):
        cwd = tmp_path_factory.mktemp("recorded")
        return play(script, cwd, *SETTINGS), run_folder(cwd)

    return run


def of(calls, name, caller=None):
    return [call for call in calls if call.name == name and call.caller is caller]


def seeds_of(calls):
    """The seeds of the games of these collects, in their order."""
    return [int(seed) for call in calls if call.name == "collect" for seed in call.given["seeds"]]


def evaluations_of(calls):
    """(policy, seeds of the games) of each evaluation of a run."""
    return [(call.given["actor"], seeds_of(of(calls, "collect", call))) for call in of(calls, "evaluate")]


def evaluated_at(folder):
    """The frames at which evaluations are on paper."""
    return [int(row["global_step"]) for row in csv.DictReader(open(folder / "evaluations.csv"))]


def rollout_of(result, seeds):
    """The results of a collect by name, and its games played alone."""
    rollout = types.SimpleNamespace(**dict(zip(ROLLOUT, result, strict=True)))
    rollout.games = replays(seeds, rollout.actions)
    return rollout


def actions_of(calls):
    """What was done in these collects."""
    return [dict(zip(ROLLOUT, call.result, strict=True))["actions"].tolist() for call in calls]


def batch_of(call):
    """What an update was given, by name."""
    rollout = call.given["rollout"]
    names = ("avail", "active", "alive", "actions", "logprobs")
    batch = types.SimpleNamespace(**{name: getattr(rollout, name) for name in names})
    batch.obs, batch.state = rollout.obs[:-1], rollout.state[:-1]
    batch.advantages, batch.returns = call.given["advantages"], call.given["value_targets"]
    return batch


def iterations(calls):
    """(rollout, batch, the ppo_update) of each iteration of a run."""
    pairs = zip(of(calls, "collect"), of(calls, "ppo_update"), strict=True)
    return [(rollout_of(collect.result, collect.given["seeds"]), batch_of(update), update) for collect, update in pairs]


def new_actor(module, seed=0):
    """A policy that is far from uniform and likes to attack."""
    torch.manual_seed(seed)
    actor = module.Actor(D, N, A, 8)
    with torch.no_grad():
        actor.output.weight *= 4
        actor.output.bias[ATTACK] += 1
    return actor


# COLLECT
def assert_these_are_the_games(rollout):
    """Every game of a rollout is the one that its seed and actions give when it is played alone."""
    lengths = [len(game.rewards) for game in rollout.games]
    T = max(lengths)
    assert rollout.obs.shape == (T + 1, len(lengths), N, D) and rollout.rewards.shape == (T, len(lengths), N)
    assert torch.equal(rollout.alive, torch.arange(T).unsqueeze(1) < torch.tensor(lengths))
    for e, (game, length) in enumerate(zip(rollout.games, lengths)):
        for name, steps in (("obs", length + 1), ("state", length + 1), ("avail", length), ("active", length)):
            np.testing.assert_array_equal(getattr(rollout, name)[:steps, e], getattr(game, name), err_msg=name)
        np.testing.assert_array_equal(rollout.rewards[:length, e], game.rewards)
        assert rollout.terminated[:, e].nonzero().flatten().tolist() == [length - 1] * game.terminated
        assert rollout.won[e] == game.won
        assert not rollout.rewards[length:, e].any() and not rollout.active[length:, e].any()


def test_collected_games_are_those_of_their_seeds(script):
    """With every kind of end in it: won, lost, cut off by the time limit; and agents that die before the end."""
    module = load(script)
    envs, actor, games = FakeVectorEnv(5), new_actor(module), []
    for round in range(4):
        seeds = np.random.SeedSequence([round]).generate_state(5)
        rollout = rollout_of(module.collect(envs, actor, seeds, CPU), seeds)
        assert_these_are_the_games(rollout)
        games += rollout.games
        policy, _ = actor(rollout.obs[:-1], rollout.avail)  # from an empty memory: nothing is left of other games
        logprobs = policy.gather(-1, rollout.actions.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(rollout.logprobs[rollout.alive], logprobs[rollout.alive])
    ends = collections.Counter((game.won, game.terminated, game.truncated) for game in games)
    assert set(ends) == {(True, True, False), (False, True, False), (False, False, True)}, ends
    assert len({len(game.rewards) for game in games}) > 4
    assert sum(not game.active[-1].all() for game in games) > 5


def test_actions_are_drawn_from_the_policy_or_are_its_mode(script):
    """Among the available ones, as the fake asserts."""
    module, envs = load(script), FakeVectorEnv(400)
    preference = torch.tensor([1.0, 0.1, 0.3, 0.6])  # the first is for the dead

    def actor(obs, avail, memory=None):
        return (preference * avail + 1e-20).log().log_softmax(-1), memory

    rollout = rollout_of(module.collect(envs, actor, range(400), CPU), [])
    free = rollout.avail[..., 1:].all(-1) & rollout.active
    counts = torch.bincount(rollout.actions[free].flatten(), minlength=A)
    assert counts.sum() > 1500
    torch.testing.assert_close((counts / counts.sum())[1:], preference[1:], atol=0.04, rtol=0)
    alike = (preference[1:] ** 2).sum().item()  # of independent agents, and of independent games
    for a, b in ((np.s_[:, :, 0], np.s_[:, :, 1]), (np.s_[:, :200], np.s_[:, 200:])):
        same = (rollout.actions[a] == rollout.actions[b])[free[a] & free[b]]
        assert len(same) > 250 and same.float().mean() == pytest.approx(alike, abs=0.09)
    greedy = rollout_of(module.collect(envs, actor, range(400), CPU, True), [])
    free = greedy.avail[..., HEAL] & greedy.active
    assert (greedy.actions[free] == HEAL).all()


def test_processes_give_what_the_fake_gives(script, monkeypatch):
    """make_vector_env's worker processes, around the same games."""
    module = load(script)
    monkeypatch.setattr(module, "make_env", FakeGame)
    args = types.SimpleNamespace(env_id="fake", use_cpp_rvo2=False, num_envs=3, num_workers=2)
    actor, results = new_actor(module), []
    envs = module.make_vector_env(args)
    try:
        assert envs.max_concurrency == 2 and envs.single_observation_space.shape == (N, D)
        for vector_env in (envs, FakeVectorEnv(3)):
            torch.manual_seed(1)
            results.append([module.collect(vector_env, actor, seeds, CPU) for seeds in ([1, 2, 3], [4, 5, 6])])
    finally:
        envs.close()
    for real, fake in zip(*results):
        assert [x.dtype for x in real] == [x.dtype for x in fake]
        assert all(map(torch.equal, real[:-1], fake[:-1])) and torch.equal(real[-1], fake[-1])


# NETWORKS
def test_the_policy_is_one_recurrent_cell_per_agent(script):
    """Against a plain loop: [observation, one-hot id] -> Linear, ReLU, GRU cell with its own memory, Linear, mask."""
    module = load(script)
    actor = new_actor(module)
    T, E = 4, 2
    obs, avail = torch.randn(T, E, N, D), torch.rand(T, E, N, A) < 0.5
    avail[..., 1] = True
    policy, _ = actor(obs, avail)
    cell = torch.nn.GRUCell(8, 8)
    cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in actor.gru.state_dict().items()})
    first = torch.cat([actor.input.weight, actor.agent_id.T], 1)
    for e in range(E):
        for i in range(N):
            one_hot, memory = torch.eye(N)[i], torch.zeros(1, 8)
            for t in range(T):
                x = torch.relu(first @ torch.cat([obs[t, e, i], one_hot]) + actor.input.bias)
                memory = cell(x.unsqueeze(0), memory)
                logits = actor.output(memory)[0]
                expected = torch.where(avail[t, e, i], logits, -torch.inf).log_softmax(-1)
                possible = avail[t, e, i]
                torch.testing.assert_close(policy[t, e, i][possible], expected[possible])
                assert (policy[t, e, i][~possible].exp() == 0).all()


# UPDATES
def some_games(module):
    """A rollout with games of different lengths in which agents die."""
    seeds = range(20, 24)
    rollout = rollout_of(module.collect(FakeVectorEnv(4), new_actor(module), seeds, CPU), seeds)
    assert not rollout.alive.all() and not rollout.active[rollout.alive].all()
    return rollout


def textbook_ppo(networks, optimizers, rollout, advantages, returns, args):
    """PPO's update as sums over single steps of single agents: the critic's step first, then the policy's."""
    (actor, critic), metrics = networks, collections.defaultdict(list)
    living = rollout.active.nonzero().tolist()
    weights = {(t, e, i): advantages[t, e, i] for t, e, i in living}
    if args.norm_adv:
        column = np.array(list(weights.values()))
        weights = {key: (x - column.mean()) / (column.std(ddof=1) + 1e-8) for key, x in weights.items()}

    def step(k, loss):
        optimizers[k].zero_grad()
        loss.backward()
        gradients = [p.grad for p in networks[k].parameters()]
        norm = sum((g**2).sum() for g in gradients).sqrt()
        for gradient in gradients:
            gradient *= min(1.0, args.max_grad_norm / (norm + 1e-6))
        optimizers[k].step()
        return norm.item()

    for _ in range(args.update_epochs):
        errors = [critic(rollout.state[t, e]) - returns[t, e] for t, e in rollout.alive.nonzero().tolist()]
        value_loss = 0.5 * torch.stack(errors).square().mean()
        metrics["critic_norm"].append(step(1, value_loss))
        metrics["value_loss"].append(value_loss.item())
        policy, _ = actor(rollout.obs[:-1], rollout.avail)
        terms = collections.defaultdict(list)
        for t, e, i in living:
            available = rollout.avail[t, e, i]
            choice = torch.distributions.Categorical(logits=policy[t, e, i][available])
            action = available[: rollout.actions[t, e, i]].sum()
            ratio = (choice.log_prob(action) - rollout.logprobs[t, e, i]).exp()
            bounded = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            terms["policy_loss"].append(-torch.min(ratio * weights[t, e, i], bounded * weights[t, e, i]))
            terms["entropy"].append(choice.entropy())
            terms["approx_kl"].append(ratio.detach() - 1 - ratio.detach().log())
            terms["clipfrac"].append((abs(ratio - 1) > args.clip_coef).float())
        means = {name: torch.stack(values).mean() for name, values in terms.items()}
        metrics["actor_norm"].append(step(0, means["policy_loss"] - args.ent_coef * means["entropy"]))
        for name, mean in means.items():
            metrics[name].append(mean.item())
    return {name: sum(values) / len(values) for name, values in metrics.items()}


@pytest.mark.parametrize("norm_adv", [False, True])
def test_the_update_is_the_textbooks(script, norm_adv):
    """Weights and metrics after some epochs in which gradients and ratios are clipped."""
    module = load(script)
    rollout = some_games(module)
    args = types.SimpleNamespace(update_epochs=3, norm_adv=norm_adv, clip_coef=0.02, ent_coef=0.1, max_grad_norm=0.05)
    advantages, returns = torch.randn(rollout.rewards.shape) + 0.5, torch.randn(rollout.rewards.shape)
    results = []
    for update in (module.ppo_update, textbook_ppo):
        actor = new_actor(module)
        critic = module.Critic(S, N, 8, 1)
        optimizers = [torch.optim.SGD(network.parameters(), lr=0.5) for network in (actor, critic)]
        if update is textbook_ppo:
            metrics = update((actor, critic), optimizers, rollout, advantages, returns, args)
        else:
            metrics = update(actor, critic, *optimizers, rollout, advantages, returns, args)
        results.append((metrics, [*actor.parameters(), *critic.parameters()]))
    (metrics, weights), (expected, expected_weights) = results
    assert min(expected.pop("actor_norm"), expected.pop("critic_norm")) > args.max_grad_norm
    assert 0.2 < expected["clipfrac"] < 1
    assert float(metrics.pop("first_ratio")) == pytest.approx(1, abs=1e-5)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-3, atol=1e-4)


def test_a_step_with_a_gradient_that_is_not_finite_is_not_made(script):
    module = load(script)
    weight = torch.nn.Parameter(torch.tensor([0.0, 4.0]))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for loss in (weight.sqrt().sum(), weight.sum() * torch.nan):
        with pytest.raises(module.UserError, match="some_loss.*(inf|nan)"):
            module.gradient_step(optimizer, loss, "some_loss", 1.0)
        assert weight.tolist() == [0, 4]
    module.gradient_step(optimizer, weight.sum() * 30, "some_loss", 2**0.5)
    assert weight.tolist() == pytest.approx([-1, 3])


def graph_models(module):
    """Models whose entropies differ from pair to pair."""
    torch.manual_seed(5)
    models = module.GraphModels(D, A)
    with torch.no_grad():
        models.action_predictor[-1].weight *= 3
        models.reverse_model.head[-1][-1].weight *= 3
    return models


def reverse_logits(models, z, z_next, i, j):
    """q_psi(a^i | z^j, z'^j, z^i): by its definition, the first layer sees the three side by side."""
    psi = models.reverse_model
    return psi.head(psi.input(torch.cat([z[j], z_next[j], z[i]])))


def test_an_edge_is_a_pair_of_the_living_whose_entropy_ratio_is_low():
    """Entropies of what is available to the influencer; the means that are logged are over the same pairs."""
    module, c = load(DG), 0.9
    rollout, models = some_games(module), graph_models(module)
    graph, means = module.learned_graph(models, rollout.obs, rollout.avail, rollout.active, c, N * N * 4 * 3)
    expected = torch.eye(N, dtype=torch.bool).repeat(*rollout.active.shape[:2], 1, 1)
    own, of_pairs = [], []
    with torch.no_grad():
        latent = models.encoder(rollout.obs)
        for t, e, i in rollout.active.nonzero().tolist():
            z, z_next, available = latent[t, e], latent[t + 1, e], rollout.avail[t, e, i]
            own.append(torch.distributions.Categorical(logits=models.action_predictor(z[i])[available]).entropy())
            for j in rollout.active[t, e].nonzero().flatten().tolist():
                choice = torch.distributions.Categorical(logits=reverse_logits(models, z, z_next, i, j)[available])
                if i != j:
                    of_pairs.append(choice.entropy())
                expected[t, e, i, j] = i == j or choice.entropy() < c * own[-1]
    assert torch.equal(graph, expected)
    edges = expected.sum() - N * rollout.active[..., 0].numel()
    assert 0.1 * len(of_pairs) < edges < 0.6 * len(of_pairs)
    own, of_pairs = torch.stack(own).mean().item(), torch.stack(of_pairs).mean().item()
    expected = {"predictor_entropy": own, "reverse_entropy_others": of_pairs, "entropy_ratio_others": of_pairs / own}
    assert {name: float(mean) for name, mean in means.items()} == pytest.approx(expected, rel=1e-4)


def test_the_graph_models_take_one_step_on_the_living():
    """Its gradient is that of three mean cross-entropies, of which the first alone reaches the encoder."""
    module = load(DG)
    rollout = some_games(module)
    data = rollout.obs, rollout.avail, rollout.active, rollout.actions
    expected = collections.defaultdict(list)
    models, reference = graph_models(module), graph_models(module)
    metrics = module.update_graph_models(models, torch.optim.SGD(models.parameters(), lr=1.0), *data, N * N * 4 * 3)

    def learn(name, logits, t, e, i, accuracy="accuracy"):
        logits = torch.where(rollout.avail[t, e, i], logits, -torch.inf)
        expected[f"{name}_loss"].append(-logits.log_softmax(-1)[rollout.actions[t, e, i]])
        if accuracy:
            expected[f"{name}_{accuracy}"].append((logits.argmax() == rollout.actions[t, e, i]).float())

    latent = reference.encoder(rollout.obs)
    for t, e, i in rollout.active.nonzero().tolist():
        z, z_next = latent[t, e], latent[t + 1, e]
        learn("single_reverse_model", reference.single_reverse_model(torch.cat([z[i], z_next[i]])), t, e, i)
        z, z_next = z.detach(), z_next.detach()
        learn("action_predictor", reference.action_predictor(z[i]), t, e, i)
        for j in rollout.active[t, e].nonzero().flatten().tolist():
            learn(
                "reverse_model",
                reverse_logits(reference, z, z_next, i, j),
                t,
                e,
                i,
                "accuracy_others" if i != j else None,
            )
    means = {name: torch.stack(values).mean() for name, values in expected.items()}
    assert metrics.keys() == means.keys()
    for name, mean in means.items():
        assert float(metrics[name]) == pytest.approx(mean.item(), rel=1e-4), name
    sum(mean for name, mean in means.items() if name.endswith("loss")).backward()
    for (name, weight), before in zip(models.named_parameters(), reference.parameters()):
        torch.testing.assert_close(weight, before - before.grad, rtol=1e-4, atol=1e-5, msg=name)


# EVALUATE
def evaluation(module, index=2, seed=3, actor=None, episodes=12):
    """evaluate() on four environments -> its result, the seeds of its games in order, the calls of collect."""
    args = types.SimpleNamespace(seed=seed, num_envs=4, eval_episodes=episodes)
    with pytest.MonkeyPatch.context() as patch:
        calls = spy(module, patch, ["collect"])
        result = module.evaluate(FakeVectorEnv(4), actor or new_actor(module), args, index, CPU)
    return result, seeds_of(calls), calls


@pytest.mark.parametrize("episodes", [12, 11])  # half of them, rounded up, are 6
def test_an_evaluation_is_its_games_played_by_sampled_actions_and_greedily(script, episodes):
    module = load(script)
    (returns, won), seeds, calls = evaluation(module, episodes=episodes)
    assert seeds[:8] == seeds[8:] and len(set(seeds)) == 8
    assert returns.shape == (2, 6, N) and won.shape == (2, 6) and won.dtype == torch.bool
    sampled = [game for call in calls[:2] for game in rollout_of(call.result, call.given["seeds"]).games]
    greedy = [replay_greedily(seed, new_actor(module)) for seed in seeds[:6]]
    for k, games in enumerate((sampled[:6], greedy)):
        np.testing.assert_allclose(returns[k], [game.rewards.sum(0) for game in games], rtol=1e-5)
        assert won[k].tolist() == [game.won for game in games]
        assert 0 < sum(won[k].tolist()) < 6 and len({len(game.rewards) for game in games}) > 1
    assert [game.actions.tolist() for game in sampled[:6]] != [game.actions.tolist() for game in greedy]


def test_the_games_of_an_evaluation_depend_on_the_seed_and_the_index_alone(script):
    module = load(script)
    (expected, _), seeds, _ = evaluation(module)
    torch.rand(7)
    (again, _), same_seeds, _ = evaluation(module)
    assert same_seeds == seeds and torch.equal(again, expected)
    assert evaluation(load(DG))[1] == seeds
    others = [evaluation(module, index=index)[1] for index in (0, 1, 3)] + [evaluation(module, seed=4)[1]]
    drawn = [seed for other in (*others, seeds) for seed in other[:8]]  # the other half is played greedily
    assert len(set(drawn)) == len(drawn)


def test_an_evaluation_samples_and_leaves_the_random_numbers_alone(script):
    """Its random numbers depend on the seed and the index, and on nothing that was drawn before."""
    module = load(script)
    actor = new_actor(module)
    played, states = [], []
    for drawn, index, seed in ((4, 2, 3), (5, 2, 3), (5, 3, 3), (5, 2, 4)):
        torch.manual_seed(drawn)
        before = torch.get_rng_state()
        _, _, collected = evaluation(module, index, seed, actor=actor)
        assert torch.equal(torch.get_rng_state(), before)
        played.append(actions_of(collected))
        states.append(collected[0].given["generator"].initial_seed())
    assert played[0] == played[1]
    assert states[0] == states[1] and len(set(states)) == 3


# ITERATIONS OF main
def test_an_iteration_collects_then_draws_the_graph_then_updates(script, recorded):
    """The graph comes from models that were trained up to the iteration before."""
    calls, _ = recorded(script)
    order = [call.name for call in calls if call.caller is None and call.name not in ("evaluate", "gae")]
    graph, models = ["learned_graph", "multi_agent_gae"], ["update_graph_models"]
    iteration = ["collect", *graph, "ppo_update", *models] if script == DG else ["collect", "ppo_update"]
    assert order == iteration * len(of(calls, "collect")) and len(order) > 4 * len(iteration)


def test_collected_games_of_a_run(script, recorded):
    """Every kind of end has been seen, and no game twice, neither in training nor in evaluation."""
    calls, folder = recorded(script)
    rollouts = [rollout for rollout, _, _ in iterations(calls)]
    for rollout in rollouts:
        assert_these_are_the_games(rollout)
    games = [game for rollout in rollouts for game in rollout.games]
    assert {(game.won, game.terminated) for game in games} == {(True, True), (False, True), (False, False)}
    assert any(not game.active[-1].all() for game in games)
    # the last evaluation may follow less than an interval after another one, whose games it then repeats
    evaluated = {
        step // 60: seeds[: len(seeds) // 2]  # the other half is played greedily
        for step, (_, seeds) in zip(evaluated_at(folder), evaluations_of(calls), strict=True)
    }
    assert len(evaluated) >= 3
    seeds = seeds_of(of(calls, "collect")) + [seed for seeds in evaluated.values() for seed in seeds]
    assert len(set(seeds)) == len(seeds) > 40


def test_another_seed_plays_other_games(script, recorded, tmp_path):
    calls, _ = recorded(script)
    other = play(script, tmp_path, *SETTINGS, "--seed", 4, "--total-timesteps", 40)
    assert not set(seeds_of(calls)) & set(seeds_of(other))
    weights = [of(run, "ppo_update")[0].given["actor"].input.weight for run in (calls, other)]
    assert not torch.equal(*weights)


def discounted(script, rollout, critic):
    """Arguments of loop_gae for the games as they were played alone, valued by the critic."""
    terminated = torch.zeros_like(rollout.alive)
    rewards = torch.zeros_like(rollout.rewards)
    for e, game in enumerate(rollout.games):
        length = len(game.rewards)
        rewards[:length, e] = torch.from_numpy(game.rewards)
        terminated[length - 1, e] = game.terminated
    if "global" in script:
        rewards = rewards.sum(-1, keepdim=True).expand_as(rewards)
    with torch.no_grad():
        values = critic(rollout.state)
    return rewards, values, terminated, rollout.alive


def test_the_critic_learns_every_agents_own_return_and_truncation_is_no_end(script, recorded):
    """Own GAE + value, from the critic as it was, whatever the policy learns from."""
    calls, _ = recorded(script)
    truncated = 0
    for rollout, batch, update in iterations(calls):
        data = discounted(script, rollout, update.given["critic"])
        expected = loop_gae(*data, GAMMA, LAMBDA) + data[1][:-1]
        torch.testing.assert_close(batch.returns[rollout.alive].double(), expected[rollout.alive], rtol=1e-4, atol=1e-4)
        truncated += sum(game.truncated for game in rollout.games)
    assert truncated > 2


def complete_graph(rollout):
    """An edge between any two that live."""
    graph = torch.zeros(*rollout.active.shape, N, dtype=torch.bool)
    for t, e, i, j in np.ndindex(*graph.shape):
        graph[t, e, i, j] = rollout.active[t, e, i] and rollout.active[t, e, j]
    return graph


def living_edges(graph, rollout):
    return graph & complete_graph(rollout) | torch.eye(N, dtype=torch.bool)


def assert_advantages(script, rollout, batch, update, graph, soft=True):
    data = discounted(script, rollout, update.given["critic"])
    if script == DG:
        expected = loop_multi_agent_gae(*data, graph, GAMMA, LAMBDA, soft)
    else:
        expected = loop_gae(*data, GAMMA, LAMBDA)
    living = rollout.active
    torch.testing.assert_close(batch.advantages[living].double(), expected[living], rtol=1e-4, atol=1e-4)


def test_the_policy_learns_from_the_advantages_of_its_method(script, recorded):
    """Local: the own GAE; global: that of the team's rewards; DG: the double sum over paths of the learned graph."""
    calls, _ = recorded(script)
    graphs = of(calls, "learned_graph") if script == DG else of(calls, "collect")
    for (rollout, batch, update), call in zip(iterations(calls), graphs, strict=True):
        graph = living_edges(call.result[0], rollout) if script == DG else None
        assert_advantages(script, rollout, batch, update, graph)


def test_the_update_gets_what_was_collected(script, recorded):
    calls, _ = recorded(script)
    for rollout, batch, update in iterations(calls):
        assert torch.equal(batch.obs, rollout.obs[:-1]) and torch.equal(batch.state, rollout.state[:-1])
        for name in ("avail", "active", "alive", "actions", "logprobs"):
            assert torch.equal(getattr(batch, name), getattr(rollout, name)), name
        for part in ("actor", "critic"):
            optimizer = update.raw[f"{part}_optimizer"]
            (group,) = optimizer.param_groups
            assert type(optimizer) is torch.optim.Adam and (group["lr"], group["eps"]) == (LEARNING_RATE, 1e-5)
            assert list(map(id, group["params"])) == list(map(id, update.raw[part].parameters()))
    first, last = (of(calls, "ppo_update")[k].given for k in (0, -1))
    for part in ("actor", "critic"):
        pairs = zip(first[part].parameters(), last[part].parameters())
        assert not any(torch.equal(*pair) for pair in pairs), part


# LOGS AND FILES
def assert_curve(folder, tag, steps, values):
    points = scalars(folder)[tag]
    assert [step for step, _ in points] == list(steps), tag
    assert [value for _, value in points] == pytest.approx([float(value) for value in values], rel=1e-4, abs=1e-5), tag


def test_charts_are_those_of_the_games(script, recorded):
    calls, folder = recorded(script)
    rollouts = [rollout for rollout, _, _ in iterations(calls)]
    lengths = [[len(game.rewards) for game in rollout.games] for rollout in rollouts]
    steps = np.cumsum([sum(of_games) for of_games in lengths])
    charts = collections.defaultdict(list)
    for rollout in rollouts:
        returns = np.array([game.rewards.sum(0) for game in rollout.games])  # (E, N)
        charts["episodic_return"].append(returns.sum(1).mean())
        for i in range(N):
            charts[f"episodic_return_agent_{i}"].append(returns[:, i].mean())
        charts["win_rate"].append(np.mean([game.won for game in rollout.games]))
        charts["deaths"].append(np.mean([(~game.active[-1]).sum() for game in rollout.games]))
        charts["episodic_length"].append(np.mean([len(game.rewards) for game in rollout.games]))
        charts["learning_rate"].append(LEARNING_RATE)
    for name, values in charts.items():
        assert_curve(folder, f"charts/{name}", steps, values)
    assert len(set(charts["deaths"])) > 1 and len(set(charts["win_rate"])) > 1


def test_losses_are_those_of_the_updates(script, recorded):
    calls, folder = recorded(script)
    updates = [update.result for update in of(calls, "ppo_update")]
    if script == DG:
        updates = [a | b.result for a, b in zip(updates, of(calls, "update_graph_models"), strict=True)]
    steps = [step for step, _ in scalars(folder)["charts/SPS"]]
    for name in updates[0]:
        assert_curve(folder, f"losses/{name}", steps, [update[name] for update in updates])
    assert [update["first_ratio"].item() for update in updates] == pytest.approx([1] * len(updates), abs=1e-5)
    explained = []
    for rollout, batch, update in iterations(calls):
        values = update.given["critic"](rollout.state[:-1]).detach().numpy()[rollout.alive]
        returns = batch.returns.numpy()[rollout.alive]
        explained.append(1 - np.var(returns - values) / np.var(returns))
    assert_curve(folder, "losses/explained_variance", steps, explained)


def test_evaluations_are_made_on_time_by_the_policy_of_that_time(script, recorded):
    """The untrained policy, then after every 60 frames, then at the end: on paper as the games say."""
    calls, folder = recorded(script)
    reached = [0] + [step for step, _ in scalars(folder)["charts/SPS"]]
    due = [0] + [step for before, step in zip(reached, reached[1:]) if before // 60 < step // 60 or step == reached[-1]]
    assert evaluated_at(folder) == due and len(due) > 3
    rows = list(csv.DictReader(open(folder / "evaluations.csv")))
    for row, call in zip(rows, of(calls, "evaluate"), strict=True):
        collected = of(calls, "collect", call)
        seeds = seeds_of(collected)
        half = len(collected) // 2
        sampled = [game for one in collected[:half] for game in rollout_of(one.result, one.given["seeds"]).games][:6]
        greedy = [replay_greedily(seed, call.given["actor"]) for seed in seeds[:6]]
        expected = {"episodes": 6}
        for prefix, games in (("", sampled), ("greedy_", greedy)):
            returns = np.array([game.rewards.sum() for game in games])
            expected |= {f"{prefix}episodic_return": returns.mean(), f"{prefix}episodic_return_std": returns.std()}
            expected[f"{prefix}win_rate"] = np.mean([game.won for game in games])
        for i in range(N):
            expected[f"episodic_return_agent_{i}"] = np.mean([game.rewards[:, i].sum() for game in sampled])
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name in expected:
        assert_curve(folder, f"eval/{name}", due, [row[name] for row in rows])
    assert any(row["win_rate"] != row["greedy_win_rate"] for row in rows)
    policies = [actor for actor, _ in evaluations_of(calls)]
    for actor, following in zip(policies, policies[1:]):
        assert not torch.equal(actor.input.weight, following.input.weight)


def test_a_run_says_at_its_end_what_share_of_both_kinds_of_games_it_has_won(script, recorded, capsys):
    _, folder = recorded(script)
    module = load(script)
    evaluations = [{"global_step": 120, "win_rate": 0.25, "greedy_win_rate": 0.5}]
    evaluations.append({"global_step": 1234, "win_rate": 0.75, "greedy_win_rate": 1.0})
    module.print_summary(str(folder), evaluations, 1234, module.Args(total_timesteps=1200))
    line = "last evaluation: win rate 0.75, of greedy games 1.00, at 1,234 frames"
    assert line in capsys.readouterr().out.splitlines()


def test_the_checkpoint_holds_the_trained_networks(script, recorded):
    calls, folder = recorded(script)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    networks = [(name, of(calls, "ppo_update")[-1].raw[name]) for name in ("actor", "critic")]
    if script == DG:
        networks.append(("models", of(calls, "update_graph_models")[-1].raw["graph_models"]))
    for name, network in networks:
        saved = checkpoint[name]
        assert saved.keys() == network.state_dict().keys()
        assert all(torch.equal(weight, saved[key]) for key, weight in network.state_dict().items())
    hidden_dim = 8
    assert checkpoint["actor"]["output.weight"].shape == (A, hidden_dim)
    assert checkpoint["critic"]["output.weight"].shape == (1, hidden_dim)
    assert checkpoint["iteration"] == len(of(calls, "collect"))
    assert checkpoint["global_step"] == scalars(folder)["charts/SPS"][-1][0]


class Clock:
    """The module time, but for clocks that stand still until they are told to move."""

    def __init__(self, original):
        self.original, self.now = original, 1000.0
        self.time = self.monotonic = self.perf_counter = lambda: self.now

    def __getattr__(self, name):
        return getattr(self.original, name)


def one_second_per_iteration(module, patch):
    clock, original = Clock(module.time), module.ppo_update
    patch.setattr(module, "time", clock)

    @functools.wraps(original)
    def ppo_update(*args, **kwargs):
        clock.now += 1.0
        return original(*args, **kwargs)

    patch.setattr(module, "ppo_update", ppo_update)


def test_the_speed_is_that_of_this_process(script, tmp_path):
    """Frames since it began per second, also after a resume."""
    play(script, tmp_path, *SETTINGS, "--total-timesteps", 80, change=one_second_per_iteration)
    folder = run_folder(tmp_path)
    first = scalars(folder)["charts/SPS"]
    resume = ["--resume", folder / "checkpoint.pt", "--total-timesteps", 180]
    play(script, tmp_path, *resume, change=one_second_per_iteration)
    points = [point for point in scalars(folder)["charts/SPS"] if point[0] > first[-1][0]]
    assert len(first) > 1 and len(points) > 1
    for begun, curve in ((0, first), (first[-1][0], points)):
        for k, (step, speed) in enumerate(curve):
            assert speed == pytest.approx((step - begun) / (k + 1), rel=1e-4)


# RESUME
class Death(BaseException):
    """Stands for the end of the process."""


def ends(where, how):
    """A change of the script: in the second call of a function it dies, or it is told to stop."""

    def change(module, patch):
        original, left = getattr(module, where), [2]

        @functools.wraps(original)
        def ending(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and how is Death:
                raise Death
            if left[0] == 0:
                os.kill(os.getpid(), how)
            return original(*args, **kwargs)

        patch.setattr(module, where, ending)

    return change


def same(a, b):
    """Whether two nested states are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state_of(folder):
    """Everything in the checkpoint but the path that the run was resumed from."""
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["args"].pop("resume")
    checkpoint.pop("run_name")
    return checkpoint


def test_a_resumed_run_is_the_run_that_was_not_ended(script, tmp_path):
    """Killed or told to stop, in an iteration or an evaluation, with every draw of random numbers that there is."""
    options = [*SETTINGS, "--checkpoint-interval", 1, "--norm-adv"]
    options += ["--edge-drop", 0.1, "--edge-add", 0.1] if script == DG else []
    whole = play(script, tmp_path / "whole", *options)
    reference = run_folder(tmp_path / "whole")
    endings = [("ppo_update", Death, None), ("ppo_update", signal.SIGTERM, 143), ("evaluate", signal.SIGINT, 130)]
    for where, how, status in endings:
        cwd = tmp_path / f"{where} {how}"
        if how is Death:
            with pytest.raises(Death):
                play(script, cwd, *options, change=ends(where, how))
        else:
            play(script, cwd, *options, change=ends(where, how), status=status)
        folder = run_folder(cwd)
        assert 0 < state_of(folder)["global_step"] < state_of(reference)["global_step"]
        resumed = play(script, cwd, "--resume", folder / "checkpoint.pt")
        assert (folder / "evaluations.csv").read_bytes() == (reference / "evaluations.csv").read_bytes()
        mine, other = state_of(folder), state_of(reference)
        assert mine.keys() == other.keys()
        assert [key for key in mine if not same(mine[key], other[key])] == []
        games = [[list(call.given["seeds"]) for call in of(run, "collect")] for run in (whole, resumed)]
        assert games[1] == games[0][-len(games[1]) :] and len(games[1]) > 1


def test_the_same_seed_gives_the_same_run_and_evaluating_and_saving_change_nothing(script, recorded, tmp_path):
    options = ["--eval-interval", 1000, "--eval-episodes", 1, "--checkpoint-interval", 0]
    play(script, tmp_path, *SETTINGS, *options, "--save-model")
    mine, other = state_of(run_folder(tmp_path)), state_of(recorded(script)[1])
    assert [key for key in mine.keys() - {"args", "evaluations"} if not same(mine[key], other[key])] == []
    assert len(mine["evaluations"]) == 2 < len(other["evaluations"])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_threads_of_pytorch(script, threads, tmp_path):
    before = torch.get_num_threads()
    calls = play(script, tmp_path, *SETTINGS, "--num-threads", threads, "--total-timesteps", 40)
    torch.set_num_threads(before)
    assert {call.pytorch["threads"] for call in calls} == {threads}


def test_settings_that_make_no_sense_end_with_a_sentence(script, tmp_path):
    module = load(script)
    with pytest.raises(module.UserError, match="40 frames"):
        play(script, tmp_path, *SETTINGS, "--total-timesteps", 39)
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence(script, tmp_path):
    module = load(script)
    with pytest.raises(module.UserError, match="iteration 1: value_loss is nan .*; there is no checkpoint"):
        play(script, tmp_path, *SETTINGS, "--learning-rate", 1e38, "--checkpoint-interval", 1)


# THE GRAPH
def test_the_learned_graph_is_that_of_the_models_and_the_rollout(recorded):
    """Called with the models as they were, trained afterwards, once, on the same rollout."""
    calls, folder = recorded(DG)
    module, densities = load(DG), []
    graphs, updates = of(calls, "learned_graph"), of(calls, "update_graph_models")
    for (rollout, _, _), graph, update in zip(iterations(calls), graphs, updates, strict=True):
        for call in (graph, update):
            for name in ("obs", "avail", "active"):
                assert torch.equal(call.given[name], getattr(rollout, name)), name
            assert call.raw["graph_models"] is graphs[0].raw["graph_models"]
        assert torch.equal(update.given["actions"], rollout.actions)
        data = rollout.obs, rollout.avail, rollout.active, 0.9, 10**6
        expected, entropies = module.learned_graph(graph.given["graph_models"], *data)
        assert torch.equal(graph.result[0], expected)
        densities.append(living_edges(expected, rollout)[rollout.active].sum() / rollout.active.sum() - 1)
        before, after = graph.given["graph_models"].state_dict(), update.given["graph_models"].state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        optimizer = update.raw["optimizer"]
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.Adam and (group["lr"], group["eps"]) == (LEARNING_RATE, 1e-5)
        assert list(map(id, group["params"])) == list(map(id, update.raw["graph_models"].parameters()))
    assert_curve(folder, "graph/edges_per_agent", [step for step, _ in scalars(folder)["charts/SPS"]], densities)
    for name in entropies:
        assert scalars(folder)[f"graph/{name}"][-1][1] == pytest.approx(float(entropies[name]), rel=1e-5)


def test_settings_of_the_graph(tmp_path):
    options = ["--c", 0.7, "--pair-chunk", 50, "--no-encoder", "--total-timesteps", 40]
    calls = play(DG, tmp_path, *SETTINGS, *options)
    for call in of(calls, "learned_graph") + of(calls, "update_graph_models"):
        assert call.given["pair_chunk"] == 50 and call.given.get("c", 0.7) == 0.7
        assert list(call.given["graph_models"].encoder.parameters()) == []


GRAPHS = [  # options, whether an edge must be there: None if it is drawn
    (["--graph", "complete"], True),
    (["--graph", "identity"], False),
    (["--graph", "random", "--graph-p", 1], True),
    (["--graph", "random", "--graph-p", 0], False),
    (["--graph", "complete", "--edge-drop", 1], False),
    (["--graph", "identity", "--edge-add", 1], True),
    (["--c", 0, "--edge-add", 1], True),
    (["--c", 0], False),
    (["--graph", "complete", "--no-soft"], True),
]


@pytest.mark.parametrize("options, complete", GRAPHS, ids=lambda x: " ".join(map(str, x)) if type(x) is list else "")
def test_the_dead_have_no_edges_under_any_option(options, complete, tmp_path):
    """Seen in the advantages: through the dead nothing is reached, and their share of a victory reaches nobody."""
    calls = play(DG, tmp_path, *SETTINGS, *options, "--total-timesteps", 120)
    densities, differences = [], 0
    for rollout, batch, update in iterations(calls):
        everybody = torch.full_like(complete_graph(rollout), complete)
        graph = living_edges(everybody, rollout)
        soft = "--no-soft" not in options
        assert_advantages(DG, rollout, batch, update, graph, soft)
        differences += (graph != everybody)[rollout.alive].sum()
        densities.append(graph[rollout.active].sum() / rollout.active.sum() - 1)
    folder = run_folder(tmp_path)
    assert_curve(folder, "graph/edges_per_agent", [step for step, _ in scalars(folder)["charts/SPS"]], densities)
    assert not complete or differences > 10
    learned = "--graph" not in options
    assert (of(calls, "update_graph_models") != []) == ("graph/entropy_ratio_others" in scalars(folder)) == learned


def test_random_edges_are_drawn_anew_between_the_living(tmp_path):
    calls = play(DG, tmp_path, *SETTINGS, "--graph", "random", "--graph-p", 0.3, "--total-timesteps", 400)
    graphs, drawn = of(calls, "multi_agent_gae"), []
    for call, (rollout, _, _) in zip(graphs, iterations(calls), strict=True):
        others = complete_graph(rollout) & ~torch.eye(N, dtype=torch.bool)
        drawn.append(call.given["graph"][others].float())
        assert not call.given["graph"][~complete_graph(rollout) & ~torch.eye(N, dtype=torch.bool)].any()
    assert torch.cat(drawn).mean() == pytest.approx(0.3, abs=0.04) and len(torch.cat(drawn)) > 1000
    assert not torch.equal(drawn[0][:50], drawn[1][:50])


@pytest.mark.parametrize("flag", ["--no-transpose-graph", "--transpose-graph"])
def test_transpose_graph_exchanges_influencer_and_influenced(flag, tmp_path):
    """Seen in the advantages, with a learned graph of one-way streets."""

    def one_way(module, patch):
        original = module.learned_graph

        @functools.wraps(original)
        def learned_graph(*args, **kwargs):
            graph, entropies = original(*args, **kwargs)
            graph[..., 0, 1] = graph[..., 0, 2] = True
            graph[..., 1, 0] = graph[..., 2, 0] = graph[..., 1, 2] = False
            return graph, entropies

        patch.setattr(module, "learned_graph", learned_graph)

    calls = play(DG, tmp_path, *SETTINGS, flag, "--total-timesteps", 120, change=one_way)
    for (rollout, batch, update), call in zip(iterations(calls), of(calls, "learned_graph"), strict=True):
        graph = call.result[0].transpose(-1, -2) if flag == "--transpose-graph" else call.result[0]
        assert_advantages(DG, rollout, batch, update, living_edges(graph, rollout))
