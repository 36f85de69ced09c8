"""The ground-truth metrics, loaded by path as ``eval.metrics`` does."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

import rlxf.tools.tiny

Evaluate = Callable[[list[str], list[str], list[str]], dict[str, float]]
GOOD, BAD, NEUTRAL, BROKEN = " the plot was great .", " the plot was dull .", " it was made in paris .", " great great"


@pytest.fixture
def evaluate() -> Evaluate:
    path = Path(rlxf.tools.tiny.__file__).with_name("truth.py")
    spec = importlib.util.spec_from_file_location("user_metrics", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Evaluate = module.evaluate
    return found


def test_metrics_are_shares_and_ties_count_half(evaluate: Evaluate) -> None:
    completions = [GOOD, BAD, NEUTRAL, BROKEN]
    initial = [BAD, BAD, NEUTRAL, GOOD]  # win, tie, tie, win (2 against 1)
    assert evaluate(["p"] * 4, completions, initial) == {"positive": 0.5, "valid": 0.75, "win_truth": 0.75}


def test_a_policy_wins_half_against_itself(evaluate: Evaluate) -> None:
    completions = [GOOD, BAD, NEUTRAL]
    assert evaluate(["p"] * 3, completions, completions)["win_truth"] == 0.5


def test_losing_everywhere_is_zero(evaluate: Evaluate) -> None:
    assert evaluate(["p"] * 2, [BAD, BAD], [GOOD, NEUTRAL])["win_truth"] == 0.0


@pytest.mark.parametrize(("prompts", "completions", "initial"), [(2, 2, 1), (1, 2, 2), (0, 0, 0)])
def test_sizes_that_do_not_fit_are_refused(evaluate: Evaluate, prompts: int, completions: int, initial: int) -> None:
    with pytest.raises(ValueError, match=f"got {prompts}, {initial} and {completions}"):
        evaluate(["p"] * prompts, [GOOD] * completions, [GOOD] * initial)
