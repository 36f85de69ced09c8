"""Pairs from a judge's verdicts: the better side is chosen, and scores are not read."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.core.errors import ShapeError
from rlxf.core.pairs import PairingResult
from rlxf.core.types import Comparisons, ScoredRollouts
from rlxf.observe.formulas import pair_metrics
from rlxf.pair import PAIRINGS, PairingSettings
from tests.pair_world import picked, scored

NAN = math.nan
Judged = list[tuple[int, int, int, float]]  # prompt, first sample, second sample, probability that first is better


def completions(*numbers: int, order: list[int] | None = None) -> ScoredRollouts:
    """So many completions of each prompt, all without a score."""
    return scored([[NAN] * number for number in numbers], order)


def compared(given: ScoredRollouts, judged: Judged) -> Comparisons:
    rollouts = given.rollouts
    keys = list(zip(rollouts.prompt_index.tolist(), rollouts.sample_index.tolist(), strict=True))
    return Comparisons(
        first=torch.tensor([keys.index((p, first)) for p, first, _, _ in judged], dtype=torch.int64),
        second=torch.tensor([keys.index((p, second)) for p, _, second, _ in judged], dtype=torch.int64),
        probability=torch.tensor([probability for *_, probability in judged], dtype=torch.float32),
    )


def pair(name: str, given: ScoredRollouts, judged: Judged, **keys: float) -> PairingResult:
    return PAIRINGS[name](given, PairingSettings(**keys), compared(given, judged))  # type: ignore[index, arg-type]


@pytest.mark.parametrize("name", ["best_worst", "all", "random"])
def test_of_two_the_better_one_is_chosen_by_the_verdict(name: str) -> None:
    judged = [(0, 0, 1, 0.25), (1, 1, 0, 0.25), (2, 0, 1, 0.5), (3, 0, 1, NAN)]
    result = pair(name, completions(2, 2, 2, 2), judged)
    assert picked(result) == [(0, 1, 0), (1, 0, 1)]
    assert result.pairs.margin.tolist() == [0.5, 0.5]
    assert (result.dropped, result.ties, result.missing, result.num_asked) == (2, 1, 1, 4)
    assert pair_metrics(result)["pair/tie_rate"] == 0.25


def test_scores_are_not_read() -> None:
    result = pair("all", scored([[9.0, 0.0]]), [(0, 0, 1, 0.0)])
    assert picked(result) == [(0, 1, 0)]
    assert result.pairs.margin.tolist() == [1.0]


def test_all_takes_the_pairs_that_were_judged_and_no_others() -> None:
    result = pair("all", completions(3), [(0, 0, 1, 1.0), (0, 2, 0, 0.625)])
    assert picked(result) == [(0, 0, 1), (0, 2, 0)]
    assert result.pairs.weight.tolist() == [0.5, 0.5]
    assert picked(pair("all", completions(3), [(0, 0, 1, 1.0), (0, 2, 0, 0.625)], min_score_margin=0.25)) == [(0, 0, 1)]


def test_best_and_worst_by_mean_where_all_pairs_were_judged() -> None:
    judged = [(0, 0, 1, 0.9), (0, 0, 2, 0.4), (0, 2, 1, 0.55)]  # means: 0.65, 0.275, 0.575
    assert picked(pair("best_worst", completions(3), judged)) == [(0, 0, 1)]


@pytest.mark.parametrize("verdict", [0.1, 0.5, NAN])
def test_no_pair_where_the_verdict_on_best_and_worst_does_not_say_so(verdict: float) -> None:
    """Sample 0 wins clearly elsewhere, sample 1 loses clearly elsewhere."""
    judged = [(0, 0, 1, verdict), (0, 0, 2, 1.0), (0, 0, 3, 1.0), (0, 2, 1, 1.0), (0, 3, 1, 1.0), (0, 2, 3, 0.5)]
    result = pair("best_worst", completions(4), judged)
    assert (len(result.pairs), result.dropped) == (0, 1)


def test_all_means_equal_is_no_pair() -> None:
    circle = [(0, 0, 1, 0.75), (0, 1, 2, 0.75), (0, 2, 0, 0.75)]
    assert len(pair("best_worst", completions(3), circle).pairs) == 0


def test_the_winner_of_a_knockout_against_the_one_that_it_beat_most_clearly() -> None:
    judged = [(0, 0, 1, 0.9), (0, 2, 3, 0.99), (0, 0, 2, 0.6)]
    result = pair("best_worst", completions(4), judged)
    assert picked(result) == [(0, 0, 1)]
    assert result.pairs.margin.tolist() == pytest.approx([0.8])
    assert picked(pair("best_worst", completions(4), [*judged[:2], (0, 0, 2, 0.4)])) == [(0, 2, 3)]


def test_a_winner_with_a_free_round() -> None:
    assert picked(pair("best_worst", completions(3), [(0, 0, 1, 0.9), (0, 2, 0, 0.6)])) == [(0, 2, 0)]


@pytest.mark.parametrize("final", [0.5, NAN])
def test_a_final_without_a_winner_leaves_the_clearer_of_the_two_semi_finals(final: float) -> None:
    judged = [(0, 0, 1, 0.9), (0, 2, 3, 0.95), (0, 0, 2, final)]
    assert picked(pair("best_worst", completions(4), judged)) == [(0, 2, 3)]


def test_one_that_won_more_comes_before_one_that_won_clearly() -> None:
    """Of eight: the half with 0 was played to its end, that with 4 was not."""
    judged = [(0, 0, 1, 0.7), (0, 2, 3, 0.7), (0, 0, 2, 0.7), (0, 4, 5, 1.0), (0, 6, 7, NAN), (0, 4, 6, NAN)]
    assert picked(pair("best_worst", completions(8), [*judged, (0, 0, 4, NAN)])) == [(0, 0, 1)]


def test_a_knockout_without_any_verdict_is_no_pair() -> None:
    result = pair("best_worst", completions(4), [(0, 0, 1, NAN), (0, 2, 3, 0.5), (0, 0, 2, NAN)])
    assert (len(result.pairs), result.missing, result.ties, result.num_asked) == (0, 2, 1, 3)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (([0], [2]), "rows 0 and 2: expected two completions of one prompt"),
        (([1], [1]), "rows 1 and 1"),
        (([0], [9]), "row 9, but there are 4 completions"),
        (([0, 1], [1, 0]), "compared more than once"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(rows: tuple[list[int], list[int]], says: str) -> None:
    first, second = (torch.tensor(side) for side in rows)
    judged = Comparisons(first=first, second=second, probability=torch.full((len(first),), 0.7))
    with pytest.raises(ShapeError, match=says):
        PAIRINGS["all"](completions(2, 2), PairingSettings(), judged)


@pytest.mark.parametrize("probability", [1.5, -0.1])
def test_what_is_no_probability_is_refused(probability: float) -> None:
    with pytest.raises(ShapeError, match=r"not in \[0, 1\]"):
        Comparisons(first=torch.tensor([0]), second=torch.tensor([1]), probability=torch.tensor([probability]))


some_numbers = st.lists(st.integers(1, 5), min_size=1, max_size=4)
some_verdicts = st.sampled_from([NAN, 0.0, 0.1, 0.25, 0.5, 0.7, 0.75, 1.0])


@st.composite
def some_judged(draw: st.DrawFn) -> tuple[list[int], Judged]:
    """All pairs of a prompt, or some of them."""
    numbers = draw(some_numbers)
    judged = []
    for p, number in enumerate(numbers):
        every = [(a, b) for a in range(number) for b in range(a)]
        asked = every if draw(st.booleans()) else [both for both in every if draw(st.booleans())]
        judged += [(p, *(both if draw(st.booleans()) else both[::-1]), draw(some_verdicts)) for both in asked]
    return numbers, judged


@settings(max_examples=300, deadline=None)
@given(made=some_judged(), limit=st.sampled_from([0.0, 0.3]), data=st.data())
def test_what_holds_for_every_judged_pair(made: tuple[list[int], Judged], limit: float, data: st.DataObject) -> None:
    numbers, judged = made
    rows = data.draw(st.permutations(range(sum(numbers))))
    asked = data.draw(st.permutations(judged))
    better = {(p, *((a, b) if v > 0.5 else (b, a))): abs(2 * v - 1) for p, a, b, v in judged if not math.isnan(v)}
    found = {}
    for name in ("best_worst", "all", "random"):
        result = pair(name, completions(*numbers), judged, min_score_margin=limit)
        shuffled = pair(name, completions(*numbers, order=list(rows)), list(asked), min_score_margin=limit)
        found[name] = picked(result)
        assert found[name] == picked(shuffled)
        assert torch.equal(result.pairs.margin, shuffled.pairs.margin)
        for key, margin in zip(found[name], result.pairs.margin.tolist(), strict=True):
            assert better[key] == pytest.approx(margin, rel=1e-6)
            assert margin > limit
        for p in {p for p, _, _ in found[name]}:
            weights = result.pairs.weight[result.pairs.prompt_index == p]
            assert float(weights.sum()) == pytest.approx(1.0, rel=1e-6)
        assert result.ties == sum(v == 0.5 for *_, v in judged)
        assert result.missing == sum(math.isnan(v) for *_, v in judged)
    assert set(found["best_worst"]) | set(found["random"]) <= set(found["all"])
