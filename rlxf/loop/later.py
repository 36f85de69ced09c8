"""Work of the driver that no step waits for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Later:
    """Done in order and in the driver's thread, while it waits for workers; before a checkpoint, and when a run ends.

    Args:
        at_once: nobody works while the driver does, so that nothing is won by waiting.
    """

    def __init__(self, *, at_once: bool = True) -> None:
        self._at_once = at_once
        self._queue: deque[Callable[[], None]] = deque()

    def add(self, work: Callable[[], None]) -> None:
        self._queue.append(work)
        if self._at_once:
            self.do()

    def do(self) -> None:
        """All that was added. What fails is not done again, and what follows it is done by the next call."""
        while self._queue:
            self._queue.popleft()()
