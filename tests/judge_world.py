"""Judges for tests: small real ones that answer by a rule and count what they are asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlxf.core.types import Text
from rlxf.judge.judge import Columns, Heard, Verdict, ignore


def longer(prompt: Text, first: str, second: str) -> float:
    """The longer answer is better."""
    return 0.5 if len(first) == len(second) else 1.0 if len(first) > len(second) else 0.0


class RuleJudge:
    """Answers by a rule; ``questions`` holds what it was asked."""

    is_symmetric = False

    def __init__(
        self,
        rule: Callable[[Text, str, str], float] = longer,
        *,
        name: str = "rule",
        reads_columns: bool = False,
        final: bool = True,
    ) -> None:
        self._rule = rule
        self._name = name
        self._final = final
        self.reads_columns = reads_columns
        self.questions: list[tuple[Text, str, str]] = []
        self.columns: list[dict[str, Any]] = []

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"kind": "rule", "name": self._name}

    def compare(
        self,
        prompts: Sequence[Text],
        first: Sequence[str],
        second: Sequence[str],
        columns: Columns,
        *,
        heard: Heard = ignore,
    ) -> Tensor:
        asked = list(zip(prompts, first, second, strict=True))
        self.questions += asked
        self.columns += [{name: values[row] for name, values in columns.items()} for row in range(len(asked))]
        found = [self._rule(*question) for question in asked]
        for index, value in enumerate(found):
            heard({index: Verdict(probability=value, final=self._final or not math.isnan(value))})
        return torch.tensor(found, dtype=torch.float32)
