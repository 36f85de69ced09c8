"""Rules that look at the length and the tokens of a completion."""

from __future__ import annotations

from typing import Any

from rlxf.config.rules import LengthOptions, RepetitionOptions, SoftOverlongOptions
from rlxf.core.types import Text
from rlxf.score.rules.rule import text_of


class Length:
    """1 where the length is between the limits, both included; outside of them less by the distance."""

    def __init__(self, options: LengthOptions) -> None:
        self._options = options

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        if self._options.unit == "tokens":
            lengths = [len(ids) for ids in completion_ids]
        elif self._options.unit == "words":
            lengths = [len(text_of(text).split()) for text in completions]
        else:
            lengths = [len(text_of(text)) for text in completions]
        return [self._score(length) for length in lengths]

    def _score(self, length: int) -> float:
        low, high, slack = self._options.min, self._options.max, self._options.slack
        below = low - length if low is not None else 0
        above = length - high if high is not None else 0
        distance = max(below, above, 0)
        return max(0.0, 1.0 - distance / slack) if slack else float(distance == 0)


class Repetition:
    """TRL's ``get_repetition_penalty_reward``: 0 without a repeated n-gram, near ``max_penalty`` with nothing else."""

    def __init__(self, options: RepetitionOptions) -> None:
        self._size, self._penalty = options.ngram_size, options.max_penalty

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        return [self._score(ids) for ids in completion_ids]

    def _score(self, ids: list[int]) -> float:
        count = len(ids) - self._size + 1
        if count < 1:
            return 0.0
        different = len({tuple(ids[start : start + self._size]) for start in range(count)})
        repeated = 1 - different / count
        return repeated * self._penalty if repeated else 0.0  # not -0.0


class SoftOverlong:
    """TRL's ``get_soft_overlong_punishment`` (DAPO, Yu et al. 2025, eq. 13)."""

    def __init__(self, options: SoftOverlongOptions) -> None:
        self._longest, self._span = options.max_completion_len, options.soft_punish_cache

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        return [self._score(len(ids)) for ids in completion_ids]

    def _score(self, length: int) -> float:
        start = self._longest - self._span
        if length <= start:
            return 0.0
        return -1.0 if length > self._longest else (start - length) / self._span
