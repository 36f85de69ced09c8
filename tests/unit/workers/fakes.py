"""Worker processes without Ray: calls are answered by objects in this process, in the order that a test wants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from rlxf.core.clock import Clock
from rlxf.core.errors import WorkerLost
from rlxf.core.stop import Stop
from workers.group import Member, WorkerGroup
from workers.remote import Answer, Pending, Waiter


class Ref:
    """What a call gives: its answer, an error, or the loss of its process."""

    def __init__(self, process: Process, method: str) -> None:
        self.process, self.method = process, method
        self.answer: Any = None
        self.error: Exception | None = None
        self.lost = False


class Process:
    """A worker. Its calls are answered when they are made, by the methods of ``room``; then it may die.

    Args:
        room: what it holds.
        dies_in: methods in whose next call it dies; a method may be in it several times.
    """

    def __init__(self, room: Any, dies_in: Iterable[str] = ()) -> None:
        self.room, self.dies_in = room, list(dies_in)
        self.dead = False
        self.calls: list[str] = []

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=lambda *args: self.make(method, args))

    def make(self, method: str, args: tuple[Any, ...]) -> Ref:
        ref = Ref(self, method)
        self.calls.append(method)
        if method in self.dies_in:
            self.dies_in.remove(method)
            self.dead = True
        if self.dead:
            ref.lost = True
            return ref
        try:
            given = [arg.answer if isinstance(arg, Ref) else arg for arg in args]
            ref.answer = None if method == "build" else getattr(self.room, method)(*given)
        except Exception as error:  # noqa: BLE001  whoever waits gets it
            ref.error = error
        return ref


class AtOnce(Waiter):
    """Waits for calls that are answered already; ``late``: methods whose answers come after all others.

    ``choose``: which of the answers comes first.
    """

    def __init__(self, choose: Callable[[list[Pending]], Pending] = lambda calls: calls[0]) -> None:
        super().__init__(Clock(), Stop(), 60.0)
        self.choose = choose
        self.late: set[str] = {"build"}
        self.waits: list[list[str]] = []

    def gather(self, calls: Sequence[Pending], timeout_s: float | None = None) -> list[Any]:
        self.waits.append([call.call for call in calls])
        for call in calls:
            if call.ref.lost:
                raise lost(call)
        for call in calls:
            if call.ref.error is not None:
                raise call.ref.error
        return [call.ref.answer for call in calls]

    def cause(self, error: Exception, others: Iterable[Pending]) -> Exception:
        return error

    def first(self, calls: Iterable[Pending]) -> Answer:
        waiting = list(calls)
        assert waiting
        call = self.choose([call for call in waiting if call.call not in self.late] or waiting)
        if call.ref.lost:
            return Answer(call, lost=lost(call))
        if call.ref.error is not None:
            raise call.ref.error
        return Answer(call, call.ref.answer)


def lost(call: Pending) -> WorkerLost:
    return WorkerLost(f"lost {call.worker} during {call.call}")


class Starts:
    """Starts processes in place of lost ones; ``make``: the next one, of a rank."""

    def __init__(self, make: Callable[[int], Process]) -> None:
        self.make = make
        self.waiter: Any = None  # of the group that was started again
        self.started: list[int] = []
        self.away: set[int] = set()
        self.back: list[int] = []  # ranks, each as often as it has come back

    def gone(self, group: WorkerGroup) -> list[int]:
        return [rank for rank, member in enumerate(group.members) if member.handle.dead]

    def start_again(self, group: WorkerGroup, ranks: Sequence[int], lost: WorkerLost) -> list[Pending]:
        self.waiter = group.waiter
        self.started += ranks
        self.away |= set(ranks)
        for rank in ranks:
            group.replace(rank, member(self.make(rank), rank))
        return [group.one(rank, "build") for rank in ranks]

    def wait_for_loading(self, calls: list[Pending]) -> None:
        assert self.waiter is not None
        self.waiter.gather(calls)

    def is_back(self, group: WorkerGroup, ranks: Iterable[int]) -> None:
        found = [rank for rank in ranks if rank in self.away]
        self.back += found
        self.away -= set(found)


def member(process: Process, rank: int) -> Member:
    return Member(process, f"rank {rank}", "a")
