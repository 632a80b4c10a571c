"""mappo_cdg_lbf.py: the simulator's graph against brute force, the pairwise targets against the definition."""

import copy
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load, run, run_folder, run_inside, scalars
from hypothesis import given, settings
from hypothesis import strategies as st
from test_advantages import discounts, episodes, loop_gae, loop_meeting_times, shapes
from test_lbf_environment import COOP, VANILLA, towards_food

SCRIPT = "mappo_cdg_lbf.py"
cdg = load(SCRIPT)


# THE SIMULATOR'S GRAPH
def outcome(env, actions):
    """Step a copy of the environment -> each player's end cell and reward, the foods that are left."""
    constant = (env.observation_space, env.action_space, env.logger, env.np_random, env.views)
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
        for env.shared_food, expected in ((True, shared), (False, private)):
            assert set(env.counterfactual_edges(actions)) == expected
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
    assert compare(env, at_random, 300)["moved"] > 0
    seen = compare(env, towards_food, 600, crowded=0.3)
    assert min(seen[what] for what in ("moved", "rewarded and eaten", "eaten, not rewarded")) > 60
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


def test_the_graph_of_a_rollout_is_that_of_each_step(monkeypatch):
    """(T, E, N_i, N_j), row = influencer, before the step: with a spy that names one pair for each step."""
    envs = [cdg.make_env("Foraging-5x5-3p-1f-v3", seed=seed) for seed in (1, 2)]
    steps, played = [], []

    def edges(env, actions):
        steps.append((env.current_step, envs.index(env)))
        played.append(actions)
        return [(0, env.current_step % 2 + 1)]

    monkeypatch.setattr(cdg.CounterfactualForaging, "counterfactual_edges", edges)
    for _ in range(2):  # the second episode's alone counts
        steps.clear()
        played.clear()
        rollout = cdg.collect(envs, lambda obs: torch.zeros(*obs.shape[:-1], 6), torch.device("cpu"))
    graph = cdg.simulator_graph(envs)
    assert graph.shape == (*rollout.alive.shape, 3, 3) and int(rollout.alive.sum()) == len(steps)
    for (t, e), actions in zip(steps, played):
        assert rollout.alive[t, e] and rollout.actions[t, e].tolist() == actions
        expected = torch.eye(3, dtype=torch.bool)
        expected[0, t % 2 + 1] = True
        assert torch.equal(graph[t, e], expected)
    assert (graph[~rollout.alive] == torch.eye(3, dtype=torch.bool)).all()


@pytest.mark.parametrize("env_id", VANILLA + COOP)
def test_effects_are_those_of_brute_force(env_id):
    """What i adds to j's reward: step a copy in which i does nothing, compare."""
    env = cdg.make_env(env_id, winner_take_all="coop" in env_id, seed=5)
    rng, found = np.random.default_rng(0), []
    env.reset()
    for _ in range(300):
        if rng.random() < 0.3:
            crowd(env, rng)
        actions = towards_food(env, rng)
        _, rewards, _ = outcome(env, actions)
        effects = env.reward_effects(actions)
        for i in range(env.n_agents):
            _, without_i, _ = outcome(env, [*actions[:i], 0, *actions[i + 1 :]])
            for j in set(range(env.n_agents)) - {i}:
                assert effects.get((i, j), 0.0) == pytest.approx(rewards[j] - without_i[j], abs=1e-9)
                found.append(effects.get((i, j), 0.0))
        if env.step(actions)[2]:
            env.reset()
    assert sum(effect > 0 for effect in found) > 5
    # who joins others that are strong enough without him takes from them; two agents that food needs both cannot
    assert any(effect < 0 for effect in found) == ("2p" not in env_id)


