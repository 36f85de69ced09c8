"""A check of recipes that do not set the token at which a reward model's score is read."""

from __future__ import annotations

import logging
from pathlib import Path

from rlxf.config.folders import shown
from rlxf.config.schema import RunConfig
from rlxf.core.read_position import READ_AT, TRAINED_AT, UNKNOWN, stored_position

logger = logging.getLogger(__name__)


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
            shown(Path(reward.load)), READ_AT, UNKNOWN, TRAINED_AT,
        )  # fmt: skip
