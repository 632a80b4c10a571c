"""Masks, recurrence, deaths and chunks of the SMAClite scripts, on tensors made here: none of this needs smaclite."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load

dg = load("mappo_dg_smaclite.py")
T, E, N, D, S, A, H = 7, 3, 4, 5, 9, 6, 8


@pytest.fixture
def rollout():
    """Random games of different lengths in which agents die, one of them at once."""
    torch.manual_seed(0)
    lengths = torch.tensor([T, 4, 1])
    alive = torch.arange(T).unsqueeze(1) < lengths
    deaths = torch.randint(1, T + 2, (E, N))
    deaths[0, 0] = 0
    active = alive.unsqueeze(-1) & (torch.arange(T).view(T, 1, 1) < deaths)
    avail = torch.rand(T, E, N, A) < 0.5
    avail[..., 1] = True
    avail[~active] = False
    avail[..., 0] = ~active
    actions = torch.multinomial(avail.float().view(-1, A), 1).view(T, E, N)
    data = {"obs": torch.randn(T + 1, E, N, D), "state": torch.randn(T + 1, E, S), "avail": avail, "active": active}
    return SimpleNamespace(alive=alive, actions=actions, returns=torch.randn(T, E, N), **data)


def test_an_unavailable_action_is_impossible(rollout):
    """Its probability is exactly 0, however much the network prefers it, and it is never sampled nor the mode."""
    actor = dg.Actor(D, N, A, H)
    with torch.no_grad():
        actor.output.bias.copy_(torch.tensor([50.0, -50.0, 50.0, 50.0, 50.0, 50.0]))
        logprobs, _ = actor(rollout.obs[:-1], rollout.avail)
    probabilities = logprobs.exp()
    assert (probabilities[~rollout.avail] == 0).all()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(T, E, N))
    assert rollout.avail.gather(-1, logprobs.argmax(-1, keepdim=True)).all()
    for _ in range(200):
        sample = (logprobs - torch.empty_like(logprobs).exponential_().log()).argmax(-1, keepdim=True)
        assert rollout.avail.gather(-1, sample).all()
    entropy = -(probabilities * logprobs).sum(-1)
    assert entropy.isfinite().all() and (entropy[~rollout.active] == 0).all()  # one action is left to the dead


def test_the_policy_is_the_same_step_by_step_and_over_the_episode(rollout):
    actor = dg.Actor(D, N, A, H)
    whole, _ = actor(rollout.obs[:-1], rollout.avail)
    memory = None
    for t in range(T):
        step, memory = actor(rollout.obs[t : t + 1], rollout.avail[t : t + 1], memory)
        torch.testing.assert_close(step[0], whole[t])
    changed = rollout.obs.clone()
    changed[0] += 1.0
    later, _ = actor(changed[:-1], rollout.avail)
    assert not torch.allclose(later[2], whole[2])  # the past is remembered
    changed = rollout.obs.clone()
    changed[5] += 1.0
    assert torch.equal(actor(changed[:-1], rollout.avail)[0][:5], whole[:5])  # the future is not known


def test_memory_does_not_mix_agents_or_games(rollout):
    actor = dg.Actor(D, N, A, H)
    whole, _ = actor(rollout.obs[:-1], rollout.avail)
    changed = rollout.obs.clone()
    changed[0, 1, 2] += 1.0
    other, _ = actor(changed[:-1], rollout.avail)
    different = (other != whole).any(-1).any(0)
    assert different[1, 2] and different.sum() == 1


def update(rollout, advantages, **changes):
    """Metrics of one epoch of ppo_update with fixed networks."""
    torch.manual_seed(1)
    actor, critic = dg.Actor(D, N, A, H), dg.Critic(S, N, H, 1)
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.0) for network in (actor, critic)]
    data = SimpleNamespace(**(vars(rollout) | changes))
    with torch.no_grad():
        policy, _ = actor(rollout.obs[:-1], rollout.avail)
        logprobs = policy.gather(-1, rollout.actions.unsqueeze(-1)).squeeze(-1)
    data.logprobs = logprobs
    args = SimpleNamespace(update_epochs=1, norm_adv=True, clip_coef=0.2, ent_coef=0.01, max_grad_norm=10.0)
    return dg.ppo_update(actor, critic, *optimizers, data, advantages, data.returns, args)


def test_the_dead_and_the_padding_are_in_no_policy_loss(rollout):
    advantages = torch.randn(T, E, N)
    expected = update(rollout, advantages)
    assert expected["first_ratio"] == pytest.approx(1.0, abs=1e-6)
    noisy, returns = advantages.clone(), rollout.returns.clone()
    noisy[~rollout.active] = 1e6
    returns[~rollout.alive] = 1e6
    obs = rollout.obs.clone()
    obs[1:][~rollout.active.flip(0).cummax(0).values.flip(0)] = 99.0  # what an agent sees after it has died
    result = update(rollout, noisy, returns=returns, obs=obs)
    assert result.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])
    living = advantages.clone()
    living[rollout.active] *= torch.linspace(-1, 2, int(rollout.active.sum()))
    assert not torch.allclose(update(rollout, living)["policy_loss"], expected["policy_loss"])


def models():
    torch.manual_seed(2)
    return dg.GraphModels(D, A)


def test_the_dead_have_no_edges_but_their_own(rollout):
    with torch.no_grad():
        graph, _ = dg.learned_graph(models(), rollout.obs, rollout.avail, rollout.active, 1.5, 10**6)
    eye = torch.eye(N, dtype=torch.bool)
    assert graph[..., eye].all()
    pairs = dg.living_pairs(rollout.active)
    assert not (graph & ~pairs & ~eye).any()
    assert (graph & pairs & ~eye).any()


def test_chunks_change_nothing(rollout):
    """Graph, statistics, losses and the step are the same for any bound on the pairs treated at a time."""
    results = []
    for pair_chunk in (1, E * N * N * 3, 10**6):
        graph_models = models()
        optimizer = torch.optim.SGD(graph_models.parameters(), lr=0.1)
        data = rollout.obs, rollout.avail, rollout.active
        graph, entropies = dg.learned_graph(graph_models, *data, 0.97, pair_chunk)
        metrics = dg.update_graph_models(graph_models, optimizer, *data, rollout.actions, pair_chunk)
        weights = torch.cat([p.detach().flatten() for p in graph_models.parameters()])
        results.append((graph, torch.stack([*entropies.values(), *metrics.values()]), weights))
    for graph, numbers, weights in results[1:]:
        assert torch.equal(graph, results[0][0])
        torch.testing.assert_close(numbers, results[0][1])
        torch.testing.assert_close(weights, results[0][2])
    assert [len(dg.time_chunks(T, E, N, n)) for n in (1, E * N * N * 3, 10**6)] == [7, 3, 1]


def test_model_losses_are_the_cross_entropies_of_the_living(rollout):
    """Against a plain loop over steps, games and (pairs of) agents."""
    graph_models = models()
    optimizer = torch.optim.SGD(graph_models.parameters(), lr=0.0)
    data = rollout.obs, rollout.avail, rollout.active
    metrics = dg.update_graph_models(graph_models, optimizer, *data, rollout.actions, 10**6)
    z = graph_models.encoder(rollout.obs)
    single, predictor, reverse = [], [], []
    for t, e, i in rollout.active.nonzero().tolist():
        action, avail = rollout.actions[t, e, i], rollout.avail[t, e, i]

        def loss(logits, action=action, avail=avail):
            return -dg.mask_logits(logits, avail).log_softmax(-1)[action]

        single.append(loss(graph_models.single_reverse_model(torch.cat([z[t, e, i], z[t + 1, e, i]]))))
        predictor.append(loss(graph_models.action_predictor(z[t, e, i])))
        q = graph_models.reverse_model
        for j in rollout.active[t, e].nonzero().flatten().tolist():
            reverse.append(loss(q.head(q.input(torch.cat([z[t, e, j], z[t + 1, e, j], z[t, e, i]])))))
    for name, losses in (("single_reverse_model", single), ("action_predictor", predictor), ("reverse_model", reverse)):
        torch.testing.assert_close(metrics[f"{name}_loss"], torch.stack(losses).mean().detach())


def test_the_edge_rule_row_is_the_influencer(rollout):
    """An edge i -> j compares the entropy of i's action given j with that of i's action: rows of one predictor."""
    graph_models = models()
    with torch.no_grad():
        _, predicted, reverse = graph_models(rollout.obs, rollout.avail, rollout.active)
        pairs = dg.living_pairs(rollout.active)
        entropies = [-(x.log_softmax(-1).exp() * x.log_softmax(-1)).sum(-1) for x in (predicted, reverse)]
        own = torch.zeros(T, E, N).masked_scatter(rollout.active, entropies[0])
        pair = torch.zeros(T, E, N, N).masked_scatter(pairs, entropies[1])
        graph, _ = dg.learned_graph(graph_models, rollout.obs, rollout.avail, rollout.active, 0.97, 10**6)
    for t, e, i, j in pairs.nonzero().tolist():
        assert graph[t, e, i, j] == (i == j or bool(pair[t, e, i, j] < 0.97 * own[t, e, i]))


def test_without_smaclite_one_sentence_says_what_to_install(tmp_path):
    code = "import runpy, sys; sys.modules['smaclite'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    for script in ("mappo_dg_smaclite.py", "baselines/mappo_local_smaclite.py", "baselines/mappo_global_smaclite.py"):
        done = subprocess.run(
            [sys.executable, "-c", code, ROOT / script], cwd=tmp_path, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2
        assert "requirements-smaclite.txt" in done.stderr and len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "runs").exists()
