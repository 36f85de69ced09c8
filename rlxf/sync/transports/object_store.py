"""The message is the bytes of a bucket, so weights travel as other messages between processes do.

On Ray that is its object store, which every machine of a cluster has a part of; ``workers`` hands references to
messages on, so that their bytes do not pass through the driver.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rlxf.sync.plan import WINDOW, Bucket
from rlxf.sync.transports.in_process import Packer
from rlxf.sync.transports.transport import (
    Address,
    Message,
    Receiver,
    ReceiverPlace,
    Sender,
    SenderPlace,
    SendsNothing,
    Transport,
)


class ObjectStore(Transport):
    """Works between any two processes, and copies the most."""

    name = "object_store"
    title = "Ray's object store"
    window = WINDOW  # more would only fill the store
    everywhere = False
    keeps_what_was_sent = True

    def sender(self, plan: Sequence[Bucket], place: SenderPlace, *, keeps: bool = False) -> Sender:
        # A message is a copy, which lasts as long as whoever carries it keeps it.
        return SendsNothing() if place.rank else _ArraySender(plan)

    def receiver(self, address: Address, place: ReceiverPlace) -> Receiver:
        return _ArrayReceiver()


class _ArraySender:
    address = None

    def __init__(self, plan: Sequence[Bucket]) -> None:
        self._packer = Packer(plan)

    def join(self) -> None:
        """Nobody waits for it."""

    def send(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> Message:
        return self._packer.send(index, tensors).numpy()  # an array travels without a copy

    def sent(self, index: int) -> Tensor:
        return self._packer.sent(index)

    def close(self) -> None:
        """Does nothing: a message belongs to the store that carries it."""


class _ArrayReceiver:
    def receive(self, bucket: Bucket, message: Message) -> Tensor:
        return torch.from_numpy(message)

    def close(self) -> None:
        """Nothing is open."""
