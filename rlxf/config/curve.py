"""Changes of this program that give the same recipe another learning curve, for runs resumed from before them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlxf.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class CurveChange:
    """One line of the table below."""

    curve: int  # the number that checkpoints carry since then
    name: str
    concerns: Callable[[RunConfig], bool]  # whether a run of this recipe takes another curve by it


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
"""What ``driver.json`` of a checkpoint says; 1 where it says nothing."""


def changed_since(curve: int, config: RunConfig) -> list[str]:
    """Names of what moves the curve of this recipe and was still the old way at number ``curve``."""
    return [change.name for change in CURVE_CHANGES if change.curve > curve and change.concerns(config)]
