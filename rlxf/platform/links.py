"""What processes pass to each other without a copy through a socket: a broadcast in a group, a handle of memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.core.errors import SyncError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Backend, Store, Work

Handle = Any
"""By which another process opens memory of a device; only ``Links`` reads it."""

_LOOK_S = 1e-4  # how often a wait looks whether a broadcast has ended, at first
_LOOK_AT_MOST_S = 5e-3


class Links(Protocol):
    """The ways between processes on one kind of device."""

    shares_devices: bool  # processes on one device can open each other's memory by a handle

    def group(
        self, store: Store, rank: int, size: int, timeout_s: float, device: torch.device, host: str
    ) -> Broadcasts:
        """A group of processes beside all that they are in. It returns when every member has called it.

        Args:
            store: where they meet.
            rank: of this process.
            size: of the group.
            timeout_s: of the meeting, and of each message.
            device: of this process.
            host: the address by which other machines reach it.
        """
        ...

    def share(self, memory: Tensor) -> Handle:
        """A handle of ``memory``, which must live as long as others read it."""
        ...

    def open(self, handle: Handle, device: torch.device) -> Tensor:
        """The memory itself, in another process on the device that it belongs to."""
        ...

    def pin(self, memory: Tensor) -> None:
        """Lock pages of the host, so that copies between them and the device are fast; may do nothing."""
        ...

    def host_copy(self, like: Tensor) -> Tensor:
        """Memory of the host for a copy of ``like``; its content is undefined."""
        ...

    def copy_beside(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Copies:
        """Begin to copy tensors of the device into memory that ``host_copy`` gave."""
        ...


class Broadcasts:
    """A group in which rank 0 sends to all others, with a deadline for each message.

    A wait is one of the host: it ends at the deadline also where a kernel of the device hangs because a member is gone.

    Args:
        backend: one of torch's process groups, which nobody else knows of.
        timeout_s: for each message.
    """

    def __init__(self, backend: Backend, timeout_s: float) -> None:
        self._backend = backend
        self._timeout_s = timeout_s

    def start(self, memory: Tensor) -> Broadcast:
        """Send ``memory`` from rank 0; on other ranks it is overwritten. It must not be touched before the wait."""
        try:
            work: Work = self._backend.broadcast(memory, 0)  # type: ignore[attr-defined]
            return Broadcast(work, self._timeout_s, self.close)
        except RuntimeError as error:
            raise SyncError(_broken(error)) from error

    def close(self) -> None:
        """Leave the group, whatever is under way in it. It may be called again."""
        try:
            self._backend.abort()
        except RuntimeError:  # a backend that knows no abort ends with its last reference
            return


class Broadcast:
    """One message under way."""

    def __init__(self, work: Work, timeout_s: float, close: Callable[[], None]) -> None:
        self._work = work
        self._deadline = time.monotonic() + timeout_s
        self._limit = timeout_s
        self._close = close

    def wait(self) -> None:
        """Return when the memory is whole, or may be written again.

        Raises:
            SyncError: a member is gone, or did not take part in time.
        """
        pause = _LOOK_S
        try:
            while not self._work.is_completed():
                if time.monotonic() > self._deadline:
                    self._close()
                    raise SyncError(
                        f"a broadcast of weights did not end within {self._limit:g} s: an engine or the trainer did "
                        "not take part in it"
                    )
                time.sleep(pause)
                pause = min(2 * pause, _LOOK_AT_MOST_S)
            self._work.wait()
        except RuntimeError as error:
            raise SyncError(_broken(error)) from error


def _broken(error: Exception) -> str:
    return f"a broadcast of weights broke off, as it does when a process is lost: {' '.join(str(error).split())[:200]}"


class Copies:
    """Copies into host memory, made beside what the device computes."""

    seconds = 0.0  # that they took, once they are awaited

    def before_changes(self) -> None:
        """Call it before their sources are changed: what is queued on the device after it waits for the copies."""

    def wait(self) -> None:
        """Return when the host can read them."""


class HostLinks:
    """Of processes whose tensors are in host memory: gloo. One machine's processes map the same memory instead."""

    shares_devices = False

    def group(
        self, store: Store, rank: int, size: int, timeout_s: float, device: torch.device, host: str
    ) -> Broadcasts:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        if "GLOO_SOCKET_IFNAME" in os.environ:
            options._devices = [dist.ProcessGroupGloo.create_default_device()]
        else:  # by default gloo asks for the host's name, which many machines resolve to their loopback
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        return Broadcasts(dist.ProcessGroupGloo(store, rank, size, options), timeout_s)

    def share(self, memory: Tensor) -> Handle:
        raise SyncError("processes on a CPU have no device whose memory they could share by a handle")

    def open(self, handle: Handle, device: torch.device) -> Tensor:
        raise SyncError("processes on a CPU have no device whose memory they could share by a handle")

    def pin(self, memory: Tensor) -> None:
        """Nothing copies to a device."""

    def host_copy(self, like: Tensor) -> Tensor:
        return torch.empty_like(like)

    def copy_beside(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Copies:
        begin, copies = time.perf_counter(), Copies()
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)
        copies.seconds = time.perf_counter() - begin
        return copies


class DeviceLinks:
    """Of processes on accelerators: a process group of the device's own backend, and torch's handles.

    Args:
        backend: makes torch's process group of (store, rank, size, timeout in seconds).
        pin: see ``Links``.
    """

    shares_devices = True

    def __init__(
        self,
        backend: Callable[[Store, int, int, float], Backend],
        pin: Callable[[Tensor], None] = lambda _: None,
    ) -> None:
        self._backend = backend
        self._pin = pin

    def group(
        self, store: Store, rank: int, size: int, timeout_s: float, device: torch.device, host: str
    ) -> Broadcasts:
        # The backend's own limit ends the process; ours comes first and ends the push.
        broadcasts = Broadcasts(self._backend(store, rank, size, 2 * timeout_s), timeout_s)
        # Backends connect in the first collective call: here, where all members are, and not in the first message.
        broadcasts.start(torch.zeros(1, dtype=torch.uint8, device=device)).wait()
        return broadcasts

    def share(self, memory: Tensor) -> Handle:
        from torch.multiprocessing.reductions import reduce_tensor

        return reduce_tensor(memory)  # type: ignore[no-untyped-call]

    def open(self, handle: Handle, device: torch.device) -> Tensor:
        rebuild, arguments = handle
        # The number of the device in the process that shared it; here it may have another one.
        tensor: Tensor = rebuild(*arguments[:_DEVICE], device.index or 0, *arguments[_DEVICE + 1 :])
        return tensor

    def pin(self, memory: Tensor) -> None:
        self._pin(memory)

    def host_copy(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device="cpu", pin_memory=True)

    def copy_beside(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Copies:
        return _StreamCopies(sources, targets)


class _StreamCopies(Copies):
    """On a stream of their own."""

    def __init__(self, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        self._module = torch.get_device_module(sources[0].device)
        stream = self._module.Stream()
        self._begin, self._end = (self._module.Event(enable_timing=True) for _ in range(2))
        stream.wait_stream(self._module.current_stream())  # the newest weights
        with self._module.stream(stream):
            self._begin.record()
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source, non_blocking=True)
            self._end.record()

    def before_changes(self) -> None:
        self._module.current_stream().wait_event(self._end)

    def wait(self) -> None:
        self._end.synchronize()
        self.seconds = self._begin.elapsed_time(self._end) / 1000


_DEVICE = 6  # of the arguments that torch.multiprocessing's reductions give for a tensor of a device: its number
