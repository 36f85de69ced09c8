"""Pairs from n samples by their scores: which ones each pairing takes, their weights, and what changes nothing."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.core.errors import ShapeError
from rlxf.core.pairs import PairingResult
from rlxf.core.types import Comparisons, OnlinePairs
from rlxf.observe.formulas import pair_metrics
from rlxf.pair import PAIRINGS, PairingSettings
from tests.pair_world import picked, scored

NAN = math.nan
Scores = list[list[float]]


def pair(name: str, scores: Scores, order: list[int] | None = None, **keys: float | None) -> PairingResult:
    if name == "threshold":
        keys = {"threshold": 0.25} | keys
    return PAIRINGS[name](scored(scores, order), PairingSettings(**keys))  # type: ignore[index, arg-type]


def test_all_takes_every_two_completions_that_differ() -> None:
    result = pair("all", [[2.0, 0.0, 1.0], [1.0, 1.0, 3.0], [4.0, 4.0]])
    assert picked(result) == [(0, 0, 1), (0, 0, 2), (0, 2, 1), (1, 2, 0), (1, 2, 1)]
    assert result.pairs.margin.tolist() == [2.0, 1.0, 1.0, 2.0, 2.0]
    torch.testing.assert_close(result.pairs.weight, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.5, 0.5]))
    assert (result.dropped, result.ties, result.missing, result.num_prompts) == (1, 1, 0, 3)
    assert pair_metrics(result) == {
        "pair/kept": 5.0, "pair/dropped": 1.0, "pair/tie_rate": 1 / 3, "pair/missing": 0.0, "pair/margin": 1.6,
        "pair/length_difference": pytest.approx(0.2),
    }  # fmt: skip


def test_best_worst_gives_each_pair_the_weight_one() -> None:
    assert pair("best_worst", [[2.0, 0.0, 1.0], [3.0, 4.0]]).pairs.weight.tolist() == [1.0, 1.0]


def test_the_threshold_parts_good_from_bad_and_belongs_to_the_bad() -> None:
    result = pair("threshold", [[0.5, 0.25, -1.0, 0.75], [1.0, 2.0], [0.0, 0.25]], threshold=0.25)
    assert picked(result) == [(0, 0, 1), (0, 0, 2), (0, 3, 1), (0, 3, 2)]
    assert result.dropped == 2


def test_a_float32_score_at_the_threshold_is_bad() -> None:
    assert picked(pair("threshold", [[0.1, 0.0], [0.2, 0.1]], threshold=0.1)) == [(1, 0, 1)]


def test_the_widest_pairs_stay_and_the_first_samples_among_equals() -> None:
    scores = [[0.0, 3.0, 1.0, 3.0]]
    assert picked(pair("all", scores, max_pairs_per_prompt=1)) == [(0, 1, 0)]
    assert picked(pair("all", scores, max_pairs_per_prompt=3)) == [(0, 1, 0), (0, 3, 0), (0, 1, 2)]
    assert picked(pair("all", scores, max_pairs_per_prompt=99)) == picked(pair("all", scores))


def test_lengths_that_differ_too_much_are_dropped_and_counted() -> None:
    """Completion k has k + 1 tokens."""
    result = pair("all", [[3.0, 2.0, 1.0, 0.0]], max_length_ratio=2.0)
    assert picked(result) == [(0, 0, 1), (0, 1, 2), (0, 1, 3), (0, 2, 3)]  # 1:2, 2:3, 2:4 and 3:4, not 1:3 and 1:4
    assert result.too_different == 2
    assert pair_metrics(result)["pair/too_different"] == 2.0
    best = pair("best_worst", [[3.0, 2.0, 1.0, 0.0]], max_length_ratio=2.0)
    assert (len(best.pairs), best.dropped, best.too_different) == (0, 1, 1)
    assert pair("all", [[1.0, 0.0]]).too_different is None


def test_the_limit_is_of_the_pairs_whose_lengths_are_near() -> None:
    result = pair("all", [[3.0, 2.0, 1.0, 0.0]], max_length_ratio=2.0, max_pairs_per_prompt=1)
    assert picked(result) == [(0, 1, 3)]


def test_a_random_pair_is_one_of_all_and_each_as_often_as_the_others() -> None:
    scores = [[2.0, 0.0, 1.0, NAN, 1.0]]
    drawn = Counter(picked(pair("random", scores, step=step))[0] for step in range(600))
    assert set(drawn) == set(picked(pair("all", scores)))
    assert all(80 <= count <= 160 for count in drawn.values())  # 120 expected of each of five


def test_a_random_pair_depends_on_seed_step_and_prompt() -> None:
    scores = [[2.0, 0.0, 1.0, 3.0]] * 8
    first = [(chosen, rejected) for _, chosen, rejected in picked(pair("random", scores, seed=1, step=1))]
    assert len(set(first)) > 1
    for keys in ({"seed": 2, "step": 1}, {"seed": 1, "step": 2}):
        assert first != [(chosen, rejected) for _, chosen, rejected in picked(pair("random", scores, **keys))]
    assert first == [(chosen, rejected) for _, chosen, rejected in picked(pair("random", scores, seed=1, step=1))]


def test_a_threshold_has_no_meaning_for_a_judge() -> None:
    given = scored([[1.0, 0.0]])
    judged = Comparisons(first=torch.tensor([0]), second=torch.tensor([1]), probability=torch.tensor([0.7]))
    with pytest.raises(ShapeError, match="needs scores"):
        PAIRINGS["threshold"](given, PairingSettings(threshold=0.5), judged)


few_values = st.sampled_from([NAN, -1.5, 0.0, 0.25, 1.0, 2.0])  # few, so that ties happen
some_scores = st.lists(st.lists(few_values, min_size=1, max_size=5), min_size=1, max_size=5)
some_keys = st.fixed_dictionaries(
    {
        "min_score_margin": st.sampled_from([0.0, 0.5, 2.0]),
        "max_pairs_per_prompt": st.sampled_from([None, 1, 2, 3]),
        "max_length_ratio": st.sampled_from([None, 1.0, 1.5, 3.0]),
        "step": st.integers(0, 3),
    }
)
names = st.sampled_from(sorted(PAIRINGS))


@settings(max_examples=300, deadline=None)
@given(name=names, scores=some_scores, keys=some_keys, data=st.data())
def test_the_order_of_rows_changes_nothing(
    name: str, scores: Scores, keys: dict[str, float | None], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(sum(map(len, scores)))))
    straight, shuffled = pair(name, scores, **keys), pair(name, scores, list(order), **keys)
    assert picked(straight) == picked(shuffled)
    for field in ("dropped", "ties", "missing", "num_asked", "num_prompts", "too_different"):
        assert getattr(straight, field) == getattr(shuffled, field)
    for field in ("row_ids", "margin", "policy_version", "weight", "prompt_index", "chosen_engine_logps"):
        assert torch.equal(getattr(straight.pairs, field), getattr(shuffled.pairs, field))


@settings(max_examples=300, deadline=None)
@given(name=names, scores=some_scores, keys=some_keys)
def test_what_holds_for_every_pair(name: str, scores: Scores, keys: dict[str, float | None]) -> None:
    result = pair(name, scores, **keys)
    pairs, found = result.pairs, picked(result)
    assert len(set(found)) == len(found)
    assert pairs.chosen.prompt_rows() == pairs.rejected.prompt_rows()
    assert pairs.prompt_index.tolist() == pairs.row_ids.tolist() == [p for p, _, _ in found]
    limit, ratio = keys["max_pairs_per_prompt"], keys["max_length_ratio"]
    for (p, chosen, rejected), margin in zip(found, pairs.margin.tolist(), strict=True):
        assert scores[p][chosen] - scores[p][rejected] == margin > keys["min_score_margin"]  # no tie, none missing
        longer, shorter = max(chosen, rejected) + 1, min(chosen, rejected) + 1
        assert ratio is None or longer <= ratio * shorter
        if name == "threshold":
            assert scores[p][chosen] > 0.25 >= scores[p][rejected]
    count = Counter(p for p, _, _ in found)
    assert all(number <= (limit or 99) for number in count.values())
    if name in ("best_worst", "random"):
        assert all(number == 1 for number in count.values())
    for p in count:
        assert float(pairs.weight[pairs.prompt_index == p].sum()) == pytest.approx(1.0, rel=1e-6)
    assert len(count) + result.dropped == len(scores)
    assert result.ties + result.missing <= result.dropped


@settings(max_examples=300, deadline=None)
@given(scores=some_scores, keys=some_keys)
def test_one_pair_of_a_prompt_is_one_of_all(scores: Scores, keys: dict[str, float | None]) -> None:
    every = set(picked(pair("all", scores, **keys | {"max_pairs_per_prompt": None})))
    for name in ("best_worst", "random", "threshold"):
        assert set(picked(pair(name, scores, **keys))) <= every
    if keys["max_length_ratio"] is None:
        widest = picked(pair("all", scores, **keys | {"max_pairs_per_prompt": 1}))
        assert widest == picked(pair("best_worst", scores, **keys))


@settings(max_examples=100, deadline=None)
@given(scores=some_scores, data=st.data())
def test_a_random_pair_does_not_depend_on_the_other_prompts(scores: Scores, data: st.DataObject) -> None:
    whole = picked(pair("random", scores))
    one = data.draw(st.integers(0, len(scores) - 1))
    tied = [row if p == one else [0.0] * len(row) for p, row in enumerate(scores)]
    assert picked(pair("random", tied)) == [found for found in whole if found[0] == one]


def test_no_pair_at_all_is_an_empty_result() -> None:
    for name in PAIRINGS:
        result = pair(name, [[1.0, 1.0], [NAN, 0.0]], max_pairs_per_prompt=2, max_length_ratio=2.0)
        assert (len(result.pairs), result.dropped, result.ties, result.missing) == (0, 2, 1, 1)
        assert isinstance(result.pairs, OnlinePairs)
