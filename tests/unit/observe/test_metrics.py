"""Numbers of a step, and the files that they go to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlxf.core.types import OnlinePairs, PromptBatch, Rollouts, ScoredRollouts, Sequences, Tokens
from rlxf.observe.formulas import num_tokens, pair_metrics, read_jsonl, rollout_metrics, version_lag
from rlxf.observe.sinks import JsonlSink, TensorBoardSink
from rlxf.pair import PairingSettings
from rlxf.pair.strategies import best_worst
from rlxf.score.penalty import Shaping, with_scores

EOS = 9


def scored(scores: list[float], completions: list[list[int]], versions: list[int] | None = None) -> ScoredRollouts:
    """Two completions per prompt; the prompts have 1, 2, 3 ... tokens."""
    count = len(scores) // 2
    prompts = [[5] * (i + 1) for i in range(count)]
    rows = [prompt for prompt in prompts for _ in range(2)]
    sequences = Sequences.from_rows(rows, completions)
    rollouts = Rollouts(
        prompts=PromptBatch(
            prompts=Tokens.from_rows(prompts),
            row_ids=torch.arange(count),
            positions=torch.arange(count),
            texts=("",) * count,
            columns={},
        ),
        sequences=sequences,
        prompt_index=torch.arange(count).repeat_interleave(2),
        sample_index=torch.arange(2).repeat(count),
        engine_logps=torch.zeros(int(sequences.completion_lengths.sum())),
        policy_version=torch.tensor(versions or [0] * len(scores)),
    )
    return with_scores(rollouts, torch.tensor(scores), eos_ids=(EOS,), shaping=Shaping())


def test_rollout_metrics_count_what_was_sampled() -> None:
    batch = scored([1.0, 4.0, 2.0, 2.0], [[1, EOS], [1, 1, 1, EOS], [1], [1, 1, EOS]])
    metrics = rollout_metrics(batch, generate_s=0.5)
    assert metrics == {
        "objective/scores": 9 / 4,
        "objective/scores_margin": 1.5,  # (3 + 0) / 2: a tie counts as no margin
        "score/missing": 0.0,
        "val/contain_eos_token": 0.75,
        "reward/score/mean": 9 / 4,
        "reward/score/max": 4.0,
        "reward/score/min": 1.0,
        "response_length/mean": 2.5,
        "response_length/max": 4.0,
        "response_length/min": 1.0,
        "prompt_length/mean": 1.5,
        "prompt_length/max": 2.0,
        "prompt_length/min": 1.0,
        "rollout/tokens_per_s": 20.0,
        "rollout/distinct": 1.0,
        "score/at_max": 0.25,
        "score/std": pytest.approx(math.sqrt(4.75 / 3)),
        "score/length_correlation": pytest.approx(math.sqrt(0.5)),  # of two prompts, one of which has equal scores
    }


def test_missing_scores_are_left_out_and_never_count_as_zero() -> None:
    batch = scored([math.nan, 4.0, 2.0, 6.0], [[EOS]] * 4)
    metrics = rollout_metrics(batch, generate_s=1.0)
    assert metrics["objective/scores"] == 4.0
    assert metrics["score/missing"] == 1.0
    assert metrics["reward/score/min"] == 2.0
    assert metrics["objective/scores_margin"] == 4.0


def test_a_step_without_any_score_says_nan_not_a_number() -> None:
    metrics = rollout_metrics(scored([math.nan] * 4, [[EOS]] * 4), generate_s=1.0)
    assert math.isnan(metrics["objective/scores"])
    assert math.isnan(metrics["objective/scores_margin"])
    assert "reward/score/mean" not in metrics
    assert metrics["score/missing"] == 4.0


def test_pair_metrics_tell_ties_from_other_drops() -> None:
    batch = scored([1.0, 4.0, 2.0, 2.0, math.nan, 0.0, 5.0, 0.0], [[EOS]] * 8)
    metrics = pair_metrics(best_worst(batch, PairingSettings()))
    expected = {"pair/kept": 2.0, "pair/dropped": 2.0, "pair/missing": 1.0, "pair/tie_rate": 0.25, "pair/margin": 4.0}
    expected["pair/length_difference"] = 0.0
    assert metrics == expected


def test_both_sides_of_a_pair_count_their_prompt() -> None:
    pairs = best_worst(scored([1.0, 4.0], [[1, EOS], [1, 1, EOS]]), PairingSettings()).pairs
    assert num_tokens(pairs) == (1 + 2) + (1 + 3)


def test_lag_is_the_mean_over_pairs_and_offline_has_none() -> None:
    batch = scored([1.0, 4.0, 0.0, 1.0], [[EOS]] * 4, versions=[3, 3, 5, 5])
    pairs = best_worst(batch, PairingSettings()).pairs
    assert isinstance(pairs, OnlinePairs)
    assert version_lag(pairs, policy_version=5) == {"sync/version_lag": 1.0}
    plain = best_worst(scored([1.0, 1.0], [[EOS]] * 2), PairingSettings()).pairs
    assert version_lag(plain, policy_version=5) == {}


def test_jsonl_keeps_every_digit_and_puts_the_step_first(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "deep" / "metrics.jsonl")
    loss = 0.1 + 0.2
    sink.write(1, {"loss": loss, "tiny": 5e-324})
    sink.write(2, {"loss": math.nan, "grad_norm": math.inf})
    sink.close()
    lines = (tmp_path / "deep" / "metrics.jsonl").read_text().splitlines()
    assert lines[0].startswith('{"step": 1,')
    assert json.loads(lines[0]) == {"step": 1, "loss": loss, "tiny": 5e-324}
    assert json.loads(lines[1], parse_constant=pytest.fail) == {"step": 2, "loss": None, "grad_norm": None}


def test_a_killed_run_keeps_the_lines_that_it_wrote(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, {"loss": 1.0})
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    sink.close()


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardSink(tmp_path)
    for step, loss in ((1, 0.75), (2, 0.5)):
        sink.write(step, {"loss": loss, "timing/all": 1.0})
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.75), (2, 0.5)]
    assert sorted(events.Tags()["scalars"]) == ["loss", "timing/all"]
