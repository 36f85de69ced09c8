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
    """A policy's answers, one per evaluation prompt: their scores, NaN where missing; with a judge their texts, too."""

    sampled: Tensor  # [num_prompts] float32
    greedy: Tensor | None  # the same of its most probable answers; None: eval.greedy is off
    texts: list[str] | None = None  # None: no judge compares them
    greedy_texts: list[str] | None = None

    def describe(self) -> dict[str, Any]:
        """The answers as JSON data."""
        texts = {"texts": self.texts, "greedy_texts": self.greedy_texts}
        return {
            "scores": _to_json(self.sampled),
            "greedy": None if self.greedy is None else _to_json(self.greedy),
            **{name: value for name, value in texts.items() if value is not None},
        }

    @staticmethod
    def read(found: dict[str, Any]) -> Scores:
        """The answers that ``describe`` gave."""
        greedy = found.get("greedy")
        scores = _from_json(found["scores"]), None if greedy is None else _from_json(greedy)
        return Scores(*scores, found.get("texts"), found.get("greedy_texts"))


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
