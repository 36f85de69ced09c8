"""Asking a judge in both orders, and never twice for the same question."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlxf.core.types import Metrics, Text
from rlxf.judge.judge import Columns, Judge, Verdict
from rlxf.judge.verdicts import Spent, VerdictStore, judge_digest, question_key


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """Of a service, in any currency, per million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def cost(self, spent: Spent) -> float:
        return (spent.prompt_tokens * self.prompt + spent.completion_tokens * self.completion) / 1e6


@dataclass(slots=True)
class Counts:
    """What the questions of a step, or of an evaluation, came to."""

    comparisons: int = 0
    missing: int = 0  # comparisons without a verdict
    ties: int = 0
    both: int = 0  # comparisons with a verdict in both orders
    flipped: int = 0  # of those: another verdict in the other order
    asked: int = 0  # questions that the judge got
    cached: int = 0  # questions that an earlier verdict answered
    spent: Spent = field(default_factory=Spent)

    def add(self, other: Counts) -> None:
        for name in ("comparisons", "missing", "ties", "both", "flipped", "asked", "cached"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("calls", "prompt_tokens", "completion_tokens"):
            setattr(self.spent, name, getattr(self.spent, name) + getattr(other.spent, name))

    def metrics(self, prices: Prices | None = None, *, prefix: str = "judge/") -> Metrics:
        """By the names of docs/metrics.md. ``prices``: of a service, whose calls and tokens are counted, too."""
        found: Metrics = {
            "asked": self.asked,
            "cached": self.cached,
            "missing": self.missing,
            "ties": self.ties,
        }
        if self.both:
            found["position_flip"] = self.flipped / self.both
        if prices is not None:
            found |= {
                "calls": self.spent.calls,
                "prompt_tokens": self.spent.prompt_tokens,
                "completion_tokens": self.spent.completion_tokens,
                "cost": prices.cost(self.spent),
            }
        return {f"{prefix}{name}": float(value) for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Compared:
    """The verdicts on N pairs of answers."""

    probability: Tensor  # [N] float32 that the first answer is better, over the orders that were asked; NaN: none
    as_asked: Tensor  # [N] float32, with the first answer first
    swapped: Tensor  # [N] float32 that the first answer is better, with the second answer first; NaN: not asked
    counts: Counts


class BothOrders:
    """A judge that is asked with each answer first once, and remembers what it said.

    ``p = (p_ab + 1 - p_ba) / 2``; without a verdict in one of the orders there is none. Two equal answers are a tie,
    and nobody is asked.

    Args:
        judge: who is asked.
        store: holds earlier verdicts and gets new ones, each order by itself; None: nothing is kept.
        both: false asks with the first answer first only.
    """

    def __init__(self, judge: Judge, store: VerdictStore | None = None, *, both: bool = True) -> None:
        self._judge = judge
        self._store = store
        self._both = both and not judge.is_symmetric
        self._name = judge_digest(judge.identity)
        self._lock = threading.Lock()  # training and an evaluation may ask at the same time

    def compare(
        self, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str], columns: Columns
    ) -> Compared:
        """The verdicts on N pairs of answers, and what they took."""
        count = len(prompts)
        rows = [row for row in range(count) if first[row] != second[row]]
        questions = [_Question(row, prompts[row], first[row], second[row]) for row in rows]
        if self._both:
            questions += [_Question(row, prompts[row], second[row], first[row]) for row in rows]
        counts = Counts(comparisons=count)
        with self._lock:
            said = self._ask(questions, columns, counts)
        equal = torch.tensor([first[row] == second[row] for row in range(count)], dtype=torch.bool)
        as_asked, swapped = torch.full((2, count), math.nan)
        as_asked[rows] = torch.tensor(said[: len(rows)], dtype=torch.float32)
        probability = as_asked
        if self._both:
            swapped[rows] = 1 - torch.tensor(said[len(rows) :], dtype=torch.float32)
            probability = (as_asked + swapped) / 2
            known = probability.isfinite()
            counts.both = int(known.sum())
            counts.flipped = int(((as_asked - 0.5).sign() != (swapped - 0.5).sign())[known].sum())
        for sides in (probability, as_asked, *([swapped] if self._both else [])):
            sides[equal] = 0.5
        counts.missing = int(probability.isnan().sum())
        counts.ties = int((probability == 0.5).sum())
        return Compared(probability, as_asked, swapped, counts)

    def _ask(self, questions: Sequence[_Question], columns: Columns, counts: Counts) -> list[float]:
        """The answer to each question; equal ones are asked once, and those that the store knows not at all."""
        keys = [self._key(question, columns) for question in questions]
        known: dict[str, float] = {}
        open_: dict[str, _Question] = {}
        for key, question in zip(keys, questions, strict=True):
            stored = self._store.get(key) if self._store is not None else None
            if stored is not None:
                known[key] = stored
            else:
                open_.setdefault(key, question)
        if open_:
            self._hear(open_, columns, known, counts)
        counts.asked, counts.cached = len(open_), len(questions) - len(open_)
        return [known.get(key, math.nan) for key in keys]

    def _hear(self, open_: Mapping[str, _Question], columns: Columns, known: dict[str, float], counts: Counts) -> None:
        names, questions = list(open_), list(open_.values())
        lock = threading.Lock()

        def heard(verdicts: Mapping[int, Verdict]) -> None:
            with lock:
                for index, verdict in verdicts.items():
                    known[names[index]] = verdict.probability
                    if verdict.usage is not None:
                        counts.spent.add(verdict.usage)
                if self._store is not None:
                    self._store.add([(names[index], said) for index, said in verdicts.items() if said.final])

        self._judge.compare(
            [question.prompt for question in questions],
            [question.first for question in questions],
            [question.second for question in questions],
            {name: [values[question.row] for question in questions] for name, values in columns.items()},
            heard=heard,
        )

    def _key(self, question: _Question, columns: Columns) -> str:
        row = {name: values[question.row] for name, values in columns.items()} if self._judge.reads_columns else None
        return question_key(self._name, question.prompt, question.first, question.second, row)


@dataclass(frozen=True, slots=True)
class _Question:
    row: int  # of the comparison
    prompt: Text
    first: str
    second: str
