"""experiments/learned_graph_study.py: what it measures against, what models learn from, how edges are scored."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run, run_folder

for package in ("matplotlib", "pandas", "scipy", "yaml", "PIL"):
    pytest.importorskip(package, reason="needs experiments/requirements.txt")
import pandas as pd  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import learned_graph_study as study  # noqa: E402
import report  # noqa: E402

cdg = study.cdg


# TRUTH
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
        graphs = dict(zip(study.GRAPHS, study.true_edges(env, actions), strict=True))
        for name, env.shared_food in (("shared", True), ("private", False)):
            assert set(zip(*np.nonzero(graphs[name]), strict=True)) == set(env.counterfactual_edges(actions))
        assert (graphs["private"] == (graphs["move"] | graphs["reward"])).all()
        found += torch.tensor([graph.any() for graph in graphs.values()])
    assert found.min() > 10


@pytest.fixture(scope="module")
def recorded():
    """Three stages of 500 steps."""
    return study.record(study.TASKS[1], 500)


def test_models_are_trained_on_what_became_of_the_agents(recorded):
    """Moves, classes of rewards, foods that are gone: from observations, but as the environment has them."""
    steps = study.take(recorded, torch.arange(1500))
    actual = cdg.outcome(steps)
    foods, cells, _ = cdg.read_observations(steps.obs)
    foods_after, cells_after, _ = cdg.read_observations(steps.next_obs)
    assert torch.equal(torch.tensor(cdg.MOVES)[actual.move].float(), cells_after - cells)
    assert torch.equal(actual.reward > 0, steps.rewards > 0)
    assert torch.equal(actual.gone.sum(-1), foods.there.sum(-1) - foods_after.there.sum(-1))
    assert torch.equal(actual.gone.any(-1), (steps.rewards > 0).any(-1))
    assert 5 < actual.gone.sum() < 500


def test_edges_are_recorded_for_every_second_iteration_and_effects_for_every_step(recorded, monkeypatch):
    known = recorded.graphs.unflatten(0, (3, 500)).flatten(1).any(-1)
    assert known.tolist() == [True, False, True]
    affected = (recorded.effects != 0).flatten(1).any(-1)
    # whoever has an effect loads, and without the reward of somebody there is none
    assert affected.sum() > 5 and not (affected & (recorded.steps.rewards == 0).all(-1)).any()
    assert not recorded.effects.diagonal(dim1=-2, dim2=-1).any()
    # another action that changes a reward, nothing included, is an edge
    reward_edges = recorded.graphs[:, study.GRAPHS.index("reward")]
    scored = reward_edges.flatten(1).any(-1)
    assert scored.any() and reward_edges[scored][recorded.effects[scored] != 0].all()
    monkeypatch.setattr(cdg.CounterfactualForaging, "reward_effects", lambda env, _: {(2, 1): 0.5})
    effects = study.record(study.TASKS[1], 10).effects
    assert (effects[:, 2, 1] == 0.5).all() and effects.sum() == 0.5 * len(effects)


# SCORES
class Copy(torch.nn.Module):
    """j's move is the action of agent 0, for j = 1 alone; its reward never changes."""

    def predict(self, steps, actions, _):
        move = torch.zeros((*actions.shape, study.A))
        move[:, 1] = cdg.one_hot(actions[:, 0], study.A)
        return {"move": move, "reward": torch.ones((*actions.shape, 1))}


def any_steps(B=5, N=3):
    obs = torch.zeros(B, N, 3 * N + 9)
    return cdg.Steps(obs, obs, torch.randint(6, (B, N)), torch.zeros(B, N))


def test_the_score_of_an_edge_is_what_another_action_changes():
    scores = study.Forward(torch.nn.Linear(1, 1)).scores
    forward = scores.__self__
    forward.network = Copy()
    expected = torch.zeros(5, 3, 3)
    expected[:, 0, 1] = 1
    found = scores(any_steps())
    assert torch.equal(found["move"], expected) and torch.equal(found["move+reward"], expected)
    assert not found["reward"].any()


