"""A step on its way from prompts to what an update trains on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rlxf.core.types import (
    Batch,
    Comparisons,
    Examples,
    Metrics,
    PairingResult,
    Pairs,
    PairValues,
    Rollouts,
    ScoredRollouts,
)


@dataclass(kw_only=True, slots=True)
class Collected:
    """What is known of a driver step so far. Each stage adds its part, and the parts before it stay as they are.

    A step of two prompts that has been sampled and scored: ``rollouts`` and ``raw_scores`` have four rows,
    ``pairing.pairs`` up to two, and ``batch`` is None until the reference has answered.
    """

    step: int  # 0 is the first
    sampled_at: int  # boundary whose weights sample it: that many steps were complete then
    version: int  # the policy version that was pushed there
    rollouts: Rollouts | None = None
    table: Tensor | None = None  # [B, S] float32, as the S sources of rewards gave them
    extra: dict[str, list[Any]] = field(default_factory=dict)  # columns that reward functions logged, B values each
    raw_scores: Tensor | None = None  # [B] float32, the weighted sums of the table
    comparisons: Comparisons | None = None  # what a judge said of pairs of completions
    running: dict[str, list[float]] = field(default_factory=dict)  # moments of running scales, after this step
    failed: int = 0  # scores that are missing because a call failed
    scored: ScoredRollouts | None = None
    pairing: PairingResult | None = None
    data: Pairs | Examples | None = None  # pairs, or what a file holds; without any rows no update is made
    reference: PairValues | None = None  # its answer about pairs, if the objective reads it
    referred: str | None = None  # digest of those pairs
    batch: Batch | None = None  # the same with what the objective needs besides
    metrics: Metrics = field(default_factory=dict)  # of its making
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage

    @property
    def lag(self) -> int:
        """Driver steps between the weights that sampled it and those that it trains."""
        return self.step - self.sampled_at
