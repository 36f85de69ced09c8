"""Signs of life: each worker tells the driver twice a second what it is doing, and the driver tells the workers that it
is there.

Both go through the key-value store of Ray's head node, written and read by threads of their own: nobody enters a
worker's main thread, which may be stuck. A process that is stopped gives no sign, whatever it was doing.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from rlxf.core.memory import Memory, machine_memory
from rlxf.core.progress import Progress, Seen
from rlxf.core.progress import progress as this_process
from rlxf.sync.transports.shared_memory import this_machine

log = logging.getLogger(__name__)

BEAT_S = 0.5  # between two signs
LOST_S = 25.0  # after which a worker that hears nothing of its driver ends itself
_GUARD_S = 1.0  # between two looks at how long that is
_NAMESPACE = "rlxf"


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """A process, told apart from a later one of the same number."""

    pid: int
    started: int  # ticks of the kernel's clock since it booted: nobody sets that clock
    machine: str  # ``this_machine``

    @classmethod
    def this(cls) -> Process:
        """The one that asks."""
        return cls(pid=os.getpid(), started=started(os.getpid()), machine=this_machine())

    def found(self) -> psutil.Process | None:
        """The process itself, if it is on this machine and has not ended."""
        if self.machine != this_machine():
            return None
        try:
            process = psutil.Process(self.pid)
            alive = started(self.pid) == self.started and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, OSError):
            return None
        return process if alive else None


def started(pid: int) -> int:
    """When a process of this machine was started, as ``Process.started``.

    Raises:
        OSError: there is none of that number.
    """
    # Not psutil's create_time: in seconds since 1970, it moves with the machine's clock.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return int(fields[19])


@dataclass(frozen=True, kw_only=True, slots=True)
class Sign:
    """What a worker tells of itself."""

    number: int  # of the sign
    process: Process
    rss: int  # bytes of memory that are resident
    memory: Memory  # of its machine
    device_bytes: int = 0  # largest amount of device memory that was in use; 0: none, or a CPU
    device_total: int = 0  # memory of its device, bytes; 0: none, or unknown
    oom_kills: int = 0  # processes that its machine's kernel has killed for want of memory
    seen: Seen = field(default_factory=lambda: Seen(0, ""))

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Sign:
        found = json.loads(text)
        parts = {
            "process": Process(**found["process"]),
            "memory": Memory(**found["memory"]),
            "seen": Seen(**found["seen"]),
        }
        return cls(**{**found, **parts})


def put(key: str, value: bytes) -> None:
    """Make ``value`` readable for all processes of the cluster."""
    _internal_kv_put(key, value, overwrite=True, namespace=_NAMESPACE)


def get(key: str) -> bytes | None:
    """What was put there last; None: nothing."""
    found: bytes | None = _internal_kv_get(key, namespace=_NAMESPACE)
    return found


def forget(run: str) -> None:
    """Delete everything that a run has put."""
    _internal_kv_del(f"{run}/", del_by_prefix=True, namespace=_NAMESPACE)


def driver_key(run: str) -> str:
    """Where a driver tells that it is there."""
    return f"{run}/driver"


class SignsOfLife:
    """The threads of a worker process: one gives signs and reads the driver's, the other ends the process without them.

    Args:
        run: of which the process is a worker.
        name: its own, unique in the run.
        progress: what is told.
        device_bytes: device memory in use, bytes.
        device_total: all memory of its device, bytes; 0: it is not known.
        leave: ends the process.
    """

    def __init__(
        self,
        run: str,
        name: str,
        *,
        progress: Progress = this_process,
        device_bytes: Callable[[], int] = lambda: 0,
        device_total: int = 0,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        self.device_bytes, self.device_total = device_bytes, device_total
        self._key, self._driver_key = f"{run}/{name}", driver_key(run)
        self._progress, self._leave = progress, leave
        self._process, self._self = Process.this(), psutil.Process()
        self._driver: Process | None = None
        self._heard: bytes | None = None  # the driver's last sign
        self._heard_at = self._guarded_at = time.monotonic()
        for work in (self._give, self._guard):
            threading.Thread(target=work, name=work.__name__, daemon=True).start()

    def require_driver(self) -> None:
        """Before a file is written that others see: raise if the driver may have given this process up.

        Raises:
            RuntimeError: nothing was heard of it for long; a newer process may do this one's work.
        """
        silent = time.monotonic() - self._heard_at
        if silent > LOST_S / 2 and not self._driver_is_here():
            raise RuntimeError(f"nothing was heard of the driver for {silent:.0f} s, so nothing is written")

    def _give(self) -> None:
        number = 0
        while True:
            number += 1
            try:
                self._give_one(number)
            except Exception as error:  # noqa: BLE001  the head node does not answer: the guard counts the time
                log.debug("no sign of life could be given: %s", error)
            time.sleep(BEAT_S)

    def _give_one(self, number: int) -> None:
        heard = get(self._driver_key)
        if heard is None:
            return  # the run has ended, and what it put is deleted: nothing is left behind
        if heard != self._heard:
            self._heard, self._heard_at = heard, time.monotonic()
            content = json.loads(heard)
            self._driver = Process(**content["process"])
            if self._key in content["replaced"]:
                self._end("another worker has taken this one's place")
        put(self._key, self._sign(number).to_bytes())

    def _sign(self, number: int) -> Sign:
        return Sign(
            number=number,
            process=self._process,
            rss=self._self.memory_info().rss,
            memory=machine_memory(),
            device_bytes=self.device_bytes(),
            device_total=self.device_total,
            oom_kills=oom_kills(),
            seen=self._progress.look(),
        )

    def _guard(self) -> None:
        while True:
            time.sleep(_GUARD_S)
            self._end_if_lost()

    def _end_if_lost(self) -> None:
        now, before = time.monotonic(), self._guarded_at
        self._guarded_at = now
        # What this process slept through, stopped or without a core, is no silence of the driver.
        self._heard_at += max(now - before - 2 * _GUARD_S, 0.0)
        if now - self._heard_at > LOST_S and not self._driver_is_here():
            self._end(f"nothing was heard of the driver for {LOST_S:g} s")

    def _end(self, why: str) -> None:
        sys.stderr.write(f"{why}: this worker ends\n")
        sys.stderr.flush()
        self._leave(1)

    def _driver_is_here(self) -> bool:
        """A driver of this machine that is stopped (Ctrl-Z, a debugger) is not lost."""
        return self._driver is not None and self._driver.found() is not None


def oom_kills() -> int:
    """Processes that this machine's kernel has killed for want of memory since it started; 0 where it does not say."""
    try:
        with open("/proc/vmstat", encoding="ascii") as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
    except OSError:
        return 0


def new_run() -> str:
    """A name for the signs of a run, unlike any other's."""
    return f"{ray.get_runtime_context().get_job_id()}-{os.urandom(4).hex()}"


def driver_sign(number: int, process: Process, replaced: Sequence[str] = ()) -> bytes:
    """What the driver puts.

    Args:
        number: of the sign.
        process: its own.
        replaced: names of workers in whose place there is another one. They end themselves, wherever they are: a kill
            may not have reached them.
    """
    return json.dumps({"number": number, "process": asdict(process), "replaced": list(replaced)}).encode()
