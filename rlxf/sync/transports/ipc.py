"""Memory of a device that the actor's rank and the engines on the same device have open: no byte leaves the device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlxf.core.errors import SyncError
from rlxf.platform.links import Handle
from rlxf.sync.plan import WINDOW, Bucket, Room
from rlxf.sync.transports.transport import (
    Message,
    Receiver,
    ReceiverPlace,
    Sender,
    SenderPlace,
    Transport,
)

_ALIGNMENT = 512  # bytes: what allocators of devices align to


@dataclass(frozen=True, slots=True)
class DeviceAddress:
    """Where the buckets of the senders lie."""

    handles: Mapping[str, Handle]  # by the name of the device
    room: Room


class Ipc(Transport):
    """For engines on the devices of the actor's ranks. Every rank collects the whole tensors, on its own device."""

    name = "ipc"
    title = "memory of the device, by handles"
    window = WINDOW
    everywhere = True
    keeps_what_was_sent = False

    def sender(self, plan: Sequence[Bucket], place: SenderPlace, *, keeps: bool = False) -> Sender:
        return _DeviceWriter(plan, place)

    def receiver(self, address: DeviceAddress, place: ReceiverPlace) -> Receiver:
        if place.where is None or place.where not in address.handles:
            raise SyncError(
                f"sync.transport = ipc: the engine is on device {place.where}, where no rank of the actor is (they are "
                f"on {', '.join(map(str, address.handles))}); set sync.transport=auto"
            )
        memory = place.platform.links.open(address.handles[place.where], place.device)
        return _DeviceReader(memory, address.room)

    def joined(self, addresses: Sequence[DeviceAddress]) -> DeviceAddress:
        handles = {where: handle for address in addresses for where, handle in address.handles.items()}
        return DeviceAddress(handles, addresses[0].room)


class _DeviceWriter:
    """The message of a bucket is its number. It is whole on the device when ``send`` returns."""

    def __init__(self, plan: Sequence[Bucket], place: SenderPlace) -> None:
        assert place.where is not None  # the choice of this transport looked at it
        self._plan = plan
        self._platform = place.platform
        room = Room.of(plan, alignment=_ALIGNMENT)
        self._memory = torch.empty(room.size, dtype=torch.uint8, device=place.device)
        self.address = DeviceAddress({place.where: place.platform.links.share(self._memory)}, room)

    def join(self) -> None:
        """Nobody waits for it."""

    def send(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> int:
        self._plan[index].fill(self.sent(index), tensors)
        self._platform.synchronize()  # the readers' streams know nothing of this one
        return index

    def sent(self, index: int) -> Tensor:
        return self.address.room.slot(self._memory, index, self._plan[index].num_bytes)

    def close(self) -> None:
        """Readers that have the memory open keep it."""


class _DeviceReader:
    def __init__(self, memory: Tensor, room: Room) -> None:
        self._memory = memory
        self._room = room

    def receive(self, bucket: Bucket, message: Message) -> Tensor:
        return self._room.slot(self._memory, message, bucket.num_bytes)

    def close(self) -> None:
        """The memory is closed with its last tensor."""
