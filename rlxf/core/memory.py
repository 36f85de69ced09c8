"""How much memory there is for the processes of this machine: all of it, or what a container or batch job may use."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 2**30
MIB = 2**20
_CGROUPS, _SELF = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Memory of a machine, or of the control group that a process is in, whichever has less left."""

    limit: int  # bytes
    available: int  # bytes that processes can still take


@dataclass(frozen=True, slots=True)
class _Group:
    """A control group: the files that tell its memory."""

    limit: Path
    usage: Path
    stat: Path
    cache: str  # the line of ``stat`` that counts what the kernel gives back before it kills

    def read(self, total: int) -> Memory | None:
        """None: it has no limit, or it is not there."""
        try:
            text = self.limit.read_text().strip()
            limit = total if text == "max" else int(text)
            if limit >= total:  # version 1 writes a huge number for "no limit"
                return None
            lines = (line.split() for line in self.stat.read_text().splitlines())
            cache = next((int(value) for name, value in lines if name == self.cache), 0)
            used = int(self.usage.read_text()) - cache
        except (OSError, ValueError):
            return None
        return Memory(limit=limit, available=max(limit - used, 0))


def machine_memory() -> Memory:
    """What there is for this process, and those beside it in its control groups (both versions of them)."""
    machine = psutil.virtual_memory()
    whole = Memory(limit=machine.total, available=machine.available)
    limited = [found for group in _groups_here() if (found := group.read(machine.total)) is not None]
    return min([whole, *limited], key=lambda memory: memory.available)


@functools.cache
def _groups_here() -> tuple[_Group, ...]:
    try:
        text = _SELF.read_text()
    except OSError:
        return ()
    return tuple(groups(text, _CGROUPS))


def groups(text: str, mount: Path) -> Iterator[_Group]:
    """The control groups of a process, each with those around it.

    Args:
        text: its ``/proc/PID/cgroup``.
        mount: where control groups are mounted.
    """
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = mount / "memory" if controllers else mount
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        cache = "total_inactive_file" if controllers else "inactive_file"
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):  # in a container the path may be the host's: only the root is there
            here = root / folder
            yield _Group(here / names[0], here / names[1], here / "memory.stat", cache)
