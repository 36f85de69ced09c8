"""Where the run is, and how long each stage of a step took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rlxf.core.types import Metrics


class Clock:
    """Seconds per stage of the current step; also knows where the run is, for messages of code that waits."""

    def __init__(self) -> None:
        self.step = 0  # driver steps that are complete
        self.stage = "start"
        self.seconds: dict[str, float] = {"save": 0.0}
        self._started = time.perf_counter()

    @property
    def place(self) -> str:
        """Where the run is, for people."""
        return f"stage {self.stage}, step {self.step + 1}" if self.step or self.stage != "start" else "start-up"

    def start(self, step: int) -> None:
        """Begin the step that follows ``step`` complete ones; what was counted since the last row is of its row."""
        self.step = step
        self._started = time.perf_counter()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count the time inside towards ``timing/<stage>``; a stage may come several times."""
        self.stage = stage
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin

    def timings(self) -> Metrics:
        """``timing/*`` of a step's row, seconds; what comes now counts for the next row.

        ``timing/all`` is the step without its evaluation, ``timing/save`` what was saved since the row before.
        """
        seconds, self.seconds = self.seconds, {"save": 0.0}
        whole = time.perf_counter() - self._started - seconds.get("eval", 0.0)
        return {**{f"timing/{stage}": value for stage, value in seconds.items()}, "timing/all": whole}
