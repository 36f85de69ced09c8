"""What a score loses: for a missing EOS by the end of the completion, for length by the number of its tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.config.roles import SamplingConfig
from rlxf.core.errors import ShapeError, TrainingError
from rlxf.models.stop_strings import StopStrings
from rlxf.score.penalty import Shaping, with_scores
from tests.data_world import make_rollouts, prompt_batch
from tests.tiny_models import byte_tokenizer

EOS, OTHER_EOS = 2, 7
# The prompts hold both EOS ids, the completions end with one, the other, none, or have it in the middle only.
ROLLOUTS = make_rollouts(prompt_batch([[5, EOS], [OTHER_EOS]]), [[[9, EOS], [9, OTHER_EOS]], [[9, 9], [EOS, 9]]])


def test_only_completions_without_an_eos_at_the_end_pay() -> None:
    scored = with_scores(
        ROLLOUTS,
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        eos_ids=(EOS, OTHER_EOS),
        shaping=Shaping(missing_eos_penalty=5.0),
    )
    assert scored.contains_eos.tolist() == [True, True, False, False]
    assert scored.scores.tolist() == [1.0, 2.0, -2.0, -1.0]
    assert scored.raw_scores.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_every_eos_id_counts() -> None:
    scored = with_scores(ROLLOUTS, torch.zeros(4), eos_ids=(EOS,), shaping=Shaping(missing_eos_penalty=1.0))
    assert scored.contains_eos.tolist() == [True, False, False, False]


def test_a_completion_that_ends_with_a_stop_string_has_ended() -> None:
    stops = StopStrings(byte_tokenizer(), ["##"])
    texts = ("ok##", "ok#", "o##k", "k##")
    prompts = prompt_batch([[5], [5]])
    rows = [byte_tokenizer()(text)["input_ids"] for text in texts]
    rollouts = make_rollouts(prompts, [rows[:2], rows[2:]])
    shaping = Shaping(missing_eos_penalty=1.0)
    scored = with_scores(rollouts, torch.zeros(4), eos_ids=(EOS,), shaping=shaping, stopped=stops.completed)
    assert scored.contains_eos.tolist() == [True, False, False, True]
    assert scored.scores.tolist() == [0.0, -1.0, -1.0, 0.0]


def test_an_eos_of_the_prompt_is_not_the_completions() -> None:
    rollouts = make_rollouts(prompt_batch([[5, EOS]]), [[[], [EOS]]])
    assert with_scores(
        rollouts, torch.zeros(2), eos_ids=(EOS,), shaping=Shaping(missing_eos_penalty=1.0)
    ).scores.tolist() == [-1.0, 0.0]


def test_a_missing_score_stays_missing() -> None:
    scored = with_scores(
        ROLLOUTS, torch.tensor([math.nan] * 4), eos_ids=(EOS,), shaping=Shaping(missing_eos_penalty=1.0)
    )
    assert scored.scores.isnan().all()


def test_an_infinite_score_is_refused_with_its_sample() -> None:
    with pytest.raises(TrainingError, match="1 of 4 scores are infinite, the first one that of prompt 1, sample 0"):
        with_scores(ROLLOUTS, torch.tensor([0.0, 0.0, math.inf, 0.0]), eos_ids=(EOS,), shaping=Shaping())


def test_a_score_for_each_completion_is_required() -> None:
    with pytest.raises(ShapeError):
        with_scores(ROLLOUTS, torch.zeros(3), eos_ids=(EOS,), shaping=Shaping())


LENGTHS = [0, 1, 3, 4, 5, 6]
OF_LENGTHS = make_rollouts(prompt_batch([[5]]), [[[9] * length for length in LENGTHS]])


def shaped(shaping: Shaping) -> list[float]:
    return with_scores(OF_LENGTHS, torch.ones(len(LENGTHS)), eos_ids=(9,), shaping=shaping).scores.tolist()


def test_each_token_costs() -> None:
    assert shaped(Shaping(length_penalty=0.25)) == [1.0, 0.75, 0.25, 0.0, -0.25, -0.5]


def test_the_last_tokens_before_the_limit_cost_more_and_more() -> None:
    """DAPO, eq. 13: nothing up to 6 - 4 tokens, in full at 6."""
    assert shaped(Shaping(overlong_tokens=4, overlong_penalty=2.0, max_new_tokens=6)) == [
        1.0,
        1.0,
        0.5,
        0.0,
        -0.5,
        -1.0,
    ]
    assert shaped(Shaping(overlong_tokens=4, overlong_penalty=2.0, max_new_tokens=4)) == [
        1.0,
        0.5,
        -0.5,
        -1.0,
        -1.0,
        -1.0,
    ]


def test_penalties_add_up() -> None:
    shaping = Shaping(
        missing_eos_penalty=8.0, length_penalty=0.5, overlong_tokens=2, overlong_penalty=4.0, max_new_tokens=6
    )
    scored = with_scores(OF_LENGTHS, torch.zeros(len(LENGTHS)), eos_ids=(EOS,), shaping=shaping)
    assert scored.scores.tolist() == [-8.0, -8.5, -9.5, -10.0, -12.5, -15.0]
    assert scored.raw_scores.tolist() == [0.0] * 6


def test_a_missing_score_stays_missing_with_every_penalty() -> None:
    shaping = Shaping(length_penalty=1.0, overlong_tokens=2, overlong_penalty=1.0, max_new_tokens=4)
    assert with_scores(ROLLOUTS, torch.tensor([math.nan] * 4), eos_ids=(), shaping=shaping).scores.isnan().all()


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), st.floats(0, 100), st.integers(1, 2**31))
def test_without_the_keys_of_length_no_bit_changes(raw: list[float], penalty: float, limit: int) -> None:
    plain = torch.tensor(raw)
    scored = with_scores(
        ROLLOUTS, plain, eos_ids=(EOS,), shaping=Shaping(missing_eos_penalty=penalty, max_new_tokens=limit)
    )
    expected = torch.where(scored.contains_eos, plain, plain - penalty)
    assert scored.scores.equal(expected)


@given(st.integers(1, 12), st.integers(0, 12))
@settings(deadline=None)
def test_the_soft_penalty_is_that_of_trl(limit: int, span: int) -> None:
    rewards = pytest.importorskip("trl.rewards")
    span = min(span, limit)
    expected = rewards.get_soft_overlong_punishment(limit, span)(completion_ids=[[9] * length for length in range(14)])
    shaping = Shaping(overlong_tokens=span, overlong_penalty=1.0 if span else 0.0, max_new_tokens=limit)
    found = -shaping.for_length(torch.arange(14))
    if span:  # without a zone nothing is subtracted here, and TRL subtracts 1 beyond a limit that sampling never passes
        torch.testing.assert_close(found, torch.tensor(expected))
    else:
        assert not found.any()


def test_a_recipe_decides() -> None:
    config = SamplingConfig(missing_eos_penalty=1.0, length_penalty=0.5, overlong_tokens=3, overlong_penalty=2.0)
    shaping = Shaping.of(config, max_new_tokens=9)
    assert shaping == Shaping(
        missing_eos_penalty=1.0, length_penalty=0.5, overlong_tokens=3, overlong_penalty=2.0, max_new_tokens=9
    )
    assert shaping.changes_scores
    assert not Shaping.of(SamplingConfig(), max_new_tokens=9).changes_scores
