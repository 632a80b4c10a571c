"""docs/adapting.md's worked example: the diff applies, and the script trains, evaluates, saves and resumes on RWARE."""

import ast
import shutil
import subprocess
import textwrap
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load, run, run_folder, scalars
from test_lbf_resume import same, state
from test_variants_in_sync import definitions, never_read

DIFF = ROOT / "docs" / "adapting-rware.diff"
# 500 frames an iteration; the graph of models that have hardly been trained has edges at c = 1
OPTIONS = ["--num-envs", 1, "--eval-interval", 500, "--eval-episodes", 1, "--c", 1]
# What lies outside of the section ENVIRONMENT and still names what is LBF's: step 9 of the text
OUTSIDE = {"Args", "make_run_name", "evaluate", "main"}


def section(text):
    """The names that the section ENVIRONMENT defines."""
    part = text.partition("\n# ENVIRONMENT\n")[2].partition("\n# NETWORKS\n")[0]
    return {node.name for node in ast.parse(part).body}


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """mappo_dg_lbf.py with the diff applied, by the command of the text."""
    if shutil.which("patch") is None:
        pytest.skip("needs the program patch")
    folder = tmp_path_factory.mktemp("adapted")
    shutil.copy(ROOT / "mappo_dg_lbf.py", folder / "mappo_dg_rware.py")
    command = ["patch", "--fuzz=0", "mappo_dg_rware.py", str(DIFF)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return folder / "mappo_dg_rware.py"


@pytest.fixture(scope="module")
def rware():
    return pytest.importorskip("rware", reason="needs tests/requirements.txt (rware)")


def test_the_diff_changes_the_environment_and_what_the_text_names(script):
    text = script.read_text(encoding="utf-8")
    mine, original = definitions(script), definitions("mappo_dg_lbf.py")
    differing = {name for name in mine if mine[name] != original.get(name)}
    environment = section(text)
    assert environment == {"RobotWarehouse", "make_env", "player_positions"}
    assert differing - environment == OUTSIDE
    assert never_read(text) == set()
    assert not [word for word in ("lbf", "Foraging", "winner", "food") if word in text]


def test_the_example_trains_evaluates_saves_and_resumes_exactly(rware, script, tmp_path):
    for folder, frames in (("whole", 1500), ("stopped", 1000)):
        (tmp_path / folder).mkdir()
        run(script, *OPTIONS, "--total-timesteps", frames, cwd=tmp_path / folder)
    stopped, whole = run_folder(tmp_path / "stopped"), run_folder(tmp_path / "whole")
    run(script, "--resume", stopped, "--total-timesteps", 1500, cwd=tmp_path / "stopped")
    assert same(state(stopped), state(whole))
    assert (stopped / "evaluations.csv").read_bytes() == (whole / "evaluations.csv").read_bytes()
    assert [row["global_step"] for row in state(whole)["evaluations"]] == [0, 500, 1000, 1500]
    charts = scalars(whole)
    assert any(0 < edges < 1 for _, edges in charts["graph/edges_per_agent"])  # N = 2: at most one each
    assert any(0 < recall < 1 for _, recall in charts["graph/oracle_recall"])
    assert charts["charts/episodic_length"][-1][1] == 500


def test_the_example_bootstraps_at_the_time_limit_and_draws_from_its_seed_alone(rware, script):
    module = load(script)
    envs = [module.make_env("rware-tiny-2ag-v2", seed) for seed in range(2)]
    D = envs[0].observation_space[0].shape[0]
    rollout = module.collect(envs, module.AgentNetwork(D, 2, 8, 5), "cpu")
    assert rollout.alive.shape == (500, 2) and rollout.alive.all() and not rollout.terminated.any()
    assert module.player_positions(envs).shape == (500, 2, 2, 2)
    first, again, other = (module.make_env("rware-tiny-2ag-v2", seed).reset()[0][0] for seed in (3, 3, 4))
    assert torch.equal(torch.tensor(first), torch.tensor(again)) and (first != other).any()


def test_the_examples_positions_are_those_after_each_step(rware, script):
    module = load(script)
    env, seen = module.make_env("rware-tiny-2ag-v2", 0), []
    for _ in range(2):  # the second episode forgets the first
        env.reset()
        seen = []
        for forward_or_left in (1, 1, 2, 1, 1, 2, 1, 1):
            env.step([forward_or_left] * 2)
            seen.append([[agent.y, agent.x] for agent in env.agents])
    assert seen[0] != seen[-1]
    assert module.player_positions([env]).tolist() == [[cells] for cells in seen]


@pytest.mark.parametrize("env_id", ["rware-img-tiny-2ag-v2", "rware-tiny-2ag-v9"])
def test_the_example_refuses_an_id_that_does_not_fit(rware, script, env_id, tmp_path):
    done = run(script, "--env-id", env_id, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert env_id in done.stderr and not (tmp_path / "runs").exists()


def test_without_positions_the_texts_function_gives_an_oracle_without_edges():
    text = (ROOT / "docs" / "adapting.md").read_text(encoding="utf-8")
    block = text.partition("```python\n")[2].partition("```")[0]
    names = {"torch": torch}
    exec(textwrap.dedent(block), names)
    positions = names["player_positions"]([SimpleNamespace(n_agents=3, steps=steps) for steps in (4, 6)])
    assert positions.shape == (6, 2, 3, 2)
    oracle = load("mappo_dg_lbf.py").oracle_graph(positions, load("mappo_dg_lbf.py").Args.oracle_distance)
    assert torch.equal(oracle, torch.eye(3, dtype=torch.bool).expand(6, 2, 3, 3))
