"""What stands in several files of the project stands there alike: versions, requirements, commands."""

import csv
import os
import re
import subprocess

import pytest
from conftest import ROOT


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def project_version():
    return re.search(r'^version = "(\d+\.\d+\.\d+)"$', text("pyproject.toml"), re.MULTILINE).group(1)


def names(requirements_file):
    """The packages of a requirements file."""
    lines = [line.partition("#")[0].strip() for line in text(requirements_file).splitlines()]
    return {re.match(r"[\w-]+", line).group().lower() for line in lines if line and not line.startswith("-")}


def test_the_changelog_begins_with_the_version():
    assert re.findall(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE) == [project_version(), "0.1.0"]
    assert "c845044" in text("CHANGELOG.md").partition("\n## 0.1.0")[2]


def test_the_citation_has_the_version_and_the_paper():
    yaml = pytest.importorskip("yaml", reason="needs experiments/requirements.txt")
    citation = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format demands
    assert str(citation["version"]) == project_version()
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert paper["url"] == "https://arxiv.org/abs/2601.21523"


def test_ruff_is_the_same_in_ci_before_commits_and_in_contributing():
    yaml = pytest.importorskip("yaml", reason="needs experiments/requirements.txt")
    (version,) = re.findall(r"ruff==(\S+)", text(".ci/run"))
    (repo,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert repo["rev"] == f"v{version}"
    assert [hook["id"] for hook in repo["hooks"]] == ["ruff-check", "ruff-format"]
    assert re.findall(r"ruff==(\S+)", text("CONTRIBUTING.md")) == [version]


def test_requirements_say_why_torch_is_capped_and_name_nothing_of_the_tests():
    assert names("tests/requirements.txt") >= {"pytest", "pytest-xdist", "hypothesis"}
    assert not names("requirements.txt") & names("tests/requirements.txt")
    comments = [line for line in text("requirements.txt").splitlines() if line.startswith("#")]
    assert any("torch" in line for line in comments)


def test_ci_and_readme_install_the_same_for_the_tests():
    files = "-r requirements.txt -r experiments/requirements.txt -r tests/requirements.txt"
    command = f"python3 -m venv .venv && .venv/bin/pip install {files} && .venv/bin/python -m pytest -ra -n 2"
    assert f"\n{command}\n" in text("README.md")
    assert f".venv/bin/pip install -q {files} ruff==" in text(".ci/run")
    assert text(".ci/run").endswith("\n.venv/bin/python -m pytest -ra -n 2\n")


STUB = """#!/usr/bin/env bash
echo "$(basename "$(dirname "$(dirname "$0")")") $(basename "$0") $*" >>"$LOG"
case "$*" in
    "-c import smaclite"*) exit "$SMACLITE_IS_MISSING" ;;
    "-c import sysconfig"*) dirname "$0" ;;
    "-m venv"*) mkdir -p "${@: -1}/bin" && for name in python pip ruff; do cp "$0" "${@: -1}/bin/$name"; done ;;
    "-m pytest"*) echo "== 1 passed ==" ;;
esac
"""


@pytest.mark.parametrize("missing", [0, 1])
def test_ci_says_whether_the_smaclite_tests_have_run_and_ends_with_those_of_everything(missing, tmp_path):
    """.ci/run itself, with a python3 that does nothing but say whether it can import SMAClite."""
    for path, content in ((".ci/run", text(".ci/run")), ("outer/bin/python3", STUB)):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(content)
        (tmp_path / path).chmod(0o755)
    variables = {"PATH": f"{tmp_path}/outer/bin:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    env = os.environ | variables | {"SMACLITE_IS_MISSING": str(missing)}
    done = subprocess.run([tmp_path / ".ci" / "run"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = "SMAClite tests: skipped, smaclite is not installed" if missing else "SMAClite tests: run"
    passed = "== 1 passed =="
    assert done.stdout.splitlines() == [passed, said, *[passed] * (1 - missing), passed]
    tested = [line for line in (tmp_path / "log").read_text().splitlines() if "-m pytest" in line]
    step = [".venv-smaclite python -m pytest -ra -n 2 -m smaclite"] * (1 - missing)
    assert tested[1:] == [*step, ".venv python -m pytest -ra -n 2"]


def test_every_requirements_file_is_explained_and_every_csv_has_an_origin():
    contributing = text("CONTRIBUTING.md")
    for path in [*ROOT.glob("requirements*.txt"), *ROOT.glob("experiments/requirements*.txt")]:
        assert path.name in contributing, path
    for path in ROOT.glob("tests/requirements*.txt"):
        assert f"`tests/{path.name}`" in contributing, path
    table = contributing.partition("| CSV in ")[2]
    assert set(re.findall(r"`(\w+)`", table.partition("\n\n")[0])) == {
        path.stem for path in ROOT.glob("experiments/results/*.csv")
    }


def test_the_trained_agents_evaluations_are_those_of_its_run():
    with open(ROOT / "experiments" / "results" / "lbf_bf16.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["method"], row["seed"]) == ("mappo_dg", "2")]
    returns = {row["nominal_frames"]: f"{float(row['return']):.3f}" for row in rows}
    shown = dict(re.findall(r"^\| (\d+) \| ([\d.]+) \|$", text("experiments/trained/README.md"), re.MULTILINE))
    assert len(shown) >= 5 and shown.items() <= returns.items()
    assert list(returns)[-1] in shown
