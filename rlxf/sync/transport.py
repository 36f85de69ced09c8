"""How a bucket's bytes get from the actor to the rollout engines: by value, or through memory that both have mapped."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlxf.core.errors import SyncError
from rlxf.sync.plan import Bucket

MAX_SLOTS = 2  # the actor writes one bucket while the engines read the one before


def this_machine() -> str:
    """A name that two processes share if and only if one can open what the other has open (``SharedBuckets``).

    The kernel's identity and the process namespace: two containers of one machine are two machines here.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the memory of ``SharedBuckets`` can be opened, on the machine that allocated it."""

    path: str
    num_slots: int
    slot_bytes: int


class SharedBuckets:
    """Room for the buckets of a plan, in memory that the processes of one machine share; allocated once per run.

    A bucket is written once, by the actor, and read in place by every engine. The memory has no name in any file
    system and ends with the last process that has it mapped, so a killed run leaves nothing behind; and it is limited
    by the machine's memory, not by the size of ``/dev/shm``, which is 64 MB in many containers.
    """

    def __init__(self, descriptor: int, address: Address, *, writable: bool) -> None:
        self.address = address
        access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        # Populated now, all at once: a first touch page by page would be part of the first push.
        size = address.num_slots * address.slot_bytes
        memory = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=access)
        self._bytes = torch.from_numpy(np.frombuffer(memory, dtype=np.uint8))  # keeps the mapping alive

    @classmethod
    def allocate(cls, plan: Sequence[Bucket]) -> SharedBuckets:
        """Memory for the largest bucket of ``plan``, twice if there are several, to be written by this process."""
        largest = max(bucket.num_bytes for bucket in plan)
        slot_bytes = -(-largest // mmap.PAGESIZE) * mmap.PAGESIZE
        num_slots = min(MAX_SLOTS, len(plan))
        descriptor = os.memfd_create("rlxf-weights")  # open as long as this process lives: engines open it by its path
        os.ftruncate(descriptor, num_slots * slot_bytes)
        address = Address(f"/proc/{os.getpid()}/fd/{descriptor}", num_slots, slot_bytes)
        return cls(descriptor, address, writable=True)

    @classmethod
    def open(cls, address: Address) -> SharedBuckets:
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

    def slot(self, index: int, num_bytes: int) -> Tensor:
        """[num_bytes] uint8 view of where bucket ``index`` of the plan is written; the next but one overwrites it."""
        start = index % self.address.num_slots * self.address.slot_bytes
        return self._bytes[start : start + num_bytes]
