"""The missing-EOS penalty looks at the end of the completion and at nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from rlxf.core.errors import ShapeError, TrainingError
from rlxf.models.stop_strings import StopStrings
from rlxf.score.penalty import with_scores
from tests.data_world import make_rollouts, prompt_batch
from tests.tiny_models import byte_tokenizer

EOS, OTHER_EOS = 2, 7
# The prompts hold both EOS ids, the completions end with one, the other, none, or have it in the middle only.
ROLLOUTS = make_rollouts(prompt_batch([[5, EOS], [OTHER_EOS]]), [[[9, EOS], [9, OTHER_EOS]], [[9, 9], [EOS, 9]]])


def test_only_completions_without_an_eos_at_the_end_pay() -> None:
    scored = with_scores(
        ROLLOUTS, torch.tensor([1.0, 2.0, 3.0, 4.0]), eos_ids=(EOS, OTHER_EOS), missing_eos_penalty=5.0
    )
    assert scored.contains_eos.tolist() == [True, True, False, False]
    assert scored.scores.tolist() == [1.0, 2.0, -2.0, -1.0]
    assert scored.raw_scores.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_every_eos_id_counts() -> None:
    scored = with_scores(ROLLOUTS, torch.zeros(4), eos_ids=(EOS,), missing_eos_penalty=1.0)
    assert scored.contains_eos.tolist() == [True, False, False, False]


def test_a_completion_that_ends_with_a_stop_string_has_ended() -> None:
    stops = StopStrings(byte_tokenizer(), ["##"])
    texts = ("ok##", "ok#", "o##k", "k##")
    prompts = prompt_batch([[5], [5]])
    rows = [byte_tokenizer()(text)["input_ids"] for text in texts]
    rollouts = make_rollouts(prompts, [rows[:2], rows[2:]])
    scored = with_scores(rollouts, torch.zeros(4), eos_ids=(EOS,), missing_eos_penalty=1.0, stopped=stops.completed)
    assert scored.contains_eos.tolist() == [True, False, False, True]
    assert scored.scores.tolist() == [0.0, -1.0, -1.0, 0.0]


def test_an_eos_of_the_prompt_is_not_the_completions() -> None:
    rollouts = make_rollouts(prompt_batch([[5, EOS]]), [[[], [EOS]]])
    assert with_scores(rollouts, torch.zeros(2), eos_ids=(EOS,), missing_eos_penalty=1.0).scores.tolist() == [-1.0, 0.0]


def test_a_missing_score_stays_missing() -> None:
    scored = with_scores(ROLLOUTS, torch.tensor([math.nan] * 4), eos_ids=(EOS,), missing_eos_penalty=1.0)
    assert scored.scores.isnan().all()


def test_an_infinite_score_is_refused_with_its_sample() -> None:
    with pytest.raises(TrainingError, match="1 of 4 scores are infinite, the first one that of prompt 1, sample 0"):
        with_scores(ROLLOUTS, torch.tensor([0.0, 0.0, math.inf, 0.0]), eos_ids=(EOS,), missing_eos_penalty=0.0)


def test_a_score_for_each_completion_is_required() -> None:
    with pytest.raises(ShapeError):
        with_scores(ROLLOUTS, torch.zeros(3), eos_ids=(EOS,), missing_eos_penalty=0.0)
