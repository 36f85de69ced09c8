"""The curves of a run as rules read them: the first values and the newest ones, never all of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median

from rlxf.health.facts import RunFacts

WINDOW = 10  # rows whose mean a rule reads: one row of a small batch is noise
LEAST = 6  # of them that must have the metric
KEPT = 2 * WINDOW  # newest rows that are kept

# A value that a run does not have is NaN: a comparison with it is false, so the rule does not hold.
UNKNOWN = math.nan


@dataclass(slots=True)
class Curve:
    """One metric: its first known values, and its newest ones."""

    first: list[float] = field(default_factory=list)  # at most ``WINDOW``, known ones only
    newest: list[float] = field(default_factory=list)  # at most 2 x ``KEPT``, one a row, NaN where the row had none
    num_known: int = 0

    def add(self, value: float) -> None:
        self.newest.append(value)
        if len(self.newest) >= 2 * KEPT:
            del self.newest[:KEPT]
        if value == value:
            self.num_known += 1
            if len(self.first) < WINDOW:
                self.first.append(value)


class Curves:
    """The metrics that rules read, a row per step or per evaluation."""

    def __init__(self, names: Iterable[str]) -> None:
        self._curves = {name: Curve() for name in names}
        self.step = -1  # of the newest row; -1: there is none
        self.num_rows = 0

    def add(self, step: int, row: Mapping[str, object]) -> None:
        """Add a row; what it does not have, and what is no finite number, counts as unknown."""
        self.step = step
        self.num_rows += 1
        for name, curve in self._curves.items():
            value = row.get(name)
            curve.add(float(value) if isinstance(value, float | int) and math.isfinite(value) else UNKNOWN)

    def now(self, name: str, size: int = WINDOW) -> float:
        """Mean of the newest ``size`` rows; NaN where fewer than 60 % of them have the metric."""
        known = self.known(name, size)
        return math.fsum(known) / len(known) if len(known) * WINDOW >= LEAST * size else UNKNOWN

    def typical(self, name: str) -> float:
        """Median of the newest ``WINDOW`` rows, which one row that is far off does not move; NaN as with ``now``."""
        known = self.known(name)
        return median(known) if len(known) >= LEAST else UNKNOWN

    def before(self, name: str) -> float:
        """Mean of the first ``WINDOW`` known values; NaN until as many newer ones are known."""
        curve = self._curves[name]
        return math.fsum(curve.first) / WINDOW if curve.num_known >= 2 * WINDOW else UNKNOWN

    def first(self, name: str) -> float:
        """The first known value."""
        first = self._curves[name].first
        return first[0] if first else UNKNOWN

    def newest(self, name: str) -> float:
        """The value of the newest row."""
        newest = self._curves[name].newest
        return newest[-1] if newest else UNKNOWN

    def known(self, name: str, size: int = WINDOW) -> list[float]:
        """The known values of the newest ``size`` rows, at most ``KEPT``."""
        return [value for value in self._curves[name].newest[-size:] if value == value]


@dataclass(frozen=True, slots=True)
class RunCurves:
    """What a rule reads of a run."""

    facts: RunFacts
    steps: Curves  # a row of ``metrics.jsonl`` each
    evaluations: Curves  # a row of ``eval.jsonl`` each
