"""The token at which a reward model's score is read: set in the recipe, or in the model's own folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal, get_args

from rlxf.config.folders import shown
from rlxf.config.roles import RewardConfig
from rlxf.config.schema import RunConfig
from rlxf.core.errors import ConfigError
from rlxf.core.model_folder import assets_folder, megatron_checkpoint

logger = logging.getLogger(__name__)

Position = Literal["end_of_turn", "last_token"]

READ_AT = "rlxf_read_at"  # key of a reward model's config.json, and of driver.json in the checkpoints of stage rm
TRAINED_AT: Position = "end_of_turn"  # by stage rm
# Trainers elsewhere read the last token of the text, with all that the chat template writes behind the answer.
_UNKNOWN: Position = "last_token"


def read_position(config: RewardConfig) -> Position:
    """Where ``reward`` reads its scores: ``reward.read_at``, or where ``reward.load`` says that it was trained.

    Raises:
        ConfigError: the folder names a position that this program does not know.
    """
    if config.read_at != "auto":
        return config.read_at
    stored = stored_position(Path(config.load)) if config.load is not None else None
    return stored or _UNKNOWN


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


def warn_of_read_position(config: RunConfig) -> None:
    """Name the position that is taken where neither recipe nor folder names one."""
    reward = config.reward
    if not config.scores or reward.load is None or reward.read_at != "auto" or not Path(reward.load).is_dir():
        return
    if stored_position(Path(reward.load)) is None:
        logger.warning(
            "reward.load = %s: its config.json has no %s, so the score is read at the last token of the text, as in "
            "TRL and transformers; set reward.read_at=%s to do the same without this warning, or reward.read_at=%s to "
            "read it at the token that ends the answer",
            shown(Path(reward.load)), READ_AT, _UNKNOWN, TRAINED_AT,
        )  # fmt: skip


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none, which other checks report."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