def test_the_effects_of_a_rollout_are_those_of_each_step(monkeypatch):
    envs = [cdg.make_env("Foraging-5x5-3p-1f-v3", seed=seed) for seed in (1, 2)]
    monkeypatch.setattr(cdg.CounterfactualForaging, "reward_effects", lambda env, _: {(2, 1): float(env.current_step)})
    rollout = cdg.collect(envs, lambda obs: torch.zeros(*obs.shape[:-1], 6), torch.device("cpu"))
    effects = cdg.known_effects(envs)
    steps = torch.arange(len(rollout.alive)).unsqueeze(1) * rollout.alive
    assert torch.equal(effects[..., 2, 1], steps.float()) and effects.sum() == steps.sum()


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


def advantages(
    advantage,
    rewards,
    values,
    terminated,
    alive,
    graph,
    soft=True,
    gamma=0.99,
    gae_lambda=0.95,
    effects=None,
    negative_effects=True,
):
    args = SimpleNamespace(advantage=advantage, gamma=gamma, gae_lambda=gae_lambda, soft=soft)
    args.negative_effects = negative_effects
    rollout = SimpleNamespace(rewards=rewards, terminated=terminated, alive=alive)
    return cdg.credit(args, rollout, values, graph, effects)


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
    alive = torch.ones((5, 1), dtype=torch.bool)
    terminated = torch.tensor([0, 0, 0, 0, 1], dtype=torch.bool).unsqueeze(1)
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


# THE OTHER ADVANTAGES
def test_the_difference_is_the_gae_of_what_one_earns_and_adds_to_the_others_rewards():
    rewards, values, terminated, alive, graph = episodes(5, 30, 4, 3)
    effects = torch.randn((30, 4, 3, 3)) * alive[..., None, None]
    result, targets = advantages("difference", rewards, values, terminated, alive, graph, effects=effects)
    expected = loop_gae(rewards + effects.sum(-1), values, terminated, alive, 0.99, 0.95)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(targets.double(), expected + values[:-1], rtol=1e-4, atol=1e-4)


def test_without_negative_effects_help_counts_and_taking_does_not():
    rewards, values, terminated, alive, graph = episodes(5, 30, 4, 3)
    effects = torch.randn((30, 4, 3, 3)) * alive[..., None, None]
    data = rewards, values, terminated, alive, graph
    result, _ = advantages("difference", *data, effects=effects, negative_effects=False)
    expected, _ = advantages("difference", *data, effects=effects.clamp(min=0))
    assert torch.equal(result, expected)


def options_of(graph, **changes):
    return SimpleNamespace(**vars(cdg.Args()) | {"graph": graph} | changes)


def test_a_complete_graph_gives_global_rewards_and_none_local_ones():
    """Where only edges are known, an edge adds the whole of j's reward."""
    rewards, values, terminated, alive, graph = episodes(6, 30, 4, 3)
    rollout = SimpleNamespace(rewards=rewards, terminated=terminated, alive=alive)
    unused = torch.randn((30, 4, 3, 3))
    local = loop_gae(rewards, values, terminated, alive, 0.99, 0.95)
    for kind, expected in (("complete", local.sum(-1, keepdim=True).expand_as(local)), ("identity", local)):
        edges, effects, _ = cdg.dependence_graph(options_of(kind), graph, unused, None, None, rollout)
        team = rewards.sum(-1, keepdim=True).expand_as(rewards) if kind == "complete" else rewards
        torch.testing.assert_close(rewards + effects.sum(-1), team)
        result, _ = advantages(
            "difference", rewards, torch.zeros_like(values), terminated, alive, edges, effects=effects
        )
        expected = loop_gae(team, torch.zeros_like(values), terminated, alive, 0.99, 0.95)
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
    assert cdg.effects_statistics(unused, unused)["effects_error"] == 0
    sizes = cdg.effects_statistics(torch.zeros_like(unused), unused)
    assert sizes["effects_error"] == sizes["simulator_effects"] == pytest.approx(unused.abs().sum() / 4)
    edges, effects, _ = cdg.dependence_graph(options_of("simulator"), graph, unused, None, None, rollout)
    assert edges is graph and effects is unused


