"""The ways in which new weights get from the actor's processes into the engines': one protocol, one file for each."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

from rlxf.platform.base import Platform
from rlxf.sync.transports.in_process import InProcess
from rlxf.sync.transports.object_store import ObjectStore
from rlxf.sync.transports.shared_memory import SharedMemory
from rlxf.sync.transports.transport import Transport

__all__ = ["TRANSPORTS", "Transport", "choose_transport"]

TRANSPORTS: dict[str, Transport] = {
    "in_process": InProcess(),
    "shared_memory": SharedMemory(),
    "object_store": ObjectStore(),
}


def choose_transport(
    wanted: Literal["auto", "object_store"], platform: Platform, machines: Callable[[], Collection[str]]
) -> Transport:
    """What ``sync.transport`` means for processes on this device.

    Args:
        wanted: the recipe's word; ``auto`` is the best that device and placement allow.
        platform: the device.
        machines: asks actor and engines where they are (``this_machine``); only called if the answer matters.
    """
    if wanted != "auto":
        return TRANSPORTS[wanted]
    shared = platform.weights_in_host_memory and len(set(machines())) == 1
    return TRANSPORTS["shared_memory" if shared else "object_store"]
