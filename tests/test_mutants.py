"""The list of mutants does not rot, and its runner tells a fault that is found from one that is not."""

import re

import pytest
from conftest import ROOT
from mutants import DG, MUTANTS, ONE, Mutant, copy_repository, mutate, survives_in

CAPITALS = r"^ *# ([A-Z][A-Z-]+(?: [A-Z-]+)*)"


def read(script):
    return (ROOT / script).read_text(encoding="utf-8")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_fits_its_scripts(mutant):
    """Its text is there once, the fault is Python, and its killer is a test."""
    for script in mutant.scripts:
        assert mutate(read(script), mutant) != read(script)
    file, _, name = mutant.killer.partition("::")
    assert re.search(rf"^def {name}\(", read(f"tests/{file}"), re.MULTILINE)


def test_every_section_has_mutants():
    """The section of a mutant is the last comment in capitals before its text."""
    text = read(ONE[0])
    before = [text.partition(mutant.old)[0] for mutant in MUTANTS if ONE[0] in mutant.scripts]
    reached = {name for part in before for name in re.findall(CAPITALS, part, re.MULTILINE)[-1:]}
    assert reached == set(re.findall(CAPITALS, text, re.MULTILINE)) and len(reached) >= 14
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_the_runner_finds_the_dead_and_the_survivor(tmp_path):
    """In a copy: the repository itself is not touched, and the copy is whole again afterwards."""
    repository, before = copy_repository(tmp_path), read(ONE[0])
    killer = "test_advantages.py::test_orientation"
    transposed = ("edges = (graph | eye)", "edges = (graph.transpose(-1, -2) | eye)")
    assert survives_in(repository, Mutant(ONE, "a fault", killer, *transposed)) == []
    harmless = ("# m_t+1[k, j]\n", "# m_t+1[k, j], inf at first\n")
    assert survives_in(repository, Mutant(ONE, "none", killer, *harmless)) == ONE
    assert read(ONE[0]) == before == (repository / ONE[0]).read_text(encoding="utf-8")


def test_a_fault_of_several_scripts_is_looked_for_in_each(tmp_path):
    """The killer loads the first of the two scripts alone: in the other one the same fault survives."""
    repository, killer = copy_repository(tmp_path), "test_lbf_learning.py::test_graph_statistics"
    fault = ("graph[..., 0].numel()", "graph.numel()")
    assert survives_in(repository, Mutant(DG, "in both", killer, *fault)) == DG[1:]


def test_a_text_that_is_gone_or_there_twice_is_an_error():
    for old in ("this text is nowhere", "import"):
        with pytest.raises(ValueError, match="occurs"):
            mutate(read(ONE[0]), Mutant(ONE, "name", "killer", old, "pass"))
    with pytest.raises(SyntaxError):
        mutate(read(ONE[0]), Mutant(ONE, "name", "killer", "import difflib", "import"))