@pytest.mark.parametrize("soft", [True, False])
def test_published_advantage(soft):
    rewards, values, terminated, alive, graph = episodes(6, 30, 4, 3)
    result, targets = advantages("published", rewards, values, terminated, alive, graph, soft)
    assert torch.equal(result, cdg.multi_agent_gae(rewards, values, terminated, alive, graph, 0.99, 0.95, soft))
    assert torch.equal(targets, cdg.gae(rewards, values, terminated, alive, 0.99, 0.95) + values[:-1])


@pytest.mark.parametrize("advantage", ["difference", "pairwise", "published"])
def test_a_critic_has_the_values_that_its_advantage_needs(advantage):
    env = cdg.make_env("Foraging-5x5-3p-1f-v3")
    D = env.observation_space[0].shape[0]
    critic = cdg.make_critic(SimpleNamespace(advantage=advantage, hidden_dim=16), D, 3)
    rewards, _, terminated, alive, graph = episodes(13, 7, 4, 3)
    values = critic(torch.randn(8, 4, 3, D)).detach()
    effects = torch.randn(7, 4, 3, 3)
    result, targets = advantages(advantage, rewards, values, terminated, alive, graph, effects=effects)
    assert result.shape == rewards.shape and targets.shape == values[:-1].shape


def test_a_row_of_the_pair_critic_belongs_to_one_influencer():
    """(..., N, D) -> (..., N_i, N_j): what the network knows of agent i's identity changes row i alone."""
    critic, obs = cdg.PairCritic(3 * 4, 3, 32, 3), torch.randn(5, 3, 4)
    before = critic(obs)
    with torch.no_grad():
        critic.agent_id[1] += 1
    assert before.shape == (5, 3, 3)
    changed = critic(obs) != before
    assert changed[:, 1].all() and not changed[:, [0, 2]].any()


# THE LEARNED GRAPH
def skilled_rollout(env_id, num_envs=4, seed=0, envs=None):
    """A rollout by players that go to food and load, as Rollout, and the simulator's graph."""
    envs = envs or [cdg.make_env(env_id, "coop" in env_id, seed + e) for e in range(num_envs)]
    rng = np.random.default_rng(seed)
    logits = torch.zeros((num_envs, envs[0].n_agents, 6))

    def actor(obs):
        for e, env in enumerate(envs):
            actions = torch.tensor(towards_food(env, rng))
            logits[e] = 50.0 * torch.nn.functional.one_hot(actions, 6)
        return logits

    rollout = cdg.collect(envs, actor, torch.device("cpu"))
    return rollout, cdg.simulator_graph(envs)


def test_the_outcome_is_what_the_environment_did():
    rollout, _ = skilled_rollout("Foraging-8x8-3p-2f-v3")
    replay = cdg.Replay(1000, 3, 15)
    replay.add(rollout)
    steps = replay.take(torch.arange(len(replay)), "cpu")
    assert torch.equal(steps.obs, rollout.obs[:-1][rollout.alive])
    assert torch.equal(steps.next_obs, rollout.obs[1:][rollout.alive])
    assert torch.equal(steps.actions, rollout.actions[rollout.alive])
    rewards = steps.rewards
    outcome = cdg.outcome(steps)
    own = slice(6, 8)  # behind two foods
    moved = (steps.next_obs - steps.obs)[..., own]
    assert torch.equal(moved, torch.tensor(cdg.MOVES, dtype=torch.float)[outcome.move])
    assert len(set(outcome.move.flatten().tolist())) == 5
    assert torch.equal(outcome.reward > 0, rewards > 0) and outcome.gone.any()
    assert torch.equal(outcome.gone.any(-1), (rewards > 0).any(-1))  # rewards are for food that disappears


