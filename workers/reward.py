"""The scorer's processes (a reward model's ranks, or a reward function's one) and how the driver sees them."""

from __future__ import annotations

from torch import Tensor

from rlxf.assembly.roles import build_scorer
from rlxf.core.types import Rollouts
from rlxf.score.scorer import Scorer

from .group import WorkerGroup
from .worker import Worker


class RewardWorker(Worker):
    """One rank of the reward model, or the reward function."""

    make = staticmethod(build_scorer)
    room: Scorer

    def score(self, rollouts: Rollouts) -> Tensor | None:
        return self.answer(self.room.score(rollouts))


class RemoteScorer:
    """The scorer on its worker processes."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group

    def score(self, rollouts: Rollouts) -> Tensor:
        scores: Tensor = self._group.call("score", rollouts)
        return scores
