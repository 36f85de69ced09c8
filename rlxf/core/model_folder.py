"""What a model folder is: Hugging Face's files, or a checkpoint of megatron, and where its small files are."""

from __future__ import annotations

import json
from pathlib import Path

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def megatron_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of megatron that a model folder is, or holds instead of safetensors files; None if neither."""
    if (folder / ".metadata").is_file():
        return folder
    tracker = folder / "latest_checkpointed_iteration.txt"
    if not tracker.is_file() or any((folder / name).is_file() for name in WEIGHT_FILES):
        return None
    newest = tracker.read_text(errors="replace").strip()
    return folder / (f"iter_{int(newest):07d}" if newest.isdecimal() else "release")


def assets_folder(folder: Path) -> Path:
    """Where config.json and tokenizer of a model are: in its folder; for a run's checkpoint, where that run started."""
    checkpoint = megatron_checkpoint(folder)
    if (folder / "config.json").is_file() or checkpoint is None:
        return folder
    if (checkpoint.parent / "config.json").is_file():
        return checkpoint.parent
    try:
        start = json.loads((checkpoint / "driver.json").read_text(encoding="utf-8"))["config"]["actor_rollout"]["load"]
    except (OSError, ValueError, KeyError, TypeError):
        return folder
    return assets_folder(Path(start))


Files = tuple[str, tuple[tuple[str, int, int], ...]]
"""A folder's path without links, and of each file in it the name, the size in bytes and the time of its last change."""


def files_of(folder: Path) -> Files | None:
    """What tells whether two processes load the same folder, and it has not changed in between. None: it is not there.

    Names, sizes and times, not contents: to read a large model twice takes longer than to push it.
    """
    try:
        place = folder.resolve(strict=True)
        found = sorted((file.name, file.stat()) for file in place.iterdir() if file.is_file())
    except OSError:
        return None
    return str(place), tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)
