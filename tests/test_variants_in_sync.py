"""The scripts repeat each other on purpose: what two of them share is identical, and their diffs stay small."""

import ast
import collections
import difflib
import functools
import itertools
import re
import sys

import pytest
from conftest import BASELINES, DG_SCRIPTS, LBF_SCRIPTS, ROOT

# Lines that `diff` marks with < or >: what a reader of the diff has to read.
MAX_DIFF_DG_TO_LOCAL = 350
MAX_DIFF_LOCAL_TO_GLOBAL = 14
MAX_DIFF_MAPPO_TO_IPPO = 16
MAX_REMOVED_DG_TO_CDG = 130

# The SMAClite scripts, each with the LBF script that it follows.
FOLLOWS = {"mappo_dg_smaclite.py": "mappo_dg_lbf.py"}
FOLLOWS |= {f"baselines/mappo_{r}_smaclite.py": f"baselines/mappo_{r}_lbf.py" for r in ("local", "global")}
MAX_DIFF_DG_TO_LOCAL_SMACLITE = 350

# What two scripts may write differently, and why.
ALLOWED = {
    "Critic": "the one difference between MAPPO and IPPO is what the critic sees",
    "main": "it is the algorithm itself; the limits on the diffs guard it",
    "Args": "the baselines have no options of the graph; the fields are compared one by one",
}
# What a SMAClite script may write differently from the LBF script that it follows, and why.
ALLOWED_SMACLITE = {
    "Args": "other tasks, and their defaults; the fields are compared one by one",
    "check_args": "other bad input",
    "make_env": "another environment",
    "Critic": "sees the environment's state",
    "check_graph_args": "has no oracle",
    "ReverseModel": "takes the pairs of the living",
    "GraphLogits": "has the pairs of the living in one row",
    "GraphModels": "mask unavailable actions, and take pairs chunk by chunk",
    "learned_graph": "takes pairs chunk by chunk, and the dead have no edges",
    "dependence_graph": "the dead have no edges, and there is no oracle",
    "graph_statistics": "counts the living, and there is no oracle",
    "update_graph_models": "takes pairs chunk by chunk, and the dead are not learned from",
    "Rollout": "masks, deaths, victories",
    "collect": "processes, a hidden state, masks, deaths",
    "episode_charts": "the win rate, deaths",
    "ppo_update": "whole sequences, masks, deaths",
    "evaluate": "the win rate, sampled and greedy games",
    "evaluation_row": "the win rate, sampled and greedy games",
    "make_run_name": "has no winner-take-all",
    "print_summary": "the win rate",
    "get_random_state": "a game depends on its seed alone",
    "set_random_state": "a game depends on its seed alone",
    "main": "it is the algorithm itself; its steps are compared",
}
# mappo_cdg_lbf.py against mappo_dg_lbf.py: what it may write differently, and why.
CDG, DG = "mappo_cdg_lbf.py", "mappo_dg_lbf.py"
ALLOWED_CDG = {
    "Args": "other graphs and advantages; the fields are compared one by one",
    "check_graph_args": "other options of the graph",
    "make_env": "the environment that knows who influences whom",
    "dependence_graph": "other graphs",
    "graph_statistics": "the simulator's edges in place of the oracle's",
    "main": "it is the algorithm itself; its steps are compared",
}
# experiments/spread.py against the script that each of its methods comes from: what it may write differently, and why.
SPREAD = "experiments/spread.py"
ALLOWED_SPREAD = {
    "Args": "another environment; the fields are compared one by one",
    "check_args": "other bad input",
    "make_env": "another environment",
    "graph_statistics": "as in the DG scripts, the oracle being the true graph",
    "credit": "other advantages",
    "collect": "all environments are stepped at once",
    "evaluate": "other environments",
    "parse_args": "knows checkpoints of its own alone",
    "main": "it is the algorithm itself",
}
SHARED_WITH_SPREAD = {
    "ippo_dg_lbf.py": {"GraphModels", "learned_graph", "graph_statistics", "update_graph_models", "multi_agent_gae"},
    CDG: {"pairwise_targets", "first_to_meet", "ReverseModel", "ppo_update"},
}
ALLOWED_OPTIONS_SPREAD = {"exp_name", "torch_deterministic", "cuda", "checkpoint_interval", "resume", "env_id"}
ALLOWED_OPTIONS_SPREAD |= {"hidden_dim", "norm_adv", "ent_coef"}  # the authors' settings for star-spread
ALLOWED_OPTIONS_SPREAD |= {"advantage", "graph", "c", "soft"}  # not all values are there, and not always of use
ALLOWED_OPTIONS_CDG = {"c", "graph", "soft", "encoder", "bf16", "transpose_graph"}
ALLOWED_OPTIONS_SMACLITE = {"env_id", "total_timesteps", "eval_interval", "eval_episodes", "hidden_dim", "graph"}
SECTIONS = ["ENVIRONMENT", "NETWORKS", "DEPENDENCE GRAPH", "ADVANTAGES", "ROLLOUT", "PPO UPDATE", "EVALUATION"]
SECTIONS += ["RUN FOLDER"]
STEPS = ["SET-UP", "EVALUATE", "COLLECT", "DEPENDENCE GRAPH", "ADVANTAGES", "UPDATE POLICY AND CRITIC", "LOG"]
STEPS += ["EVALUATE", "SHOW", "SAVE"]


