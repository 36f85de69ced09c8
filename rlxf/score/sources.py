"""All sources of a run's scores: asks them, counts their failures, and adds their scores up."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlxf.core.errors import ScoreError
from rlxf.core.stop import Stop
from rlxf.core.types import Metrics, Rollouts
from rlxf.core.user_function import as_answer
from rlxf.core.waiting import in_thread
from rlxf.score.combine import Term, combine, unscaled
from rlxf.score.scorer import Scorer
from rlxf.score.texts import Asked, TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
_TICK_S = 0.2  # how often a wait looks at the stop request


class Tally(Protocol):
    """Completions of a run that have no score because a call failed; a resumed run continues the count."""

    all_failed_scores: int  # also of steps that are not complete, which a resumed run scores again


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """What all sources say of ``B`` completions."""

    table: Tensor  # [B, S] float32, a column for each source; NaN where missing
    extra: dict[str, list[Any]] = field(default_factory=dict)  # columns that reward functions logged, B values each
    metrics: Metrics = field(default_factory=dict)  # that they logged


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """What one source says."""

    scores: Tensor  # [B] float32
    failed: int = 0
    problem: str | None = None
    error: Exception | None = None  # of a call that failed as a whole
    extra: dict[str, list[Any]] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)


def _failed(error: ScoreError, count: int) -> _Answer:
    return _Answer(scores=torch.full((count,), math.nan), failed=count, problem=str(error), error=error)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenTerm:
    """A source that scores tokens, and how it enters the sum."""

    term: Term
    scorer: Scorer

    def answer(self, rollouts: Rollouts, asked: Asked | None) -> _Answer:
        try:
            return _Answer(scores=self.scorer.score(rollouts))
        except ScoreError as error:
            return _failed(error, len(rollouts))


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTerm:
    """A source that reads texts, and how it enters the sum."""

    term: Term
    reader: TextSource
    here: bool = False  # it computes in this process and thread, where breakpoints work

    def answer(self, rollouts: Rollouts, asked: Asked | None) -> _Answer:
        assert asked is not None
        try:
            found = self.reader.ask(asked)
        except ScoreError as error:
            return _failed(error, len(rollouts))
        scores = torch.tensor([math.nan if score is None else score for score in found.scores], dtype=torch.float32)
        return _Answer(
            scores=scores, failed=found.failed, problem=found.problem, extra=found.extra, metrics=found.metrics
        )


class Rewards:
    """The sources of a run's scores.

    A failed call leaves its completions without a score, up to a number of them in the whole run.

    Args:
        sources: none where a judge alone compares.
        tokenizer: the policy's.
        tally: counts failed scores, for all that score in the run; each source counts by itself.
        limit: ``reward.max_failures``.
        place: where the run is, for messages: "step 3".
        stop: ends a wait early when the user asked for it.
    """

    def __init__(
        self,
        sources: Sequence[TokenTerm | TextTerm],
        tokenizer: PreTrainedTokenizerBase,
        tally: Tally,
        limit: int,
        place: Callable[[], str],
        stop: Stop,
    ) -> None:
        self.terms = [source.term for source in sources]
        self._sources, self._tokenizer = sources, tokenizer
        self._tally, self._limit, self._place, self._stop = tally, limit, place, stop

    def score(self, rollouts: Rollouts, *, where: Callable[[Term], bool] = lambda term: True) -> Scores:
        """The scores of each completion.

        Sources that read texts are asked at the same time, and while models score.

        Args:
            rollouts: B completions.
            where: which sources are asked; the column of another one is NaN.

        Raises:
            ScoreError: calls failed, and with their completions more than ``limit`` would have no score.
        """
        answers = self._ask(rollouts, [number for number, term in enumerate(self.terms) if where(term)])
        for answer in answers.values():
            if answer.failed:
                self.tolerate(answer.failed, str(answer.problem), answer.error)
        table = np.full((len(rollouts), len(self.terms)), math.nan, np.float32)
        for number, answer in answers.items():
            table[:, number] = answer.scores.numpy()
        return Scores(
            table=torch.from_numpy(table),
            extra={name: values for answer in answers.values() for name, values in answer.extra.items()},
            metrics={
                f"rewards/{self.terms[number].name}/{name}": value
                for number, answer in answers.items()
                for name, value in answer.metrics.items()
            },
        )

    def close(self) -> None:
        """End the processes and connections that sources have started."""
        for source in self._sources:
            if isinstance(source, TextTerm):
                source.reader.close()

    def _ask(self, rollouts: Rollouts, numbers: Sequence[int]) -> dict[int, _Answer]:
        """What the sources of these numbers say, in that order."""
        sources = {number: self._sources[number] for number in numbers}
        readers = {number: source for number, source in sources.items() if isinstance(source, TextTerm)}
        asked = as_texts(rollouts, self._tokenizer) if readers else None
        waiting: dict[int, Future[_Answer]] = {}
        for number, source in readers.items():
            if not source.here and len(sources) > 1:
                waiting[number] = in_thread(partial(source.answer, rollouts, asked), f"reward {source.term.name}")
        answers = {
            number: source.answer(rollouts, asked) for number, source in sources.items() if number not in waiting
        }
        answers |= {number: self._wait(future) for number, future in waiting.items()}
        return {number: answers[number] for number in numbers}

    def _wait(self, future: Future[_Answer]) -> _Answer:
        while True:
            if self._stop.must_give_up():
                raise self._stop.error("stopped while waiting for rewards")
            try:
                return future.result(timeout=_TICK_S)
            except FutureTimeout:
                if future.done():
                    raise

    def tolerate(self, failed: int, problem: str, error: Exception | None = None) -> None:
        """Count scores, or verdicts, that are missing because a call failed, and warn.

        Raises:
            ScoreError: with them the run has more than it may have.
        """
        count = self._tally.all_failed_scores + failed
        if count > self._limit:
            raise ScoreError(
                f"{self._place()}: {problem}; {failed} completions have no score, {count} in this run, "
                f"and reward.max_failures = {self._limit} allows fewer"
            ) from error
        self._tally.all_failed_scores += failed
        log.warning(
            "%s: %s; %d completions have no score, %d of reward.max_failures = %d in this run",
            self._place(), problem, failed, count, self._limit,
        )  # fmt: skip


def as_texts(rollouts: Rollouts, tokenizer: PreTrainedTokenizerBase) -> Asked:
    """Completions as those read them who score texts."""
    rows = rollouts.prompt_index.tolist()
    prompts = [rollouts.prompts.texts[row] for row in rows]
    ids = rollouts.sequences.completion_rows()
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return Asked(
        prompts=prompts,
        completions=[as_answer(prompt, text) for prompt, text in zip(prompts, texts, strict=True)],
        completion_ids=ids,
        columns={name: [values[row] for row in rows] for name, values in rollouts.prompts.columns.items()},
    )


class Unscaled:
    """The weighted sum of the sources as they are, for evaluations: these are compared over the whole run."""

    def __init__(self, rewards: Rewards) -> None:
        self._rewards, self._terms = rewards, unscaled(rewards.terms)

    def score(self, rollouts: Rollouts) -> Tensor:
        """[B] float32; NaN where a score is missing that may not be left out."""
        return combine(self._rewards.score(rollouts).table, self._terms, {})
