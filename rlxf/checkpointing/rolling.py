"""Which checkpoints are rolling: written because minutes have passed, and replaced by the next one of any kind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rlxf.checkpointing.manifest import MANIFEST
from rlxf.checkpointing.store import folder_of
from rlxf.core.files import remove, write_text

ROLLING = "rolling_checkpointed_iteration.txt"  # their steps, one a line: one, or two while it is being replaced


def rolling_steps(root: Path) -> frozenset[int]:
    """The steps of the rolling checkpoints below ``root``. A marked checkpoint may not exist (yet)."""
    try:
        return frozenset(int(line) for line in (root / ROLLING).read_text().split())
    except (OSError, ValueError):  # without a readable mark none is deleted
        return frozenset()


def mark_rolling(root: Path, steps: Iterable[int]) -> None:
    """Mark the checkpoints of ``steps``, and no others, as rolling."""
    found = sorted(steps)
    if found:
        write_text(root / ROLLING, "".join(f"{step}\n" for step in found))
    else:
        (root / ROLLING).unlink(missing_ok=True)


def drop_rolling(root: Path, *, but: int) -> None:
    """Delete all rolling checkpoints but that of step ``but``, which replaces them."""
    for step in rolling_steps(root) - {but}:
        folder = folder_of(root, step)
        if (folder / MANIFEST).is_file() and not folder.is_symlink():
            remove(folder)
