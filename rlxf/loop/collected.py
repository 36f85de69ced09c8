"""A step on its way from prompts to what an update trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlxf.core.pairs import PairedRows, PairingResult
from rlxf.core.tensors import take
from rlxf.core.types import (
    Batch,
    Comparisons,
    Examples,
    Metrics,
    Pairs,
    PairValues,
    ReferencedPairs,
    Rollouts,
    ScoredRollouts,
)
from rlxf.rollout.chunks import Chunk
from rlxf.schedule.parts import Parts


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairedChunk:
    """The pairs of a chunk of prompts, and what tells them from all other pairs of the step.

    Of the prompt in row 5 of the step, its third completion chosen and its first one rejected: ``names = [[5, 2, 0]]``.
    """

    rows: tuple[int, ...]  # of the step's prompts, also of those without a pair
    found: PairedRows  # N, of the chunk's rollouts or of the step's
    names: Tensor  # [N, 3] int64: row of the prompt in the step, sample chosen, sample rejected


def pair_names(found: PairedRows, rows: Sequence[int] | None = None) -> Tensor:
    """``PairedChunk.names``; ``rows``: where the prompts of the rollouts are in the step. None: they are the step's."""
    prompts = found.prompt_index.numpy()
    if rows is not None:
        prompts = np.array(rows, dtype=np.int64)[prompts]
    samples = [take(found.rollouts.sample_index, side).numpy() for side in (found.chosen, found.rejected)]
    return torch.from_numpy(np.stack([prompts, *samples], axis=1))


@dataclass(kw_only=True, slots=True)
class Collected:
    """What is known of a driver step so far. Each stage adds its part, and the parts before it stay as they are.

    A step of two prompts that has been sampled and scored: ``rollouts`` and ``raw_scores`` have four rows,
    ``pairing.pairs`` up to two, and ``batch`` is None until the reference has answered.
    """

    step: int  # 0 is the first
    sampled_at: int  # boundary whose weights sample it: that many steps were complete then
    version: int  # the policy version that was pushed there
    chunks: tuple[tuple[int, ...], ...] = ()  # rows of the prompts that move on together; known once sampling begins
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
    # [sum completion tokens] float32: the reference's log-probs of the pairs that people are shown, chosen sides first.
    shown: Tensor | None = None
    batch: Batch | None = None  # the same with what the objective needs besides
    metrics: Metrics = field(default_factory=dict)  # of its making
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage
    # What a stage has made so far of a step that it is at work on, for the one that follows.
    sampled: Parts[Chunk] = field(default_factory=Parts)
    paired: Parts[PairedChunk] = field(default_factory=Parts)
    first: Parts[ReferencedPairs] = field(default_factory=Parts)  # its first mini-batch, or nothing
    begun: bool = False  # its first mini-batch, if it was there before the step, has been through the model

    @property
    def lag(self) -> int:
        """Driver steps between the weights that sampled it and those that it trains."""
        return self.step - self.sampled_at