def test_the_replay_keeps_the_last_steps_and_is_restored_from_a_checkpoint():
    rollouts = [skilled_rollout("Foraging-5x5-2p-1f-v3", 2, seed)[0] for seed in range(12)]
    lengths = [int(rollout.alive.sum()) for rollout in rollouts]
    size = sum(lengths) * 2 // 3  # the ring is written over
    replay, other = cdg.Replay(size, 2, 9), cdg.Replay(size, 2, 9)
    rewards = torch.zeros((0, 2))
    for k, rollout in enumerate(rollouts):
        replay.add(rollout)
        rewards = torch.cat([rewards, rollout.rewards[rollout.alive]])[-size:]
        assert len(replay) == min(size, sum(lengths[: k + 1])) == len(rewards)
        kept = replay.rewards[: len(replay)]
        assert torch.equal(kept.sort(0).values, rewards.sort(0).values)
        other = cdg.Replay(size, 2, 9)
        other.load_state_dict(replay.state_dict())
        everything = torch.arange(len(replay))
        assert len(other) == len(replay) and other.added == replay.added
        for mine, restored in zip(replay.take(everything, "cpu"), other.take(everything, "cpu"), strict=True):
            assert torch.equal(mine, restored)
    small = cdg.Replay(5, 2, 9)  # less than a rollout
    small.add(rollouts[0])
    assert len(small) == 5 and torch.equal(
        small.rewards.sort(0).values, rollouts[0].rewards[rollouts[0].alive][-5:].sort(0).values
    )


def test_the_forward_model_learns_the_simulators_graph():
    """On skilled play: the edges that it finds are the simulator's, as hardly any pair is at random."""
    torch.manual_seed(0)
    model, replay = cdg.ForwardModel(3, 6, 10), cdg.Replay(100_000, 3, 18)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for seed in range(0, 400, 10):
        rollout, truth = skilled_rollout("Foraging-10x10-3p-3f-v3", 10, seed)
        replay.add(rollout)
        losses = cdg.update_forward_model(model, optimizer, replay)
    assert all(loss < 0.35 for loss in losses.values()), losses
    rollout, truth = skilled_rollout("Foraging-10x10-3p-3f-v3", 20, 1000)
    alive = rollout.alive
    graph = cdg.forward_graph(model, rollout.obs[:-1][alive], rollout.actions[alive], False, 0.3)
    metrics = cdg.graph_statistics(graph, truth[alive])
    base_rate = float(metrics["simulator_edges_per_agent"]) / 2
    assert metrics["simulator_precision"] > 3 * base_rate and metrics["simulator_recall"] > 0.5, metrics

    envs = [cdg.make_env("Foraging-10x10-3p-3f-v3", seed=2000 + e) for e in range(10)]
    rollout, _ = skilled_rollout("Foraging-10x10-3p-3f-v3", 10, 2000, envs)
    truth = cdg.known_effects(envs)[rollout.alive]
    effects = learned_effects(model, rollout)
    assert (effects - truth).abs().sum() < 0.5 * truth.abs().sum()


def learned_effects(model, rollout):
    """forward_effects of the steps that took place."""
    alive = rollout.alive
    return cdg.forward_effects(model, rollout.obs[:-1][alive], rollout.actions[alive], rollout.rewards[alive])


def test_learned_effects_are_rewards_less_those_expected_without_an_action():
    """Of steps with rewards, and of pairs in which the model sees an effect."""

    class Fixed:
        class_rewards = torch.arange(len(cdg.REWARD_SIZES) + 1) / 10

        def __call__(self, obs, actions):
            reward = torch.zeros((*actions.shape, len(self.class_rewards)))
            reward[..., 0] = 100.0
            # agent 1 gets 0.3 iff agents 0 and 2 load, but the model takes it that agent 2 alone brings 0.1
            reward[:, 1, 1] = 150.0 * (actions[:, 2] == 5)
            reward[:, 1, 3] = 200.0 * (actions[:, 0] == 5) * (actions[:, 2] == 5)
            return cdg.Outcome(None, reward, None)

    actions = torch.tensor([[5, 1, 5], [5, 5, 5], [0, 2, 5]])
    rewards = torch.tensor([[0.0, 0.35, 0.2], [0.0, 0.0, 0.0], [0.0, 0.15, 0.0]])
    effects = cdg.forward_effects(Fixed(), torch.zeros((3, 3, 12)), actions, rewards)
    expected = torch.zeros((3, 3, 3))
    expected[0, 0, 1] = 0.25
    expected[0, 2, 1] = 0.35
    expected[2, 2, 1] = 0.15
    torch.testing.assert_close(effects, expected)


