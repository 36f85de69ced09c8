"""The verdicts of a run, as its rows come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from rlxf.health.curves import Curves, RunCurves
from rlxf.health.facts import RunFacts
from rlxf.health.rules import EVALUATED, RULES, STEPPED
from rlxf.health.verdict import Verdict

Row = Mapping[str, object]  # a metric that is missing, null, NaN or infinite counts as unknown


class Health:
    """Asks every rule after each row, and keeps what they say."""

    def __init__(self, facts: RunFacts) -> None:
        self._curves = RunCurves(facts, Curves(STEPPED), Curves(EVALUATED))
        self._verdicts: dict[str, Verdict] = {}

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """All that have held so far, in the order in which they first did."""
        return tuple(self._verdicts.values())

    def add(self, step: int, row: Row) -> list[Verdict]:
        """The verdicts that hold for the first time after a step.

        Args:
            step: complete steps. A step that is not newer than the last one is left out.
            row: its metrics as ``metrics.jsonl`` has them, those of its evaluation included.
        """
        if step <= self._curves.steps.step:
            return []
        self._curves.steps.add(step, row)
        found = self._ask(step, of_evaluations=False)
        return found + self.add_evaluation(step, row)

    def add_evaluation(self, step: int, row: Row) -> list[Verdict]:
        """The same after an evaluation that is in no step's row: the one before the first step."""
        evaluates = any(name.startswith("eval/") and value is not None for name, value in row.items())
        if not evaluates or step <= self._curves.evaluations.step:
            return []
        self._curves.evaluations.add(step, row)
        return self._ask(step, of_evaluations=True)

    def restore(self, rows: Iterable[Row], evaluations: Iterable[Row] = ()) -> None:
        """Add the rows of a run's ``metrics.jsonl`` and ``eval.jsonl``, each with its ``step``."""
        at = {_step(row): row for row in rows}
        alone = {_step(row): row for row in evaluations if _step(row) not in at}
        for step in sorted({*at, *alone}):
            if step in at:
                self.add(step, at[step])
            else:
                self.add_evaluation(step, alone[step])

    def _ask(self, step: int, *, of_evaluations: bool) -> list[Verdict]:
        new: list[Verdict] = []
        for rule in RULES.values():
            if rule.of_evaluations != of_evaluations:
                continue
            seen = rule.look(self._curves)
            if seen is None:
                continue
            if (earlier := self._verdicts.get(rule.name)) is not None:
                self._verdicts[rule.name] = replace(earlier, last=step, seen=seen)
            else:
                self._verdicts[rule.name] = rule.verdict(seen, first=step, last=step)
                new.append(self._verdicts[rule.name])
        return new


def _step(row: Row) -> int:
    step = row["step"]
    return int(step) if isinstance(step, int | float) else 0
