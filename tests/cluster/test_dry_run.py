"""A dry run against a cluster that is running: the same table, and an exit code that says whether the recipe fits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT, Cluster

TINY = ("--config-name", "online_dpo_trainer_tiny", "training.device=cpu", "resource_pool.resource_name=NPU")


@pytest.mark.cluster
@pytest.mark.parametrize(("ref", "code", "says"), [(1, 0, "it has room"), (2, 3, "asked 5 NPU")])
def test_a_dry_run_looks_at_the_running_cluster(
    two_nodes: Cluster, tmp_path: Path, ref: int, code: int, says: str
) -> None:
    command = [sys.executable, str(ROOT / "ray_gpt.py"), *TINY, "dry_run=true", f"resource_pool.ref={ref}"]
    done = subprocess.run(command, cwd=tmp_path, env=two_nodes.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.cluster
def test_a_search_counts_the_devices_of_the_running_cluster(two_nodes: Cluster, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "ray_gpt.py"), *TINY, "dry_run=true", "plan.devices=cluster"]
    done = subprocess.run(command, cwd=tmp_path, env=two_nodes.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "layouts for 4 x cpu" in done.stdout
    assert "the recipe as it is: " in done.stdout
