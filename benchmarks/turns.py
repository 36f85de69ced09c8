"""Programs that train step by step in processes of their own and take turns, so that a slow machine slows all.

A program calls ``Gate.begin_step`` before each of its steps. At the first step of a turn it waits there until the
benchmark lets it go on; its cost from then until it waits again is one turn: whole steps, with everything that belongs
to them. CPU seconds are the operating system's, of the process and of everything that it started.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.measure import ProcessTree, environment
from rlxf.core.clock import Clock

TURN_TIMEOUT_S, START_TIMEOUT_S = 300.0, 300.0


class Finished(Exception):
    """Ends a program at the beginning of a step."""


class Gate:
    """A program's side of the pipe."""

    def __init__(self, connection: Connection, steps_per_turn: int) -> None:
        self._connection = connection
        self._steps = steps_per_turn
        self.cpu_s: dict[str, float] = {}  # by stage, of the turn so far
        self.tokens = 0  # sampled in the turn so far
        self.before_turn: Callable[[], None] = lambda: None  # called before the program waits for its next turn

    def begin_step(self, step: int) -> None:
        """Wait for the next turn, if one begins with this step.

        Raises:
            Finished: there is no next turn.
        """
        if step % self._steps:
            return
        self.before_turn()
        self._connection.send({"cpu_s": self.cpu_s, "tokens": self.tokens})
        self.cpu_s, self.tokens = {}, 0
        if self._connection.recv() != "go":
            raise Finished

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count this process' CPU seconds towards a stage."""
        begin = time.process_time()
        try:
            yield
        finally:
            self.cpu_s[name] = self.cpu_s.get(name, 0.0) + time.process_time() - begin


class GatedClock(Clock):
    """The driver's clock, with a gate before each step."""

    def __init__(self, gate: Gate, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._gate = gate

    def start(self, step: int) -> None:
        self._gate.begin_step(step)
        super().start(step)

    @contextmanager
    def __call__(self, stage: str, **of: Any) -> Iterator[None]:
        with self._gate.stage(stage), super().__call__(stage, **of):
            yield


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What one turn cost."""

    cpu_s: float  # of all processes
    wall_s: float
    stages: dict[str, float]  # CPU seconds of the program's own process
    tokens: int  # sampled, as far as the program counts them


@dataclass(kw_only=True)
class Program:
    """One program under measurement.

    Args:
        name: for messages and results.
        target: runs in a process of its own; called with a gate, ``settings`` and an empty folder.
        settings: what ``target`` is told.
    """

    name: str
    target: Callable[[Gate, Any, Path], None]
    settings: Any
    folder: Path
    steps_per_turn: int
    _process: Any = field(default=None, init=False)

    def start(self) -> None:
        """Start the process; ``wait_until_ready`` waits for it, so that several can load at a time."""
        self.folder.mkdir(parents=True)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        os.environ.update(environment())
        self._process = context.Process(
            target=_serve, args=(self.target, theirs, self.settings, self.folder, self.steps_per_turn)
        )
        self._process.start()
        theirs.close()

    def wait_until_ready(self) -> None:
        self._receive(START_TIMEOUT_S)
        self._tree = ProcessTree(self._process.pid)

    def turn(self) -> Turn:
        """Let the program make its next steps."""
        before, begin = sum(self._tree.cpu_seconds().values()), time.perf_counter()
        self._connection.send("go")
        report = self._receive(TURN_TIMEOUT_S)
        wall_s = time.perf_counter() - begin
        cpu_s = sum(self._tree.cpu_seconds().values()) - before
        return Turn(cpu_s=cpu_s, wall_s=wall_s, stages=report["cpu_s"], tokens=report["tokens"])

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.send("stop")
        self._process.join(60)
        if self._process.is_alive():
            self._process.terminate()

    def _receive(self, timeout_s: float) -> Mapping[str, Any]:
        try:
            if self._connection.poll(timeout_s):
                report: Mapping[str, Any] = self._connection.recv()
                return report
            problem = f"did not answer within {timeout_s:g} s"
        except EOFError:
            self._process.join(5)
            problem = f"ended with exit code {self._process.exitcode}"
        text = (self.folder / "output.txt").read_text(errors="replace")
        raise SystemExit(f"{self.name} {problem}:\n" + "\n".join(text.splitlines()[-30:]))


def _serve(
    target: Callable[[Gate, Any, Path], None], connection: Connection, settings: Any, folder: Path, steps: int
) -> None:
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(Finished):
        target(Gate(connection, steps), settings, folder)


@contextmanager
def running(programs: list[Program]) -> Iterator[None]:
    """All programs loaded and waiting for their first turn; none is left when the block ends."""
    try:
        for program in programs:
            program.start()
        for program in programs:
            program.wait_until_ready()
        yield
    finally:
        for program in programs:
            if program._process is not None:
                program.stop()


def in_turn(programs: list[Program], rounds: int, before_reversal: int) -> Iterator[Program]:
    """Every program once per round; the order is turned round every ``before_reversal`` rounds."""
    for number in range(rounds):
        yield from programs if number // before_reversal % 2 == 0 else reversed(programs)


def gemm_peak(repeats: int = 5) -> dict[str, float]:
    """Best GF/s of one thread, by CPU time, at a shape of the larger model's feed-forward block."""
    import torch

    torch.set_num_threads(1)
    rows, width, inner = 1536, 512, 1536
    x, w = torch.randn(rows, width), torch.randn(inner, width)
    xb, wb = x.bfloat16(), w.bfloat16()
    kernels: dict[str, Callable[[], Any]] = {
        "fp32_mkl": lambda: torch.nn.functional.linear(x, w),
        "bf16": lambda: torch.nn.functional.linear(xb, wb),
    }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        kernels["fp32_onednn"] = lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return {name: 2e-9 * rows * width * inner / _best(kernel, repeats) for name, kernel in kernels.items()}


def _best(kernel: Callable[[], Any], repeats: int) -> float:
    kernel()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        for _ in range(8):
            kernel()
        times.append((time.process_time() - begin) / 8)
    return min(times)


def write_results(path: Path, report: Any, lines: Iterable[str] = ()) -> None:
    """Print ``lines``, the table of a report, and write the report as JSON."""
    for line in lines:
        print(line)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {path}")
