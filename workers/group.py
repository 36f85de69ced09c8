"""A role's worker processes, addressed as one; and what happens when one of them is lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import ray

from rlxf.core.errors import WorkerLost

from .remote import Pending, Waiter


@dataclass(frozen=True, slots=True)
class Member:
    """One worker process of a role."""

    handle: Any  # Ray actor handle
    rank: str  # "ref rank 0"
    node: str  # "10.0.0.1 (8c6fb2)"

    @property
    def name(self) -> str:
        return f"{self.rank} on node {self.node}"


class Starts(Protocol):
    """Who starts processes in place of lost ones (``crew.py``)."""

    def gone(self, group: WorkerGroup) -> list[int]:
        """Ranks whose process has ended."""
        ...

    def start_again(self, group: WorkerGroup, ranks: Sequence[int], lost: WorkerLost) -> list[Pending]:
        """New processes for these ranks, which are members of the group now, and the calls that load their models."""
        ...

    def wait_for_loading(self, calls: list[Pending]) -> None:
        """Return when what ``start_again`` started is loaded."""
        ...

    def is_back(self, group: WorkerGroup, ranks: Iterable[int]) -> None:
        """These ranks have done a piece of work since they were started again."""
        ...


class WorkerGroup:
    """All ranks of one role. Every rank gets the same call; rank 0's answer is the group's.

    Args:
        members: in rank order.
        waiter: waits for them.
        starts: starts lost ones again; None: a loss is an error.
    """

    def __init__(self, members: Sequence[Member], waiter: Waiter, starts: Starts | None = None) -> None:
        self.members = tuple(members)
        self.waiter = waiter
        self.starts = starts

    def replace(self, rank: int, member: Member) -> None:
        """From now on ``member`` has this rank."""
        self.members = (*self.members[:rank], member, *self.members[rank + 1 :])

    def send(self, method: str, *args: Any) -> list[Pending]:
        """Start a call on every rank, without waiting."""
        if len(self.members) > 1:  # into the object store once, not once per rank
            args = tuple(arg if isinstance(arg, int | ray.ObjectRef) else ray.put(arg) for arg in args)
        return [self.one(rank, method, *args) for rank in range(len(self.members))]

    def one(self, rank: int, method: str, *args: Any) -> Pending:
        """Start a call on one rank."""
        member = self.members[rank]
        return Pending(getattr(member.handle, method).remote(*args), member.name, method)

    def ask(self, method: str, *args: Any) -> list[Any]:
        """Call every rank and wait for all; their answers, in rank order."""
        return self.waiter.gather(self.send(method, *args))

    def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Call every rank and wait for all; the answer of rank 0."""
        return self.waiter.gather(self.send(method, *args), timeout_s)[0]


class StatelessGroup(WorkerGroup):
    """A role whose processes hold only what they load. If one is lost, all ranks start again and do the call again."""

    def __init__(self, members: Sequence[Member], waiter: Waiter, starts: Starts | None = None) -> None:
        super().__init__(members, waiter, starts)
        self._loading: list[Pending] = []
        self._unproven = False  # started again, and no call has been answered since

    def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """The same; a call whose rank is lost is made again, once.

        Raises:
            WorkerLost: lost twice during the same call, or twice before an answer to any.
        """
        while True:
            try:
                self._wait_for_loading()
                answer = super().call(method, *args, timeout_s=timeout_s)
            except WorkerLost as lost:
                if self.starts is None or self._unproven or not self.starts.gone(self):
                    raise
                self._unproven = True
                self._loading = self.starts.start_again(self, range(len(self.members)), lost)
            else:
                if self._unproven and self.starts is not None:
                    self.starts.is_back(self, range(len(self.members)))
                self._unproven = False
                return answer

    def _wait_for_loading(self) -> None:
        """A call that broke off here leaves it to the next one."""
        if self._loading and self.starts is not None:
            self.starts.wait_for_loading(self._loading)
            self._loading = []
