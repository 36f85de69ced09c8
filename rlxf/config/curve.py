"""Changes of this program that give the same recipe another learning curve. Resuming an older run names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlxf.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class CurveChange:
    """One line of the table below."""

    curve: int  # the number that checkpoints hold since this change
    name: str
    concerns: Callable[[RunConfig], bool]  # whether it changes the curve of this recipe


def _samples(config: RunConfig) -> bool:
    return config.samples


def _decays(config: RunConfig) -> bool:
    return config.actor_rollout.lr_decay_style != "constant"


def _trains_scores(config: RunConfig) -> bool:
    return config.objective == "reward"


def _reads_scores(config: RunConfig) -> bool:
    return config.scores


# A change that moves the learning curve of shipped or users' recipes adds a line, with a number one above the last.
CURVE_CHANGES = (
    CurveChange(2, "sampling seeds", _samples),
    CurveChange(2, "learning rate of decaying schedules", _decays),
    CurveChange(2, "the token at which a reward model is trained, with a chat template", _trains_scores),
    CurveChange(2, "the token at which a reward model is read, with a chat template", _reads_scores),
)
CURVE = max(change.curve for change in CURVE_CHANGES)
"""The number in ``driver.json`` of new checkpoints; a checkpoint without a number has 1."""


def changed_since(curve: int, config: RunConfig) -> list[str]:
    """Names of the changes after number ``curve`` that move the curve of this recipe."""
    return [change.name for change in CURVE_CHANGES if change.curve > curve and change.concerns(config)]
