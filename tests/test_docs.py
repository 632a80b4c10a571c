"""README.md and docs/*.md: they agree with the scripts and the committed results, their links lead somewhere."""

import ast
import csv
import functools
import re
import subprocess

import pandas as pd
import pytest
from conftest import BASELINES, DG_SCRIPTS, LBF_SCRIPTS, ROOT, load, run_folder, run_inside, scalars
from fake_smaclite import SMACLITE_SCRIPTS
from test_smaclite_fake import SETTINGS, play

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
METRICS = ROOT / "docs" / "metrics.md"
CDG = "mappo_cdg_lbf.py"
SCRIPTS = LBF_SCRIPTS + SMACLITE_SCRIPTS + [CDG]
DG = [script for script in SCRIPTS if "_dg_" in script]
SHORT_RUN = ["--env-id", "Foraging-5x5-3p-2f-v3", "--no-winner-take-all", "--num-envs", 2, "--total-timesteps", 100]
SHORT_RUN += ["--eval-episodes", 2, "--hidden-dim", 8]
DEFAULT_TASK = "Foraging-8x8-2p-4f-coop-v3"
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@functools.cache
def text_of(page):
    return page.read_text(encoding="utf-8")


def rows(text):
    """The cells of every table row of a page, without heads."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# LENGTH AND LINKS
def test_readme_is_a_door():
    assert len(text_of(README).splitlines()) <= 200


def links(text):
    """What a page links, shows or names as a source: (text, target)."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\[([^][]*)\]\(([^()\s]+)\)", text)
    return found + [("", target) for target in re.findall(r'(?:src|srcset|href)="([^"]+)"', text)]


def anchors(text):
    """The fragments that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    relative = [target for _, target in links(text_of(page)) if not re.match(r"[a-z]+:", target)]
    for target in relative:
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and ROOT in [file, *file.parents], f"{page.name} links {target}"
        assert not fragment or fragment in anchors(text_of(file)), f"{page.name} links {target}"


@pages
def test_a_function_that_a_page_links_is_in_that_script(page):
    for name, target in links(text_of(page)):
        name = name.strip("`")
        if target.endswith(".py") and name.isidentifier():
            tree = ast.parse((page.parent / target).read_text(encoding="utf-8"))
            assert name in {getattr(node, "name", None) for node in tree.body}, f"{page.name}: {target} has no {name}"


# FIGURES
def shown():
    """The figures' files that the pages show."""
    targets = [(page.parent / target).resolve() for page in PAGES for _, target in links(text_of(page))]
    return {target.name for target in targets if target.parent == ROOT / "experiments" / "figures"}