@functools.cache
def source(script):
    return (ROOT / script).read_text()


@functools.cache
def definitions(script):
    """name -> source of every function and class of the script, decorators included."""
    text, found = source(script), {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            decorators = [ast.get_source_segment(text, decorator) for decorator in node.decorator_list]
            found[node.name] = "\n".join([*decorators, ast.get_source_segment(text, node)])
    return found


@functools.cache
def fields(script):
    """name -> (annotation, default, docstring as written) of every field of Args, in order."""
    text, found = source(script), {}
    (args,) = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    for field, doc in itertools.zip_longest(args.body[::2], args.body[1::2]):
        assert isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr), f"{script}: a field has no help text"
        found[field.target.id] = tuple(ast.get_source_segment(text, x) for x in (field.annotation, field.value, doc))
    return found


def changed_lines(a, b):
    """How many lines are removed or added from script a to script b."""
    return len(removed(a, b)) + len(removed(b, a))


def removed(a, b):
    """The lines of script a that a diff to script b takes away."""
    mine, other = source(a).splitlines(), source(b).splitlines()
    opcodes = difflib.SequenceMatcher(None, mine, other, autojunk=False).get_opcodes()
    return [line for tag, start, end, _, _ in opcodes if tag != "equal" for line in mine[start:end]]


def imports(node):
    """The top-level names of the packages that are imported below node."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name.split(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "a relative import"
            yield child.module.split(".")[0]


def header(script):
    """The PEP 723 block as text, without the comment signs."""
    block = re.match(r"# /// script\n((?:# .*\n)+)# ///\n", source(script))
    assert block, f"{script} does not begin with a PEP 723 header"
    return re.sub(r"^# ", "", block.group(1), flags=re.MULTILINE)


def package(requirement):
    return re.match(r"[A-Za-z0-9_-]+", requirement).group()


PAIRS = list(itertools.combinations(LBF_SCRIPTS, 2))


@pytest.mark.parametrize("a, b", PAIRS)
def test_shared_functions_and_classes_are_identical(a, b):
    mine, other = definitions(a), definitions(b)
    shared = [name for name in mine if name in other]
    assert len(shared) >= 15
    same_critic = ("mappo" in a) == ("mappo" in b)
    for name in shared:
        if name not in ALLOWED or name == "Critic" and same_critic:
            assert mine[name] == other[name], f"{name} differs between {a} and {b}"
    assert shared == [name for name in other if name in mine], "not in the same order"


@pytest.mark.parametrize("a, b", PAIRS)
def test_shared_options_are_identical(a, b):
    mine, other = fields(a), fields(b)
    shared = [name for name in mine if name in other]
    for name in shared:
        assert mine[name] == other[name], f"Args.{name} differs between {a} and {b}"
    assert shared == [name for name in other if name in mine], "not in the same order"
    if (a in DG_SCRIPTS) == (b in DG_SCRIPTS):
        assert mine == other
    else:
        assert set(mine) > set(other)  # the baselines have the common options, all of them and no other ones


def test_only_a_dg_script_has_a_graph():
    graph = {"check_graph_args", "player_positions", "mlp", "ReverseModel", "GraphLogits", "GraphModels", "entropy"}
    graph |= {"other_agents"}
    graph |= {"learned_graph", "oracle_graph", "change_edges", "dependence_graph", "graph_statistics"}
    graph |= {"cross_entropy", "accuracy", "update_graph_models", "meeting_times", "multi_agent_gae"}
    for script in DG_SCRIPTS:
        for baseline in BASELINES:
            assert set(definitions(script)) - set(definitions(baseline)) == graph
            assert set(definitions(baseline)) <= set(definitions(script))


@pytest.mark.parametrize("algorithm", ["mappo", "ippo"])
def test_diffs_from_dg_to_local_to_global(algorithm):
    local = f"baselines/{algorithm}_local_lbf.py"
    assert changed_lines(f"{algorithm}_dg_lbf.py", local) <= MAX_DIFF_DG_TO_LOCAL
    assert changed_lines(local, f"baselines/{algorithm}_global_lbf.py") <= MAX_DIFF_LOCAL_TO_GLOBAL


@pytest.mark.parametrize("mappo", [script for script in LBF_SCRIPTS if "mappo" in script])
def test_diffs_from_mappo_to_ippo(mappo):
    assert changed_lines(mappo, mappo.replace("mappo", "ippo")) <= MAX_DIFF_MAPPO_TO_IPPO


def test_a_baseline_adds_nothing_but_its_own_few_lines():
    """Hardly a line of a local baseline is missing from the DG script: the diff is what the method adds."""
    for algorithm in ("mappo", "ippo"):
        new = removed(f"baselines/{algorithm}_local_lbf.py", f"{algorithm}_dg_lbf.py")
        assert len(new) <= 20, "\n".join(new)


def test_third_party_imports_only(lbf_script):
    """Whatever is imported is in the standard library or in the header; wandb only when it is asked for."""
    tree = ast.parse(source(lbf_script))
    dependencies = {package(requirement) for requirement in re.findall(r'"([a-z][^"]*)"', header(lbf_script))}
    third_party = set(imports(tree)) - sys.stdlib_module_names
    assert third_party - {"wandb"} <= dependencies
    assert dependencies - third_party == {"tensorboard"}  # by way of torch.utils.tensorboard
    top_level = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "wandb" not in {name for node in top_level for name in imports(node)}


def requirements(name):
    """package -> line of the requirements file, comments and included files aside."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    return {package(line): line for line in lines if line and not line.startswith("-")}


