"""Ctrl-C and SIGTERM to a run in one process: it saves what is complete and ends. (On Ray: tests/cluster.)"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rlxf.observe.formulas import read_jsonl
from tests.runs.small import World, command, environment


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)]
)
def test_a_signal_saves_the_complete_steps(world: World, tmp_path: Path, number: signal.Signals, code: int) -> None:
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        command(world.recipe(training={"train_iters": 100_000}), run_dir, "runtime=local"),
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no step in 120 s"
        time.sleep(0.1)
    begin = time.monotonic()
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    assert time.monotonic() - begin < 30
    assert process.returncode == code, errors
    stopped, saved, go_on = errors.splitlines()[-3:]
    assert stopped.startswith("stopped")
    assert "Traceback" not in errors
    last = read_jsonl(metrics)[-1]["step"]
    assert int((run_dir / "checkpoints" / "latest_checkpointed_iteration.txt").read_text()) == last
    driver = json.loads((run_dir / "checkpoints" / f"iter_{last:07d}" / "driver.json").read_text())
    assert (driver["step"], driver["policy_version"]) == (last, last)
    assert saved == f"saved: {last} of 100000 steps, {run_dir / 'checkpoints' / f'iter_{last:07d}'}"
    assert go_on.startswith("to go on: python ray_gpt.py --config-dir ")
    assert go_on.endswith(f"--config-name small runtime=local hydra.run.dir={run_dir}")
    assert not (run_dir / "policy").exists()
