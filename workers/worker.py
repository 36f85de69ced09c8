"""What the worker processes of all roles have in common."""

from __future__ import annotations

import functools
import socket
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, Protocol, TypeVar

import ray

from rlxf.config.schema import RunConfig
from rlxf.core.garbage import leave_out_what_is_loaded, searched_seldom
from rlxf.core.model_folder import Files, files_of
from rlxf.core.progress import progress
from rlxf.platform import Platform, Process, get_platform
from rlxf.platform.visible import visible_devices
from rlxf.sync.transports import Where
from rlxf.sync.transports.shared_memory import this_machine

from .signs import SignsOfLife
from .storage import missing_tokens, remove_token, write_token

T = TypeVar("T")
NO_RENDEZVOUS = "127.0.0.1", 0  # the address of a group of one


class Build(Protocol):
    """Puts a role's room together from the whole recipe, as the functions of ``rlxf/assembly/roles.py`` do."""

    def __call__(self, config: RunConfig, platform: Platform, process: Process) -> Any: ...


class Worker:
    """One process of a role. Nothing is loaded before ``build``: a failure there is an answer, not a dead actor.

    Each public method is a phase of the process's progress, by its name or by what ``phase_of`` makes of it.

    Args:
        rank: in the role's group.
        world_size: of the group.
        sign: run and name by which the process gives signs of life; None: nobody follows it.
    """

    make: Build  # of each role, as a static method
    make_again: Build | None = None  # the same in place of a process that was lost, where it differs
    room: Any  # what it gave
    platform: Platform  # once the room is built
    files: Files | None = None  # of the policy's folder

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, method in list(vars(cls).items()):
            if isinstance(method, FunctionType) and not name.startswith("_"):
                setattr(cls, name, _phase(method))

    def __init__(self, rank: int, world_size: int, sign: tuple[str, str] | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.signs = SignsOfLife(*sign) if sign else None
        self._listener: socket.socket | None = None
        # Arrays from the object store are read-only; every room only reads them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def require_driver(self) -> None:
        """Before files are written that others see.

        Raises:
            RuntimeError: the driver is lost, and a newer process may be writing them.
        """
        if self.signs is not None:
            self.signs.require_driver()

    def _phase_of(self, method: str, args: tuple[Any, ...]) -> str:
        """The name of the phase that a call is."""
        return method

    def address(self) -> tuple[str, int]:
        """This node's address and a port on it, held until the group's rendezvous; a group of one needs none."""
        if self.world_size == 1:
            return NO_RENDEZVOUS
        self._listener = socket.create_server(("", 0))
        return ray.util.get_node_ip_address(), self._listener.getsockname()[1]

    def where(self, device: str) -> tuple[Where, ...]:
        """Where this process is, with each of its devices; it may be asked before a model loads.

        ``device``: the recipe's.
        """
        devices = visible_devices(get_platform(device))
        return tuple(Where(this_machine(), name) for name in devices) or (Where(this_machine()),)

    def start_files(self) -> Files | None:
        """The files of the policy's folder, as they were when this process loaded it."""
        return self.files

    def storage_token(self, folder: Path, name: str, write: bool = True) -> str | None:
        """Write (or delete) a token of this process; what is wrong, or None."""
        return write_token(folder, name) if write else remove_token(folder, name)

    def missing_tokens(self, folder: Path, names: Sequence[str]) -> list[str]:
        """The tokens that this process does not see in the folder."""
        return missing_tokens(folder, names)

    def build(self, config: RunConfig, master: tuple[str, int], again: bool = False) -> None:
        """Load the room's model, or whatever it has.

        Args:
            config: the recipe.
            master: the address of the group's rendezvous.
            again: in place of a process that was lost.
        """
        with progress.phase("build"), searched_seldom():
            platform, process = self.place(config, master)
            make = self.make_again if again and self.make_again is not None else self.make
            folder = config.actor_rollout.load
            self.files = files_of(Path(folder)) if folder else None
            self.platform, self.room = platform, make(config, platform, process)
        leave_out_what_is_loaded()
        if self.signs is not None and platform.name != "cpu":
            self.signs.device_bytes, self.signs.device_total = platform.max_memory_allocated, platform.total_memory()

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


def _phase(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, whose calls are a phase."""

    @functools.wraps(method)
    def within(self: Worker, *args: Any, **options: Any) -> Any:
        with progress.phase(self._phase_of(method.__name__, args)):
            return method(self, *args, **options)

    return within
