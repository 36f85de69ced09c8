"""Two hundred steps on Ray: memory, files, threads and CPU seconds do not grow, and no worker is taken to hang."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT

# Caches still fill: the trainer takes 40 to 50 KB a step between steps 50 and 200, and next to nothing 300 steps later.
WARM_KB = 100


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(900)
@pytest.mark.parametrize("engine", ["hf", "stub"])
def test_a_short_soak_keeps_its_limits(tmp_path: Path, engine: str) -> None:
    output = tmp_path / "soak.json"
    options = ["--engine", engine, "--steps", "200", "--from", "50", "--max-kb", str(WARM_KB)]
    command = [sys.executable, "benchmarks/soak.py", *options, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(output.read_text())
    assert set(report["processes"]) == {"driver", "actor", "rollout", "rollout 1", "reference", "reward"}
    assert report["events"] == {}
