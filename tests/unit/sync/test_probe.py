"""The probe: its prompt, and what it says about an engine's answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlxf.assembly.build_run import build_probe
from rlxf.config.schema import RunConfig
from rlxf.core.errors import SyncError
from rlxf.core.types import Sequences, Tokens
from rlxf.platform import get_platform
from rlxf.sync.probe import Probe, check_answers
from tests.rollout_world import run_config

PROMPTS = Tokens.from_rows([[5, 6, 7], [8], [9, 10]])


@dataclass
class Answer:
    completion: list[int]
    logps: list[float]
    policy_version: int = 3


def actor_logps(sequences: Sequences) -> Tensor:
    """An actor for which token ``t`` always has log-prob ``-t``."""
    return -torch.tensor([token for row in sequences.completion_rows() for token in row], dtype=torch.float32)


PROBE = Probe(prompt=Tokens.from_rows([[5, 6]]), num_tokens=2, tolerance=1e-4)


def positions(config: RunConfig, count: int) -> RunConfig:
    model = config.model["tiny"].model_copy(update={"max_position_embeddings": count})
    return config.model_copy(update={"model": {"tiny": model}})


def test_the_prompt_is_longer_than_a_cache_block_and_fits_into_two_with_its_answer() -> None:
    platform = get_platform("cpu")
    probe = build_probe(run_config(Path("model")), platform, PROMPTS)
    (row,) = probe.prompt.rows()
    assert row[:8] == [5, 6, 7, 8, 9, 10, 5, 6]
    assert platform.kv_block_size < len(row) < len(row) + probe.num_tokens <= 2 * platform.kv_block_size


@pytest.mark.parametrize("count", [2, 17, 64, 140, 256])
def test_prompt_and_answer_fit_into_the_models_positions(count: int) -> None:
    probe = build_probe(positions(run_config(Path("model")), count), get_platform("cpu"), PROMPTS)
    assert len(probe.prompt.tokens) >= 1
    assert probe.num_tokens >= 1
    assert len(probe.prompt.tokens) + probe.num_tokens <= count


def test_bf16_gets_a_wider_tolerance() -> None:
    config = run_config(Path("model"))
    half = config.model_copy(update={"actor_rollout": config.actor_rollout.model_copy(update={"bf16": True})})
    tolerances = [build_probe(c, get_platform("cpu"), PROMPTS).tolerance for c in (config, half)]
    assert tolerances == [1e-4, 5e-2]


@pytest.mark.parametrize(("layers", "factor"), [(2, 1), (30, 1), (32, 1.0328), (80, 1.6330), (120, 2)])
def test_deeper_models_get_a_wider_tolerance_and_shallow_ones_no_narrower(layers: int, factor: float) -> None:
    """Each layer adds rounding errors; the tolerance was measured at 30."""
    config = run_config(Path("model"))
    model = config.model["tiny"].model_copy(update={"num_layers": layers})
    deep = config.model_copy(update={"model": {"tiny": model}})
    half = deep.model_copy(update={"actor_rollout": deep.actor_rollout.model_copy(update={"bf16": True})})
    tolerances = [build_probe(c, get_platform("cpu"), PROMPTS).tolerance for c in (deep, half)]
    assert tolerances == pytest.approx([1e-4 * factor, 5e-2 * factor], rel=1e-4)


def test_the_worst_engine_counts() -> None:
    answers = [Answer([3, 4], [-3.0, -4.00001]), Answer([7, 1], [-7.00008, -1.0])]
    assert check_answers(PROBE, answers, 3, actor_logps) == pytest.approx(4e-5, rel=0.05)


def test_an_engine_that_differs_is_named_with_version_and_figures() -> None:
    answers = [Answer([3, 4], [-3.0, -4.0]), Answer([7, 1], [-7.0, -1.5])]
    with pytest.raises(SyncError, match=r"engine 2 of 2 .* version 3: .* 0\.25 on average and 0\.5 at most.* 0\.0001"):
        check_answers(PROBE, answers, 3, actor_logps)


def test_a_log_prob_that_is_not_a_number_fails() -> None:
    with pytest.raises(SyncError, match="engine 1 of 1"):
        check_answers(PROBE, [Answer([3, 4], [-3.0, math.nan])], 3, actor_logps)


def test_an_engine_that_holds_another_version_fails() -> None:
    with pytest.raises(SyncError, match="holds version 3 after version 4"):
        check_answers(PROBE, [Answer([3, 4], [-3.0, -4.0])], 4, actor_logps)
