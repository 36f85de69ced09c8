"""Checks that a rollout engine holds the actor's weights, by what it samples after a probe prompt.

The engine continues a prompt greedily and the actor computes the log-probs of the same tokens. The prompt is longer
than a cache block and was also sampled before the update. So the probe finds keys and values that outlived the update,
and an output head that was not rebuilt. It cannot find changes below the tolerance. But a part that stays stale drifts
away over several updates, and ``sync.verify_interval`` repeats the probe to find it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal, Protocol

import torch
from torch import Tensor

from rlxf.core.errors import SyncError
from rlxf.core.types import Sequences, Tokens

_NUM_TOKENS = 16  # sampled after the prompt
# Limits of the mean difference over these tokens. Equal weights of a 135M model differ by 1e-5 (fp32) and 1e-2 (bf16)
# on average. Single tokens differ by up to 0.1 in bf16, where neighbouring numbers near a logit of 36 are 0.25 apart,
# so the largest difference says little. Every layer adds rounding errors of its own: they grow with the root of depth.
_TOLERANCE_FP32, _TOLERANCE_BF16 = 1e-4, 5e-2
_MEASURED_LAYERS = 30


class EngineAnswer(Protocol):
    """What one engine sampled after the probe prompt."""

    @property
    def completion(self) -> list[int]: ...

    @property
    def logps(self) -> list[float]: ...

    @property
    def policy_version(self) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """The prompt, and how far engine and actor may differ on what follows it."""

    prompt: Tokens  # one row
    num_tokens: int
    tolerance: float  # of the mean absolute difference of log-probs


def make_probe(
    prompts: Tokens,
    *,
    block: int,
    positions: int,
    precision: Literal["fp32", "bf16", "fp16"],
    num_layers: int = _MEASURED_LAYERS,
) -> Probe:
    """A probe of joined training prompts, longer than a block of the engine's cache if the model's positions allow it.

    Args:
        prompts: at least one token in all; repeated from the start if they are too few. Real text, because after random
            tokens equal weights in bf16 differ five times as much.
        block: tokens of one block of the engine's cache.
        positions: longest sequence that the model knows, tokens.
        precision: of engine and actor.
        num_layers: of the model; more than those of the measured one widen the tolerance.
    """
    growth = math.sqrt(max(1.0, num_layers / _MEASURED_LAYERS))
    length = max(1, min(block + block // 4, positions - _NUM_TOKENS))
    return Probe(
        prompt=Tokens.from_rows([list(islice(cycle(prompts.tokens.tolist()), length))]),
        num_tokens=min(_NUM_TOKENS, positions - length),
        tolerance=(_TOLERANCE_FP32 if precision == "fp32" else _TOLERANCE_BF16) * growth,
    )


def check_answers(
    probe: Probe, answers: Sequence[EngineAnswer], version: int, token_logps: Callable[[Sequences], Tensor]
) -> float:
    """The mean difference between an engine's log-probs and the actor's; the largest of all engines.

    Raises:
        SyncError: an engine has another version, or differs by more than the probe's tolerance.
    """
    prompts = probe.prompt.rows() * len(answers)
    sequences = Sequences.from_rows(prompts, [answer.completion for answer in answers])
    actor_logps = torch.split(token_logps(sequences), sequences.completion_lengths.tolist())
    largest = 0.0
    for i, (answer, expected) in enumerate(zip(answers, actor_logps, strict=True)):
        who = f"rollout engine {i + 1} of {len(answers)}"
        if answer.policy_version != version:
            raise SyncError(f"{who} holds version {answer.policy_version} after version {version} was pushed")
        differences = (expected.double().cpu() - torch.tensor(answer.logps, dtype=torch.float64)).abs()
        mean = float(differences.mean())
        if not mean <= probe.tolerance:  # NaN is not <=
            raise SyncError(_explain(who, version, mean, float(differences.max()), probe))
        largest = max(largest, mean)
    return largest


def _explain(who: str, version: int, mean: float, largest: float, probe: Probe) -> str:
    return (
        f"{who} does not hold the actor's weights at version {version}: after a probe of {probe.prompt.tokens.numel()} "
        f"tokens its log-probs differ from the actor's by {mean:.3g} on average and {largest:.3g} at most, tolerance "
        f"{probe.tolerance:.2g} on average. Likely causes: an output head that was not rebuilt (tied embeddings), a "
        "prefix cache that was not reset, a weight layout of the device's own (VLLM_ASCEND_ENABLE_NZ must be 0), or a "
        "dtype that differs between the two"
    )