def test_parts_of_an_outcome_are_taken_as_independent():
    half, fifth = torch.tensor(0.5), torch.tensor(0.2)
    combined = study.combined({"move": half, "reward": fifth, "gone": half})
    assert combined["move+reward"] == pytest.approx(1 - 0.5 * 0.8)
    assert combined["move+reward+gone"] == pytest.approx(1 - 0.5 * 0.8 * 0.5)
    foods = torch.tensor([[0.5, 0.0, 0.9]]), torch.tensor([[0.0, 0.5, 0.9]])
    assert study.change("gone", *foods).tolist() == [[0.75]]
    classes = torch.tensor([[[0.5, 0.5, 0.0]]]), torch.tensor([[[0.0, 0.5, 0.5]]])
    assert study.change("move", *classes).tolist() == [[0.5]]


@pytest.fixture(scope="module")
def trained(recorded):
    """The relational model after some steps on the record."""
    torch.manual_seed(0)
    model = study.relational(recorded)
    rewarded = study.rewarded_steps(recorded)
    for _ in range(60):
        index = np.concatenate([np.random.default_rng(0).integers(0, 1500, 64), rewarded[:64]])
        model.update(study.take(recorded, index))
    return model


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5])
def test_scores_above_a_threshold_are_the_edges_of_training(recorded, trained, threshold):
    steps = study.take(recorded, study.rewarded_steps(recorded))
    scores = trained.scores(steps)
    others = cdg.other_agents(scores["move"])
    for shared_food, outcome in ((False, "move+reward"), (True, "move+reward+gone")):
        graph = cdg.forward_graph(trained.network.model, steps.obs, steps.actions, shared_food, threshold)
        assert torch.equal(scores[outcome][:, others] > threshold, graph[:, others])
        assert 0 < graph[:, others].sum() < graph[:, others].numel()


def test_the_loss_is_that_of_training(recorded):
    """On a replay of one rewarded step, so that every batch is the same."""
    index = study.rewarded_steps(recorded)[:1]
    replay = cdg.Replay(10, 3, recorded.steps.obs.shape[-1])
    replay.load_state_dict({name: part[index] for name, part in recorded.steps._asdict().items()} | {"added": 1})
    model = study.Relational(recorded)
    expected = model.loss(study.take(recorded, index))
    optimizer = torch.optim.SGD(model.model.parameters(), lr=0.0)
    losses = cdg.update_forward_model(model.model, optimizer, replay, num_steps=1)
    torch.testing.assert_close(sum(losses.values()), expected.detach())


# MEASURES
def test_average_precision_by_hand():
    truth = np.array([True, False, True, False])
    # ranks of the true ones 1 and 3: precision 1 and 2/3
    assert study.average_precision(truth, np.array([0.9, 0.5, 0.4, 0.1])) == pytest.approx((1 + 2 / 3) / 2)
    # ranks 2 and 4: precision 1/2 and 2/4
    assert study.average_precision(truth, np.array([0.8, 0.9, 0.1, 0.5])) == pytest.approx((1 / 2 + 2 / 4) / 2)
    # the first three are equal, whatever their order: both true ones are found among three
    for order in ([0, 1, 2, 3], [1, 0, 2, 3], [2, 0, 1, 3]):
        assert study.average_precision(truth[order], np.array([1.0, 1.0, 1.0, 0.0])[order]) == pytest.approx(2 / 3)
    assert study.average_precision(truth, np.zeros(4)) == pytest.approx(1 / 2)


def test_average_precision_is_scikit_learns():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for digits in (0, 1, 8):
        truth = rng.random(500) < 0.2
        score = (rng.random(500) + truth).round(digits)
        assert study.average_precision(truth, score) == pytest.approx(metrics.average_precision_score(truth, score))


