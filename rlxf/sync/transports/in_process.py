"""Actor and engine in one process: a bucket is one tensor, which the engine reads where it was packed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rlxf.sync.plan import Bucket
from rlxf.sync.transports.transport import Address, Message, Receiver, Sender, SendsNothing, Transport


class InProcess(Transport):
    """The transport of ``runtime=local``."""

    title = "this process"
    window = 1

    def sender(self, plan: Sequence[Bucket], rank: int, *, keeps: bool = False) -> Sender:
        # Nothing needs to be kept: in one process the engines have sampled before the actor moves on.
        return SendsNothing() if rank else Packer(plan)

    def receiver(self, address: Address) -> Receiver:
        return _AsItIs()


class Packer:
    """Packs buckets into memory of its own on the CPU: the message is the [num_bytes] uint8 bytes of one."""

    address = None

    def __init__(self, plan: Sequence[Bucket]) -> None:
        self._plan = plan
        # Of the largest bucket, allocated once: fresh pages cost more than the copy into them.
        self._memory = torch.empty(max(bucket.num_bytes for bucket in plan), dtype=torch.uint8)

    def send(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> Tensor:
        bucket = self._plan[index]
        payload = self._memory[: bucket.num_bytes]
        bucket.fill(payload, tensors)
        return payload

    def close(self) -> None:
        """Does nothing: no other process can open the memory."""


class _AsItIs:
    def receive(self, bucket: Bucket, message: Message) -> Tensor:
        payload: Tensor = message
        return payload
