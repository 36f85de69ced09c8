"""The transport's protocol: how the bytes of new weights get from the actor's processes into the engines'.

A transport has an end in every rank of the actor (``Sender``) and one in every process of an engine (``Receiver``): an
engine whose model is shared by several devices has several. The driver opens all of them, then asks the actor for one
bucket of the plan after the other and passes each message on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlxf.platform.base import Platform
from rlxf.sync.plan import Bucket

CPU = torch.device("cpu")

Address = Any
"""Where a sender can be found by receivers: it travels between processes, and only the transport's own ends read it."""

Message = Any
"""What a sender tells the receivers of one bucket: its bytes, or where they are. Only the two ends read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SenderPlace:
    """One rank of the actor, as a sender."""

    rank: int = 0
    platform: Platform
    device: torch.device = CPU
    where: str | None = None  # a name of the device that processes of one machine agree on; None: not known
    host: str = "127.0.0.1"  # the address of this machine
    num_receivers: int = 1
    timeout_s: float = 60.0  # of one message


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceiverPlace:
    """One process of an engine, as a receiver."""

    number: int = 0  # among all receivers
    platform: Platform
    device: torch.device = CPU
    where: str | None = None  # as in ``SenderPlace``
    host: str = "127.0.0.1"


class Exports(Protocol):
    """The actor's rank, as far as its weights are concerned."""

    def sync_plan(self) -> tuple[Bucket, ...]: ...

    def bucket_tensors(self, index: int, *, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name and newest tensor of all that is in bucket ``index`` of the plan: whole, on the model's device.

        Only rank 0 gets tensors, or every rank (``everywhere``). All ranks must call it and exhaust the iterator,
        because they give shares.
        """
        ...


class Sender(Protocol):
    """The end in one rank of the actor."""

    @property
    def address(self) -> Address:
        """What receivers need to know of this end."""
        ...

    def join(self) -> None:
        """Called while the receivers are opened, for ends that have to meet."""
        ...

    def send(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> Message:
        """Bucket ``index`` of the plan on its way; what rank 0 gives is handed to every receiver.

        ``tensors``: what ``Exports.bucket_tensors`` gives, to be exhausted. Copies, if any, are made here.
        """
        ...

    def sent(self, index: int) -> Tensor:
        """[num_bytes] uint8: what ``send`` has just put on its way, for a checksum. Empty where nothing was sent."""
        ...

    def close(self) -> None:
        """Release what other processes could open; a new sender will take its place."""
        ...


class Receiver(Protocol):
    """The end in one process of an engine."""

    def receive(self, bucket: Bucket, message: Message) -> Tensor:
        """[bucket.num_bytes] uint8: the bucket's bytes, valid until the ``window``-th bucket after it is sent."""
        ...

    def close(self) -> None:
        """A new receiver will take its place."""
        ...


class ActorEnd(Protocol):
    """Every rank of the actor, as the driver sees them."""

    def open_sender(self, transport: Transport, num_receivers: int, keeps: bool) -> Address:
        """A new sender in every rank, in place of the one before; where they are (``Transport.joined``)."""
        ...


class EngineEnds(Protocol):
    """Every engine, as the driver sees them."""

    @property
    def num_receivers(self) -> int: ...

    def open_receivers(self, transport: Transport, address: Address) -> None:
        """A new receiver in every engine's processes, in place of the one before, while the senders ``join``."""
        ...


class Transport(Protocol):
    """One way from the actor to the engines. It has no state, so that it can be given to any process."""

    name: str  # what `sync.transport` calls it
    title: str  # "weights travel through ..."
    window: int  # buckets under way at a time: the ``window``-th bucket after one uses its memory again
    everywhere: bool  # every rank of the actor sends, to the engines on its own device
    keeps_what_was_sent: bool  # a sender can be told to

    def sender(self, plan: Sequence[Bucket], place: SenderPlace, *, keeps: bool = False) -> Sender:
        """``keeps``: what was sent can be received again until the same bucket is sent anew."""
        ...

    def receiver(self, address: Address, place: ReceiverPlace) -> Receiver: ...

    def joined(self, addresses: Sequence[Address]) -> Address:
        """One address of those of all senders, in the order of their ranks."""
        return addresses[0]

    def connect(self, actor: ActorEnd, engines: EngineEnds, *, keeps: bool = False) -> Address:
        """Open both ends: before the first push, and again whenever a process was replaced.

        A push that failed in between is repeated as a whole: a sender keeps nothing of the pushes before.

        Returns:
            Where others can receive the same messages, if the transport keeps what was sent.
        """
        address = actor.open_sender(self, engines.num_receivers, keeps and self.keeps_what_was_sent)
        engines.open_receivers(self, address)
        return address


class SendsNothing:
    """The sender of the ranks that only give their shares, where rank 0 sends the whole tensors."""

    address = None

    def join(self) -> None:
        """Nobody waits for it."""

    def send(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for _ in tensors:
            continue

    def sent(self, index: int) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def close(self) -> None:
        """Nothing is open."""
