"""Workers and drivers that are forked from a process which has imported everything once.

Imports are five of the six CPU seconds in which a worker starts. The tests of runs that lose workers start hundreds;
test_launch.py and the tests of lost nodes have those that Ray starts by itself.

``python -m tests.cluster.nursery SOCKET`` is the process; ``forked.py`` asks it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import runpy
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil

MODULES = (
    "tests.runs.warm",
    "hydra",
    "jsonschema",
    "requests",
    "google.protobuf.descriptor",
    "rlxf.assembly.roles",
    "rlxf.assembly.planning",
    "rlxf.config.load",
    "rlxf.planner.estimate",
)


@dataclass(frozen=True)
class Nursery:
    """What forks processes."""

    python: Path  # a program to be called in place of ``python``
    server: subprocess.Popen[bytes]

    def forked(self) -> list[psutil.Process]:
        """The processes that live."""
        return list(psutil.Process(self.server.pid).children())


@contextmanager
def nursery(folder: Path, env: dict[str, str], program: Path) -> Iterator[Nursery]:
    """A place that forks processes.

    Args:
        folder: for its files, of which the path of a socket must be short.
        env: variables of the process from which the others are forked.
        program: the Python that runs what is not forked.
    """
    address, python, log = folder / "nursery", folder / "python", folder / "nursery.log"
    client = Path(__file__).with_name("forked.py")
    words = shlex.join([sys.executable, "-I", "-S", str(client), str(address), str(program)])
    python.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    python.chmod(0o755)
    with log.open("wb") as output:
        command = [sys.executable, "-m", "tests.cluster.nursery", str(address)]
        found = Nursery(python, subprocess.Popen(command, env=env, stdout=output, stderr=output))
    try:
        deadline = time.monotonic() + 120
        while not address.exists():
            assert found.server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the nursery does not start"
            time.sleep(0.05)
        yield found
    finally:
        for process in [*found.forked(), found.server]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        found.server.wait()


class Server:
    """Forks a process for each that asks, and says how it ended. Who asked and is killed takes it along."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._waits: dict[socket.socket, int] = {}  # who waits for the end of which process
        self._ended, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> NoReturn:
        while True:
            ready, _, _ = select.select([self._ended, self._listener, *self._waits], [], [])
            if self._ended in ready:
                os.read(self._ended, 4096)
                self._reap()
            if self._listener in ready:
                with suppress(OSError, ValueError):  # who asked is killed meanwhile
                    self._fork(self._listener.accept()[0])
            for connection in self._waits.keys() & set(ready):  # nobody is there any more
                os.kill(self._waits[connection], signal.SIGKILL)
                self._forget(connection)

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                for connection in [each for each, process in self._waits.items() if process == pid]:
                    with suppress(OSError):
                        connection.sendall(status.to_bytes(8, "big"))
                    self._forget(connection)

    def _forget(self, connection: socket.socket) -> None:
        del self._waits[connection]
        connection.close()

    def _fork(self, connection: socket.socket) -> None:
        length, outputs, _, _ = socket.recv_fds(connection, 8, 2)
        with connection.makefile("rb") as file:
            asked = json.loads(file.read(int.from_bytes(length, "big")))
        pid = os.fork()
        if not pid:
            for each in (self._listener, connection, *self._waits):
                each.close()
            os.close(self._ended)
            _become(asked, outputs)
        for output in outputs:
            os.close(output)
        self._waits[connection] = pid  # if nobody is there any more, the next turn sees it
        connection.sendall(pid.to_bytes(8, "big"))


def _become(asked: dict[str, Any], outputs: list[int]) -> NoReturn:
    """The process that was asked for."""
    os.setpgid(0, 0)  # Ray ends the whole group of a worker that is lost
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, output in enumerate(outputs, start=1):
        os.dup2(output, number)
        os.close(output)
    arguments, environment = asked["arguments"], asked["environment"]
    if os.path.basename(arguments[0]) == "setup_worker.py":
        arguments, added = _worker(arguments[1:])
        environment |= added
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(asked["folder"])
    for folder in reversed(environment.get("PYTHONPATH", "").split(os.pathsep)):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    random.seed()
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()


def _worker(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """What Ray's ``setup_worker.py`` runs, and with which variables besides."""
    context: dict[str, Any] = {}
    kept = []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--serialized-runtime-env-context":
            context = json.loads(value or "{}")
        elif name != "--language":
            kept.append(argument)
    assert not context.get("command_prefix"), context
    return kept, context.get("env_vars", {})


def main() -> NoReturn:
    for name in MODULES:
        importlib.import_module(name)
    assert "ray" not in sys.modules  # it reads its variables when it is loaded, and they differ from worker to worker
    gc.collect()
    gc.freeze()
    address = Path(sys.argv[1])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"{address}.tmp")
        listener.listen(64)
        Path(f"{address}.tmp").rename(address)
        Server(listener).serve()


if __name__ == "__main__":
    main()
