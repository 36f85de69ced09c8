"""The tiny world's recipe on this machine: the run that the learning test and the stored curve look at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.runs.small import ROOT, Finished, ray_gpt

WORLD = ROOT / "models" / "tiny"
GOLDEN = ROOT / "tests" / "golden"
CURVE, ROLLOUTS = GOLDEN / "tiny_local_seed1.json", GOLDEN / "tiny_local_seed1_rollouts.jsonl"
NUM_STEPS, STEP_SIZE = 20, 32  # of the stored curve


def build_world() -> None:
    """Make the tiny world unless it is there (about 50 CPU seconds)."""
    subprocess.run([sys.executable, str(ROOT / "scripts" / "build_tiny_world.py")], check=True)


def run_tiny(run_dir: Path, *overrides: str, recipe: str = "online_dpo_trainer_tiny") -> Finished:
    """The shipped recipe, seed 1, in one process."""
    options = ("runtime=local", "training.seed=1", f"hydra.run.dir={run_dir}", "log.report=false")
    done = ray_gpt("--config-name", recipe, *options, *overrides)
    assert done.returncode == 0, done.stderr[-4000:]
    return Finished(run_dir)


def replay(run_dir: Path) -> Finished:
    """The stored rollouts, trained on as the recipe does in a run of so many steps."""
    source = ("rollout.engine=replay", f"rollout.replay_path={ROLLOUTS}")
    return run_tiny(run_dir, *source, f"training.train_iters={NUM_STEPS}", "training.eval_interval=0")


def model_files() -> dict[str, str]:
    """Digests of the world's models: training them gives other bits on another type of CPU."""
    files: dict[str, str] = json.loads((WORLD / "manifest.json").read_text())["files"]
    return {name: files[name] for name in ("sft/model.safetensors", "rm/model.safetensors")}


def golden() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(CURVE.read_text())
    return stored
