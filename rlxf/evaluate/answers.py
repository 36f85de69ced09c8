"""Scores of a policy's answers to the evaluation prompts, and win rates between two policies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlxf.core.types import Metrics


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a policy's answers, one per evaluation prompt; NaN where missing."""

    sampled: Tensor  # [num_prompts] float32
    greedy: Tensor | None  # the same of its most probable answers; None: eval.greedy is off

    def describe(self) -> dict[str, Any]:
        """The scores as JSON data."""
        return {"scores": _to_json(self.sampled), "greedy": None if self.greedy is None else _to_json(self.greedy)}

    @staticmethod
    def read(found: dict[str, Any]) -> Scores:
        """The scores that ``describe`` gave."""
        greedy = found.get("greedy")
        return Scores(_from_json(found["scores"]), None if greedy is None else _from_json(greedy))


def _to_json(scores: Tensor) -> list[float | None]:
    return [score if math.isfinite(score) else None for score in scores.tolist()]


def _from_json(scores: list[float | None]) -> Tensor:
    return torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float32)


def win_rate(scores: Tensor, others: Tensor) -> float:
    """Share of prompts whose score is above the other's; ties count half, missing scores not at all."""
    return mean(wins(scores, others))


def wins(scores: Tensor, others: Tensor) -> Tensor:
    """[prompts with two scores] float64: 1 where the score is above the other's, 0.5 where they are equal, else 0."""
    known = scores.isfinite() & others.isfinite()
    return torch.where(scores == others, 0.5, (scores > others).double())[known]


def measured(name: str, values: Tensor) -> Metrics:
    """``eval/<name>``, the mean of one value per prompt, and ``eval/<name>_se``, its standard error."""
    return {f"eval/{name}": mean(values), f"eval/{name}_se": standard_error(values)}


def mean(values: Tensor) -> float:
    """The mean; NaN of nothing."""
    return float(values.mean()) if values.numel() else math.nan


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values: their standard deviation over the root of their number; NaN below two."""
    return float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