def test_the_agreement_of_effects_by_hand():
    truth = torch.zeros(2, 2, 2)
    truth[0, 0, 1] = 0.4
    truth[1, 1, 0] = -0.1
    exact = study.measure_effects(truth, truth)
    assert (exact["pairs"], exact["affected_pairs"]) == (4, 2)
    assert exact["correlation"] == pytest.approx(1) and exact["relative_error"] == exact["unaffected_error"] == 0
    learned = truth / 2
    learned[1, 0, 1] = 0.3
    learned[:, 0, 0] = 7.0  # i = j is no pair
    half = study.measure_effects(learned, truth)
    assert half["relative_error"] == pytest.approx((0.2 + 0.05 + 0.3) / 0.5)
    assert half["unaffected_error"] == pytest.approx(0.3 / 0.5)
    pairs = [0.4, 0.0, 0.0, -0.1], [0.2, 0.0, 0.3, -0.05]
    assert half["correlation"] == pytest.approx(np.corrcoef(*pairs)[0, 1])
    none = study.measure_effects(torch.zeros_like(truth), truth)
    assert np.isnan(none["correlation"]) and none["relative_error"] == 1
    nothing_to_learn = study.measure_effects(truth, torch.zeros_like(truth))
    assert np.isnan(nothing_to_learn["relative_error"]) and np.isnan(nothing_to_learn["unaffected_error"])


# THE STUDY
def test_a_relational_model_learns_who_is_in_the_way():
    """A few thousand steps of play: collisions are ranked far above chance, whole rows of the CSV come out."""
    data = study.record(study.TASKS[0], 2000)
    rows = study.study_graphs(study.TASKS[0], "relational", data, 2000, list(study.STAGES))
    row = [row for row in rows if row["graph"] == row["outcome"] == "move"][-1]
    assert row["auc"] > 0.6 and row["average_precision"] > 1.5 * row["base_rate"]
    assert {row["stage"] for row in rows} <= set(study.STAGES) and 0 <= row["recall_0.5"] <= row["recall_0.1"] <= 1
    assert set(study.GRAPH_COLUMNS) <= row.keys()


