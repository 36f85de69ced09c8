"""The token at which a reward model's score is read: set in the recipe, or in the model's own folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args

from rlxf.core.errors import ConfigError
from rlxf.core.model_folder import assets_folder, megatron_checkpoint

Position = Literal["end_of_turn", "last_token"]

READ_AT = "rlxf_read_at"  # key of a reward model's config.json, and of driver.json in the checkpoints of stage rm
TRAINED_AT: Position = "end_of_turn"  # by stage rm
# Trainers elsewhere read the last token of the text, with all that the chat template writes behind the answer.
UNKNOWN: Position = "last_token"


def read_position(wanted: Position | Literal["auto"], folder: str | None) -> Position:
    """Where scores are read: ``wanted`` (``reward.read_at``), or the position that the model's folder names.

    Raises:
        ConfigError: the folder names a position that this program does not know.
    """
    if wanted != "auto":
        return wanted
    stored = stored_position(Path(folder)) if folder is not None else None
    return stored or UNKNOWN


def stored_position(folder: Path) -> Position | None:
    """The position that a reward model's folder or checkpoint names; None if it names none.

    Raises:
        ConfigError: it names a position that this program does not know.
    """
    checkpoint = megatron_checkpoint(folder)
    driver = None if checkpoint is None else checkpoint / "driver.json"
    # The config.json of a run's checkpoint is that of the model which the run began with.
    file = driver if driver is not None and driver.is_file() else assets_folder(folder) / "config.json"
    found = _read(file).get(READ_AT)
    if found is None or found in get_args(Position):
        return found
    raise ConfigError(
        f"{file}: {READ_AT} = {found!r}; expected {' or '.join(get_args(Position))}: a newer version wrote it, or set "
        "reward.read_at yourself"
    )


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none, which other checks report."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
