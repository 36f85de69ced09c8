"""Packing and prompt sharing change nothing but the work: losses and gradients are those of one sequence at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlxf.assembly.roles import build_actor, load_role
from rlxf.core.errors import ShapeError
from rlxf.core.types import Pairs, ReferencedPairs, Sequences
from rlxf.models.backend import sequence_scores, token_logps
from rlxf.models.batching import MicroBatchLimits
from rlxf.platform import Process, get_platform
from tests.settings import random_pairs, random_rows, referenced, run_config
from tests.tiny_models import save_causal_lm, save_reward_model


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp(request.param) / "model", request.param)


def gradients(folder: Path, batch: ReferencedPairs, **settings: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step over all pairs; Adam's first moment is a tenth of the gradient."""
    config = run_config(folder, ppo_mini_batch_size=len(batch), clip_grad=0.0, **settings)
    actor = build_actor(config, get_platform("cpu"), Process())
    actor.trainable.step = lambda learning_rate: 0.0  # type: ignore[method-assign]  # keep the gradients as they are
    metrics = actor.update(batch, 0)
    chunk = actor.trainable.chunks[0].module
    return metrics["loss"], {name: weight.main_grad.clone() for name, weight in chunk.named_parameters()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        distance = (found[name] - value).norm() / value.norm().clamp_min(1e-12)
        assert float(distance) <= 1e-5, f"{name}: relative distance {float(distance):.2g}"


@pytest.mark.parametrize(
    "settings",
    [{"micro_batch_size": 9}, {"max_tokens_per_micro_batch": 120}, {"micro_batch_size": 2, "share_prompts": False}],
    ids=["all pairs in one pass", "token budget", "packed, prompts twice"],
)
def test_loss_and_gradients_equal_one_pair_at_a_time_without_sharing(folder: Path, settings: dict[str, Any]) -> None:
    batch = referenced(random_pairs(9))
    loss, expected = gradients(folder, batch, micro_batch_size=1, share_prompts=False)
    found_loss, found = gradients(folder, batch, **settings)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert_close(found, expected)


def test_pairs_of_the_same_prompt_share_it_too(folder: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = random_rows(1, 30, 31, generator) * 4 + random_rows(1, 9, 10, generator)
    chosen, rejected = (Sequences.from_rows(prompts, random_rows(5, 1, 9, generator)) for _ in range(2))
    batch = referenced(Pairs(chosen=chosen, rejected=rejected))
    loss, expected = gradients(folder, batch, micro_batch_size=1, share_prompts=False)
    found_loss, found = gradients(folder, batch, micro_batch_size=5)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert_close(found, expected)


def test_each_prompt_and_each_predicting_row_is_computed_once() -> None:
    from rlxf.models.megatron.packing import pack_for_logps, pack_for_scores
    from rlxf.models.megatron.parallel import Layout

    pairs = random_pairs(6)
    both = Sequences.concat([pairs.chosen, pairs.rejected])
    layout = Layout(device=torch.device("cpu"))
    prompt_tokens, response_tokens = int(pairs.chosen.prompt_lengths.sum()), int(both.completion_lengths.sum())
    packed = pack_for_logps(both, layout)
    # A completion's last token predicts nothing, so it is not computed.
    assert packed.tokens.numel() == prompt_tokens + response_tokens - len(both)
    assert len(packed.rows) == response_tokens
    twice = pack_for_logps(both, layout, share_prompts=False)
    assert twice.tokens.numel() == 2 * prompt_tokens + response_tokens - len(both)
    assert pack_for_scores(both, layout).tokens.numel() == prompt_tokens + response_tokens


@torch.no_grad()
def test_log_probs_and_scores_do_not_depend_on_what_shares_a_pass(folder: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    prompts = [row for row in random_rows(4, 1, 25, generator) for _ in range(3)]
    sequences = Sequences.from_rows(prompts, random_rows(12, 1, 30, generator))
    order = torch.randperm(12, generator=generator)
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    reward = save_reward_model(tmp_path / "rm", kind)
    config = run_config(folder, reward=reward)
    model, scorer = (load_role(config, role, get_platform("cpu"), Process()) for role in ("ref", "reward"))
    alone = MicroBatchLimits(num_sequences=1, share_prompts=False)
    for limits in (
        MicroBatchLimits(num_sequences=12),
        MicroBatchLimits(num_sequences=2),
        MicroBatchLimits(num_sequences=2, num_tokens=90),
    ):
        values = torch.split(token_logps(model, sequences.select(order), limits), _lengths(sequences, order))
        expected = torch.split(token_logps(model, sequences, alone), sequences.completion_lengths.tolist())
        for place, row in enumerate(order.tolist()):
            torch.testing.assert_close(values[place], expected[row], atol=1e-5, rtol=0)
        scores = sequence_scores(scorer, sequences.select(order), limits)
        torch.testing.assert_close(scores, sequence_scores(scorer, sequences, alone)[order], atol=1e-5, rtol=0)


def _lengths(sequences: Sequences, order: torch.Tensor) -> list[int]:
    lengths: list[int] = sequences.completion_lengths[order].tolist()
    return lengths


def test_sequences_without_a_completion_or_a_prompt_are_refused() -> None:
    from rlxf.models.megatron.packing import pack_for_logps
    from rlxf.models.megatron.parallel import Layout

    layout = Layout(device=torch.device("cpu"))
    for prompts, completions in (([], []), ([[1]], [[]])):
        with pytest.raises(ShapeError, match="at least one sequence"):
            pack_for_logps(Sequences.from_rows(prompts, completions), layout)
