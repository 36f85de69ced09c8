"""Reward functions and rules in a process of their own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from rlxf.core.errors import ScoreError
from rlxf.core.stop import Stop
from rlxf.core.user_process import UserProcess
from rlxf.score.functions import FunctionSource
from rlxf.score.texts import Answered, Asked


class ProcessSource:
    """A reward function in a process of its own, which is ended when it takes too long.

    Args:
        make: makes the source in its process.
        name: how messages name it.
        workers: processes; with several, each is asked about a part of the prompts.
        timeout_s: longest time of a call, in seconds.
        stop: ends a wait early when the user asked for it.
        limit: what sets ``timeout_s``, for messages.

    Raises:
        ConfigError: the function cannot be loaded.
    """

    def __init__(
        self,
        make: Callable[[], FunctionSource],
        name: str,
        *,
        workers: int,
        timeout_s: float,
        stop: Stop,
        limit: str = "reward.timeout_s",
    ) -> None:
        self._workers = workers
        self._process = UserProcess(
            make,
            name,
            workers=workers,
            timeout_s=timeout_s,
            stop=stop,
            failed=ScoreError,
            limit=limit,
        )
        self._process.start()

    def ask(self, asked: Asked) -> Answered:
        """A score for each completion.

        Raises:
            ScoreError: the function failed, took too long, or ended its process.
        """
        parts = _parts(asked, self._workers)
        answers = self._process.call(FunctionSource.ask, parts)
        if len(answers) == 1:
            return answers[0]
        names = dict.fromkeys(name for answer in answers for name in answer.metrics)
        columns = dict.fromkeys(name for answer in answers for name in answer.extra)
        return Answered(
            scores=[score for answer in answers for score in answer.scores],
            extra={
                name: [
                    value
                    for part, answer in zip(parts, answers, strict=True)
                    for value in answer.extra.get(name, [None] * len(part))
                ]
                for name in columns
            },
            metrics={name: _mean([a.metrics[name] for a in answers if name in a.metrics]) for name in names},
        )

    def close(self) -> None:
        """End the processes."""
        self._process.close()


def _parts(asked: Asked, count: int) -> list[Asked]:
    """At most ``count`` parts of about the same size; the completions of a prompt stay together."""
    size = len(asked)
    changes = [0, *(row for row in range(1, size) if asked.prompts[row] != asked.prompts[row - 1]), size]
    bounds = sorted({min(changes, key=lambda place: abs(place - size * part / count)) for part in range(count + 1)})
    return [
        Asked(
            prompts=asked.prompts[start:end],
            completions=asked.completions[start:end],
            completion_ids=asked.completion_ids[start:end],
            columns={name: values[start:end] for name, values in asked.columns.items()},
        )
        for start, end in pairwise(bounds)
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
