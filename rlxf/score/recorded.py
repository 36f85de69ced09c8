"""Scores that a recorded run has already given."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlxf.core.errors import ShapeError
from rlxf.core.types import Rollouts
from rlxf.observe.record import RecordedRollouts


class RecordedScorer:
    """The raw scores of a `rollouts.jsonl`, found by prompt id (the row's number) and sample index; null is NaN."""

    def __init__(self, path: str | Path) -> None:
        self._rows = RecordedRollouts(path)

    def score(self, rollouts: Rollouts) -> Tensor:
        """[B] float32 raw scores; NaN where the record has none."""
        numbers = rollouts.prompts.row_ids.tolist()
        recorded = [self._rows[number].scores for number in numbers]
        scores = []
        pairs = zip(rollouts.prompt_index.tolist(), rollouts.sample_index.tolist(), strict=True)
        for prompt, sample in pairs:
            if sample >= len(recorded[prompt]):
                place = self._rows.where(numbers[prompt])
                raise ShapeError(f"{place}: sample {sample} is needed, but {len(recorded[prompt])} were recorded")
            scores.append(recorded[prompt][sample])
        return torch.tensor(scores, dtype=torch.float32)
