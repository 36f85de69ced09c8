"""The checkpoints of a run on disk: their names, which one to resume from, which is best, which are deleted.

A folder is made under a temporary name and renamed last (``core.files.publish``), so after a crash no folder with a
checkpoint's name is incomplete.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from rlxf.checkpointing.manifest import DRIVER, MANIFEST, find_problems
from rlxf.core.errors import CheckpointError
from rlxf.core.files import remove

LATEST = "latest_checkpointed_iteration.txt"  # megatron's tracker: the step of the newest checkpoint
BEST = "best_checkpointed_iteration.txt"  # the step of the best one, in the same form
BEST_REASON = "best_checkpointed_iteration.json"  # and by which metric
PUBLISHED = r"(?:iter|hf)_\d{7,}|policy"  # the folders of a run that get their names when they are whole
_NAME = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True, slots=True)
class Damaged:
    """A checkpoint that cannot be used, and the first reasons why."""

    folder: Path
    problems: list[str]

    def __str__(self) -> str:
        return f"{self.folder}: {'; '.join(self.problems[:3])}"


def num_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's files, as far as they are there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def step_of(folder: Path) -> int:
    """The step of a checkpoint, from its name; -1 if it is not named like one."""
    match = _NAME.fullmatch(folder.name)
    return int(match.group(1)) if match else -1


def folder_of(root: Path, step: int) -> Path:
    """``<root>/iter_0000020`` for step 20."""
    return root / f"iter_{step:07d}"


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints below ``root``, oldest first; temporary folders do not count."""
    if not root.is_dir():
        return []
    found = [(int(match.group(1)), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if path.is_dir()]


def newest_good(root: Path) -> tuple[Path | None, list[Damaged]]:
    """The newest checkpoint whose files are all whole, and the damaged ones that are newer.

    Returns:
        (None, []) if there is no checkpoint at all: a run then starts at the beginning.

    Raises:
        CheckpointError: there are checkpoints, or there were, and none is whole. A run starts from the beginning only
            if the user asks for it.
    """
    found: Path | None = None
    damaged: list[Damaged] = []
    for folder in reversed(list_checkpoints(root)):
        problems = find_problems(folder)
        if not problems:
            found = folder
            break
        damaged.append(Damaged(folder, problems))
    tracked = _tracked(root)
    newest = max([step_of(item.folder) for item in damaged] + [step_of(found) if found else -1])
    if tracked is not None and tracked > newest:
        damaged.insert(0, Damaged(folder_of(root, tracked), [f"is missing, though {LATEST} names it"]))
    if found is None and (damaged or (root / LATEST).exists()):
        listed = "\n".join(f"  {item}" for item in damaged) or f"  {root / LATEST} exists, but no checkpoint does"
        raise CheckpointError(
            f"no checkpoint in {root} is complete:\n{listed}\n"
            "restore one; or start from the beginning with training.resume=never and another folder in "
            "actor_rollout.save (or hydra.run.dir)"
        )
    return found, damaged


def _tracked(root: Path) -> int | None:
    """The step that the tracker file names; None without a readable file: then the folders' names tell the newest."""
    try:
        return int((root / LATEST).read_text())
    except (OSError, ValueError):
        return None


def require_good(folder: Path) -> None:
    """Check one checkpoint that the user named.

    Raises:
        CheckpointError: it is not there, or damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"training.resume = {folder}: no such folder")
    if problems := find_problems(folder):
        raise CheckpointError(f"training.resume = {Damaged(folder, problems)}; name another one, or `auto`")


def best(
    root: Path,
    metric: str,
    count: int,
    *,
    largest: bool,
    newest: int | None = None,
    ignore: frozenset[int] = frozenset(),
) -> list[Path]:
    """The ``count`` checkpoints with the best value of a metric at their own step, best first.

    A checkpoint is left out if it has no such value, if its step is after ``newest`` or in ``ignore``, or if its
    ``driver.json`` cannot be read. Of equal values the newer one is better.
    """
    values: list[tuple[float, int, Path]] = []
    for folder in list_checkpoints(root):
        value, step = metric_of(folder, metric), step_of(folder)
        if value is not None and (newest is None or step <= newest) and step not in ignore:
            values.append((value if largest else -value, step, folder))
    return [folder for _, _, folder in sorted(values, reverse=True)[:count]]


def metric_of(folder: Path, metric: str) -> float | None:
    """The value of a metric at a checkpoint's own step, if it has one."""
    try:
        return float(json.loads((folder / DRIVER).read_text())["metrics"][metric])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def prune(
    root: Path,
    keep_latest: int,
    *,
    newest: int,
    keep: frozenset[Path] = frozenset(),
    ignore: frozenset[int] = frozenset(),
) -> list[Path]:
    """Delete all but the ``keep_latest`` newest checkpoints (0 = keep all) and those in ``keep``; the deleted ones.

    Deletes only folders that this program made: named like a checkpoint, with a manifest, and not a link. Checkpoints
    of steps after ``newest`` are neither counted nor deleted: they are damaged, and the run that fell back behind them
    will replace them. The same holds for the steps in ``ignore``.
    """
    if keep_latest == 0:
        return []
    deleted = []
    counted = [f for f in list_checkpoints(root) if step_of(f) <= newest and step_of(f) not in ignore]
    for folder in counted[:-keep_latest]:
        if folder not in keep and not folder.is_symlink() and (folder / MANIFEST).is_file():
            remove(folder)
            deleted.append(folder)
    return deleted


def checkpoints_folder(save: str | None, run_dir: Path) -> Path:
    """Where the run's checkpoints go: ``save`` (``actor_rollout.save``), or ``checkpoints`` in the run folder."""
    return Path(save or run_dir / "checkpoints").absolute()
