"""One process group of the actor's rank 0 and all processes of engines: buckets are broadcast from device to device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed import DistError

from rlxf.core.errors import SyncError
from rlxf.platform.links import Broadcast, Broadcasts
from rlxf.sync.plan import WINDOW, Bucket, Room
from rlxf.sync.transports.transport import (
    Message,
    Receiver,
    ReceiverPlace,
    Sender,
    SenderPlace,
    SendsNothing,
    Transport,
)

_PREFIX = "rlxf-weights"


@dataclass(frozen=True, slots=True)
class GroupAddress:
    """Where the members of the group meet."""

    host: str
    port: int
    size: int  # the sender and all receivers
    room: Room
    timeout_s: float  # of one message


class Collective(Transport):
    """For actor and engines on different devices, of one machine or of several."""

    name = "collective"
    title = "a broadcast between devices"
    window = WINDOW
    everywhere = False
    keeps_what_was_sent = False

    def sender(self, plan: Sequence[Bucket], place: SenderPlace, *, keeps: bool = False) -> Sender:
        return SendsNothing() if place.rank else _Broadcaster(plan, place)

    def receiver(self, address: GroupAddress, place: ReceiverPlace) -> Receiver:
        return _Listener(address, place)


class _Broadcaster:
    """Rank 0 of the group. ``send`` returns while the bucket is under way, so that the next one can be packed."""

    def __init__(self, plan: Sequence[Bucket], place: SenderPlace) -> None:
        self._plan, self._place = plan, place
        self._room = Room.of(plan)
        self._memory = torch.empty(self._room.size, dtype=torch.uint8, device=place.device)
        limit = timedelta(seconds=place.timeout_s)
        self._store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=limit)
        size = 1 + place.num_receivers
        self.address = GroupAddress(place.host, self._store.port, size, self._room, place.timeout_s)
        self._group: Broadcasts | None = None
        self._under_way: dict[int, Broadcast] = {}  # by the start of the slot

    def join(self) -> None:
        self._group = _member(self._store, 0, self.address, self._place)

    def send(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> int:
        assert self._group is not None  # joined
        bucket, start = self._plan[index], self._room.starts[index]
        failure = self._wait_for(start)
        bucket.fill(self.sent(index), tensors)  # also after a failure: the other ranks give their shares
        if failure is not None:
            raise failure
        self._under_way[start] = self._group.start(self.sent(index))
        return index

    def _wait_for(self, start: int) -> SyncError | None:
        """The slot is free; what went wrong with its last bucket."""
        try:
            if start in self._under_way:
                self._under_way.pop(start).wait()
        except SyncError as error:
            return error
        return None

    def sent(self, index: int) -> Tensor:
        return self._room.slot(self._memory, index, self._plan[index].num_bytes)

    def close(self) -> None:
        self._under_way.clear()
        if self._group is not None:
            self._group.close()
        self._group = None


class _Listener:
    def __init__(self, address: GroupAddress, place: ReceiverPlace) -> None:
        self._room = address.room
        self._memory = torch.empty(address.room.size, dtype=torch.uint8, device=place.device)
        limit = timedelta(seconds=address.timeout_s)
        try:
            store = TCPStore(address.host, address.port, is_master=False, timeout=limit)
        except (RuntimeError, DistError) as error:
            raise SyncError(
                f"an engine cannot reach the trainer at {address.host}:{address.port} for a broadcast of weights: "
                f"{' '.join(str(error).split())[:200]}; open the ports between the machines, or set "
                "sync.transport=object_store"
            ) from error
        self._group = _member(store, 1 + place.number, address, place)

    def receive(self, bucket: Bucket, message: Message) -> Tensor:
        payload = self._room.slot(self._memory, message, bucket.num_bytes)
        self._group.start(payload).wait()
        return payload

    def close(self) -> None:
        self._group.close()


def _member(store: TCPStore, rank: int, address: GroupAddress, place: SenderPlace | ReceiverPlace) -> Broadcasts:
    """Join the group; it returns when all have."""
    prefixed, links = PrefixStore(_PREFIX, store), place.platform.links
    try:
        return links.group(prefixed, rank, address.size, address.timeout_s, place.device, place.host)
    except (RuntimeError, DistError) as error:
        raise SyncError(
            f"not all of the trainer and {address.size - 1} processes of engines joined a broadcast of weights within "
            f"{address.timeout_s:g} s: {' '.join(str(error).split())[:200]}"
        ) from error
