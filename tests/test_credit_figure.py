"""experiments/credit_figure.py: the credits that it shows are those that docs/counterfactual.md speaks of."""

import sys

import pytest
from conftest import ROOT

for package in ("matplotlib", "pandas", "scipy", "yaml"):
    pytest.importorskip(package, reason="needs experiments/requirements.txt")
sys.path.insert(0, str(ROOT / "experiments"))
import credit_figure  # noqa: E402


def test_a_perfect_critic_leaves_the_published_advantage_next_to_nothing():
    """Only its share 1 - lambda of everybody's advantage is left of the credit for the approach."""
    needed = credit_figure.credits("needed")
    assert needed["published"] == pytest.approx(0.05 * needed["pairwise"], abs=1e-6)
    assert needed["pairwise"][0] > 0.1


def test_the_difference_credits_the_approach_where_it_is_needed_and_nowhere_else():
    needed, by_itself = credit_figure.credits("needed"), credit_figure.credits("by itself")
    assert needed["difference"] == pytest.approx(needed["pairwise"], abs=1e-6)
    assert (by_itself["difference"] == 0).all()


def test_the_pairwise_advantage_rewards_a_contact_that_changes_nothing():
    assert credit_figure.credits("by itself")["pairwise"][0] > 0.3
    assert (credit_figure.credits("by itself")["published"].abs() < 1e-6).all()


def test_a_step_away_is_credited_less_than_one_towards():
    """One step's credit: lambda 0 leaves the TD errors, whose sign is that of the move."""
    moves = [b - a for a, b in zip(credit_figure.PATH, credit_figure.PATH[1:], strict=False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(credit_figure, "LAMBDA", 0.0)
        for advantage in ("pairwise", "difference"):
            credit = credit_figure.credits("needed")[advantage][: len(moves)]
            assert [bool(value > 0) for value in credit] == [move < 0 for move in moves]
