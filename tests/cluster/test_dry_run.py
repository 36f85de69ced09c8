"""A dry run against a cluster that is running: the same table, and an exit code that says whether the recipe fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--config-name", "online_dpo_trainer_tiny")


@pytest.mark.cluster
@pytest.mark.parametrize(("devices", "code", "says"), [(4, 0, "it has room"), (3, 3, "asked 4 NPU")])
def test_a_dry_run_looks_at_the_running_cluster(tmp_path: Path, devices: int, code: int, says: str) -> None:
    program = (
        "import json, ray, subprocess, sys\n"
        f"ray.init(address='local', num_cpus=1, resources={{'NPU': {devices}}}, include_dashboard=False)\n"
        "address = ray.get_runtime_context().gcs_address\n"
        "command = [sys.executable, *sys.argv[1:]]\n"
        "import os\n"
        "done = subprocess.run(command, env=os.environ | {'RAY_ADDRESS': address}, capture_output=True, text=True)\n"
        "print(json.dumps([done.returncode, done.stdout, done.stderr]))\n"
    )
    arguments = [
        str(ROOT / "ray_gpt.py"),
        *TINY,
        "dry_run=true",
        "training.device=cpu",
        "resource_pool.resource_name=NPU",
    ]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    returncode, stdout, stderr = json.loads(done.stdout.splitlines()[-1])
    assert returncode == code, stdout + stderr
    assert says in stdout + stderr
    assert "Traceback" not in stderr
