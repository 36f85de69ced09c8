"""A second machine on this one: a network of its own with a cable that can be pulled, its own processes and memory."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Cable:
    """Between this machine and the other one.

    Processes of the other one see neither the processes nor the shared memory of this one; files are the same.
    """

    name: str  # of the network namespace and, with an "a" or a "b", of the cable's two ends
    here: str  # address of this machine's end
    there: str

    def command_there(self, command: Sequence[str]) -> list[str]:
        """What starts ``command`` on the other machine; it ends with the process that has started it."""
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        memory = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
        return ["ip", "netns", "exec", self.name, *own, "sh", "-c", memory, "sh", *command]

    def cut(self) -> None:
        """Nothing passes any more, and nobody is told: packets are lost as behind a switch that fails."""
        for end in (self._end("a"), self._end_there("b")):
            _run(*end, "down")

    def mend(self) -> None:
        """The cable is whole again."""
        for end in (self._end("a"), self._end_there("b")):
            _run(*end, "up")

    def _end(self, letter: str) -> list[str]:
        return ["ip", "link", "set", self.name + letter]

    def _end_there(self, letter: str) -> list[str]:
        return ["ip", "-n", self.name, "link", "set", self.name + letter]


@contextmanager
def cable() -> Iterator[Cable]:
    """The other machine's network.

    Raises:
        PermissionError: only root may make one, and not in every container; or the tool for it is not there.
    """
    number = os.getpid() % 250
    found = Cable(f"rx{os.getpid()}", f"10.213.{number}.1", f"10.213.{number}.2")
    try:
        _run("ip", "netns", "add", found.name)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PermissionError(f"no network of its own can be made here: {error}") from error
    try:
        here, there = found.name + "a", found.name + "b"
        _run("ip", "link", "add", here, "type", "veth", "peer", "name", there, "netns", found.name)
        _run("ip", "address", "add", f"{found.here}/24", "dev", here)
        _run("ip", "-n", found.name, "address", "add", f"{found.there}/24", "dev", there)
        _run("ip", "-n", found.name, "link", "set", "lo", "up")
        found.mend()
        yield found
    finally:
        # The cable by itself: the namespace stays as long as a process is in it.
        subprocess.run(["ip", "link", "delete", found.name + "a"], check=False, capture_output=True)
        _run("ip", "netns", "delete", found.name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
