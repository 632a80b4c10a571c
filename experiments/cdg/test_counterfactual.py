"""mappo_cdg_lbf.py: the simulator's graph against brute force, the pairwise targets against the definition."""

import copy
import math
from collections import Counter
from types import SimpleNamespace

import mappo_cdg_lbf as cdg
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_advantages import discounts, episodes, loop_gae, loop_meeting_times, shapes
from test_lbf_environment import COOP, VANILLA, towards_food


# THE SIMULATOR'S GRAPH
def outcome(env, actions):
    """Step a copy of the environment -> each player's end cell and reward, the foods that are left."""
    constant = (env.observation_space, env.action_space, env.logger, env.np_random, env.view)
    twin = copy.deepcopy(env, {id(part): part for part in constant})
    _, rewards, *_ = twin.step(actions)
    return [player.position for player in twin.players], rewards, set(twin.foods)


def brute_force(env, actions, seen):
    """The definition: replace i's action by each available one, step a copy, compare -> edges with and without shared
    food; counts in seen what occurs."""
    cells, rewards, foods = outcome(env, actions)
    shared, private = set(), set()
    for i, player in enumerate(env.players):
        for other in env._valid_actions[player]:
            other_cells, other_rewards, other_foods = outcome(env, [*actions[:i], other.value, *actions[i + 1 :]])
            eaten = foods != other_foods
            for j in set(range(env.n_agents)) - {i}:
                moved = cells[j] != other_cells[j]
                rewarded = abs(rewards[j] - other_rewards[j]) > 1e-9
                if moved or rewarded:
                    private.add((i, j))
                if moved or rewarded or eaten:
                    shared.add((i, j))
                seen["moved"] += moved
                seen["rewarded and eaten"] += rewarded and eaten
                seen["rewarded, not eaten"] += rewarded and not eaten
                seen["eaten, not rewarded"] += eaten and not rewarded
                seen["penalty"] += rewarded and min(rewards[j], other_rewards[j]) < 0
    return shared, private


def compare(env, policy, steps, crowded=0.0):
    """Every edge of so many steps against brute force -> what occurred, and how often."""
    rng, seen = np.random.default_rng(0), Counter()
    env.reset()
    for _ in range(steps):
        if rng.random() < crowded:
            crowd(env, rng)
        actions = policy(env, rng)
        shared, private = brute_force(env, actions, seen)
        assert set(cdg.counterfactual_edges(env, actions, shared_food=True)) == shared
        assert set(cdg.counterfactual_edges(env, actions, shared_food=False)) == private
        seen["step"] += 1
        seen["two in a cell"] += len({player.position for player in env.players}) < env.n_agents
        if env.step(actions)[2]:
            env.reset()
    return seen


def crowd(env, rng):
    """Put the players around a food, so that they collide and load, now and then two of them into one cell."""
    foods = np.argwhere(env.field)
    centre = foods[rng.integers(len(foods))]
    for player in env.players:
        row, col = (centre + rng.integers(-2, 3, 2)).tolist()
        if 0 <= row < env.rows and 0 <= col < env.cols and env.field[row, col] == 0:
            player.position = row, col
    env._gen_valid_moves()


def at_random(env, rng):
    return rng.integers(0, 6, env.n_agents).tolist()


@pytest.mark.parametrize("env_id", VANILLA + COOP)
def test_edges_are_those_of_brute_force(env_id):
    """The six tasks of training: random actions, and steps towards food in crowds, where most of the edges are."""
    env = cdg.make_env(env_id, winner_take_all="coop" in env_id, seed=3)
    assert compare(env, at_random, 800)["moved"] > 0
    seen = compare(env, towards_food, 1000, crowded=0.3)
    assert min(seen[what] for what in ("moved", "rewarded and eaten", "eaten, not rewarded")) > 100
    assert seen["two in a cell"] > 5
    # who joins others that are strong enough without him takes a share of their reward, or all of it; two agents that
    # food needs both cannot
    assert (seen["rewarded, not eaten"] > 20) == ("2p" not in env_id)


