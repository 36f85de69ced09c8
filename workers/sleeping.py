"""Which engines sleep, on devices that they share with the trainer."""

from __future__ import annotations

from collections.abc import Iterable

from rlxf.core.errors import WorkerLost

from .group import WorkerGroup


class Sleepers:
    """Calls that every engine gets once, also where one is lost in the middle and the call is made again.

    Args:
        group: the engines.
        asleep: they all are.
    """

    def __init__(self, group: WorkerGroup, *, asleep: bool = False) -> None:
        self._group = group
        self.asleep = set(range(len(group.members))) if asleep else set[int]()  # the trainer may use their memory
        self.half: set[int] = set()  # with weights, or room for them, and no cache

    def sleep(self, engines: set[int]) -> dict[int, WorkerLost]:
        """Those of these engines that are awake. Returns how some were lost; they count as awake."""
        awake = engines - self.asleep
        lost = self._each("sleep", awake)
        self.asleep |= awake - set(lost)
        return lost

    def wake_weights(self) -> None:
        """Of all that sleep.

        Raises:
            WorkerLost: one of them was lost; the others have done it.
        """
        lost = self._each("wake_weights", self.asleep)
        self.half |= self.asleep - set(lost)
        self.asleep = set(lost)
        _raise_first(lost)

    def wake_cache(self) -> None:
        """Of all whose weights woke; as ``wake_weights``."""
        lost = self._each("wake_cache", self.half)
        self.half = set(lost)
        _raise_first(lost)

    def are_new(self, engines: Iterable[int]) -> None:
        """Others have taken the places of these engines: they have loaded, or are about to, and are awake."""
        self.asleep -= set(engines)
        self.half -= set(engines)

    def _each(self, method: str, engines: set[int]) -> dict[int, WorkerLost]:
        """Call these engines and wait for all of them; those that were lost meanwhile."""
        calls = {engine: self._group.one(engine, method) for engine in sorted(engines)}
        by_call = {call.ref: engine for engine, call in calls.items()}
        lost: dict[int, WorkerLost] = {}
        while calls:
            answer = self._group.waiter.first(calls.values())
            engine = by_call[answer.call.ref]
            del calls[engine]
            if answer.lost is not None:
                lost[engine] = answer.lost
        return lost


def _raise_first(lost: dict[int, WorkerLost]) -> None:
    for error in lost.values():
        raise error
