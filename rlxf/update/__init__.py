"""Training: losses and the other objectives, the schedule, and the optimizer steps of the actor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlxf.config.schema import RunConfig
    from rlxf.config.stages import ObjectiveName
    from rlxf.update.objective import Objective, Place

# An objective's imports are inside its function: only the actor's processes need them.


def _preference(config: RunConfig, place: Place) -> Objective[Any]:
    from rlxf.update.preference import PreferenceObjective

    return PreferenceObjective(config, place)


def _reward(config: RunConfig, place: Place) -> Objective[Any]:
    from rlxf.update.reward import RewardObjective

    return RewardObjective(config.actor_rollout.center_rewards_coefficient, place)


def _supervised(config: RunConfig, place: Place) -> Objective[Any]:
    from rlxf.update.supervised import SupervisedObjective

    return SupervisedObjective(place)


OBJECTIVES: dict[ObjectiveName, Callable[[RunConfig, Place], Objective[Any]]] = {
    "preference": _preference,
    "reward": _reward,
    "supervised": _supervised,
}
"""What an optimizer step minimises, by the name that the recipe's stage has for it (``rlxf/config/stages.py``)."""