def test_every_committed_figure_is_shown():
    listed = subprocess.run(["git", "ls-files", "experiments/figures"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    committed = {line.rpartition("/")[2] for line in listed.stdout.splitlines()}
    assert committed and committed <= shown()


def test_every_figure_is_shown_light_and_dark():
    names = shown()
    assert names == {name.replace("-light.", "-dark.") for name in names if "-light." in name} | {
        name.replace("-dark.", "-light.") for name in names if "-dark." in name
    }


# OPTIONS
@functools.cache
def options(script):
    """{option: default} of a script."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    defaults = load(script).Args()
    return {field.target.id: getattr(defaults, field.target.id) for field in fields}


def documented_options():
    """{heading of a table of options: {option: default as written}}."""
    part = text_of(METRICS).partition("\n## Options\n")[2].partition("\n## ")[0]
    found = {}
    for section in part.split("\n### ")[1:]:
        table = [row for row in rows(section) if row[0].startswith("`--")]
        assert all(len(row) == 4 and row[3] for row in table)
        names = [row[0].strip("`-").replace("-", "_") for row in table]
        found[section.splitlines()[0]] = dict(zip(names, [row[1] for row in table], strict=True))
    return found


def written(script, name, value):
    """A default as the page writes it."""
    if name == "exp_name":
        assert value == script.rpartition("/")[2].removesuffix(".py")
        return "the script's name"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.0e}".replace("e-0", "e-") if 0 < value < 1e-3 else f"{value:g}"
    return value


def test_every_option_is_documented_with_its_default_and_no_other():
    scripts = {
        "All scripts": SCRIPTS,
        "LBF scripts only": [*LBF_SCRIPTS, CDG],
        "SMAClite scripts only": SMACLITE_SCRIPTS,
        "DG scripts only": DG,
        f"`{CDG}` only": [CDG],
    }
    documented = documented_options()
    assert list(documented) == list(scripts)
    for script in SCRIPTS:
        expected = {}
        for heading, having in scripts.items():
            if script in having:
                expected |= documented[heading]
        missing = expected.keys() - options(script).keys()
        # two of a kind lack what the line of the option says
        lacking = {"oracle_distance", "bf16"} if script in SMACLITE_SCRIPTS else {"pair_chunk"}
        assert missing == (lacking if script in DG else set()), script
        assert options(script).keys() <= expected.keys(), script
        for name, value in options(script).items():
            default, _, smaclite = expected[name].strip("]").partition(" [")
            if smaclite and script in SMACLITE_SCRIPTS:
                default = smaclite
            assert default == written(script, name, value), f"{script}: --{name}"


# METRICS
@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """script -> the folder of a short run of it."""

    @functools.cache
    def run(script):
        cwd = tmp_path_factory.mktemp("run")
        if script in SMACLITE_SCRIPTS:
            play(script, cwd, *SETTINGS)
        else:
            done = run_inside(load(script), *SHORT_RUN, cwd=cwd)
            assert done.returncode == 0, done.stderr
        return run_folder(cwd)

    return run


def numberless(name):
    return re.sub(r"_agent_\d+$", "_agent_{i}", name)


def documented_metrics(script):
    """The metrics of a script, by the page."""
    learned, lbf, smaclite = script in DG, script not in SMACLITE_SCRIPTS, script in SMACLITE_SCRIPTS
    found = []
    for name, _, meaning in (row for row in rows(text_of(METRICS)) if len(row) == 3):
        absent = "(learned graph)" in meaning and not learned
        own = "(CDG)" in meaning or name == "`graph/edges_per_agent`"
        absent |= name.startswith("`graph/") and not (learned and "(CDG" not in meaning or script == CDG and own)
        absent |= "(CDG, `--graph learned`)" in meaning  # of another graph than the default one
        absent |= "(LBF)" in meaning and not lbf
        absent |= "(SMAClite)" in meaning and not smaclite
        if "/" in name and not absent:
            found.append(name.strip("`"))
    assert len(found) == len(set(found)) > 10
    return set(found)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_logged_metric_is_documented_and_no_other(script, logged):
    tags = {numberless(tag) for tag in scalars(logged(script))}
    assert tags == documented_metrics(script)


@pytest.mark.parametrize("script", ["mappo_dg_lbf.py", SMACLITE_SCRIPTS[0]])
def test_every_column_of_evaluations_is_documented_and_no_other(script, logged):
    with open(logged(script) / "evaluations.csv", encoding="utf-8") as file:
        columns = {numberless(name) for name in next(csv.reader(file))}
    own = text_of(METRICS).rpartition("| column |")[2]
    names = {row[0].strip("`") for row in rows(own)}
    metrics = {name.removeprefix("eval/") for name in documented_metrics(script) if name.startswith("eval/")}
    assert columns == names | metrics


# NUMBERS
def evaluations(name):
    return pd.read_csv(ROOT / "experiments" / "results" / f"{name}.csv").sort_values("nominal_frames")


def row_of(page, label):
    """The cells after the label in the only table row that begins with it."""
    (cells,) = (row[1:] for row in rows(text_of(page)) if row[0] == label)
    return cells


def close(cell, value, digits):
    return abs(float(cell) - value) <= 0.5 * 10**-digits + 1e-9


def test_what_a_user_should_see_is_what_the_runs_gave():
    frames = [float(cell[:-1]) * {"k": 1e3, "M": 1e6}[cell[-1]] for cell in row_of(README, "frames")]
    assert frames == [1e5, 2e5, 4e5, 1e6]
    for name, label in (("lbf_mappo", "seed 1, version 0.1.0"), ("lbf_bf16", "seeds 1 to 3, later scripts")):
        data = evaluations(name)
        data = data[(data["method"] == "mappo_dg") & (data["task"] == DEFAULT_TASK)]
        for due, cell in zip(frames, row_of(README, label), strict=True):
            returns = data[data["nominal_frames"] == due].set_index("seed")["return"]
            low, _, high = cell.partition(" to ")
            if high:
                assert sorted(returns.index) == [1, 2, 3]
                assert close(low, returns.min(), 3) and close(high, returns.max(), 3), (label, due)
            else:
                assert close(low, returns[1], 3), (label, due)


def test_the_frames_to_half_of_the_final_return_are_those_of_the_runs():
    page = ROOT / "docs" / "results.md"
    table = rows(text_of(page).partition("\n### Take-off\n")[2].partition("\n### ")[0])
    tasks = table[0][1:]
    data, run = evaluations("lbf_mappo"), ["method", "task", "seed"]
    final = data[data["nominal_frames"] >= 4.5e6].groupby(run)["return"].mean().rename("final")
    data = data.join(final, on=run)
    first = data[data["return"] >= data["final"] / 2].groupby(run)["nominal_frames"].first() / 1e6
    assert len(table) == 5
    for label, *cells in table[1:]:
        method = label.lower().replace("-", "_").replace(" ", "_")
        for task, cell in zip(tasks, cells, strict=True):
            pair = (method, f"Foraging-{task}-v3")
            if cell == "-":
                assert pair not in first.index.droplevel("seed")
            elif cell == "fails":
                assert final[pair].mean() < 0.1
            else:
                low, _, high = cell.partition(" to ")
                assert final[pair].mean() >= 0.1
                assert close(low, first[pair].min(), 2) and close(high, first[pair].max(), 2), pair


def test_our_own_method_stands_where_readme_says():
    """Highest IQM, mean and worst task; behind the better of global and local rewards on two tasks."""
    assert "highest IQM and mean" in text_of(README) and "fails on no task" in text_of(README)
    head, *lines = [row for row in rows(text_of(README)) if row[0] == "method" or row[0].startswith("MAPPO-")]
    glance = {row[0]: dict(zip(head, row)) for row in lines}
    ours = glance.pop("MAPPO-CDG")
    for method, row in glance.items():
        if "CDG" not in method:
            for column in ("IQM", "mean", "worst task"):
                assert float(ours[column].split()[0]) > float(row[column].split()[0]), (method, column)
    final = {name: evaluations(name) for name in ("lbf_cdg", "lbf_mappo")}
    for name, data in final.items():
        final[name] = data[data.nominal_frames > 4.5e6].groupby(["method", "task"])["return"].mean()
    for task, other in (("10x10-3p-3f", "mappo_global"), ("15x15-3p-4f", "mappo_local")):
        pair = f"Foraging-{task}-v3"
        assert final["lbf_cdg"]["mappo_cdg", pair] < final["lbf_mappo"][other, pair] - 0.01


def test_lengths_and_diffs_are_about_what_readme_says():
    lines = {row[0]: int(row[-1]) for row in rows(text_of(README)) if re.fullmatch(r"\[`.*\.py`\].*", row[0])}
    assert len(lines) == len(SCRIPTS)
    for cell, about in lines.items():
        script = re.match(r"\[`(.*)`\]\((.*)\)", cell)
        assert script[1] == script[2] in SCRIPTS
        length = len((ROOT / script[1]).read_text(encoding="utf-8").splitlines())
        assert abs(length - about) <= 60, f"{script[1]} has {length} lines"
    diffs = [row for row in rows(text_of(README)) if row[0].startswith("`diff ")]
    assert len(diffs) == 4
    for command, _, about in diffs:
        done = subprocess.run(command.strip("`").split(), cwd=ROOT, capture_output=True, text=True)
        changed = len(re.findall("^[<>]", done.stdout, re.MULTILINE))
        assert abs(changed - int(about)) <= max(3, int(about) // 20), f"{command}: {changed} lines"


def test_readme_lists_every_page():
    targets = {target for _, target in links(text_of(README))}
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= targets
    assert BASELINES and DG_SCRIPTS and set(SCRIPTS) <= targets
