"""A role's worker processes, addressed as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray

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


class WorkerGroup:
    """All ranks of one role. Every rank gets the same call; rank 0's answer is the group's."""

    def __init__(self, members: Sequence[Member], waiter: Waiter) -> None:
        self.members = tuple(members)
        self.waiter = waiter

    def send(self, method: str, *args: Any) -> list[Pending]:
        """Start a call on every rank, without waiting."""
        if len(self.members) > 1:  # into the object store once, not once per rank
            args = tuple(arg if isinstance(arg, int | ray.ObjectRef) else ray.put(arg) for arg in args)
        return [Pending(getattr(member.handle, method).remote(*args), member.name, method) for member in self.members]

    def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Call every rank and wait for all; the answer of rank 0."""
        return self.waiter.gather(self.send(method, *args), timeout_s)[0]
