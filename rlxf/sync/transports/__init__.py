"""The ways in which new weights get from the actor's processes into the engines': one protocol, one file for each."""

from __future__ import annotations

from rlxf.sync.transports.choice import Choice, Places, Where, choose
from rlxf.sync.transports.collective import Collective
from rlxf.sync.transports.in_process import InProcess
from rlxf.sync.transports.ipc import Ipc
from rlxf.sync.transports.object_store import ObjectStore
from rlxf.sync.transports.shared_memory import SharedMemory
from rlxf.sync.transports.transport import Transport

__all__ = ["TRANSPORTS", "Choice", "Places", "Transport", "Where", "choose"]

# The order is that of the numbers of `sync/transport` in the metrics.
TRANSPORTS: dict[str, Transport] = {
    transport.name: transport for transport in (InProcess(), SharedMemory(), Ipc(), Collective(), ObjectStore())
}
