"""Runs on Ray whose workers meet faults at chosen moments: in the n-th call of a method, or when a step is complete.

``python -m tests.cluster.faults PLAN.json ARGUMENTS ...`` is ``python ray_gpt.py ARGUMENTS ...`` with the faults of a
plan. The calls of a method are counted over all processes that have had a rank, so a process that takes the place of
another meets the faults that follow, and none of them twice.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

PLAN = "RLXF_TEST_FAULTS"  # environment variable: the plan of the processes below
REST_S = 0.7


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A worker meets its end before (or after) the n-th call of one of its methods."""

    role: str
    method: str
    call: int = 1  # from 1, of that rank's method in the whole run
    rows: int | None = None  # instead: the first call when the run has so many complete steps, as metrics.jsonl says
    rank: int = 0
    after: bool = False
    # SIGKILL; SIGSTOP; the call never comes back; it is late; it waits until the test releases it
    how: Literal["kill", "stop", "hang", "rest", "hold"] = "kill"

    def happen(self, done: Path) -> None:
        """Here and now; ``done``: the file that says so."""
        done.touch()
        while self.how == "hang" or (self.how == "hold" and not released(done).exists()):
            time.sleep(0.02)
        if self.how == "rest":
            time.sleep(REST_S)
        if self.how in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if self.how == "kill" else signal.SIGSTOP)


def released(done: Path) -> Path:
    """The file that ends a hold."""
    return done.with_suffix(".released")


def planned(command: Sequence[str], folder: Path, faults: Sequence[Fault]) -> list[str]:
    """The command of a run (``Recipe.command``) with these faults; ``folder``: for the plan and the counts."""
    folder.mkdir()
    plan = folder / "plan.json"
    plan.write_text(json.dumps([asdict(fault) for fault in faults]))
    run_dir = next(word for word in command if word.startswith("hydra.run.dir=")).partition("=")[2]
    (folder / "metrics.jsonl").symlink_to(Path(run_dir) / "metrics.jsonl")
    return [command[0], "-m", "tests.cluster.faults", str(plan), *command[2:]]


def run(
    command: Sequence[str], folder: Path, faults: Sequence[Fault], env: dict[str, str], timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """How a run with faults (``planned``) ends."""
    return subprocess.run(planned(command, folder, faults), env=env, capture_output=True, text=True, timeout=timeout_s)


def happened(folder: Path) -> int:
    """How many of the faults of a run have come."""
    return len(list(folder.glob("*.done")))


def train_with(workers: str, variable: str) -> int:
    """``ray_gpt.py`` with the ``WORKERS`` of this module, all of whose processes have a variable: a path.

    The command line is the path, and then that of ``ray_gpt.py``.
    """
    path = os.environ[variable] = str(Path(sys.argv[1]).absolute())
    from workers import crew
    from workers.train import main as train

    crew.WORKERS.update(importlib.import_module(workers).WORKERS)
    original = crew._environment
    # A cluster that runs already has not inherited it.
    crew._environment = lambda *args: {**original(*args), variable: path}  # type: ignore[assignment]
    return train(("python", "ray_gpt.py"), sys.argv[2:])


if __name__ == "__main__":
    sys.exit(train_with("tests.cluster.faulty_workers", PLAN))
