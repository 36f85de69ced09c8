"""Training: losses and the other objectives, the schedule, and the optimizer steps of the actor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlxf.config.stages import ObjectiveName
    from rlxf.update.objective import Objective, ObjectiveContext, ObjectiveSettings

# An objective's imports are inside its function: only the actor's processes need them.


def _preference(settings: ObjectiveSettings, context: ObjectiveContext) -> Objective[Any]:
    from rlxf.update.preference import PreferenceObjective

    return PreferenceObjective(
        settings.config,
        context,
        offline=settings.offline,
        has_reference=settings.has_reference,
        margin_weight=settings.margin_weight,
    )


def _reward(settings: ObjectiveSettings, context: ObjectiveContext) -> Objective[Any]:
    from rlxf.update.reward import RewardObjective

    return RewardObjective(settings.config.center_rewards_coefficient, context)


def _supervised(settings: ObjectiveSettings, context: ObjectiveContext) -> Objective[Any]:
    from rlxf.update.supervised import SupervisedObjective

    return SupervisedObjective(context)


OBJECTIVES: dict[ObjectiveName, Callable[[ObjectiveSettings, ObjectiveContext], Objective[Any]]] = {
    "preference": _preference,
    "reward": _reward,
    "supervised": _supervised,
}
"""What an optimizer step minimises, by the name that the recipe's stage has for it (``rlxf/config/stages.py``)."""
