"""How many bytes a process has moved: what shows that weights do not pass through the driver."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

_COUNTS_AT = 120  # of Linux's struct tcp_info: bytes acknowledged and bytes received, two 64-bit numbers
_RAYS_STORE = ("/dev/shm/plasma", "plasma-store")  # parts of the name of a mapping


class Moved:
    """Counts from now on, for this process: files and pipes, TCP connections, and pages of Ray's store that it touched.

    Not in it: what goes through Unix sockets, by which Ray sends control messages only.
    """

    def __init__(self) -> None:
        # To count reads files, too; that must be outside of what is counted.
        self._before = {**_by_tcp(), **_in_rays_store(), **_by_file()}

    def bytes(self) -> int:
        after = {**_by_file(), **_by_tcp(), **_in_rays_store()}
        return sum(max(count - self._before.get(name, 0), 0) for name, count in after.items())


def _by_file() -> Mapping[str, int]:
    numbers = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"files and pipes": int(numbers["rchar"]) + int(numbers["wchar"])}


def _by_tcp() -> Mapping[str, int]:
    """By connection."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor is closed, or no TCP connection
            link = os.readlink(f"/proc/self/fd/{name}")
            if link.startswith("socket:"):
                found[link] = _of_socket(int(name))
    return found


def _of_socket(descriptor: int) -> int:
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        sent, received = struct.unpack_from("QQ", copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), _COUNTS_AT)
    return int(sent + received)


def _in_rays_store() -> Mapping[str, int]:
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:  # the first line of a mapping
            inside = any(name in line for name in _RAYS_STORE)
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return {"Ray's store": total}
