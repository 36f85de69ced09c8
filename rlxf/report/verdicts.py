"""The verdicts of `rlxf.health` on a run, from the rows of its files."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rlxf.health import Health, facts_of
from rlxf.report.read import RunData


class Verdicts:
    """Feeds the rows of one run to the rules, each once, and again from the first when rows were taken away."""

    def __init__(self) -> None:
        self._health: Health | None = None
        self._seen: tuple[object, int, int] | None = None
        self._steps, self._evaluations = 0, 0  # rows that the rules have seen

    def update(self, run: RunData) -> list[dict[str, Any]]:
        """All verdicts so far, in the order in which they first held."""
        seen = (run.config, run.metrics.generation, run.evaluations.generation)
        if self._health is None or seen != self._seen:
            self._health, self._seen = Health(facts_of(run.config)), seen
            self._steps, self._evaluations = 0, 0
        first = run.metrics.steps[0] if len(run.metrics) else None
        for index in range(self._evaluations, len(run.evaluations)):
            # A later evaluation is in the row of its step as well; a run that only evaluates has no other rows.
            if first is None or run.evaluations.steps[index] < first:
                self._health.add_evaluation(run.evaluations.steps[index], run.evaluations.row(index))
        for index in range(self._steps, len(run.metrics)):
            self._health.add(run.metrics.steps[index], run.metrics.row(index))
        self._steps, self._evaluations = len(run.metrics), len(run.evaluations)
        return [asdict(verdict) for verdict in self._health.verdicts]