OTHER_RULES = [
    ("Foraging-2s-8x8-3p-3f-v3", False, {}),
    ("Foraging-6x6-9p-4f-v3", False, {}),
    ("Foraging-6x6-9p-4f-v3", True, {}),
    ("Foraging-5x5-4p-1f-coop-v3", True, {"penalty": 0.1}),
    ("Foraging-6x6-4p-2f-v3", False, {"penalty": 0.1}),
    ("Foraging-6x6-4p-2f-v3", False, {"_normalize_reward": False}),
    ("Foraging-6x6-4p-2f-v3", True, {"_normalize_reward": False}),
]


@pytest.mark.parametrize("env_id, winner_take_all, settings", OTHER_RULES)
def test_edges_under_other_rules(env_id, winner_take_all, settings):
    """Partial observation, a full board, a penalty for loading in vain, rewards as they are."""
    env = cdg.make_env(env_id, winner_take_all, seed=4)
    vars(env).update(settings)
    seen = compare(env, towards_food, 300, crowded=0.2)
    assert min(seen[what] for what in ("moved", "rewarded and eaten", "eaten, not rewarded")) > 20
    assert (seen["penalty"] > 0) == ("penalty" in settings)


def test_a_rollout_brings_the_graph_of_each_step(monkeypatch):
    """(T, E, N_i, N_j), row = influencer, before the step: with a spy that names one pair for each step."""
    envs = [cdg.make_env("Foraging-5x5-3p-1f-v3", seed=seed) for seed in (1, 2)]
    steps, played = [], []

    def edges(env, actions):
        steps.append((env.current_step, envs.index(env)))
        played.append(actions)
        return [(0, env.current_step % 2 + 1)]

    logits = torch.zeros(6)
    results = cdg.collect(envs, lambda obs: logits.expand(*obs.shape[:-1], 6), torch.device("cpu"), edges=edges)
    *_, alive, graph = results
    assert len(results) == 7 and graph.shape == (*alive.shape, 3, 3) and int(alive.sum()) == len(steps)
    for (t, e), actions in zip(steps, played):
        assert alive[t, e] and results[1][t, e].tolist() == actions
        expected = torch.eye(3, dtype=torch.bool)
        expected[0, t % 2 + 1] = True
        assert torch.equal(graph[t, e], expected)
    assert len(cdg.collect(envs, lambda obs: logits.expand(*obs.shape[:-1], 6), torch.device("cpu"))) == 6


# THE PAIRWISE TARGETS
def pair_episodes(seed, T, E, N, edge_probability=0.3):
    """episodes() with values of every pair."""
    rewards, _, terminated, alive, graph = episodes(seed, T, E, N, edge_probability)
    pair_values = torch.randn((T + 1, E, N, N), generator=torch.Generator().manual_seed(seed + 1))
    return rewards, pair_values, terminated, alive, graph


def loop_pairwise_targets(rewards, pair_values, terminated, alive, graph, gamma, lam):
    """The recursion of the docstring, one entry after the other, from the definition of the meeting times."""
    T, E, N = rewards.shape
    own_values = pair_values.diagonal(dim1=-2, dim2=-1)
    own = loop_gae(rewards, own_values, terminated, alive, gamma, lam) + own_values[:-1]
    met = torch.cat([loop_meeting_times(graph, alive), torch.full((1, E, N, N), math.inf)])
    targets = torch.zeros((T + 1, E, N, N), dtype=torch.float64)
    for e in range(E):
        length = int(alive[:, e].sum())
        targets[length, e] = pair_values[length, e]  # of an episode that is cut
        for t in reversed(range(length)):
            for i in range(N):
                for j in range(N):
                    influenced = [i] + [k for k in range(N) if graph[t, e, i, k] and k != i]
                    via = min(influenced, key=lambda k: met[t + 1, e, k, j])  # min keeps the first of equal ones
                    if i == j or graph[t, e, i, j]:
                        targets[t, e, i, j] = own[t, e, j]
                    elif not terminated[t, e]:
                        values = (1 - lam) * pair_values[t + 1, e, via, j] + lam * targets[t + 1, e, via, j]
                        targets[t, e, i, j] = gamma * values
        targets[length, e] = 0
    return targets[:-1]