def test_the_untrained_model_sees_no_effects():
    """Learning begins like that from local rewards."""
    rollout, _ = skilled_rollout("Foraging-5x5-3p-1f-v3")
    assert rollout.rewards.sum() > 0 and (learned_effects(cdg.ForwardModel(3, 6, 5), rollout) == 0).all()


@pytest.mark.parametrize("env_id", ["Foraging-8x8-2p-4f-coop-v3", "Foraging-10x10-2p-3f-coop-v3"])
def test_two_agents_that_need_each_other_take_nothing_from_each_other(env_id):
    """So --no-negative-effects changes nothing on these two tasks; with three agents it does."""
    envs = [cdg.make_env(env_id, True, e) for e in range(20)]
    skilled_rollout(env_id, 20, 0, envs)
    effects = cdg.known_effects(envs)
    assert effects.min() == 0 and effects.max() > 0
    envs = [cdg.make_env("Foraging-10x10-3p-3f-v3", seed=e) for e in range(20)]
    skilled_rollout("Foraging-10x10-3p-3f-v3", 20, 0, envs)
    assert cdg.known_effects(envs).min() < 0


def test_the_model_learns_who_of_two_of_one_level_wins_all():
    """Two players of level 1 load a food of level 2: the package's order decides, so players have identities."""
    torch.manual_seed(0)
    model, replay = cdg.ForwardModel(2, 6, 8), cdg.Replay(10_000, 2, 18)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for seed in range(0, 300, 10):
        envs = [cdg.make_env("Foraging-8x8-2p-4f-coop-v3", True, seed + e) for e in range(10)]
        for env in envs:
            env.min_player_level[:] = env.max_player_level[:] = 1
        rollout, _ = skilled_rollout("Foraging-8x8-2p-4f-coop-v3", 10, seed, envs)
        assert (rollout.rewards[..., 1] == 0).all()  # the first one always wins
        replay.add(rollout)
        cdg.update_forward_model(model, optimizer, replay)
    truth = cdg.known_effects(envs)[rollout.alive]
    effects = learned_effects(model, rollout)
    assert truth.sum() > 1 and (effects - truth).abs().sum() < 0.2 * truth.sum()


def test_a_change_that_the_model_does_not_foresee_is_no_edge():
    """The total variation of what becomes of j: with a model whose prediction is given."""

    class Fixed:
        num_actions = 6

        def __call__(self, obs, actions):
            B, N = actions.shape
            move = torch.zeros((B, N, 5))
            # agent 1's move is all but certain, and another one iff agent 0 loads
            move[:, 1, 0] = 50.0 * (actions[:, 0] != 5)
            move[:, 1, 1] = 50.0 * (actions[:, 0] == 5)
            gone = torch.where(actions[:, 2:3] == 5, 0.0, -100.0)  # a food: perhaps, iff agent 2 loads
            return cdg.Outcome(move, torch.zeros((B, N, 6)), gone)

    actions = torch.tensor([[0, 0, 0], [5, 3, 5]])
    eye = torch.eye(3, dtype=torch.bool).repeat(2, 1, 1)
    graph = cdg.forward_graph(Fixed(), torch.zeros((2, 3, 12)), actions, False, 0.3)
    expected = eye.clone()
    expected[:, 0, 1] = True
    assert torch.equal(graph, expected)
    graph = cdg.forward_graph(Fixed(), torch.zeros((2, 3, 12)), actions, True, 0.3)
    expected[:, 2] = True
    assert torch.equal(graph, expected)


