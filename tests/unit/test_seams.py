"""Each choice of a recipe has an entry where its implementations are, and every entry can be chosen."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from rlxf.algorithms import ALGORITHMS
from rlxf.config.kinds import JudgeName, PairingName, ReaderName, ScorerName, Stage
from rlxf.config.rules import RuleName
from rlxf.config.schema import RolloutConfig, SyncConfig
from rlxf.config.stages import STAGES, ObjectiveName
from rlxf.judge import JUDGES
from rlxf.pair import PAIRINGS
from rlxf.rollout import ENGINES
from rlxf.score import READERS, SCORERS
from rlxf.score.rules import RULES
from rlxf.sync.transports import TRANSPORTS
from rlxf.update import OBJECTIVES


def choices(annotation: Any) -> set[str]:
    """The words of a Literal, or of one that may be None."""
    words = get_args(annotation)
    return {word for part in words for word in (get_args(part) or (part,)) if isinstance(word, str)}


ENGINE_CHOICES = choices(RolloutConfig.model_fields["engine"].annotation) - {"replay"}  # a source of prompts, too


@pytest.mark.parametrize(
    ("expected", "entries"),
    [
        (set(get_args(Stage)), STAGES),
        (set(get_args(Stage)), ALGORITHMS),
        (set(get_args(ObjectiveName)), OBJECTIVES),
        ({facts.objective for facts in STAGES.values()}, OBJECTIVES),
        (set(get_args(PairingName)), PAIRINGS),
        (set(get_args(ScorerName)), SCORERS),
        (set(get_args(ReaderName)), READERS),
        (set(get_args(RuleName)), RULES),
        (set(get_args(JudgeName)), JUDGES),
        (ENGINE_CHOICES, ENGINES),
    ],
    ids=[
        "stages",
        "algorithms",
        "objectives",
        "objectives of stages",
        "pairings",
        "scorers",
        "readers",
        "rules",
        "judges",
        "engines",
    ],
)
def test_every_choice_has_an_entry_and_every_entry_is_a_choice(expected: set[str], entries: dict[str, Any]) -> None:
    assert expected == set(entries)


def test_a_transport_that_a_recipe_may_name_is_there() -> None:
    """``auto`` chooses among all of them."""
    assert choices(SyncConfig.model_fields["transport"].annotation) - {"auto"} <= set(TRANSPORTS)