@settings(max_examples=80, deadline=None)
@given(**shapes, **discounts, edge_probability=st.floats(0, 1))
def test_pairwise_targets_are_the_recursion(seed, T, E, N, gamma, lam, edge_probability):
    data = pair_episodes(seed, T, E, N, edge_probability)
    expected = loop_pairwise_targets(*data, gamma, lam)
    torch.testing.assert_close(cdg.pairwise_targets(*data, gamma, lam).double(), expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(**shapes, gamma=st.floats(0, 1), edge_probability=st.floats(0, 1))
def test_with_lambda_one_they_are_the_rewards_after_the_meeting(seed, T, E, N, gamma, edge_probability):
    """Whatever the values and the graph, for episodes that end in a terminal state: the definition, O(T^2)."""
    rewards, pair_values, _, alive, graph = pair_episodes(seed, T, E, N, edge_probability)
    terminated = alive & ~torch.cat([alive[1:], torch.zeros_like(alive[:1])])
    met, expected = loop_meeting_times(graph, alive), torch.zeros((T, E, N, N), dtype=torch.float64)
    for start in range(T):
        for t in range(start, T):
            earned = gamma ** (t - start) * (rewards[t] * alive[t].unsqueeze(-1)).double()  # (E, N_j)
            expected[start] += (met[start] <= t) * earned.unsqueeze(-2)
    targets = cdg.pairwise_targets(rewards, pair_values, terminated, alive, graph, gamma, 1.0)
    torch.testing.assert_close(targets.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T, N", [(50, 3), (150, 10)])
def test_pairwise_targets_at_the_sizes_of_training(T, N):
    data = pair_episodes(0, T, 2, N, edge_probability=0.05)
    expected = loop_pairwise_targets(*data, 0.99, 0.95)
    torch.testing.assert_close(cdg.pairwise_targets(*data, 0.99, 0.95).double(), expected, rtol=1e-4, atol=1e-4)


def advantages(advantage, rewards, values, terminated, alive, graph, soft=True, gamma=0.99, gae_lambda=0.95, before=0):
    args = SimpleNamespace(
        advantage=advantage, gamma=gamma, gae_lambda=gae_lambda, soft=soft, pre_meeting_lambda=before
    )
    return cdg.credit(rewards, values, terminated, alive, graph, args)


def test_limits_of_the_pairwise_advantage():
    """Complete graph: every i is credited with j's lambda-return; identity and W = 0 off the diagonal: GAE^i."""
    rewards, pair_values, terminated, alive, graph = pair_episodes(1, 30, 4, 3)
    own_values = pair_values.diagonal(dim1=-2, dim2=-1)
    own = cdg.gae(rewards, own_values, terminated, alive, 0.99, 0.95)
    returns = (own + own_values[:-1]) * alive.unsqueeze(-1)
    complete, identity = torch.ones_like(graph), torch.eye(3, dtype=torch.bool).expand_as(graph)
    targets = cdg.pairwise_targets(rewards, pair_values, terminated, alive, complete, 0.99, 0.95)
    torch.testing.assert_close(targets, returns.unsqueeze(-2).expand_as(targets))

    result, _ = advantages("pairwise", rewards, torch.diag_embed(own_values), terminated, alive, identity)
    torch.testing.assert_close(result[alive], own[alive])

    same_for_all = own_values.unsqueeze(-2).expand_as(pair_values)  # then a complete graph is the global advantage
    result, _ = advantages("pairwise", rewards, same_for_all, terminated, alive, complete)
    torch.testing.assert_close(result[alive], own.sum(-1, keepdim=True).expand_as(own)[alive])


def test_pairwise_targets_of_one_step():
    """lambda = 0 leaves one step; T = 1 and episodes that end at t = 0 need no special treatment."""
    rewards, pair_values, terminated, alive, graph = pair_episodes(2, 20, 4, 2)
    next_values = (pair_values[1:] * ~terminated[..., None, None]).masked_fill(~alive[..., None, None], 0)
    own = rewards + 0.9 * next_values.diagonal(dim1=-2, dim2=-1)
    expected = torch.where(graph, own.unsqueeze(-2), 0.9 * next_values) * alive[..., None, None]
    torch.testing.assert_close(cdg.pairwise_targets(rewards, pair_values, terminated, alive, graph, 0.9, 0.0), expected)

    alive = torch.zeros((20, 4), dtype=torch.bool)
    alive[0] = True
    terminated = alive & (torch.arange(4) % 2 == 0)
    first = [x[:n] for x, n in zip((rewards, pair_values, terminated, alive, graph), (1, 2, 1, 1, 1))]
    long = cdg.pairwise_targets(rewards, pair_values, terminated, alive, graph, 0.9, 0.95)
    torch.testing.assert_close(long[:1], cdg.pairwise_targets(*first, 0.9, 0.95))
    assert (long[1:] == 0).all()
    own = rewards[0] + 0.9 * pair_values[1].diagonal(dim1=-2, dim2=-1) * ~terminated[0].unsqueeze(-1)
    cut = 0.9 * pair_values[1] * ~terminated[0][:, None, None]
    torch.testing.assert_close(long[0], torch.where(graph[0], own.unsqueeze(-2), cut))


def test_a_pair_that_never_meets_has_no_target():
    rewards, pair_values = torch.ones((5, 1, 2)), torch.zeros((6, 1, 2, 2))
    alive, terminated = torch.ones((5, 1)), torch.tensor([0, 0, 0, 0, 1]).unsqueeze(1)
    graph = torch.eye(2, dtype=torch.bool).repeat(5, 1, 1, 1)
    graph[2, 0, 0, 1] = True
    targets = cdg.pairwise_targets(rewards, pair_values, terminated, alive, graph, 1.0, 1.0)[:, 0]
    assert targets[:, 0, 1].tolist() == [3, 3, 3, 0, 0]  # the rewards from the meeting on; past it there is none
    assert targets[:, 1, 0].tolist() == [0] * 5
    assert targets[:, 0, 0].tolist() == targets[:, 1, 1].tolist() == [5, 4, 3, 2, 1]


def test_the_padding_of_pairwise_targets_is_exactly_zero_and_never_read():
    rewards, pair_values, terminated, alive, graph = pair_episodes(3, 25, 6, 3)
    assert not alive.all()
    expected = cdg.pairwise_targets(rewards, pair_values, terminated, alive, graph, 0.99, 0.95)
    assert (expected[~alive] == 0).all()
    rewards[~alive], graph[~alive] = math.nan, True
    behind = torch.cat([torch.zeros_like(alive[:1]), ~alive])  # W(s_t+1) of a last step is read, what is behind is not
    behind[1:] &= torch.cat([torch.zeros_like(alive[:1]), ~alive])[:-1] | terminated
    pair_values[behind] = math.nan
    assert torch.equal(cdg.pairwise_targets(rewards, pair_values, terminated, alive, graph, 0.99, 0.95), expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), T=st.integers(1, 12), E=st.integers(1, 3), order=st.permutations(range(4)))
def test_relabelling_the_agents_of_pairwise_targets(seed, T, E, order):
    """With lambda = 1, where it does not matter which of several agents that meet j at the same time is followed."""
    rewards, pair_values, terminated, alive, graph = pair_episodes(seed, T, E, 4)
    terminated = alive & ~torch.cat([alive[1:], torch.zeros_like(alive[:1])])

    def relabelled(x):
        return x[..., order, :][..., order]

    expected = relabelled(cdg.pairwise_targets(rewards, pair_values, terminated, alive, graph, 0.99, 1.0))
    data = rewards[..., order], relabelled(pair_values), terminated, alive, relabelled(graph)
    torch.testing.assert_close(cdg.pairwise_targets(*data, 0.99, 1.0), expected, rtol=1e-5, atol=1e-5)


# THE PREDICTABLE ADVANTAGE
def loop_predictable(rewards, values, terminated, alive, graph, gamma, lam, before):
    """The recursion of the docstring, one entry after the other, from the definition of the meeting times."""
    T, E, N = rewards.shape
    own, deltas = (loop_gae(rewards, values, terminated, alive, gamma, x) for x in (lam, 0))
    met = torch.cat([loop_meeting_times(graph, alive), torch.full((1, E, N, N), math.inf)])
    result = torch.zeros((T + 1, E, N, N), dtype=torch.float64)
    for e in range(E):
        for t in reversed(range(int(alive[:, e].sum()))):
            for i in range(N):
                influenced = [i] + [k for k in range(N) if graph[t, e, i, k] and k != i]
                for j in range(N):
                    via = min(influenced, key=lambda k: met[t + 1, e, k, j])
                    later = deltas[t, e, j] + gamma * before * result[t + 1, e, via, j]
                    result[t, e, i, j] = own[t, e, j] if i == j or graph[t, e, i, j] else later
    return result[:-1].sum(-1)


@settings(max_examples=80, deadline=None)
@given(**shapes, **discounts, fraction=st.floats(0, 1), edge_probability=st.floats(0, 1))
def test_predictable_gae_is_the_recursion(seed, T, E, N, gamma, lam, fraction, edge_probability):
    """Episodes of random lengths, from one step on, that are terminated or cut."""
    data = episodes(seed, T, E, N, edge_probability)
    expected = loop_predictable(*data, gamma, lam, fraction * lam)
    result = cdg.predictable_gae(*data, gamma, lam, fraction * lam)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T, N", [(50, 3), (150, 10)])
@pytest.mark.parametrize("before", [0.0, 0.5])
def test_predictable_gae_at_the_sizes_of_training(T, N, before):
    data = episodes(0, T, 2, N, edge_probability=0.05)
    expected = loop_predictable(*data, 0.99, 0.95, before)
    torch.testing.assert_close(cdg.predictable_gae(*data, 0.99, 0.95, before).double(), expected, rtol=1e-4, atol=1e-4)


def test_limits_of_the_predictable_advantage():
    rewards, values, terminated, alive, graph = episodes(7, 30, 4, 3)
    data = rewards, values, terminated, alive
    complete, identity = torch.ones_like(graph), torch.eye(3, dtype=torch.bool).expand_as(graph)
    own, deltas = (loop_gae(*data, 0.99, x).float() for x in (0.95, 0))
    everybody = own.sum(-1, keepdim=True).expand_as(own)  # the global advantage
    for edges, before in ((complete, 0.0), (complete, 0.5), (graph, 0.95), (identity, 0.95)):
        torch.testing.assert_close(
            cdg.predictable_gae(*data, edges, 0.99, 0.95, before), everybody, rtol=1e-4, atol=1e-4
        )
    mine = cdg.predictable_gae(*data, identity, 0.99, 0.95, 0.0)
    torch.testing.assert_close(mine, own + deltas.sum(-1, keepdim=True) - deltas, rtol=1e-4, atol=1e-4)
    one_step = cdg.predictable_gae(*data, graph, 0.99, 0.0, 0.0)
    torch.testing.assert_close(one_step, deltas.sum(-1, keepdim=True).expand_as(own), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T", [1, 20])
def test_predictable_gae_of_an_episode_of_one_step(T):
    """A terminal state is worth 0, a cut episode bootstraps; T = 1 or padding behind makes no difference."""
    rewards, values, _, _, graph = episodes(8, T, 4, 2)
    alive = torch.zeros((T, 4), dtype=torch.bool)
    alive[0] = True
    terminated = alive & (torch.arange(4) % 2 == 0)
    result = cdg.predictable_gae(rewards, values, terminated, alive, graph, 0.9, 0.95, 0.3)
    deltas = rewards[0] + 0.9 * values[1] * torch.tensor([0.0, 1, 0, 1]).unsqueeze(-1) - values[0]
    torch.testing.assert_close(result[0], deltas.sum(-1, keepdim=True).expand(4, 2))
    assert (result[1:] == 0).all()


def test_the_padding_of_predictable_gae_is_exactly_zero_and_never_read():
    rewards, values, terminated, alive, graph = episodes(9, 25, 6, 3)
    assert not alive.all()
    expected = cdg.predictable_gae(rewards, values, terminated, alive, graph, 0.99, 0.95, 0.5)
    assert (expected[~alive] == 0).all()
    rewards[~alive], graph[~alive] = math.nan, True
    over = torch.cat([torch.zeros_like(alive[:1]), ~alive])
    values[over & ~torch.cat([alive[:1], alive & ~terminated])] = math.nan  # V(s_t+1) of a cut episode is read
    assert torch.equal(cdg.predictable_gae(rewards, values, terminated, alive, graph, 0.99, 0.95, 0.5), expected)


def test_an_edge_counts_from_the_step_after_it():
    """What an edge at t lets through is not delta_t, which counts in any case, but what follows."""
    rewards, values, terminated, alive, graph = episodes(10, 12, 3, 3, edge_probability=0.2)
    alive[:], terminated[:] = True, False
    late = rewards.clone()
    late[6:] += 1

    def change(graph):
        results = [cdg.predictable_gae(x, values, terminated, alive, graph, 0.99, 0.95, 0.0) for x in (rewards, late)]
        return (results[1] - results[0])[6]

    graph[6] = torch.eye(3, dtype=torch.bool)
    graph[6, :, 0, 1] = True
    own = sum((0.99 * 0.95) ** n for n in range(6))
    torch.testing.assert_close(change(graph), torch.tensor([2 * own + 1, own + 2, own + 2]).expand(3, 3))


def test_the_predictable_advantage_of_the_script():
    data = episodes(11, 30, 4, 3)
    result, targets = advantages("predictable", *data, before=0.5)
    assert torch.equal(result, cdg.predictable_gae(*data, 0.99, 0.95, 0.5))
    assert torch.equal(targets, cdg.gae(*data[:-1], 0.99, 0.95) + data[1][:-1])


# THE OTHER ADVANTAGES
def test_blind_advantage():
    """The definition: one's own GAE by the critic that sees, the others' by the blind one, from the meeting on."""
    rewards, _, terminated, alive, graph = episodes(5, 30, 4, 3)
    values = torch.randn((31, 4, 3, 2))
    result, targets = advantages("blind", rewards, values, terminated, alive, graph)
    seeing, blind = (loop_gae(rewards, values[..., k], terminated, alive, 0.99, 0.95) for k in (0, 1))
    met, expected = loop_meeting_times(graph, alive), seeing.clone()
    for t, e, i, j in (~met.isinf()).nonzero().tolist():
        m = int(met[t, e, i, j])
        expected[t, e, i] += 0 if i == j else (0.99 * 0.95) ** (m - t) * blind[m, e, j]
    torch.testing.assert_close(result.double()[alive], expected[alive], rtol=1e-4, atol=1e-4)
    expected = torch.stack([seeing, blind], -1) + values[:-1]
    torch.testing.assert_close(targets.double()[alive], expected[alive], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("soft", [True, False])
def test_published_advantage(soft):
    rewards, values, terminated, alive, graph = episodes(6, 30, 4, 3)
    result, targets = advantages("published", rewards, values, terminated, alive, graph, soft)
    assert torch.equal(result, cdg.multi_agent_gae(rewards, values, terminated, alive, graph, 0.99, 0.95, soft))
    assert torch.equal(targets, cdg.gae(rewards, values, terminated, alive, 0.99, 0.95) + values[:-1])


@pytest.mark.parametrize("env_id", ["Foraging-8x8-2p-4f-coop-v3", "Foraging-2s-6x6-3p-2f-v3"])
def test_the_blind_critic_sees_no_other_player(env_id):
    """Its value changes with what is one's own or common and with nothing else; the other critic's with everything."""
    env = cdg.make_env(env_id)
    N, D = env.n_agents, env.observation_space[0].shape[0]
    own = 3 * env.max_num_food + 3
    critic, obs = cdg.TwoCritics(D, own, N, 16), torch.randn(D).expand(N, D).clone()
    before = critic(obs)
    for feature in range(D):
        changed = obs.clone()
        changed[0, feature] += 1
        seeing, blind = (critic(changed) != before).unbind(-1)
        assert seeing.all() and blind[0] == (feature < own) and not blind[1:].any()


def test_a_row_of_the_pair_critic_belongs_to_one_influencer():
    """(..., N, D) -> (..., N_i, N_j): what the network knows of agent i's identity changes row i alone."""
    critic, obs = cdg.PairCritic(3 * 4, 3, 32, 3), torch.randn(5, 3, 4)
    before = critic(obs)
    with torch.no_grad():
        critic.agent_id.weight[1] += 1
    assert before.shape == (5, 3, 3)
    changed = critic(obs) != before
    assert changed[:, 1].all() and not changed[:, [0, 2]].any()
