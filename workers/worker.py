"""What the worker processes of all roles have in common."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import ray

from rlxf.config.schema import RunConfig
from rlxf.platform import Platform, Process, get_platform
from rlxf.sync.transports.shared_memory import this_machine

from .storage import missing_tokens, remove_token, write_token

T = TypeVar("T")


class Build(Protocol):
    """Puts a role's room together from the whole recipe, as the functions of ``rlxf/assembly/roles.py`` do."""

    def __call__(self, config: RunConfig, platform: Platform, process: Process) -> Any: ...


class Worker:
    """One process of a role. Nothing is loaded before ``build``: a failure there is an answer, not a dead actor."""

    make: Build  # of each role, as a static method
    room: Any  # what it gave

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._listener: socket.socket | None = None
        # Arrays from the object store are read-only; every room only reads them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def address(self) -> tuple[str, int]:
        """This node's address and a port on it, held until the group's rendezvous; a group of one needs none."""
        if self.world_size == 1:
            return "127.0.0.1", 0
        self._listener = socket.create_server(("", 0))
        return ray.util.get_node_ip_address(), self._listener.getsockname()[1]

    def machine(self) -> str:
        """The same for all processes that can share memory with this one."""
        return this_machine()

    def storage_token(self, folder: Path, name: str, write: bool = True) -> str | None:
        """Write (or delete) a token of this process; what is wrong, or None."""
        return write_token(folder, name) if write else remove_token(folder, name)

    def missing_tokens(self, folder: Path, names: Sequence[str]) -> list[str]:
        """The tokens that this process does not see in the folder."""
        return missing_tokens(folder, names)

    def build(self, config: RunConfig, master: tuple[str, int]) -> None:
        """Load the room's model, or whatever it has. ``master``: the address of the group's rendezvous."""
        self.room = self.make(config, *self.place(config, master))

    def place(self, config: RunConfig, master: tuple[str, int]) -> tuple[Platform, Process]:
        """The device, and this rank's place in its group. Ray shows a process its own devices only: it has number 0."""
        process = Process(
            rank=self.rank,
            world_size=self.world_size,
            local_rank=0,
            master_addr=master[0],
            master_port=master[1],
            listen_fd=self._listener.detach() if self._listener else None,
        )
        return get_platform(config.training.device, cpu_linear=config.training.cpu_linear), process

    def answer(self, value: T) -> T | None:
        """``value`` on rank 0; the others have nothing to send."""
        return value if self.rank == 0 else None