def dependencies(script):
    """package -> what the script's header asks for."""
    assert 'requires-python = ">=3.10"' in header(script)
    listed = re.search(r"^dependencies = (\[.*\])$", header(script), re.MULTILINE).group(1)
    return {package(dependency): dependency for dependency in ast.literal_eval(listed)}


def test_an_lbf_script_needs_what_requirements_txt_says_and_no_more(lbf_script):
    assert dependencies(lbf_script) == requirements("requirements.txt")


@pytest.mark.parametrize("script", FOLLOWS)
def test_a_smaclite_script_needs_the_versions_that_the_requirements_say(script):
    """Those of smaclite itself, which come with it, aside."""
    needed = dependencies(script)
    smaclite = requirements("requirements-smaclite.txt")
    git, commit = re.search(r"git\+(\S+)@(\w+)$", smaclite.pop("smaclite")).groups()
    assert f'smaclite = {{ git = "{git}", rev = "{commit}" }}' in header(script)
    assert needed.pop("smaclite") == "smaclite"
    assert needed.items() <= (requirements("requirements.txt") | smaclite).items()
    assert f'override-dependencies = ["{smaclite["rtree"]}"]' in header(script)


def test_whatever_else_has_a_header_needs_the_versions_that_requirements_txt_says():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py"), *ROOT.glob("experiments/*.py")]
    others = {str(path.relative_to(ROOT)) for path in paths if path.read_text(encoding="utf-8").startswith("# ///")}
    others -= {*LBF_SCRIPTS, *FOLLOWS}
    assert "experiments/spread.py" in others
    for other in others:
        assert dependencies(other).items() <= requirements("requirements.txt").items(), other


def test_sections(lbf_script):
    """Announced by the same comments, in the same order, in every script."""
    announced = re.findall(r"^# ([A-Z][A-Z -]+)(?:$|:)", source(lbf_script), re.MULTILINE)
    assert announced == [name for name in SECTIONS if "dg_" in lbf_script or name != "DEPENDENCE GRAPH"]
    steps = re.findall(r"^ +# ([A-Z][A-Z-]+(?: [A-Z]+)*)", source(lbf_script), re.MULTILINE)
    assert steps == [name for name in STEPS if "dg_" in lbf_script or name != "DEPENDENCE GRAPH"]
    text = source(lbf_script)
    order = ["class Args", "class UserError", "# ENVIRONMENT", "def main():", 'if __name__ == "__main__":']
    assert [text.index(mark) for mark in order] == sorted(text.index(mark) for mark in order)
    assert re.search(r'^"""\w+ with .*arXiv 2601.21523', text, re.MULTILINE)


# Methods that packages call, by the class of theirs that a class of ours extends; they prescribe the parameters, too.
CALLED_BY_PACKAGES = {
    "ForagingEnv": {"spawn_food", "step", "_gen_valid_moves", "_make_gym_obs"},
    "NeighbourFinder": {"update", "query_radius"},
    "NumpyVelocityUpdater": {"reset_all_units", "compute_new_velocities"},
    "SMACliteEnv": {"reset", "step", "get_obs", "get_avail_actions"},
    "Unit": {"game_step", "has_within_attack_range"},
    "nn.Module": {"forward"},
}


def reads(node):
    """How often each name and attribute is read below node."""
    nodes = [x for x in ast.walk(node) if isinstance(x, ast.Name | ast.Attribute) and isinstance(x.ctx, ast.Load)]
    return collections.Counter(x.id if isinstance(x, ast.Name) else x.attr for x in nodes)


def options_read(node):
    """Every name in args.NAME below node."""
    attributes = [x for x in ast.walk(node) if isinstance(x, ast.Attribute)]
    return {x.attr for x in attributes if isinstance(x.value, ast.Name) and x.value.id == "args"}


def called_from_outside(classes, base):
    """The methods that packages call of a class that extends base, at first or second hand."""
    own = [ast.unparse(further) for further in classes[base].bases] if base in classes else []
    return CALLED_BY_PACKAGES.get(base, set()).union(*(called_from_outside(classes, further) for further in own))


def never_read(text):
    """What a source defines and does not use: functions, classes and methods that only they themselves mention, their
    parameters and variables, and options that are checked and nothing else."""
    tree, dead = ast.parse(text), set()
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    definitions = [(node, set()) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for name, owner in classes.items():
        hooks = {"__init__"} | called_from_outside(classes, name)
        definitions += [(node, hooks) for node in owner.body if isinstance(node, ast.FunctionDef)]
    read = reads(tree)
    for node, hooks in definitions:
        mine = reads(node)
        if node.name not in hooks and not node.name.startswith("__") and read[node.name] <= mine[node.name]:
            dead.add(node.name)
        if isinstance(node, ast.FunctionDef):
            names = {x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
            if node.name == "__init__" or node.name not in hooks:
                names |= {x.arg for x in ast.walk(node) if isinstance(x, ast.arg)}
            dead |= {f"{node.name}: {name}" for name in names - mine.keys() - {"self", "_"}}
    used = [node for node in tree.body if getattr(node, "name", "") not in ("check_args", "check_graph_args")]
    options = {field.target.id for field in classes["Args"].body if isinstance(field, ast.AnnAssign)}
    return dead | {f"--{name}" for name in options - set().union(*map(options_read, used))}


def test_nothing_is_dead(lbf_script):
    assert never_read(source(lbf_script)) == set()


ALIVE = """
class Args:
    seed: int = 1
    c: float = 0.9

class Net(nn.Module):
    def __init__(self, size):
        self.layer = Linear(size)

    def forward(self, x, unused_by_us):
        return self.layer(x)

def check_args(args):
    return args.seed < 0 or args.c < 0

def helper(a, b):
    first, _ = a
    return first + b

def main():
    args = Args()
    check_args(args)
    for i in range(args.seed):
        Net(helper(i, args.c))

main()
"""


def test_what_is_dead_is_found():
    """test_nothing_is_dead can fail, whatever it is that is dead."""
    found = lambda old, new: never_read(ALIVE.replace(old, new))  # noqa: E731
    assert never_read(ALIVE) == set()
    assert found("Net(helper(i, args.c))", "helper(i, args.c)") == {"Net"}
    assert found("Net(helper(i, args.c))", "Net(args.c)") == {"helper", "main: i"}
    assert found("Net(helper(i, args.c))", "Net(helper(i, 1))") == {"--c"}
    assert found("return first + b", "return first") == {"helper: b"}
    assert found("return first + b", "return a + b") == {"helper: first"}
    assert found("return first + b", "return helper(first, b)") == set()
    assert found("(helper(i, args.c))", "(i + args.c)") == {"helper"}
    assert found("def forward(self", "def backward(self") == {"backward", "backward: unused_by_us"}
    assert found("Linear(size)", "Linear(3)") == {"__init__: size"}
    assert found("Net(helper(i, args.c))", "Net(i, args.c)  # helper") == {"helper"}


@pytest.mark.parametrize("a, b", list(itertools.combinations(FOLLOWS, 2)))
def test_the_smaclite_scripts_share_their_functions_and_options(a, b):
    mine, other = definitions(a), definitions(b)
    shared = [name for name in mine if name in other]
    assert len(shared) >= 20
    for name in shared:
        if name not in ALLOWED or name == "Critic":
            assert mine[name] == other[name], f"{name} differs between {a} and {b}"
    assert shared == [name for name in other if name in mine], "not in the same order"
    assert fields(b).items() <= fields(a).items()


def test_diffs_between_the_smaclite_scripts():
    dg, local, global_ = FOLLOWS
    assert changed_lines(dg, local) <= MAX_DIFF_DG_TO_LOCAL_SMACLITE
    assert changed_lines(local, global_) <= MAX_DIFF_LOCAL_TO_GLOBAL


@pytest.mark.parametrize("smaclite, lbf", FOLLOWS.items())
def test_a_smaclite_script_follows_its_lbf_script(smaclite, lbf):
    """It differs only where the environment forces it: what else they share is identical and in the same order."""
    mine, other = definitions(smaclite), definitions(lbf)
    shared = [name for name in mine if name in other]
    for name in shared:
        if name not in ALLOWED_SMACLITE:
            assert mine[name] == other[name], f"{name} differs between {smaclite} and {lbf}"
    assert shared == [name for name in other if name in mine], "not in the same order"
    mine, other = fields(smaclite), fields(lbf)
    shared = [name for name in mine if name in other]
    assert {name for name in shared if mine[name] != other[name]} <= ALLOWED_OPTIONS_SMACLITE
    assert shared == [name for name in other if name in mine], "not in the same order"
    assert set(mine) - set(other) <= {"use_cpp_rvo2", "num_workers", "pair_chunk"}
    assert set(other) - set(mine) <= {"eval_greedy", "winner_take_all", "oracle_distance", "bf16"}


@pytest.mark.parametrize("script", FOLLOWS)
def test_the_form_of_a_smaclite_script(script):
    """The LBF scripts' sections and steps, no long line, nothing that is not used, only what the header names."""
    test_sections(script)
    test_nothing_is_dead(script)
    tree = ast.parse(source(script))
    dependencies = {package(requirement) for requirement in re.findall(r'"([a-z][^"]*)"', header(script))}
    assert set(imports(tree)) - sys.stdlib_module_names - {"wandb"} <= dependencies
    assert max(map(len, source(script).splitlines())) <= 120


def test_the_counterfactual_script_follows_the_dg_script():
    """What they share is identical and in the same order; the one thing that it lacks is the oracle."""
    mine, other = definitions(CDG), definitions(DG)
    shared = [name for name in mine if name in other]
    for name in shared:
        if name not in ALLOWED_CDG:
            assert mine[name] == other[name], f"{name} differs between {CDG} and {DG}"
    assert shared == [name for name in other if name in mine], "not in the same order"
    assert set(other) - set(mine) == {"player_positions", "oracle_graph"}
    mine, other = fields(CDG), fields(DG)
    shared = [name for name in mine if name in other]
    assert {name for name in shared if mine[name] != other[name]} <= ALLOWED_OPTIONS_CDG
    assert shared == [name for name in other if name in mine], "not in the same order"
    assert set(other) - set(mine) == {"oracle_distance", "edge_drop", "edge_add", "transpose_graph"}
    assert len(removed(DG, CDG)) <= MAX_REMOVED_DG_TO_CDG  # what it adds is the method
    assert header(CDG) == header(DG)


def test_the_form_of_the_counterfactual_script():
    test_sections(CDG)
    test_nothing_is_dead(CDG)
    test_third_party_imports_only(CDG)


@pytest.mark.parametrize("script", SHARED_WITH_SPREAD)
def test_star_spread_shares_its_functions_and_options_with_the_lbf_scripts(script):
    mine, other = definitions(SPREAD), definitions(script)
    shared = [name for name in mine if name in other]
    assert SHARED_WITH_SPREAD[script] <= set(shared) and len(shared) >= 30
    allowed = ALLOWED_SPREAD.keys() - SHARED_WITH_SPREAD[script]
    for name in shared:
        if name not in allowed:
            assert mine[name] == other[name], f"{name} differs between {SPREAD} and {script}"
    assert shared == [name for name in other if name in mine], "not in the same order"
    mine, other = fields(SPREAD), fields(script)
    shared = [name for name in mine if name in other]
    assert {name for name in shared if mine[name] != other[name]} <= ALLOWED_OPTIONS_SPREAD
    assert shared == [name for name in other if name in mine], "not in the same order"


def test_nothing_of_star_spread_is_dead():
    assert never_read(source(SPREAD)) == set()
