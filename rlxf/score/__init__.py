"""Giving a completion a score: reward model, Python function, recorded score; and the missing-EOS penalty."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rlxf.config.kinds import ScorerName
from rlxf.score.scorer import Scorer, ScorerParts

if TYPE_CHECKING:
    from rlxf.config.schema import RunConfig

__all__ = ["SCORERS", "Scorer", "ScorerParts", "scorer_of"]

# A scorer's imports are inside its function: a process imports only what it holds.


def _model(parts: ScorerParts) -> Scorer:
    from rlxf.score.reward_model import RewardModelScorer

    return RewardModelScorer(parts.config, parts.platform, parts.process)


def _function(parts: ScorerParts) -> Scorer:
    from rlxf.score.functions import FunctionScorer

    return FunctionScorer(parts.config, parts.tokenizer())


def _recorded(parts: ScorerParts) -> Scorer:
    from rlxf.score.recorded import RecordedScorer

    return RecordedScorer(str(parts.config.rollout.replay_path))


SCORERS: dict[ScorerName, Callable[[ScorerParts], Scorer]] = {
    "model": _model,
    "function": _function,
    "recorded": _recorded,
}


def scorer_of(config: RunConfig) -> ScorerName:
    """What a recipe's completions are scored by: what its ``reward`` section holds, unless a replay holds scores."""
    return "recorded" if config.replays_scores else config.reward.kind
