"""experiments/learned_graph_study.py: what it measures against, what models learn from, how edges are scored."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

for package in ("matplotlib", "pandas", "scipy", "sklearn"):
    pytest.importorskip(package, reason="needs experiments/requirements.txt")
import learned_graph_study as study  # noqa: E402

cdg = study.cdg


def skilled_steps(env_id, steps):
    """(env before the step, actions) of a skilled team."""
    env, rng = cdg.make_env(env_id, "coop" in env_id, 3), np.random.default_rng(0)
    env.reset()
    for _ in range(steps):
        actions = study.towards_food(env, 0.8, rng)
        yield env, actions
        if env.step(actions)[2]:
            env.reset()


@pytest.mark.parametrize("env_id", study.TASKS)
def test_the_truth_is_the_simulators_graph(env_id):
    found = torch.zeros(4)
    for env, actions in skilled_steps(env_id, 300):
        graphs = dict(zip(study.GRAPHS, study.true_edges(env, actions)))
        for name, shared_food in (("shared", True), ("private", False)):
            assert set(zip(*np.nonzero(graphs[name]))) == set(cdg.counterfactual_edges(env, actions, shared_food))
        assert (graphs["private"] == (graphs["move"] | graphs["reward"])).all()
        found += torch.tensor([graph.any() for graph in graphs.values()])
    assert found.min() > 10


def test_models_are_trained_on_what_became_of_the_agents():
    """Moves, classes of rewards, foods that are gone: from observations, but as the environment has them."""
    data = study.record(study.TASKS[1], 500)
    step = study.take(data, torch.arange(1500))
    move, reward, gone = study.targets(step)
    assert torch.equal(study.MOVES[move].float(), study.own_cell(step, step.next_obs) - study.own_cell(step, step.obs))
    assert torch.equal(reward > 0, step.rewards > 0)
    before, after = ((obs[:, 0, 2 : 3 * step.F : 3] > 0).sum(-1) for obs in (step.obs, step.next_obs))
    assert torch.equal(gone.sum(-1), before - after)
    assert torch.equal(gone.any(-1), (step.rewards > 0).any(-1))
    assert 5 < gone.sum() < 500
    # truth is recorded for every second iteration only
    known = data.shared.unflatten(0, (3, 500)).flatten(1).any(-1)
    assert known.tolist() == [True, False, True]


class Copy(torch.nn.Module):
    """j's outcome is the action of agent 0, for j = 1 alone."""

    def predict(self, step, actions, i=None):
        outcome = torch.zeros((*actions.shape, study.ACTIONS))
        outcome[:, 1] = study.onehot(actions[:, 0], study.ACTIONS)
        return {"move": outcome}


def test_the_score_of_an_edge_is_what_another_action_changes():
    forward = study.Forward.__new__(study.Forward)
    forward.network = Copy()
    step = SimpleNamespace(obs=torch.zeros(5, 3, 9), actions=torch.randint(6, (5, 3)), N=3)
    expected = torch.zeros(5, 3, 3)
    expected[:, 0, 1] = 1
    assert torch.equal(forward.scores(step)["move"], expected)


def test_a_relational_model_learns_who_is_in_the_way():
    """A few hundred steps of random play: collisions are ranked far above chance, whole rows of the CSV come out."""
    rows = study.study(study.TASKS[0], "relational", study.record(study.TASKS[0], 2000), 2000, list(study.STAGES))
    row = [row for row in rows if row["graph"] == row["outcome"] == "move"][-1]
    assert row["auc"] > 0.6 and row["average_precision"] > 1.5 * row["base_rate"]
    assert {row["stage"] for row in rows} <= set(study.STAGES) and 0 <= row["recall_0.5"] <= row["recall_0.1"] <= 1


def test_the_committed_table_can_be_drawn():
    text = study.tables(study.pd.read_csv(study.RESULTS))
    assert all(task in text for task in study.TASKS) and "relational" in text and "nan" not in text.lower()
