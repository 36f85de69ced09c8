"""What a worker process is doing, and whether it moves: read by a thread beside its work, and told to the driver."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

FIRST = "first "  # before the name of a phase that a process has not ended yet
_REMEMBERED = 50  # durations of each phase


@dataclass(frozen=True, slots=True)
class Seen:
    """One look at the progress of a process.

    ``Seen(7, "update", {"update": 1.5})``: it has moved seven times, is in an update, and updates took 1.5 s.
    """

    counter: int
    phase: str  # "": nothing to do
    medians: dict[str, float] = field(default_factory=dict)  # seconds of the phases that have ended; "first ..." apart


class Progress:
    """Counts what a process has done. A phase's first time is one of its own: it compiles, allocates and warms up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counter = 0
        self._phase = ""
        self._durations: dict[str, deque[float]] = {}
        self._known: set[str] = set()

    def tick(self) -> None:
        """Something was done within a phase: a token, a micro-batch."""
        self._counter += 1  # a lost one between threads does no harm

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is inside is a phase; if it ends without an error, its time counts for the next ones of that name."""
        known, before = name if name in self._known else f"{FIRST}{name}", self._phase
        with self._lock:
            self._phase, self._counter = known, self._counter + 1
        begin = time.monotonic()
        try:
            yield
            self._known.add(name)
            with self._lock:
                self._durations.setdefault(known, deque(maxlen=_REMEMBERED)).append(time.monotonic() - begin)
        finally:
            with self._lock:
                self._phase, self._counter = before, self._counter + 1

    def look(self) -> Seen:
        """Where it is now."""
        with self._lock:
            medians = {name: statistics.median(found) for name, found in self._durations.items()}
            return Seen(self._counter, self._phase, medians)


progress = Progress()
"""Of this process."""
