"""Runs of a recipe that have not ended: ``training.resume=last`` continues the newest; a new run logs its name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlxf.checkpointing.fingerprint import fingerprint
from rlxf.checkpointing.lock import is_owned
from rlxf.checkpointing.resume import read_driver, summarised_steps
from rlxf.checkpointing.store import checkpoints_folder, list_checkpoints
from rlxf.config.changes import SHAPE_FROM, compare
from rlxf.config.schema import RunConfig
from rlxf.core.command import TYPED, Typed
from rlxf.core.errors import CheckpointError

MAX_LOOKED_AT = 100  # run folders, the newest first


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A run that can be continued."""

    folder: Path
    step: int  # complete driver steps in its newest checkpoint
    num_steps: int  # of the recipe


def newest_unfinished(config: RunConfig, run_dir: Path, typed: Typed | None) -> Unfinished | None:
    """The run beside ``run_dir`` (or in it) of the same recipe that has the newest checkpoint and is not complete.

    The recipe is the same if ``--config-name``, data and shape of the policy are equal and no key changed that changes
    the curve. Runs that a process still works on, and runs without a checkpoint, do not count.

    Args:
        config: the recipe, with its number of steps.
        run_dir: where a new run would go.
        typed: the command; without one the name of the recipe is not compared.
    """
    found: list[tuple[float, Unfinished]] = []
    data = None
    for folder in _candidates(config, run_dir):
        checkpoint = _newest_checkpoint(config, folder)
        if checkpoint is None or not _is_of_recipe(folder, typed):
            continue
        path, driver = checkpoint
        steps = config.training.train_iters
        if (
            summarised_steps(folder) >= steps
            or driver["step"] > steps
            or is_owned(path.parent)
            or _has_changed(driver, config)
        ):
            continue
        data = data or fingerprint(config.training_paths)
        if (driver.get("data") or {}).get("sha256") == (data or {}).get("sha256"):
            found.append((path.stat().st_mtime, Unfinished(folder, int(driver["step"]), steps)))
    return max(found, key=lambda item: item[0])[1] if found else None


def _candidates(config: RunConfig, run_dir: Path) -> Iterator[Path]:
    """Folders that may be runs: those beside ``run_dir``, or the one that wrote into ``actor_rollout.save`` last."""
    if config.actor_rollout.save:
        newest = _newest_checkpoint(config, run_dir)
        if newest is not None and "run_folder" in newest[1]:
            yield Path(newest[1]["run_folder"])
        return
    if run_dir.parent.is_dir():
        folders = [path for path in run_dir.parent.iterdir() if (path / "checkpoints").is_dir()]
        yield from sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True)[:MAX_LOOKED_AT]


def _newest_checkpoint(config: RunConfig, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of a run folder whose ``driver.json`` can be read. Its other files are checked later."""
    for path in reversed(list_checkpoints(checkpoints_folder(config.actor_rollout.save, folder))):
        with suppress(CheckpointError):
            return path, read_driver(path)
    return None


def _is_of_recipe(folder: Path, typed: Typed | None) -> bool:
    """Whether the run's stored command (or, in the first version, its parent folder) names this recipe."""
    if typed is None:
        return True
    try:
        name = json.loads((folder / TYPED).read_text())["config_name"]
    except (OSError, ValueError, KeyError, TypeError):
        name = folder.parent.name
    return bool(name == typed.config_name)


def _has_changed(driver: dict[str, Any], config: RunConfig) -> bool:
    try:
        changes = compare(driver["config"], config, from_folder=driver.get(SHAPE_FROM[0]) == SHAPE_FROM[1])
    except (KeyError, TypeError, AttributeError):  # not a recipe as this version or an older one wrote it
        return True
    return bool(changes.shape or changes.curve)
