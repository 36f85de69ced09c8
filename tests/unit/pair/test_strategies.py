"""Best against worst: no pair without a reason, and row order means nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.core.errors import ShapeError
from rlxf.core.pairs import PairingResult
from rlxf.core.types import Rollouts
from rlxf.pair import PairingSettings
from rlxf.pair.strategies import best_worst
from tests.data_world import reorder
from tests.pair_world import picked, scored, with_flat

NAN = math.nan


def pair(scores: list[list[float]], margin: float = 0.0) -> PairingResult:
    return best_worst(scored(scores), PairingSettings(min_score_margin=margin))


def counts(result: PairingResult) -> tuple[int, int, int, int, int]:
    return len(result.pairs), result.dropped, result.ties, result.missing, result.num_prompts


def test_the_best_of_n_is_chosen_and_the_worst_rejected() -> None:
    result = pair([[0.5, 2.0, -1.0], [3.0, 1.0, 2.0]])
    assert picked(result) == [(0, 1, 2), (1, 0, 1)]
    assert result.pairs.margin.tolist() == [3.0, 2.0]
    assert counts(result) == (2, 0, 0, 0, 2)


def test_a_tie_makes_no_pair() -> None:
    assert counts(pair([[1.0, 1.0], [1.0, 2.0]])) == (1, 1, 1, 0, 2)


def test_a_margin_at_the_limit_is_dropped_and_above_it_kept() -> None:
    result = pair([[0.0, 0.5], [0.0, 0.75], [1.0, 1.0]], margin=0.5)
    assert picked(result) == [(1, 1, 0)]
    assert counts(result) == (1, 2, 1, 0, 3)


def test_a_missing_score_is_neither_chosen_nor_rejected() -> None:
    result = pair([[NAN, 1.0, 2.0], [NAN, 1.0], [NAN, NAN], [5.0, NAN, NAN, 4.0]])
    assert picked(result) == [(0, 2, 1), (3, 0, 3)]
    assert counts(result) == (2, 2, 0, 2, 4)


def test_among_equals_the_first_sample_counts() -> None:
    assert picked(pair([[1.0, 2.0, 1.0, 2.0]])) == [(0, 1, 0)]


def test_prompts_may_have_different_numbers_of_completions() -> None:
    assert picked(pair([[1.0, 2.0], [3.0, 1.0, 2.0, 0.0], [0.0]])) == [(0, 1, 0), (1, 0, 3)]


def test_no_pair_at_all_is_an_empty_result() -> None:
    result = pair([[1.0, 1.0], [NAN, 0.0]])
    assert counts(result) == (0, 2, 1, 1, 2)
    assert result.pairs.chosen.tokens.numel() == result.pairs.chosen_engine_logps.numel() == 0


def test_rows_of_a_pair_lead_back_to_the_scores() -> None:
    given = scored([[0.5, 2.0, -1.0], [3.0, 1.0, 2.0]], order=[5, 3, 0, 4, 2, 1])
    result = best_worst(given, PairingSettings())
    difference = given.scores[result.rows.chosen] - given.scores[result.rows.rejected]
    assert difference.tolist() == result.pairs.margin.tolist() == [3.0, 2.0]


def test_engine_logps_and_versions_travel_with_their_completion() -> None:
    result = pair([[0.0, 1.0, 2.0], [9.0, 1.0]])
    assert result.pairs.chosen_engine_logps.tolist() == [-2.0, -2.0, -2.0, -10.0]
    assert result.pairs.rejected_engine_logps.tolist() == [0.0, -11.0, -11.0]
    assert result.pairs.policy_version.tolist() == [0, 0]


def test_a_pair_over_two_prompts_is_refused() -> None:
    rollouts = scored([[1.0, 2.0], [1.0, 2.0]]).rollouts
    mixed: dict[str, Any] = {name: getattr(rollouts, name) for name in Rollouts.__dataclass_fields__}
    mixed |= {"prompt_index": torch.tensor([0, 1, 0, 1]), "sample_index": torch.tensor([0, 0, 1, 1])}
    result = best_worst(with_flat(Rollouts(**mixed), torch.tensor([1.0, 2.0, 3.0, 4.0])), PairingSettings())
    with pytest.raises(ShapeError, match="same prompt tokens"):
        len(result.pairs)


def test_a_sample_that_is_there_twice_is_refused() -> None:
    rollouts = reorder(scored([[1.0, 2.0]]).rollouts, [0, 1, 0])
    with pytest.raises(ShapeError, match="sample 0 of prompt row 0"):
        best_worst(with_flat(rollouts, torch.tensor([1.0, 2.0, 3.0])), PairingSettings())


few_values = st.sampled_from([NAN, -1.5, 0.0, 0.25, 1.0, 1e30])  # few, so that ties happen
some_scores = st.lists(st.lists(few_values, min_size=1, max_size=5), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(scores=some_scores, margin=st.sampled_from([0.0, 0.5, 2.0]), data=st.data())
def test_the_order_of_rows_changes_nothing(scores: list[list[float]], margin: float, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(sum(map(len, scores)))))
    straight = best_worst(scored(scores), PairingSettings(min_score_margin=margin))
    shuffled = best_worst(scored(scores, list(order)), PairingSettings(min_score_margin=margin))
    assert counts(straight) == counts(shuffled)
    for name in ("row_ids", "margin", "policy_version", "chosen_engine_logps", "rejected_engine_logps"):
        assert torch.equal(getattr(straight.pairs, name), getattr(shuffled.pairs, name))
    for name in ("chosen", "rejected"):
        assert getattr(straight.pairs, name).rows() == getattr(shuffled.pairs, name).rows()


@settings(max_examples=200, deadline=None)
@given(scores=some_scores, margin=st.sampled_from([0.0, 0.5, 2.0]))
def test_every_pair_is_the_widest_of_its_prompt(scores: list[list[float]], margin: float) -> None:
    result = best_worst(scored(scores), PairingSettings(min_score_margin=margin))
    found = {p: (chosen, rejected) for p, chosen, rejected in picked(result)}
    for p, row in enumerate(scores):
        known = [s for s in row if not math.isnan(s)]
        widest = max(known) - min(known) if len(known) >= 2 else 0.0
        assert (p in found) == (widest > margin)
        if p in found:
            chosen, rejected = found[p]
            assert row[chosen] > row[rejected]
            assert row[chosen] - row[rejected] == pytest.approx(widest)
    assert result.pairs.chosen.prompt_rows() == result.pairs.rejected.prompt_rows()
    assert len(result.pairs) + result.dropped == len(scores)
    assert result.ties + result.missing <= result.dropped
