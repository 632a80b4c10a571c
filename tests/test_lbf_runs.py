"""Every script runs alone and logs what it should; every option has the effect that its help text promises."""

import csv
import math
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DG_SCRIPTS, LBF_SCRIPTS, ROOT, load, run, run_folder, run_inside, scalars

SMALL = ["--env-id", "Foraging-6x6-3p-2f-v3", "--no-winner-take-all", "--num-envs", 4, "--total-timesteps", 600]
SMALL += ["--eval-episodes", 2, "--eval-interval", 10**6, "--checkpoint-interval", 0]
MODELS = ("single_reverse_model", "action_predictor", "reverse_model")
ACCURACIES = ["single_reverse_model_accuracy", "action_predictor_accuracy", "reverse_model_accuracy_others"]


def tags_of(script, cwd, *options):
    """The scalars of a small run; cwd must not have one yet."""
    Path(cwd).mkdir(exist_ok=True)
    done = run_inside(script, *SMALL, *options, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return scalars(run_folder(cwd))


def values(tags, tag):
    return [value for _, value in tags[tag]]


def expected_tags(script, num_agents):
    agents = [f"episodic_return_agent_{i}" for i in range(num_agents)]
    charts = ["episodic_return", "episodic_length", "learning_rate", "SPS", *agents]
    losses = ["policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance", "first_ratio"]
    graph = []
    if script in DG_SCRIPTS:
        losses += [f"{model}_loss" for model in MODELS] + ACCURACIES
        graph = ["edges_per_agent", "oracle_precision", "oracle_recall"]
        graph += ["predictor_entropy", "reverse_entropy_others", "entropy_ratio_others"]
    evaluations = ["episodic_return", "episodic_return_std", "episodes", *agents]
    groups = {"charts": charts, "losses": losses, "graph": graph, "eval": evaluations}
    return {f"{group}/{name}" for group, names in groups.items() for name in names}


def check_what_is_said(stdout, script, folder):
    """What is about to run, and at the end what came of it."""
    first, device, frames, evaluation, resume, curves = stdout.splitlines()
    run_dir = f"runs/{folder.name}"
    assert first == f"{run_dir}: vanilla, 3 agents, 15 observations, 6 actions, 10 episodes per iteration"
    assert device == ("dependence graph: learned, c = 0.9; device: cpu" if script in DG_SCRIPTS else "device: cpu")
    rows = list(csv.DictReader((folder / "evaluations.csv").read_text(encoding="utf-8").splitlines()))
    reached = int(rows[-1]["global_step"])
    assert frames == f"{run_dir}: {reached:,} of 2,500 frames"
    assert evaluation == f"last evaluation: return {float(rows[-1]['episodic_return']):.3f} at {reached:,} frames"
    assert re.fullmatch(rf"continue: python \S+{Path(script).name} --resume {run_dir} --total-timesteps MORE", resume)
    assert curves == f"curves: tensorboard --logdir {run_dir}"


def test_a_script_alone_in_an_empty_folder(lbf_script, tmp_path):
    """A real process on a copy of nothing but the script: the folder, the tags, the numbers and evaluations.csv."""
    alone = shutil.copy(ROOT / lbf_script, tmp_path)
    options = ["--env-id", "Foraging-5x5-3p-2f-v3", "--no-winner-take-all", "--total-timesteps", 2500]
    options += ["--eval-interval", 700, "--eval-episodes", 6, "--checkpoint-interval", 1000]
    done = run(alone, *options, cwd=tmp_path)
    folder = run_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {Path(alone).name, "runs"}
    assert re.fullmatch(rf"Foraging-5x5-3p-2f-v3__{Path(alone).stem}__1__\d+", folder.name)
    assert {path.name.split(".")[0] for path in folder.iterdir()} == {"checkpoint", "evaluations", "events", "run"}
    check_what_is_said(done.stdout, lbf_script, folder)
    closing = (folder / "evaluations.csv").read_text(encoding="utf-8").splitlines()[-1].split(",")[3]
    assert f"eval={float(closing):.3f}" in done.stderr.splitlines()[-1].rpartition("\r")[2]

    tags = scalars(folder)
    assert set(tags) == expected_tags(lbf_script, num_agents=3)
    assert all(math.isfinite(value) for tag in tags for value in values(tags, tag))
    boundaries = [step for step, _ in tags["charts/SPS"]]  # the frames after each iteration
    assert boundaries == sorted(set(boundaries)) and boundaries[-2] < 2500 <= boundaries[-1]
    assert all(0 < b - a <= 500 for a, b in zip([0, *boundaries], boundaries))
    for tag in tags:
        assert tag.startswith("eval/") or [step for step, _ in tags[tag]] == boundaries, tag
    assert values(tags, "losses/first_ratio") == pytest.approx([1] * len(boundaries), abs=1e-5)
    assert all(0 < value <= math.log(6) + 1e-5 for value in values(tags, "losses/entropy"))
    assert all(0 <= value <= 1 for value in values(tags, "losses/clipfrac"))
    assert all(value > 0 for value in values(tags, "charts/SPS"))
    assert set(values(tags, "charts/learning_rate")) == {np.float32(5e-4)}
    lengths = np.diff([0, *boundaries]) / 10
    assert values(tags, "charts/episodic_length") == pytest.approx(lengths)
    agents = np.array([values(tags, f"charts/episodic_return_agent_{i}") for i in range(3)])
    assert values(tags, "charts/episodic_return") == pytest.approx(agents.sum(0), abs=1e-6)
    assert (agents >= 0).all() and 0 < agents.sum(0).max() <= 1
    if lbf_script in DG_SCRIPTS:
        assert all(0 <= value <= 2 for value in values(tags, "graph/edges_per_agent"))
        for tag in [f"losses/{name}" for name in ACCURACIES] + ["graph/oracle_precision", "graph/oracle_recall"]:
            assert all(0 <= value <= 1 for value in values(tags, tag)), tag
        predictor, reverse = (
            np.array(values(tags, f"graph/{name}")) for name in ("predictor_entropy", "reverse_entropy_others")
        )
        assert (predictor > 0).all() and (predictor <= math.log(6) + 1e-5).all()
        assert values(tags, "graph/entropy_ratio_others") == pytest.approx(reverse / predictor, rel=1e-5)

    header = ["global_step", "evaluation", "nominal_step", "episodic_return", "episodic_return_std", "episodes"]
    header += [f"episodic_return_agent_{i}" for i in range(3)]
    with open(folder / "evaluations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == header and all(int(row["episodes"]) == 6 for row in rows)
    due = [0]  # each the first boundary at or past the next multiple of the interval, and the end
    for step in boundaries:
        if step >= 700 * len(due) or step == boundaries[-1]:
            due.append(step)
    assert [int(row["global_step"]) for row in rows] == due and len(due) >= 4
    assert [int(row["evaluation"]) for row in rows] == [step // 700 for step in due]
    assert [int(row["nominal_step"]) for row in rows] == [step // 700 * 700 for step in due[:-1]] + [2500]
    for name in header[3:]:
        steps, means = zip(*tags[f"eval/{name}"])
        assert list(steps) == [int(row["global_step"]) for row in rows], name
        # evaluations.csv has six significant digits
        assert means == pytest.approx([float(row[name]) for row in rows], rel=6e-6), name
    means = [[float(row[f"episodic_return_agent_{i}"]) for i in range(3)] for row in rows]
    assert [float(row["episodic_return"]) for row in rows] == pytest.approx(np.sum(means, 1), abs=1e-6)
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr


def test_the_default_task(lbf_script, tmp_path):
    """Winner-take-all on 8x8-2p-4f-coop with every default but the lengths: no food needs less than two agents."""
    options = ["--total-timesteps", 1000, "--eval-episodes", 5]
    done = run_inside(lbf_script, *options, cwd=tmp_path)
    assert done.returncode == 0 and "2 agents, 18 observations, 6 actions, 10 episodes" in done.stdout
    folder = run_folder(tmp_path)
    assert scalars(folder).keys() == expected_tags(lbf_script, num_agents=2)
    assert len((folder / "evaluations.csv").read_text().splitlines()) == 3
    args = torch.load(folder / "checkpoint.pt", weights_only=True)["args"]
    paper = {"num_envs": 10, "hidden_dim": 128, "learning_rate": 5e-4, "gamma": 0.99, "gae_lambda": 0.95}
    paper |= {"update_epochs": 4, "clip_coef": 0.2, "ent_coef": 0.001, "max_grad_norm": 10.0, "norm_adv": False}
    paper |= {"winner_take_all": True, "eval_interval": 50_000, "eval_greedy": False, "cuda": False, "num_threads": 1}
    paper |= {"adam_eps": 1e-5}  # CleanRL's; the paper's code has 1e-8
    if lbf_script in DG_SCRIPTS:
        paper |= {"c": 0.9, "graph": "learned", "soft": True, "encoder": True, "transpose_graph": False}
        paper |= {"edge_drop": 0.0, "edge_add": 0.0, "oracle_distance": 3}
    assert {name: args[name] for name in paper} == paper
    defaults = load(lbf_script).Args()
    assert (defaults.total_timesteps, defaults.eval_episodes, defaults.checkpoint_interval) == (5_000_000, 100, 100_000)


def test_the_untrained_policy_is_evaluated_alike_by_every_script(tmp_path):
    """The same weights and the same boards at frame 0 for the same seed, other ones for another seed."""
    options = ["--eval-episodes", 20, "--num-envs", 1, "--total-timesteps", 50]
    rows = []
    for script in LBF_SCRIPTS:
        cwd = tmp_path / Path(script).stem
        tags_of(script, cwd, *options)
        rows.append((run_folder(cwd) / "evaluations.csv").read_text().splitlines()[1])
    assert len(set(rows)) == 1 and not rows[0].startswith("0,0.0,0.0")
    tags_of(LBF_SCRIPTS[0], tmp_path / "other", *options, "--seed", 2)
    assert (run_folder(tmp_path / "other") / "evaluations.csv").read_text().splitlines()[1] != rows[0]


def test_evaluation_boards():
    """evaluate() with a fixed policy: the same returns from every script, whatever was drawn before; the index and the
    seed change the boards."""
    args = SimpleNamespace(seed=3, env_id="Foraging-5x5-2p-2f-v3", winner_take_all=False)
    args.eval_episodes, args.eval_greedy = 25, False
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 3.0])

    def play(script, index=4, **changes):
        torch.rand(int(torch.randint(1, 50, ())))  # evaluation has random draws of its own
        before = torch.get_rng_state()
        actor = lambda obs: logits.expand(*obs.shape[:-1], 6)  # noqa: E731
        returns = load(script).evaluate(actor, SimpleNamespace(**vars(args) | changes), index, torch.device("cpu"))
        assert torch.equal(before, torch.get_rng_state()) and returns.shape == (25, 2)
        return returns

    expected = play(LBF_SCRIPTS[0])
    assert expected.sum() > 0
    for script in LBF_SCRIPTS:
        assert torch.equal(play(script), expected)
    assert not torch.equal(play(LBF_SCRIPTS[0], index=5), expected)
    assert not torch.equal(play(LBF_SCRIPTS[0], seed=4), expected)


DENSITIES = [  # options, edges of an agent to the two others
    (["--graph", "complete"], 2),
    (["--graph", "identity"], 0),
    (["--graph", "random", "--graph-p", 0.3], 0.6),
    (["--graph", "random", "--graph-p", 0], 0),
    (["--graph", "random", "--graph-p", 1], 2),
    (["--graph", "oracle", "--oracle-distance", 0], 0.01),  # a blocked agent's cell can be entered: two on one cell
    (["--graph", "oracle", "--oracle-distance", 100], 2),
    (["--graph", "complete", "--edge-drop", 1], 0),
    (["--graph", "complete", "--edge-drop", 0.25], 1.5),
    (["--graph", "identity", "--edge-add", 1], 2),
    (["--graph", "identity", "--edge-add", 0.25], 0.5),
    (["--graph", "oracle", "--edge-drop", 1], 0),
    (["--c", 0], 0),
    (["--c", 0, "--edge-add", 1], 2),
    (["--c", 1, "--edge-drop", 1], 0),
]


@pytest.mark.parametrize("options, density", DENSITIES, ids=lambda x: " ".join(map(str, x)) if type(x) is list else "")
def test_graph_options(dg_script, tmp_path, options, density):
    tags = tags_of(dg_script, tmp_path, *options)
    tolerance = 0 if density in (0, 2) else 0.1
    assert np.mean(values(tags, "graph/edges_per_agent")) == pytest.approx(density, abs=tolerance)
    assert ("losses/reverse_model_loss" in tags) == ("--graph" not in options)  # the models train if they are used


def test_the_oracle_agrees_with_itself(dg_script, tmp_path):
    tags = tags_of(dg_script, tmp_path, "--graph", "oracle")
    assert set(values(tags, "graph/oracle_precision")) == set(values(tags, "graph/oracle_recall")) == {1}
    assert all(0 < value < 2 for value in values(tags, "graph/edges_per_agent"))


def test_c_adds_edges(dg_script, tmp_path):
    """The same models see the same first iteration: a larger c keeps the edges and adds some."""
    tags = [tags_of(dg_script, tmp_path / str(c), "--c", c) for c in (0, 0.9, 1)]
    ratios = {values(run_tags, "graph/entropy_ratio_others")[0] for run_tags in tags}
    density = [values(run_tags, "graph/edges_per_agent")[0] for run_tags in tags]
    assert len(ratios) == 1 and 0 == density[0] <= density[1] < density[2]


def test_soft_weights_and_the_limits_of_the_graph(dg_script, tmp_path):
    """One epoch: the first policy loss is minus the mean advantage, whose values at the graph's limits are known."""
    losses = {}
    for graph in ("complete", "identity"):
        for soft in ("--soft", "--no-soft"):
            options = ["--graph", graph, soft, "--update-epochs", 1, "--gae-lambda", 0.8]
            tags = tags_of(dg_script, tmp_path / (graph + soft), *options)
            losses[graph, soft] = values(tags, "losses/policy_loss")[0]
    own = losses["identity", "--no-soft"]
    assert abs(own) > 1e-3
    assert losses["complete", "--no-soft"] == pytest.approx(3 * own, rel=1e-3)
    assert losses["complete", "--soft"] == pytest.approx(3 * own, rel=1e-3)
    assert losses["identity", "--soft"] == pytest.approx((0.8 + 0.2 * 3) * own, rel=1e-3)


@pytest.mark.parametrize("flag", ["--no-transpose-graph", "--transpose-graph"])
def test_transpose_graph(dg_script, flag, tmp_path, monkeypatch):
    """The advantages get the learned graph as it is, row = influencer, or transposed under the flag."""
    dg, learned, used = load(dg_script), [], []
    original_graph, original_gae = dg.learned_graph, dg.multi_agent_gae

    def learned_graph(*args):
        graph, entropies = original_graph(*args)
        graph[..., 0, 2], graph[..., 2, 0] = True, False
        learned.append(graph)
        return graph, entropies

    def multi_agent_gae(rewards, values, terminated, alive, graph, *args):
        used.append(graph[alive])
        return original_gae(rewards, values, terminated, alive, graph, *args)

    monkeypatch.setattr(dg, "learned_graph", learned_graph)
    monkeypatch.setattr(dg, "multi_agent_gae", multi_agent_gae)
    assert run_inside(dg, *SMALL, flag, cwd=tmp_path).returncode == 0
    assert len(learned) == len(used) >= 3
    for a, b in zip(learned, used):
        assert torch.equal(a.transpose(-1, -2) if flag == "--transpose-graph" else a, b)


def test_the_graph_comes_from_models_trained_up_to_the_iteration_before(dg_script, tmp_path, monkeypatch):
    """The order of an iteration: collect, graph, advantages, policy and critic, graph models."""
    dg, order = load(dg_script), []
    for name in ("collect", "learned_graph", "multi_agent_gae", "ppo_update", "update_graph_models"):

        def spy(*args, name=name, original=getattr(dg, name)):
            order.append(name)
            return original(*args)

        monkeypatch.setattr(dg, name, spy)
    assert run_inside(dg, *SMALL, cwd=tmp_path).returncode == 0
    iteration = ["collect", "learned_graph", "multi_agent_gae", "ppo_update", "update_graph_models"]
    assert order == ["collect"] + iteration * (len(order) // 5) + ["collect"]  # the first and the last evaluate


def test_no_encoder(dg_script, tmp_path):
    """The graph models see raw observations (D = 15), or the encoder's 64 numbers; --save-model saves at the end."""
    for flag, latent_dim in (("--encoder", 64), ("--no-encoder", 15)):
        tags_of(dg_script, tmp_path / flag, flag, "--save-model")
        state = torch.load(run_folder(tmp_path / flag) / "checkpoint.pt", weights_only=True)
        models = state["models"]
        assert any(name.startswith("encoder.") for name in models) == (flag == "--encoder")
        assert models["single_reverse_model.0.weight"].shape == (256, 2 * latent_dim)
        assert models["action_predictor.0.weight"].shape == (256, latent_dim)
        assert models["reverse_model.input.weight"].shape == (256, 3 * latent_dim)
        assert state["global_step"] >= 600


def test_norm_adv(lbf_script, tmp_path):
    """Normalised advantages have mean 0, and so has the first policy loss."""
    plain = tags_of(lbf_script, tmp_path / "plain", "--update-epochs", 1)
    normalised = tags_of(lbf_script, tmp_path / "normalised", "--update-epochs", 1, "--norm-adv")
    assert abs(values(plain, "losses/policy_loss")[0]) > 1e-3
    assert values(normalised, "losses/policy_loss") == pytest.approx([0] * len(normalised["charts/SPS"]), abs=1e-5)


def test_global_rewards(tmp_path, monkeypatch):
    """In the global baselines every agent's reward is the team's, in the local ones its own."""
    for script in LBF_SCRIPTS[2:]:
        module, own, used = load(script), [], []
        original_collect, original_gae = module.collect, module.gae

        def collect(*args):
            own.append(original_collect(*args))
            return own[-1]

        def gae(rewards, *args):
            used.append((own[-1][3], rewards))
            return original_gae(rewards, *args)

        monkeypatch.setattr(module, "collect", collect)
        monkeypatch.setattr(module, "gae", gae)
        (cwd := tmp_path / module.__name__).mkdir()
        assert run_inside(module, *SMALL, cwd=cwd).returncode == 0
        assert any(reward.any() for reward, _ in used)
        for reward, learned_from in used:
            expected = reward.sum(-1, keepdim=True).expand_as(reward) if "global" in script else reward
            assert torch.equal(learned_from, expected)


def test_eval_greedy(lbf_script, tmp_path):
    """Evaluations change, training does not."""
    sampled = tags_of(lbf_script, tmp_path / "sampled", "--eval-episodes", 20)
    greedy = tags_of(lbf_script, tmp_path / "greedy", "--eval-episodes", 20, "--eval-greedy")
    assert sampled["eval/episodic_return"] != greedy["eval/episodic_return"]
    assert sampled["losses/policy_loss"] == greedy["losses/policy_loss"]
    actions = [load(lbf_script).collect(*greedy_setting(lbf_script))[1] for _ in range(2)]
    assert torch.equal(*actions) and (actions[0] == 3).all()


def greedy_setting(script):
    """One board, a policy that prefers action 3 by a little, greedily."""
    logits = torch.tensor([0.0, 0.0, 0.0, 0.1, 0.0, 0.0])
    env = load(script).make_env("Foraging-5x5-2p-1f-v3", False, 0)
    return [env], lambda obs: logits.expand(*obs.shape[:-1], 6), torch.device("cpu"), True


# What an option may change: the folder's name, the evaluation of the untrained policy, the losses and the graph of the
# training, its length, the later evaluations, whether there is a checkpoint at the end.
TRAINS = {"training", "evaluations"}
EFFECTS = {  # option: (the settings to which it is added, its setting, what it changes and nothing else)
    "exp_name": ("", "--exp-name other", {"name"}),
    "seed": ("", "--seed 2", TRAINS | {"name", "untrained"}),
    "save_model": ("", "--save-model", {"checkpoint"}),
    "checkpoint_interval": ("", "--checkpoint-interval 300", {"checkpoint"}),
    "env_id": ("", "--env-id Foraging-6x6-3p-3f-v3", TRAINS | {"name", "untrained"}),
    "winner_take_all": ("", "--winner-take-all", TRAINS | {"name", "untrained"}),
    "total_timesteps": ("", "--total-timesteps 850", {"length", "evaluations"}),
    "num_envs": ("", "--num-envs 3", TRAINS),
    "eval_interval": ("", "--eval-interval 300", {"evaluations"}),
    "eval_episodes": ("", "--eval-episodes 19", {"untrained", "evaluations"}),
    "eval_greedy": ("", "--eval-greedy", {"untrained", "evaluations"}),
    "hidden_dim": ("", "--hidden-dim 32", TRAINS | {"untrained"}),
    "learning_rate": ("", "--learning-rate 5e-3", TRAINS),
    "adam_eps": ("--learning-rate 5e-3", "--adam-eps 1", TRAINS),
    "gamma": ("", "--gamma 0.5", TRAINS),
    "gae_lambda": ("", "--gae-lambda 0.5", TRAINS),
    "update_epochs": ("--learning-rate 5e-3", "--update-epochs 2", TRAINS),
    "norm_adv": ("--learning-rate 5e-3", "--norm-adv", TRAINS),
    "clip_coef": ("--learning-rate 5e-3", "--clip-coef 1e-3", TRAINS),
    "ent_coef": ("--learning-rate 5e-3", "--ent-coef 0.5", TRAINS),
    "max_grad_norm": ("--learning-rate 5e-3", "--max-grad-norm 1e-5", TRAINS),
}
EFFECTS_OF_THE_GRAPH = {
    "c": ("--learning-rate 5e-3", "--c 0.999", TRAINS),
    "graph": ("--learning-rate 5e-3", "--graph complete", TRAINS),
    "graph_p": ("--learning-rate 5e-3 --graph random", "--graph-p 0.05", TRAINS),
    "oracle_distance": ("--learning-rate 5e-3 --graph oracle", "--oracle-distance 1", TRAINS),
    "soft": ("--learning-rate 5e-3", "--no-soft", TRAINS),
    "encoder": ("", "--no-encoder", TRAINS),
    "edge_drop": ("--learning-rate 5e-3 --graph complete", "--edge-drop 0.9", TRAINS),
    "edge_add": ("--learning-rate 5e-3", "--edge-add 0.9", TRAINS),
    "bf16": ("--learning-rate 5e-3 --c 1", "--bf16", TRAINS),
    "transpose_graph": ("--learning-rate 5e-3 --c 1", "--transpose-graph", TRAINS),
}
HAVE_TESTS_OF_THEIR_OWN = {"torch_deterministic", "num_threads", "cuda", "track", "wandb_project_name", "wandb_entity"}
HAVE_TESTS_OF_THEIR_OWN |= {"resume"}


def aspects(script, cwd, *options):
    """A run of three iterations or more, by what an option may change."""
    tags = tags_of(script, cwd, "--eval-episodes", 20, *options)
    folder = run_folder(cwd)
    with open(folder / "evaluations.csv", newline="", encoding="utf-8") as file:
        untrained, *evaluations = csv.DictReader(file)
    curves = {tag: points[:3] for tag, points in tags.items() if tag.startswith(("losses/", "graph/"))}
    frames = tags["losses/entropy"][-1][0]
    return {
        "name": folder.name.rpartition("__")[0],
        "untrained": untrained,
        "training": curves,
        "length": frames // 200,  # an iteration is 200 frames or less, and 600 are asked for
        "evaluations": evaluations,
        "checkpoint": (folder / "checkpoint.pt").exists(),
    }


@pytest.fixture(scope="module")
def runs_without(tmp_path_factory):
    """The aspects of the runs to which options are added, each played once."""
    played = {}

    def play(script, base):
        if (script, base) not in played:
            played[script, base] = aspects(script, tmp_path_factory.mktemp("base"), *base.split())
        return played[script, base]

    return play


@pytest.mark.parametrize("script", ["mappo_dg_lbf.py", "baselines/ippo_global_lbf.py"])
@pytest.mark.parametrize("option", EFFECTS | EFFECTS_OF_THE_GRAPH)
def test_an_option_changes_what_it_should_and_nothing_else(script, option, runs_without, tmp_path):
    if option in EFFECTS_OF_THE_GRAPH and script not in DG_SCRIPTS:
        assert option not in vars(load(script).Args())
        return
    base, setting, changes = (EFFECTS | EFFECTS_OF_THE_GRAPH)[option]
    without, with_it = runs_without(script, base), aspects(script, tmp_path, *base.split(), *setting.split())
    assert {name for name in without if with_it[name] != without[name]} == changes


def test_every_option_has_a_test(lbf_script):
    options = set(vars(load(lbf_script).Args()))
    graph = set(EFFECTS_OF_THE_GRAPH) if lbf_script in DG_SCRIPTS else set()
    assert options == set(EFFECTS) | HAVE_TESTS_OF_THEIR_OWN | graph


@pytest.mark.parametrize(
    "env_id", ["Foraging-2s-6x6-2p-2f-v3", "Foraging-2s-8x8-3p-2f-coop-v3", "Foraging-10x10-9p-2f-v3"]
)
def test_other_ids(env_id, lbf_script, tmp_path):
    """Partially observed tasks, and many agents."""
    options = ["--env-id", env_id, "--num-envs", 2, "--total-timesteps", 150]
    tags = tags_of(lbf_script, tmp_path, *options)
    num_agents = int(re.search(r"(\d+)p", env_id).group(1))
    assert set(tags) == expected_tags(lbf_script, num_agents)
    assert all(math.isfinite(value) for tag in tags for value in values(tags, tag))


def test_exp_name_names_the_folder(lbf_script, tmp_path):
    assert run_inside(lbf_script, *SMALL, "--exp-name", "mine", "--seed", 7, cwd=tmp_path).returncode == 0
    assert re.fullmatch(r"Foraging-6x6-3p-2f-v3__mine__7__\d+", run_folder(tmp_path).name)
    assert not (run_folder(tmp_path) / "checkpoint.pt").exists()  # --checkpoint-interval 0


COMMON = """exp_name seed torch_deterministic cuda track wandb_project_name wandb_entity save_model env_id
total_timesteps learning_rate num_envs gamma gae_lambda adam_eps update_epochs norm_adv clip_coef ent_coef max_grad_norm
winner_take_all hidden_dim eval_interval eval_episodes eval_greedy checkpoint_interval resume num_threads""".split()
OF_THE_GRAPH = "c graph graph_p soft encoder edge_drop edge_add bf16 transpose_graph oracle_distance".split()


def test_help(lbf_script, tmp_path):
    """Every option and nothing else: nothing that is computed at run time."""
    done = run_inside(lbf_script, "--help", cwd=tmp_path)
    assert done.returncode == 0
    options = {
        name.replace("-", "_") for name in re.findall(r"^[^\w\n]{1,4}--([a-z][a-z0-9-]*)", done.stdout, re.MULTILINE)
    }
    assert options == set(COMMON + OF_THE_GRAPH if lbf_script in DG_SCRIPTS else COMMON)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    assert run_inside(lbf_script, "--help", cwd=elsewhere).stdout == done.stdout
    assert f"(default: {Path(lbf_script).stem})" in done.stdout and not list(elsewhere.iterdir())


def test_wandb_is_used_only_when_asked_for(lbf_script, tmp_path, monkeypatch):
    calls = []
    wandb = SimpleNamespace(init=lambda **settings: calls.append(settings))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tags_of(lbf_script, tmp_path / "not asked")
    assert not calls
    tags_of(lbf_script, tmp_path / "asked", "--track", "--wandb-project-name", "p", "--wandb-entity", "e")
    (settings,) = calls
    assert (settings["project"], settings["entity"], settings["sync_tensorboard"]) == ("p", "e", True)
    assert settings["name"] == run_folder(tmp_path / "asked").name and settings["config"]["num_envs"] == 4
