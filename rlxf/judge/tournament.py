"""Which completions of a prompt are compared with each other. Pure logic; the judge is a callable."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlxf.config.kinds import TournamentName
from rlxf.core.types import Comparisons

Ask = Callable[[Sequence[int], Sequence[int]], Tensor]
"""Two lists of M rows -> [M] probability that the completion of the first row is better; NaN: no verdict."""


@dataclass(slots=True)
class _Found:
    first: list[int]
    second: list[int]
    probability: list[float]

    def ask(self, pairs: Sequence[tuple[int, int]], ask: Ask) -> list[float]:
        if not pairs:
            return []
        first, second = [one for one, _ in pairs], [two for _, two in pairs]
        said: list[float] = ask(first, second).tolist()
        self.first += first
        self.second += second
        self.probability += said
        return said


def comparisons(prompt_index: Tensor, sample_index: Tensor, ask: Ask, tournament: TournamentName) -> Comparisons:
    """The judged pairs of each prompt's completions; in a pair, ``first`` has the lower sample index.

    ``knockout``: n - 1 comparisons of n completions. Neighbours by sample index meet, winners meet the winners beside
    them, and one without a partner goes on. After a tie, or without a verdict, the lower sample index goes on.
    ``all``: n (n - 1) / 2 comparisons, each completion with each other one.

    Args:
        prompt_index: [B] int64, the prompt of each row.
        sample_index: [B] int64, the number of each row among the completions of its prompt.
        ask: is called once for each round of all prompts.
        tournament: the name above.
    """
    standing = _by_prompt(prompt_index, sample_index)
    found = _Found([], [], [])
    if tournament == "all":
        found.ask([pair for rows in standing for pair in itertools.combinations(rows, 2)], ask)
    while tournament == "knockout" and any(len(rows) > 1 for rows in standing):
        pairs = [list(zip(rows[::2], rows[1::2], strict=False)) for rows in standing]
        said = iter(found.ask([pair for of_prompt in pairs for pair in of_prompt], ask))
        standing = [
            [_winner(pair, next(said)) for pair in of_prompt] + (rows[-1:] if len(rows) % 2 else [])
            for rows, of_prompt in zip(standing, pairs, strict=True)
        ]
    return Comparisons(
        first=torch.tensor(found.first, dtype=torch.int64),
        second=torch.tensor(found.second, dtype=torch.int64),
        probability=torch.tensor(found.probability, dtype=torch.float32),
    )


def _by_prompt(prompt_index: Tensor, sample_index: Tensor) -> list[list[int]]:
    """The rows of each prompt, by sample index."""
    rows: dict[int, list[int]] = {}
    samples = sample_index.tolist()
    for row, prompt in enumerate(prompt_index.tolist()):
        rows.setdefault(prompt, []).append(row)
    return [sorted(rows[prompt], key=lambda row: samples[row]) for prompt in sorted(rows)]


def _winner(pair: tuple[int, int], probability: float) -> int:
    return pair[1] if not math.isnan(probability) and probability < 0.5 else pair[0]
