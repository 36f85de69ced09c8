"""Actor and engine in one process: a bucket is one tensor, which the engine reads where it was packed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rlxf.sync.plan import Bucket
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


class InProcess(Transport):
    """The transport of ``runtime=local``."""

    name = "in_process"
    title = "this process"
    window = 1
    everywhere = False
    keeps_what_was_sent = False  # in one process the engines have sampled before the actor moves on

    def sender(self, plan: Sequence[Bucket], place: SenderPlace, *, keeps: bool = False) -> Sender:
        return SendsNothing() if place.rank else Packer(plan, place.device)

    def receiver(self, address: Address, place: ReceiverPlace) -> Receiver:
        return _AsItIs()


class Packer:
    """Packs buckets into memory of its own: the message is the [num_bytes] uint8 bytes of one."""

    address = None

    def __init__(self, plan: Sequence[Bucket], device: torch.device | None = None) -> None:
        self._plan = plan
        # Of the largest bucket, allocated once: fresh pages cost more than the copy into them.
        self._memory = torch.empty(max(bucket.num_bytes for bucket in plan), dtype=torch.uint8, device=device)

    def join(self) -> None:
        """Nobody waits for it."""

    def send(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> Tensor:
        self._plan[index].fill(self._memory, tensors)
        return self.sent(index)

    def sent(self, index: int) -> Tensor:
        return self._memory[: self._plan[index].num_bytes]

    def close(self) -> None:
        """Does nothing: no other process can open the memory."""


class _AsItIs:
    def receive(self, bucket: Bucket, message: Message) -> Tensor:
        payload: Tensor = message
        return payload

    def close(self) -> None:
        """Nothing is open."""