def test_effects_are_scored_before_they_are_learned_from(monkeypatch, recorded):
    """Each iteration by the model of the one before; learned effects that are the truth leave no error."""
    calls = []

    def effects(model, obs, actions, rewards):
        calls.append("score")
        start = 500 * (len(calls) // 2)
        assert torch.equal(obs, recorded.steps.obs[start : start + 500].float())
        assert torch.equal(rewards, recorded.steps.rewards[start : start + 500])
        return recorded.effects[start : start + 500]

    def update(model, optimizer, replay):
        calls.append("learn")
        assert len(replay) == 500 * len(calls) // 2
        assert torch.equal(replay.obs[: len(replay)], recorded.steps.obs[: len(replay)])

    monkeypatch.setattr(cdg, "forward_effects", effects)
    monkeypatch.setattr(cdg, "update_forward_model", update)
    rows = study.study_effects(study.TASKS[1], recorded, 1000, ["a", "b"], 4)
    assert calls == ["score", "learn"] * 3
    assert [(row["stage"], row["frames"], row["seed"]) for row in rows] == [
        ("a", 500, 4),
        ("a", 1000, 4),
        ("b", 1500, 4),
    ]
    assert all(row["relative_error"] == 0 for row in rows[1:]) and rows[-1].keys() == set(study.EFFECT_COLUMNS)


def test_what_the_csvs_hold_is_not_run_again(tmp_path):
    options = ["--frames", 2000, "--tasks", study.TASKS[1], "--output", tmp_path, "--configs", "relational", "effects"]
    first = run("experiments/learned_graph_study.py", *options, cwd=tmp_path)
    assert f"{study.TASKS[1]}: relational, " in first.stdout and "effects, seed 3, " in first.stdout
    paths = [tmp_path / "learned_graph_study.csv", tmp_path / "learned_effects_study.csv"]
    written = [path.read_text(encoding="utf-8") for path in paths]
    second = run("experiments/learned_graph_study.py", *options, cwd=tmp_path)
    assert second.stdout == first.stdout[first.stdout.index("Truth: private.") :]
    assert written == [path.read_text(encoding="utf-8") for path in paths]
    # another config is added to the rows that there are
    rows = study.read_table(paths[0], study.GRAPH_COLUMNS)
    study.add_rows(paths[0], study.GRAPH_COLUMNS, rows.head(2).assign(model="reverse").to_dict("records"))
    assert list(pd.read_csv(paths[0]).model) == ["relational"] * len(rows) + ["reverse"] * 2


BAD = {
    "--frames must be a multiple of 2000, not 0": ["--frames", 0, "--output", "out"],
    "--frames must be a multiple of 2000, not 3000": ["--frames", 3000, "--output", "out"],
    "--frames needs --output: other stages must not be mixed with the committed ones": ["--frames", 2000],
    "no config 'raw'; there are ": ["--configs", "raw"],
    "unknown environment Foraging-8x8-2p-4f-v4": ["--tasks", "Foraging-8x8-2p-4f-v4"],
    "a task in which everybody observes all cells and levels": ["--tasks", "Foraging-2s-8x8-3p-3f-v3"],
    "was trained on Foraging-8x8-2p-4f-coop-v3: give --tasks Foraging-8x8-2p-4f-coop-v3 alone": [
        *("--checkpoint", ROOT / "experiments/trained/mappo_dg_8x8-2p-4f-coop.pt")
    ],
    "does not exist: run without --table-only first": ["--table-only", "--output", "nowhere"],
}


@pytest.mark.parametrize("sentence", BAD)
def test_what_makes_no_sense_is_one_sentence(sentence, tmp_path):
    done = run("experiments/learned_graph_study.py", *BAD[sentence], cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and sentence in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_trained_policy_plays_the_last_stage():
    _, checkpoint = study.load_checkpoint(ROOT / "experiments/trained/mappo_dg_8x8-2p-4f-coop.pt")
    played = study.record(study.TASKS[0], 500, checkpoint)
    scripted = study.record(study.TASKS[0], 500)
    assert torch.equal(played.steps.actions[:1000], scripted.steps.actions[:1000])
    stages = played.steps.rewards.unflatten(0, (3, 500)).sum((1, 2))
    assert stages[2] > 3 and stages[2] > 5 * stages[0], stages  # the first stage is played at random
    assert not torch.equal(played.steps.actions[1000:], scripted.steps.actions[1000:])


def test_the_model_of_a_run_is_measured_on_its_own_play(tmp_path):
    """With its weights and its policy; trained for 20k frames it ranks the edges far better than chance."""
    options = ["--env-id", study.TASKS[0], "--graph", "learned", "--total-timesteps", 20_000, "--eval-episodes", 1]
    run("mappo_cdg_lbf.py", *options, cwd=tmp_path)
    row = study.study_run(run_folder(tmp_path), frames=3000)
    assert (row["task"], row["seed"]) == (study.TASKS[0], 1) and row["frames"] >= 20_000
    assert row["average_precision"] > 3 * row["base_rate"] and row["auc"] > 0.7, row
    path = run_folder(tmp_path) / "checkpoint.pt"
    checkpoint = torch.load(path, weights_only=True)
    torch.manual_seed(0)
    checkpoint["models"] = cdg.ForwardModel(2, 6, 8).state_dict()
    torch.save(checkpoint, path)
    assert study.study_run(path, frames=3000)["average_precision"] < row["average_precision"] / 2


def test_a_run_without_a_learned_graph_cannot_be_measured(tmp_path):
    trained = ROOT / "experiments/trained/mappo_dg_8x8-2p-4f-coop.pt"
    done = run("experiments/learned_graph_study.py", "--runs", trained, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "is no run of mappo_cdg_lbf.py --graph learned" in done.stderr


# THE COMMITTED TABLES
def test_the_committed_tables_can_be_drawn():
    graphs = study.read_csv(study.RESULTS / "learned_graph_study.csv", study.GRAPH_COLUMNS)
    effects = study.read_csv(study.RESULTS / "learned_effects_study.csv", study.EFFECT_COLUMNS)
    for table, text in ((graphs, study.graph_tables(graphs)), (effects, study.effects_table(effects))):
        assert all(task in text for task in study.TASKS) and "nan" not in text.lower()
        assert set(table.task) == set(study.TASKS)
    assert set(effects.seed) == set(study.EFFECT_SEEDS)


def test_the_committed_tables_are_no_grids_of_the_report():
    grids = report.load_grids(study.RESULTS) | report.load_others(study.RESULTS)
    assert grids and not [name for name in grids if name.startswith("learned")]
