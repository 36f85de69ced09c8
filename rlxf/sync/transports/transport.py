"""The transport's protocol: how the bytes of new weights get from the actor's processes into the engines'.

A transport has an end in every rank of the actor (``Sender``) and one in every engine's process (``Receiver``). The
driver opens both, then asks the actor for one bucket of the plan after the other and passes each message on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from rlxf.sync.plan import Bucket

Address = Any
"""Where a sender can be found by receivers: it travels between processes, and only the transport's own ends read it."""

Message = Any
"""What a sender tells the receivers of one bucket: its bytes, or where they are. Only the two ends read it."""


class Exports(Protocol):
    """The actor's rank, as far as its weights are concerned."""

    def sync_plan(self) -> tuple[Bucket, ...]: ...

    def bucket_tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Name and newest tensor of all that is in bucket ``index`` of the plan: whole, on the model's device.

        Only rank 0 gets tensors. The other ranks must call it and exhaust the iterator as well, because they give
        shares.
        """
        ...


class Sender(Protocol):
    """The end in one rank of the actor."""

    @property
    def address(self) -> Address:
        """What receivers need to know of this end; that of rank 0 is given to them."""
        ...

    def send(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> Message:
        """Bucket ``index`` of the plan on its way; what rank 0 gives is handed to every receiver.

        ``tensors``: what ``Exports.bucket_tensors`` gives, to be exhausted. Copies, if any, are made here.
        """
        ...

    def close(self) -> None:
        """Release what other processes could open; a new sender will take its place."""
        ...


class Receiver(Protocol):
    """The end in one engine's process."""

    def receive(self, bucket: Bucket, message: Message) -> Tensor:
        """[bucket.num_bytes] uint8: the bucket's bytes, valid until the ``window``-th bucket after it is sent."""
        ...


class ActorEnd(Protocol):
    """Every rank of the actor, as the driver sees them."""

    def open_sender(self, transport: Transport, keeps: bool) -> Address:
        """A new sender in every rank, in place of the one before; the address of rank 0's."""
        ...


class EngineEnds(Protocol):
    """Every engine, as the driver sees them."""

    def open_receivers(self, transport: Transport, address: Address) -> None:
        """A new receiver in every engine's process, in place of the one before."""
        ...


class Transport(Protocol):
    """One way from the actor to the engines. It has no state, so that it can be given to any process."""

    title: str  # "weights travel through ..."
    window: int  # buckets under way at a time: the ``window``-th bucket after one uses its memory again

    def sender(self, plan: Sequence[Bucket], rank: int, *, keeps: bool = False) -> Sender:
        """``keeps``: what was sent can be received again until the same bucket is sent anew."""
        ...

    def receiver(self, address: Address) -> Receiver: ...

    def connect(self, actor: ActorEnd, engines: EngineEnds, *, keeps: bool = False) -> Address:
        """Open both ends: before the first push, and again whenever a process was replaced.

        A push that failed in between is repeated as a whole: a sender keeps nothing of the pushes before.

        Returns:
            Where others can receive the same messages.
        """
        address = actor.open_sender(self, keeps)
        engines.open_receivers(self, address)
        return address


class SendsNothing:
    """The sender of the ranks that only give their shares, where rank 0 sends the whole tensors."""

    address = None

    def send(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for _ in tensors:
            continue

    def close(self) -> None:
        """Nothing is open."""
