"""What the checks of recipes need to know of each stage. ``rlxf/algorithms`` says what a stage does in a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlxf.config.kinds import Stage

ObjectiveName = Literal["preference", "reward", "supervised"]
"""What an optimizer step minimises; the code is in ``OBJECTIVES`` of ``rlxf/update``."""

RowKind = Literal["prompts", "preference pairs", "examples"]
"""What a row of ``actor_rollout.data_path`` is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageFacts:
    """What the checks of a recipe and the report need to know of one stage."""

    title: str  # as the user reads it
    rows: RowKind
    objective: ObjectiveName

    @property
    def online(self) -> bool:
        """Whether the policy answers prompts while it trains; else the file holds all that is trained on."""
        return self.rows == "prompts"


STAGES: dict[Stage, StageFacts] = {
    "ray_online_dpo": StageFacts(title="online DPO", rows="prompts", objective="preference"),
    "dpo": StageFacts(title="offline DPO", rows="preference pairs", objective="preference"),
    "sft": StageFacts(title="supervised fine-tuning", rows="examples", objective="supervised"),
    "rm": StageFacts(title="reward model", rows="preference pairs", objective="reward"),
}


def stage_names(*, online: bool) -> list[Stage]:
    """The stages that sample, or those that read all from a file."""
    return [name for name, facts in STAGES.items() if facts.online == online]
