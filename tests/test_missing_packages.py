"""A package that is not installed is one sentence with the command that installs it, in every tool and script."""

import ast
import functools
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = [str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")])]
SMACLITE_SCRIPTS = [script for script in SCRIPTS if "smaclite" in script]
LBF_SCRIPTS = [script for script in SCRIPTS if script not in SMACLITE_SCRIPTS]
SMACLITE = ["smaclite", "rtree", "sklearn", "pygame"]
# The tools with what brings them to every import; OUT is a folder that may be written to.
TOOLS = {
    "benchmark.py": ["--quick"],
    "credit_figure.py": ["--help"],
    "known_graph.py": ["--quick", "--output", "OUT"],
    "launch.py": [ROOT / "experiments/grids/lbf_mappo.yaml", "--output-dir", "OUT", "--backend", "ray"],
    "learned_graph_study.py": ["--table-only"],
    "loads.py": [ROOT / "experiments/trained/mappo_dg_8x8-2p-4f-coop.pt", "--episodes", "1"],
    "method_figure.py": ["--help"],
    "readability.py": [],
    "report.py": ["--check"],
    "spread.py": ["--help"],
    "spread_scale.py": ["--help"],
    "watch.py": [],
}
LOADING = (
    "benchmark.py",
    "known_graph.py",
    "learned_graph_study.py",
    "loads.py",
    "watch.py",
)  # the tools that load a script
DISTRIBUTIONS = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}  # where they are not called as imported

# In sitecustomize.py: what is in WITHOUT cannot be found, as if it were not installed.
HIDE = """
import os, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *arguments):
        if name.partition(".")[0] != os.environ["WITHOUT"]:
            return self.finder.find_spec(name, *arguments)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def text(path):
    return (ROOT / path).read_text(encoding="utf-8")


@functools.cache
def packages(path):
    """The packages that a tool imports, itself, by way of what is no tool or of a script; those of an option, too."""
    tree, found = ast.parse(text(path)), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    siblings = {name for name in found if (ROOT / "experiments" / f"{name}.py").exists()}
    loaded = [f"experiments/{name}.py" for name in siblings if f"{name}.py" not in TOOLS]
    if path.removeprefix("experiments/") in LOADING:
        loaded.append("mappo_dg_lbf.py")
    found = found.union(*map(packages, loaded))
    return found - siblings - sys.stdlib_module_names


def program(path, *options, without, folder):
    """Run a tool or script in the folder, in an environment without a package."""
    (folder / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    options = [folder / "out" if option == "OUT" else option for option in options]
    environment = os.environ | {"PYTHONPATH": str(folder), "WITHOUT": without, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / path), *map(str, options)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def commands_packages(command):
    """The distributions that an install command names, in its requirements files or itself."""
    files = "\n".join(text(name) for name in re.findall(r"-r (\S+)", command))
    lines = [line.partition("#")[0] for line in files.splitlines()]
    return {word.lower() for line in [*lines, command] for word in re.findall(r"[A-Za-z][\w-]*", line)}


def assert_one_sentence(done, path, package):
    """Status 2 and one line that names the package and a command that installs it."""
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr[-2000:]
    assert done.stderr.startswith(f"{path.rpartition('/')[-1]}: "), done.stderr
    command = done.stderr[done.stderr.index("pip install") :]
    assert DISTRIBUTIONS.get(package, package) in commands_packages(command), command


NEEDED = [
    (tool, package) for tool in TOOLS for package in sorted(packages(f"experiments/{tool}") - {"wandb", *SMACLITE})
]


@pytest.mark.parametrize("tool, package", NEEDED)
def test_a_tool_without_a_package_says_how_to_install_it(tool, package, tmp_path):
    done = program(f"experiments/{tool}", *TOOLS[tool], without=package, folder=tmp_path)
    assert_one_sentence(done, tool, package)
    if package != "ray":
        assert f"the package {package} is not installed" in done.stderr


# without SMAClite nothing else is missed
NEXT_TO_SMACLITE = [pytest.param(package, marks=pytest.mark.smaclite) for package in SMACLITE[1:]]


@pytest.mark.parametrize("package", ["smaclite", *NEXT_TO_SMACLITE])
def test_the_benchmark_of_smaclite_says_how_to_install_it(package, tmp_path):
    done = program("experiments/benchmark.py", "--smaclite", "--quick", without=package, folder=tmp_path)
    assert_one_sentence(done, "benchmark.py", package)


@pytest.mark.parametrize("package", SMACLITE)
@pytest.mark.parametrize("script", SMACLITE_SCRIPTS)
def test_a_smaclite_script_says_how_to_install_what_is_missing(script, package, tmp_path):
    done = program(script, without=package, folder=tmp_path)
    assert_one_sentence(done, script, package)
    assert not (tmp_path / "runs").exists()


# all have the same start_wandb
WITH_WANDB = ["mappo_dg_lbf.py", pytest.param("mappo_dg_smaclite.py", marks=pytest.mark.smaclite)]


@pytest.mark.parametrize("script", WITH_WANDB)
def test_track_says_how_to_install_wandb(script, tmp_path):
    done = program(script, "--track", without="wandb", folder=tmp_path)
    assert_one_sentence(done, script, "wandb")
    assert not (tmp_path / "runs").exists()


def test_the_command_for_smaclite_is_the_same_wherever_it_stands():
    (command,) = re.findall(r"^#\s+(pip install .*)$", text("requirements-smaclite.txt"), re.MULTILINE)
    assert command.startswith("pip install --no-deps -r requirements-smaclite.txt && ")
    for script in SMACLITE_SCRIPTS + ["experiments/errors.py"]:
        strings = [node.value for node in ast.walk(ast.parse(text(script))) if isinstance(node, ast.Constant)]
        assert [string for string in strings if isinstance(string, str) and string.endswith(command)], script


def test_every_tool_is_tried():
    tools = {
        path.name for path in (ROOT / "experiments").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
    }
    assert tools == TOOLS.keys()
    assert {package for _, package in NEEDED} >= {"matplotlib", "pandas", "PIL", "ray", "scipy", "torch", "yaml"}


OF_AN_OPTION = {"experiments/launch.py": "ray", "experiments/benchmark.py": "smaclite"}
OF_AN_OPTION |= dict.fromkeys(LBF_SCRIPTS, "wandb") | dict.fromkeys(SMACLITE_SCRIPTS, "smaclite")


@pytest.mark.parametrize("path", [*(f"experiments/{tool}" for tool in TOOLS), *LBF_SCRIPTS, *SMACLITE_SCRIPTS])
def test_help_needs_no_package_of_an_option(path, tmp_path):
    done = program(path, "--help", without=OF_AN_OPTION.get(path, "wandb"), folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("usage: ")
