"""The processes of the reward models, and how the driver sees them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlxf.assembly.roles import build_models
from rlxf.core.types import Rollouts, Text
from rlxf.score.scorer import ModelScorer

from .group import WorkerGroup
from .worker import Worker


class RewardWorker(Worker):
    """One rank of each reward model."""

    make = staticmethod(build_models)
    room: dict[str, ModelScorer]

    def score(self, name: str, rollouts: Rollouts) -> Tensor | None:
        return self.answer(self.room[name].score(rollouts))

    def score_texts(
        self, name: str, prompts: Sequence[Text], answers: Sequence[str], ended: Sequence[bool]
    ) -> Tensor | None:
        return self.answer(self.room[name].score_texts(prompts, answers, ended))


class RemoteScorer:
    """A reward model on its worker processes; ``name``: of its source."""

    def __init__(self, group: WorkerGroup, name: str) -> None:
        self._group, self._name = group, name

    def score(self, rollouts: Rollouts) -> Tensor:
        scores: Tensor = self._group.call("score", self._name, rollouts)
        return scores

    def score_texts(self, prompts: Sequence[Text], answers: Sequence[str], ended: Sequence[bool]) -> Tensor:
        scores: Tensor = self._group.call("score_texts", self._name, prompts, answers, ended)
        return scores
