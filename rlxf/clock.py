"""Where the run is, and how long each stage of a step took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rlxf.types import Metrics


class Clock:
    """Seconds per stage of the current step; also says where the run is, for the messages of whoever waits."""

    def __init__(self) -> None:
        self.step = 0  # driver steps that are complete
        self.stage = "start"
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    @property
    def place(self) -> str:
        """Where the run is, for people."""
        return f"stage {self.stage}, step {self.step + 1}" if self.step or self.stage != "start" else "start-up"

    def start(self, step: int) -> None:
        """Begin the step that follows ``step`` complete ones."""
        self.step = step
        self.seconds = {}
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
        """``timing/*`` of the step so far, seconds."""
        stages = {f"timing/{stage}": seconds for stage, seconds in self.seconds.items()}
        return {**stages, "timing/all": time.perf_counter() - self._started}
