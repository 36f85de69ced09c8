"""Where the run is, and how long each stage of a step took."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rlxf.core.types import Metrics


class Clock:
    """Seconds per stage of the current step; also knows where the run is, for messages of code that waits."""

    def __init__(self) -> None:
        self.step = 0  # driver steps that are complete
        self.seconds: dict[str, float] = {"save": 0.0}
        self._started = time.perf_counter()
        self._here = threading.local()  # stage and step of a thread that works on another one

    @property
    def place(self) -> str:
        """Where the run is, for people; in a thread of its own what that works on."""
        stage, step = self._place_here
        return f"stage {stage}, step {step + 1}" if step or stage != "start" else "start-up"

    @property
    def step_here(self) -> int:
        """The step that this thread works on; 0 is the first."""
        return self._place_here[1]

    @property
    def _place_here(self) -> tuple[str, int]:
        place: tuple[str, int | None] = getattr(self._here, "place", ("start", None))
        return place[0], self.step if place[1] is None else place[1]

    def start(self, step: int) -> None:
        """Begin the step that follows ``step`` complete ones; what was counted since the last row is of its row."""
        self.step = step
        self._here.place = self._place_here[0], None
        self._started = time.perf_counter()

    @contextmanager
    def __call__(
        self, stage: str, *, step: int | None = None, seconds: dict[str, float] | None = None
    ) -> Iterator[None]:
        """Count the time inside towards ``timing/<stage>``; a stage may come several times.

        Args:
            stage: its name.
            step: the step that it works on; the run's if it is left out.
            seconds: of that step, to be added with ``add`` when its row is due; the current row's if left out.
        """
        self._here.place = stage, step
        into = self.seconds if seconds is None else seconds
        begin = time.perf_counter()
        try:
            yield
        finally:
            into[stage] = into.get(stage, 0.0) + time.perf_counter() - begin

    def add(self, seconds: Mapping[str, float]) -> None:
        """What a step took before its turn is of its row."""
        for stage, value in seconds.items():
            self.seconds[stage] = self.seconds.get(stage, 0.0) + value

    def timings(self) -> Metrics:
        """``timing/*`` of a step's row, seconds; what comes now counts for the next row.

        ``timing/all`` is the step without its evaluation, ``timing/save`` what was saved since the row before.
        """
        seconds, self.seconds = self.seconds, {"save": 0.0}
        whole = time.perf_counter() - self._started - seconds.get("eval", 0.0)
        return {**{f"timing/{stage}": value for stage, value in seconds.items()}, "timing/all": whole}
