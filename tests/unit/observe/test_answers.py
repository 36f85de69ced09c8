"""Numbers that tell of a bad policy or reward, on steps that can be counted by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlxf.core.types import Comparisons, ScoredRollouts
from rlxf.observe.answers import distinct, judge_agreement, score_shape
from rlxf.observe.formulas import rollout_metrics
from rlxf.score.penalty import Shaping, with_scores
from tests.data_world import make_rollouts, prompt_batch, reorder
from tests.tiny_models import EOS

NAN = math.nan


def step(completions: list[list[list[int]]], scores: list[float]) -> ScoredRollouts:
    """``completions``: of each prompt, no two of which are the same or equally long."""
    rollouts = make_rollouts(prompt_batch([[5] * (place + 1) for place in range(len(completions))]), completions)
    return with_scores(rollouts, torch.tensor(scores), eos_ids=(EOS,), shaping=Shaping())


def test_a_completion_counts_once_whatever_its_prompt() -> None:
    made = step([[[6, 7], [6, 7]], [[6, 7], [6]]], [0.0] * 4)
    assert distinct(made.rollouts.sequences) == 0.5
    assert rollout_metrics(made, 1.0)["rollout/distinct"] == 0.5


def test_the_order_of_rows_does_not_matter() -> None:
    made = step([[[6], [6, 7], [6, 7, 8]], [[9], [9, 9], [4]]], [0.0, 2.0, 1.0, 5.0, 7.0, NAN])
    order = [3, 1, 5, 0, 2, 4]
    rows = reorder(made.rollouts, order)
    other = with_scores(rows, made.raw_scores[order], eos_ids=(EOS,), shaping=Shaping())
    assert score_shape(other) == pytest.approx(score_shape(made))
    assert distinct(other.rollouts.sequences) == distinct(made.rollouts.sequences)


def test_scores_that_follow_the_length_within_prompts() -> None:
    longer_is_better = step([[[6], [6, 7], [6, 7, 8]], [[9], [9, 9], [9, 9, 9]]], [10.0, 11.0, 12.0, -3.0, -2.0, -1.0])
    assert score_shape(longer_is_better)["score/length_correlation"] == pytest.approx(1.0)
    shorter_is_better = step([[[6], [6, 7]], [[9], [9, 9]]], [1.0, 0.0, 5.0, 4.0])
    assert score_shape(shorter_is_better)["score/length_correlation"] == pytest.approx(-1.0)


def test_prompts_that_differ_are_no_correlation() -> None:
    """The long answers are those of the prompt with high scores; within a prompt nothing varies with length."""
    made = step([[[6], [7]], [[6, 7, 8], [6, 7, 9]]], [0.0, 1.0, 10.0, 11.0])
    assert math.isnan(score_shape(made)["score/length_correlation"])


@pytest.mark.parametrize("scores", [[2.0, 2.0, 2.0, 2.0], [NAN, NAN, NAN, 2.0]])
def test_scores_that_do_not_vary(scores: list[float]) -> None:
    found = score_shape(step([[[6], [6, 7]], [[9], [9, 9]]], scores))
    assert math.isnan(found["score/length_correlation"])
    assert found["score/at_max"] == 1.0
    assert found["score/std"] == 0.0 or math.isnan(found["score/std"])


def test_spread_and_share_at_the_highest_score() -> None:
    found = score_shape(step([[[6], [7]], [[8], [9]]], [1.0, 3.0, 3.0, NAN]))
    assert found["score/at_max"] == pytest.approx(2 / 3)
    assert found["score/std"] == pytest.approx(float(torch.tensor([1.0, 3.0, 3.0]).std()))


def test_without_scores_there_is_nothing_to_say() -> None:
    assert all(math.isnan(value) for value in score_shape(step([[[6]]], [NAN])).values())


def test_agreement_counts_verdicts_and_scores_that_decide() -> None:
    scores = torch.tensor([1.0, 0.0, 5.0, 5.0, NAN])
    judged = Comparisons(
        first=torch.tensor([0, 1, 2, 2, 0, 0]),
        second=torch.tensor([1, 2, 3, 0, 4, 1]),
        probability=torch.tensor([0.9, 0.7, 0.9, 0.5, 0.9, NAN]),
    )  # right, wrong, equal scores, a tie, no score, no verdict
    assert judge_agreement(judged, scores) == {"judge/agrees_with_scores": 0.5}
    none = Comparisons(first=judged.first[:0], second=judged.second[:0], probability=judged.probability[:0])
    assert math.isnan(judge_agreement(none, scores)["judge/agrees_with_scores"])
