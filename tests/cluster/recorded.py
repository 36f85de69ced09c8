"""Runs on Ray whose workers write down when which of their methods began and ended.

``python -m tests.cluster.recorded FILE ARGUMENTS ...`` is ``python ray_gpt.py ARGUMENTS ...``. Each line of the file
is a call: role, rank, method, and seconds of a clock that all processes of the machine share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.cluster.faults import train_with

RECORD = "RLXF_TEST_RECORD"  # environment variable: the file
METHODS = {
    "train": ("offload", "restore", "free_cache", "update", "send_bucket"),
    "infer": ("sleep", "wake_weights", "wake_cache", "receive", "generate", "start", "advance", "probe"),
}


@dataclass(frozen=True)
class Recorded:
    role: str
    rank: int
    method: str
    begin: float
    end: float


def run(
    command: Sequence[str], file: Path, env: dict[str, str], timeout_s: float = 240
) -> tuple[subprocess.CompletedProcess[str], list[Recorded]]:
    """The command of a run (``Recipe.command``), and its calls in the order in which they began."""
    recorded = [command[0], "-m", "tests.cluster.recorded", str(file), *command[2:]]
    done = subprocess.run(recorded, env=env, capture_output=True, text=True, timeout=timeout_s)
    calls = [Recorded(**json.loads(line)) for line in file.read_text().splitlines()]
    return done, sorted(calls, key=lambda call: call.begin)


def write(call: Recorded) -> None:
    with open(os.environ[RECORD], "a") as file:  # one write of a short line: lines of several processes do not mix
        file.write(json.dumps(asdict(call)) + "\n")


if __name__ == "__main__":
    sys.exit(train_with("tests.cluster.recorded_workers", RECORD))
