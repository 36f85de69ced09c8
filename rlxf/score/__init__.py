"""Giving a completion a score: reward model, Python function, recorded score; and the penalties."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rlxf.config.kinds import ScorerName
from rlxf.score.scorer import Scorer, ScorerParts

__all__ = ["SCORERS", "Scorer", "ScorerParts"]

# A scorer's imports are inside its function: a process imports only what it holds.


def _model(parts: ScorerParts) -> Scorer:
    from rlxf.score.reward_model import RewardModelScorer

    return RewardModelScorer(parts.load_model(), parts.config, parts.limits, parts.load_tokenizer(), parts.policy())


def _function(parts: ScorerParts) -> Scorer:
    from rlxf.score.functions import FunctionScorer

    return FunctionScorer(Path(str(parts.config.function)), parts.policy().tokenizer)


def _recorded(parts: ScorerParts) -> Scorer:
    from rlxf.score.recorded import RecordedScorer

    return RecordedScorer(str(parts.recording))


SCORERS: dict[ScorerName, Callable[[ScorerParts], Scorer]] = {
    "model": _model,
    "function": _function,
    "recorded": _recorded,
}
