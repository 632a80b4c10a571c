"""gae, meeting_times and multi_agent_gae against the definitions, written here as plain loops."""

import math

import pytest
import torch
from conftest import load
from hypothesis import given, settings
from hypothesis import strategies as st

dg = load("mappo_dg_lbf.py")


def episodes(seed, T, E, N, edge_probability=0.3):
    """Random rewards, values, terminated, alive, graph: episodes of random lengths, half of them truncated."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn((T, E, N), generator=g), torch.randn((T + 1, E, N), generator=g)
    lengths = torch.randint(1, T + 1, (E,), generator=g)
    steps = torch.arange(T).unsqueeze(1)
    alive = steps < lengths
    terminated = (steps == lengths - 1) & (torch.rand(E, generator=g) < 0.5)
    graph = (torch.rand((T, E, N, N), generator=g) < edge_probability) | torch.eye(N, dtype=torch.bool)
    return rewards, values, terminated, alive, graph


def loop_gae(rewards, values, terminated, alive, gamma, lam):
    """The textbook sum, for each start separately."""
    T, E, N = rewards.shape
    result = torch.zeros((T, E, N), dtype=torch.float64)
    for e in range(E):
        length = int(alive[:, e].sum())
        for start in range(length):
            for t in range(start, length):
                delta = rewards[t, e] + gamma * (1 - terminated[t, e].double()) * values[t + 1, e] - values[t, e]
                result[start, e] += (gamma * lam) ** (t - start) * delta
    return result


def loop_multi_agent_gae(rewards, values, terminated, alive, graph, gamma, lam, soft):
    """The definition: path products of the graph from every start, the TD errors weighted by what they reach."""
    T, E, N = rewards.shape
    result = torch.zeros((T, E, N), dtype=torch.float64)
    for e in range(E):
        length = int(alive[:, e].sum())
        for start in range(length):
            paths = torch.eye(N, dtype=torch.float64)
            for t in range(start, length):
                delta = rewards[t, e] + gamma * (1 - terminated[t, e].double()) * values[t + 1, e] - values[t, e]
                paths = ((paths @ graph[t, e].double()) > 0).double()
                weights = lam * paths + (1 - lam) if soft else paths
                result[start, e] += (gamma * lam) ** (t - start) * weights @ delta.double()
    return result


def loop_meeting_times(graph, alive):
    T, E, N, _ = graph.shape
    result = torch.full((T, E, N, N), math.inf)
    for e in range(E):
        length = int(alive[:, e].sum())
        for start in range(length):
            paths = torch.eye(N, dtype=torch.float64)
            for t in range(start, length):
                paths = ((paths @ graph[t, e].double()) > 0).double()
                result[start, e][(paths > 0) & result[start, e].isinf()] = t
    return result


shapes = {"seed": st.integers(0, 10**6), "T": st.integers(1, 12), "E": st.integers(1, 4), "N": st.integers(1, 6)}
discounts = {"gamma": st.floats(0, 1), "lam": st.floats(0, 1)}


@settings(max_examples=60, deadline=None)
@given(**shapes, **discounts)
def test_gae_is_the_textbook_sum(seed, T, E, N, gamma, lam):
    rewards, values, terminated, alive, _ = episodes(seed, T, E, N)
    expected = loop_gae(rewards, values, terminated, alive, gamma, lam)
    torch.testing.assert_close(
        dg.gae(rewards, values, terminated, alive, gamma, lam).double(), expected, rtol=1e-4, atol=1e-4
    )


@settings(max_examples=60, deadline=None)
@given(**shapes, edge_probability=st.floats(0, 1))
def test_meeting_times_are_first_reachability(seed, T, E, N, edge_probability):
    _, _, _, alive, graph = episodes(seed, T, E, N, edge_probability)
    assert torch.equal(dg.meeting_times(graph, alive), loop_meeting_times(graph, alive))


@settings(max_examples=80, deadline=None)
@given(**shapes, **discounts, edge_probability=st.floats(0, 1), soft=st.booleans())
def test_multi_agent_gae_is_the_double_sum(seed, T, E, N, gamma, lam, edge_probability, soft):
    data = episodes(seed, T, E, N, edge_probability)
    expected = loop_multi_agent_gae(*data, gamma, lam, soft)
    torch.testing.assert_close(dg.multi_agent_gae(*data, gamma, lam, soft).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T, N", [(50, 3), (150, 10)])
def test_multi_agent_gae_at_the_sizes_of_training(T, N):
    data = episodes(0, T, 3, N, edge_probability=0.05)
    expected = loop_multi_agent_gae(*data, 0.99, 0.95, soft=True)
    torch.testing.assert_close(dg.multi_agent_gae(*data, 0.99, 0.95).double(), expected, rtol=1e-4, atol=1e-4)


def test_limits_of_the_graph():
    """Complete graph: the global-reward advantage; identity: the local one; soft mixes them with lambda."""
    rewards, values, terminated, alive, graph = episodes(1, 30, 4, 3)
    own = dg.gae(rewards, values, terminated, alive, 0.99, 0.95)
    total = own.sum(-1, keepdim=True).expand_as(own)
    complete, identity = torch.ones_like(graph), torch.eye(3, dtype=torch.bool).expand_as(graph)

    def advantages(graph, soft):
        return dg.multi_agent_gae(rewards, values, terminated, alive, graph, 0.99, 0.95, soft)

    torch.testing.assert_close(advantages(complete, soft=False), total)
    torch.testing.assert_close(advantages(identity, soft=False), own)
    torch.testing.assert_close(advantages(complete, soft=True), total)
    torch.testing.assert_close(advantages(identity, soft=True), 0.95 * own + 0.05 * total)


def test_one_step_cases():
    """lambda = 0 leaves the TD errors; T = 1 and episodes that end at t = 0 need no special treatment."""
    rewards, values, terminated, alive, graph = episodes(2, 20, 4, 3)
    deltas = rewards + 0.9 * values[1:] * ~terminated.unsqueeze(-1) - values[:-1]
    deltas[~alive] = 0
    hard = dg.multi_agent_gae(rewards, values, terminated, alive, graph, 0.9, 0.0, soft=False)
    torch.testing.assert_close(hard, torch.einsum("teij,tej->tei", graph.float(), deltas))
    soft = dg.multi_agent_gae(rewards, values, terminated, alive, graph, 0.9, 0.0, soft=True)
    torch.testing.assert_close(soft, deltas.sum(-1, keepdim=True).expand_as(deltas))

    alive = torch.zeros((20, 4), dtype=torch.bool)
    alive[0] = True  # every episode ends at t = 0, half of them in a terminal state
    terminated = alive & (torch.arange(4) % 2 == 0)
    first = [x[:n] for x, n in zip((rewards, values, terminated, alive, graph), (1, 2, 1, 1, 1))]
    long = dg.multi_agent_gae(rewards, values, terminated, alive, graph, 0.9, 0.95)
    torch.testing.assert_close(long[:1], dg.multi_agent_gae(*first, 0.9, 0.95))
    assert (long[1:] == 0).all()


def test_an_edge_counts_from_its_own_step():
    """An edge that is present at t0 already counts for delta_t0, one that comes later from its own step on."""
    rewards, values = torch.zeros((3, 1, 2)), torch.zeros((4, 1, 2))
    rewards[:, 0, 1] = torch.tensor([1.0, 10.0, 100.0])
    alive = torch.ones((3, 1), dtype=torch.bool)
    terminated = ~alive
    graph = torch.eye(2, dtype=torch.bool).repeat(3, 1, 1, 1)
    graph[1, 0, 0, 1] = True
    advantages = dg.multi_agent_gae(rewards, values, terminated, alive, graph, 1.0, 1.0, soft=False)
    assert advantages[:, 0, 0].tolist() == [110.0, 110.0, 0.0]
    assert dg.meeting_times(graph, alive)[:, 0, 0, 1].tolist() == [1.0, 1.0, math.inf]


def test_orientation():
    """Only 0 -> 2 and only agent 2 is rewarded: agent 0 is credited, agent 1 is not; transposed, agent 0 is not."""
    rewards = torch.zeros((4, 1, 3))
    rewards[3, 0, 2] = 1.0
    values = torch.zeros((5, 1, 3))
    alive = torch.ones((4, 1), dtype=torch.bool)
    terminated = ~alive
    graph = torch.eye(3, dtype=torch.bool).repeat(4, 1, 1, 1)
    graph[1, 0, 0, 2] = True
    credit = dg.multi_agent_gae(rewards, values, terminated, alive, graph, 0.99, 0.95, soft=False)[:, 0]
    assert (credit[:2, 0] > 0).all() and (credit[2:, 0] == 0).all()  # up to the edge, not after it
    assert (credit[:, 1] == 0).all() and (credit[:, 2] > 0).all()
    transposed = graph.transpose(-1, -2)
    credit = dg.multi_agent_gae(rewards, values, terminated, alive, transposed, 0.99, 0.95, soft=False)[:, 0]
    assert (credit[:, 0] == 0).all()


def test_paths_compose_forward_in_time():
    """0 -> 1 then 1 -> 2 is a path, 1 -> 2 then 0 -> 1 is none."""
    graph = torch.eye(3, dtype=torch.bool).repeat(2, 2, 1, 1)
    graph[0, 0, 0, 1] = graph[1, 0, 1, 2] = True
    graph[0, 1, 1, 2] = graph[1, 1, 0, 1] = True
    met = dg.meeting_times(graph, torch.ones((2, 2), dtype=torch.bool))
    assert met[0, 0, 0, 2] == 1 and met[0, 1, 0, 2].isinf()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), T=st.integers(1, 12), E=st.integers(1, 3), order=st.permutations(range(4)))
def test_relabelling_the_agents(seed, T, E, order):
    rewards, values, terminated, alive, graph = episodes(seed, T, E, 4)
    expected = dg.multi_agent_gae(rewards, values, terminated, alive, graph, 0.99, 0.95)[..., order]
    relabelled = graph[:, :, order][..., order]
    result = dg.multi_agent_gae(rewards[..., order], values[..., order], terminated, alive, relabelled, 0.99, 0.95)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_padding_is_exactly_zero_and_never_read():
    """Whatever the padding holds, not-a-number included, the results are 0 there and unchanged elsewhere."""
    rewards, values, terminated, alive, graph = episodes(3, 25, 6, 3)
    assert not alive.all()
    expected = dg.multi_agent_gae(rewards, values, terminated, alive, graph, 0.99, 0.95)
    assert (expected[~alive] == 0).all() and (dg.gae(rewards, values, terminated, alive, 0.99, 0.95)[~alive] == 0).all()
    assert dg.meeting_times(graph, alive)[~alive].isinf().all()
    rewards[~alive], graph[~alive] = math.nan, True
    behind = torch.cat([torch.zeros_like(alive[:1]), ~alive])  # V(s_t+1) of a last step is read, what is behind is not
    behind[1:] &= torch.cat([torch.zeros_like(alive[:1]), ~alive])[:-1] | terminated
    values[behind] = math.nan
    result = dg.multi_agent_gae(rewards, values, terminated, alive, graph, 0.99, 0.95)
    assert torch.equal(result, expected)


def test_the_diagonal_of_a_graph_is_always_meant():
    _, _, _, alive, graph = episodes(4, 10, 6, 3)
    assert not alive.all() and not graph.all()
    eye = torch.eye(3, dtype=torch.bool)
    assert torch.equal(dg.meeting_times(graph & ~eye, alive), loop_meeting_times(graph | eye, alive))
