"""What a run leaves on disk: checkpoints, the policy as a Hugging Face folder, recorded rollouts, config."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rlxf.checkpoint import file_digest, write_manifest
from rlxf.config.schema import RunConfig
from rlxf.pair.strategies import PairingResult
from rlxf.record import RolloutRecorder, SampleRecorder
from rlxf.run import Actor, State
from rlxf.types import ScoredRollouts

LATEST = "latest_checkpointed_iteration.txt"


class RunFolder:
    """The folders of one run. A checkpoint is complete or not there: temporary folder, fsync, rename."""

    def __init__(self, config: RunConfig, run_dir: Path, actor: Actor) -> None:
        self._config = config
        self._run_dir = run_dir
        self._checkpoints = Path(config.actor_rollout.save or run_dir / "checkpoints")
        self._actor = actor
        data = config.rollout.replay_path or config.actor_rollout.data_path
        # Now and not in the first save, which a stop signal may be waiting for.
        self._data = fingerprint(Path(data)) if data else None

    def save_checkpoint(self, state: State) -> Path:
        """``<checkpoints>/iter_0000020`` after 20 steps: what the actor writes, and ``driver.json``."""

        def fill(folder: Path) -> None:
            self._actor.save_checkpoint(folder)
            driver = {**asdict(state), "saved_step": state.step, "config": self._config.dump(), "data": self._data}
            write_json(folder / "driver.json", driver)
            write_manifest(folder)

        folder = self._checkpoints / f"iter_{state.step:07d}"
        replace_folder(folder, fill)
        write_text(self._checkpoints / LATEST, f"{state.step}\n")
        return folder

    def save_policy(self) -> Path:
        """``<run folder>/policy``: the policy and its tokenizer as a folder that transformers loads."""
        folder = self._run_dir / "policy"
        self._actor.save_hf(folder)
        return folder


class Recorders:
    """Writes ``rollouts.jsonl`` every step if asked to, and ``samples.jsonl`` after the first and every n-th step."""

    def __init__(self, rollouts: RolloutRecorder | None, samples: SampleRecorder | None, samples_interval: int) -> None:
        self._rollouts = rollouts
        self._samples = samples
        self._interval = samples_interval

    def write(self, step: int, scored: ScoredRollouts, pairing: PairingResult) -> None:
        if self._rollouts is not None:
            self._rollouts.write(scored)
        if self._samples is not None and (step == 1 or step % self._interval == 0):
            self._samples.write(step, scored, pairing.chosen_rows, pairing.rejected_rows)


def save_config(config: RunConfig, run_dir: Path) -> None:
    """``config.yaml``: the merged recipe, every default filled in."""
    write_text(run_dir / "config.yaml", yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True))


def fingerprint(path: Path) -> dict[str, Any]:
    """What tells whether a data file is still the same."""
    return {"path": str(path), "num_bytes": path.stat().st_size, "sha256": file_digest(path)}


def replace_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make ``folder`` what ``fill`` writes, on disk before it gets its name.

    A crash leaves no half-written ``folder``. One that exists stays until the new one is complete, as ``.<name>.old``
    for the moment between two renames.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (folder.with_name(f".{folder.name}.{kind}") for kind in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    fill(temporary)
    for path in sorted(temporary.rglob("*")):
        _fsync(path)
    _fsync(temporary)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    temporary.rename(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