# THE SCRIPT
SMALL = ["--env-id", "Foraging-6x6-3p-2f-v3", "--no-winner-take-all", "--num-envs", 4, "--total-timesteps", 900]
SMALL += ["--eval-interval", 300, "--eval-episodes", 5, "--checkpoint-interval", 300]
VARIANTS = [["--graph", graph] for graph in ("simulator", "learned", "reverse", "random", "complete", "identity")]
VARIANTS += [["--advantage", advantage] for advantage in ("pairwise", "published")]
VARIANTS += [["--advantage", "pairwise", "--graph", "learned", "--shared-food", "--edge-threshold", 0.1]]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: " ".join(map(str, options)))
def test_a_run_that_is_stopped_and_resumed_ends_like_one_that_is_not(options, tmp_path):
    (whole := tmp_path / "whole").mkdir()
    (parts := tmp_path / "parts").mkdir()
    assert run_inside(SCRIPT, *SMALL, *options, cwd=whole).returncode == 0
    assert run_inside(SCRIPT, *SMALL, *options, "--total-timesteps", 450, cwd=parts).returncode == 0
    done = run_inside(SCRIPT, "--resume", run_folder(parts), "--total-timesteps", 900, cwd=parts)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(run_folder(cwd) / "checkpoint.pt", weights_only=True) for cwd in (whole, parts))
    assert first["global_step"] == second["global_step"]
    for part in ("actor", "critic", "models"):
        for name, weight in first[part].items():
            assert torch.equal(weight, second[part][name]), (part, name)
    tags = scalars(run_folder(whole))
    assert {"graph/edges_per_agent", "graph/simulator_precision", "graph/simulator_recall"} <= tags.keys()
    assert ("graph/entropy_ratio_others" in tags) == ("reverse" in options)
    assert ("losses/reward_loss" in tags) == ("learned" in options)
    assert all(math.isfinite(value) for points in tags.values() for _, value in points)
    error = {value for _, value in tags["graph/effects_error"]}
    if "--graph" not in options:  # the graph is the simulator's own
        assert {value for _, value in tags["graph/simulator_precision"]} <= {0.0, 1.0}
        assert error == {0.0}
    elif "complete" in options:
        assert max(error) > 0


def test_the_script_alone_in_an_empty_folder(tmp_path):
    alone = tmp_path / SCRIPT
    alone.write_bytes((ROOT / SCRIPT).read_bytes())
    done = run(alone, *SMALL, cwd=tmp_path)
    assert "dependence graph: simulator; advantage: difference; device: cpu" in done.stdout
    assert (run_folder(tmp_path) / "evaluations.csv").exists()


def test_a_learned_graph_needs_to_see_everything(tmp_path):
    """The forward model reads cells and levels out of observations; what is not seen cannot be read."""
    done = run_inside(SCRIPT, "--env-id", "Foraging-2s-8x8-2p-2f-v3", "--graph", "learned", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "observes all" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--c", 0.5],
        ["--graph", "complete", "--graph-p", 0.3],
        ["--shared-food"],
        ["--graph", "reverse", "--advantage", "published", "--shared-food"],
        ["--graph", "learned", "--edge-threshold", 0.1],
        ["--advantage", "pairwise", "--no-negative-effects"],
        ["--replay-size", 500],
        ["--forward-learning-rate", 0.1],
        ["--no-soft"],
        ["--no-encoder"],
        ["--bf16"],
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_a_setting_that_has_no_effect_is_refused(options, tmp_path):
    """Else a sweep over it would be one run, many times."""
    done = run_inside(SCRIPT, *options, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "runs").exists()
    assert "has no effect with --graph" in done.stderr


@pytest.mark.parametrize(
    "option", [("--edge-threshold", 1.5), ("--replay-size", 0), ("--c", -1), ("--forward-learning-rate", -1)]
)
def test_bad_options(option, tmp_path):
    done = run_inside(SCRIPT, *option, cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not (tmp_path / "runs").exists()
