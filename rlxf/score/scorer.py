"""The scorer's protocol, and what scorers are built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from rlxf.config.rewards import RewardSource
    from rlxf.config.roles import RewardConfig
    from rlxf.core.stop import Stop
    from rlxf.core.types import Rollouts, Text
    from rlxf.models.batching import MicroBatchLimits
    from rlxf.models.megatron.model import MegatronModel


class Scorer(Protocol):
    """Gives each completion a score; larger is better.

    Two completions of one prompt, ``rollouts.sequences`` = ``[[5, 6 | 7, 1], [5, 6 | 8]]`` (tokens behind the bar are
    the completion's): ``score`` gives ``tensor([0.8, nan])``, float32, if the second one has no score.
    """

    def score(self, rollouts: Rollouts) -> Tensor:
        """[B] float32 raw scores, one per completion, on the CPU; NaN where a score is missing (never replaced by 0).

        Raises:
            ScoreError: the call failed. Then none of its completions has a score; ``reward.max_failures`` decides
                whether the run continues.
        """
        ...


class ModelScorer(Scorer, Protocol):
    """A reward model, which also scores texts that nobody sampled here."""

    def score_texts(self, prompts: Sequence[Text], answers: Sequence[str], ended: Sequence[bool]) -> Tensor:
        """[B] float32 scores; NaN for a text that is longer than the model takes. ``ended``: the answer is whole."""
        ...


@dataclass(frozen=True, slots=True)
class SampledBy:
    """What a scorer must know of the policy to read its completions."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: set[int]  # what ends a completion


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerParts:
    """The parts from which scorers are built. A scorer takes those that it needs; models are loaded when it asks."""

    config: RewardConfig
    limits: MicroBatchLimits  # of one forward pass
    recording: str | None  # the `rollouts.jsonl` of a replay
    policy: Callable[[], SampledBy]
    load_model: Callable[[], MegatronModel]  # this rank's share of the reward model
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]  # the reward model's


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderParts:
    """The parts from which a source that reads texts is built."""

    source: RewardSource
    key: str  # that names it in messages, such as ``reward.sources[1].function``
    workers: int  # processes that run a function; 0: it runs in this one
    timeout_s: float  # of the completions of a step
    stop: Stop  # ends a wait early
    policy: Callable[[], SampledBy]
