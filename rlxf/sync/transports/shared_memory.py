"""Memory that the actor and the engines of one machine have mapped: written once, read in place by every engine."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlxf.core.errors import SyncError
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


class SharedMemory(Transport):
    """For processes of one machine. Every process of an engine opens the memory itself: no bytes pass a socket."""

    name = "shared_memory"
    title = "shared memory"
    window = WINDOW
    everywhere = False
    keeps_what_was_sent = True

    def sender(self, plan: Sequence[Bucket], place: SenderPlace, *, keeps: bool = False) -> Sender:
        return SendsNothing() if place.rank else _Writer(plan, place, keeps=keeps)

    def receiver(self, address: MemoryAddress, place: ReceiverPlace) -> Receiver:
        return _Reader(SharedBuckets.open(address))


class _Writer:
    """The message of a bucket is its number."""

    def __init__(self, plan: Sequence[Bucket], place: SenderPlace, *, keeps: bool = False) -> None:
        self._plan = plan
        self._shared = SharedBuckets.allocate(plan, keeps=keeps)
        place.platform.links.pin(self._shared.memory)

    @property
    def address(self) -> MemoryAddress:
        return self._shared.address

    def join(self) -> None:
        """Nobody waits for it."""

    def send(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> int:
        self._plan[index].fill(self.sent(index), tensors)
        return index

    def sent(self, index: int) -> Tensor:
        return self._shared.slot(index, self._plan[index].num_bytes)

    def close(self) -> None:
        self._shared.close()


class _Reader:
    def __init__(self, shared: SharedBuckets) -> None:
        self._shared = shared

    def receive(self, bucket: Bucket, message: Message) -> Tensor:
        return self._shared.slot(message, bucket.num_bytes)

    def close(self) -> None:
        """The mapping ends with its last reader."""


def this_machine() -> str:
    """A name that two processes share if and only if one can open what the other has open (``SharedBuckets``).

    The kernel's identity and the process namespace: two containers of one machine are two machines here.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


@dataclass(frozen=True, slots=True)
class MemoryAddress:
    """Where the memory of ``SharedBuckets`` can be opened, on the machine that allocated it."""

    path: str
    room: Room


class SharedBuckets:
    """Room for the buckets of a plan, in memory that the processes of one machine share; allocated once per connection.

    A bucket is written once, by the actor, and read in place by every engine. The memory has no name in any file
    system and ends with the last process that has it mapped, so a killed run leaves nothing behind; and it is limited
    by the machine's memory, not by the size of ``/dev/shm``, which is 64 MB in many containers.
    """

    def __init__(self, descriptor: int, address: MemoryAddress, *, writable: bool) -> None:
        self.address = address
        self._descriptor = descriptor
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        # Populate all pages now: touching them one by one would slow down the first push.
        memory = mmap.mmap(descriptor, address.room.size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=access)
        self.memory = torch.from_numpy(np.frombuffer(memory, dtype=np.uint8))  # keeps the mapping alive

    @classmethod
    def allocate(cls, plan: Sequence[Bucket], *, keeps: bool = False) -> SharedBuckets:
        """Memory to be written by this process: for the largest bucket of ``plan`` twice, or (``keeps``) for each."""
        room = Room.of(plan, each=keeps, alignment=mmap.PAGESIZE)
        descriptor = os.memfd_create("rlxf-weights")  # open until it is closed: engines open it by its path
        os.ftruncate(descriptor, room.size)
        address = MemoryAddress(f"/proc/{os.getpid()}/fd/{descriptor}", room)
        return cls(descriptor, address, writable=True)

    @classmethod
    def open(cls, address: MemoryAddress) -> SharedBuckets:
        """The memory that another process of this machine allocated, to be read.

        Raises:
            SyncError: this process may not open it.
        """
        try:
            descriptor = os.open(address.path, os.O_RDONLY)
        except OSError as error:
            raise SyncError(
                f"cannot open the actor's shared memory {address.path}: {error.strerror}; actor and engines must run "
                "as the same user. Set sync.transport=object_store if they cannot"
            ) from error
        try:
            return cls(descriptor, address, writable=False)
        finally:
            os.close(descriptor)  # the mapping stays

    def close(self) -> None:
        """For the process that allocated it: from now on no process can open it; those that have it open keep it."""
        os.close(self._descriptor)

    def slot(self, index: int, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 view of where bucket ``index`` of the plan is written; others may be written there, too."""
        return self.address.room.slot(self.memory, index, num_bytes)
