"""What a policy said to the evaluation prompts, and who of two said better."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Answers:
    """One completion per evaluation prompt."""

    scores: Tensor  # [num_prompts] float32, NaN where missing
    texts: list[str]

    def describe(self) -> dict[str, Any]:
        """As JSON data."""
        scores = [score if math.isfinite(score) else None for score in self.scores.tolist()]
        return {"scores": scores, "texts": self.texts}

    @staticmethod
    def read(found: dict[str, Any]) -> Answers:
        """What ``describe`` gave."""
        scores = [math.nan if score is None else score for score in found["scores"]]
        return Answers(torch.tensor(scores, dtype=torch.float32), found["texts"])


@dataclass(frozen=True, slots=True)
class Round:
    """The answers of one evaluation."""

    sampled: Answers
    greedy: Answers | None  # None: eval.greedy is off

    def describe(self) -> dict[str, Any]:
        """As JSON data."""
        return {**self.sampled.describe(), "greedy": self.greedy.describe() if self.greedy else None}

    @staticmethod
    def read(found: dict[str, Any]) -> Round:
        """What ``describe`` gave."""
        greedy = found.get("greedy")
        return Round(Answers.read(found), Answers.read(greedy) if greedy else None)


def win_rate(scores: Tensor, others: Tensor) -> float:
    """Share of prompts whose score is above the other's; ties count half, missing scores not at all."""
    known = scores.isfinite() & others.isfinite()
    wins = torch.where(scores == others, 0.5, (scores > others).double())
    return mean(wins[known])


def mean(values: Tensor) -> float:
    """NaN of nothing."""
    return float(values.mean()) if values.numel() else math.nan
