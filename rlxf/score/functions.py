"""Scoring with a Python function from a file. No torch: the process that runs it needs none of its own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlxf.core.errors import ConfigError, ScoreError
from rlxf.core.jsonl import plain
from rlxf.core.user_file import load_function
from rlxf.core.user_function import UserFunction, copied
from rlxf.score.texts import Answered, Asked

_SIGNATURE = "def reward(prompts, completions, completion_ids, **columns) -> list[float | None]"
_FLOAT32_MAX = float.fromhex("0x1.fffffep+127")
_GIVEN = ("prompts", "completions", "completion_ids")
OWN_METRICS = ("mean", "std", "missing")  # what every source has, as ``rewards/<name>/mean``
_LOGS = ("log_extra", "log_metric")

RewardFunction = Callable[..., Any]


class FunctionSource:
    """Calls a reward function with TRL's arguments, once for all completions that it is asked about.

    ``prompts`` and ``completions`` are strings, or chat messages where the prompt is a chat; ``completion_ids`` are the
    sampled token ids, without padding; each further column of the data file comes as a keyword, with one value per
    completion. ``log_extra(column, values)`` and ``log_metric(name, value)`` come if the signature names them. The
    function returns a number per completion, or None where it has no score; it may be asynchronous.

    Args:
        function: of the user, or of a rule.
        name: how messages name it: ``reward.function=my.py``.
        path: its file, whose line messages name; None: it is not the user's.

    Raises:
        ConfigError: the function cannot take what it is called with.
    """

    def __init__(self, function: RewardFunction, name: str, path: Path | None = None) -> None:
        self._name = name
        asked = inspect.signature(function).parameters
        self._logs = [log for log in _LOGS if log in asked]
        given = (*_GIVEN, *self._logs)
        self._call = UserFunction(function, name, title="reward", signature=_SIGNATURE, given=given, path=path)

    @staticmethod
    def from_file(path: Path, key: str = "reward.function") -> FunctionSource:
        """``reward`` of a Python file, which is run for that.

        Raises:
            ConfigError: the file or the function is missing or wrong.
        """
        function = load_function(path, "reward", key=key, signature=_SIGNATURE, asynchronous=True)
        return FunctionSource(function, f"{key}={path}", path)

    def ask(self, asked: Asked) -> Answered:
        """The function's answer, once it is one finite number or None per completion.

        Raises:
            ScoreError: the function failed, or what it returned is not one score per completion.
            ConfigError: it does not take the columns of the data.
        """
        extra: dict[str, list[Any]] = {}
        metrics: dict[str, float] = {}
        arguments: dict[str, Any] = {
            "prompts": [copied(prompt) for prompt in asked.prompts],
            "completions": [copied(completion) for completion in asked.completions],
            "completion_ids": asked.completion_ids,
        }
        for column, values in asked.columns.items():
            if column in (*arguments, *self._logs):
                raise ConfigError(
                    f"actor_rollout.data_path: rename column {column!r}; {self._name} gets its own {column}"
                )
            arguments[column] = values
        given = {"log_extra": self._keeper(extra, len(asked)), "log_metric": self._logger(metrics)}
        arguments |= {log: given[log] for log in self._logs}
        result = self._call(arguments, len(asked), what="scores", each="completion")
        return Answered(scores=self._scores(result), extra=extra, metrics=metrics)

    def close(self) -> None:
        """It has started nothing."""

    def _keeper(self, extra: dict[str, list[Any]], count: int) -> Callable[[str, list[Any]], None]:
        def log_extra(column: str, values: list[Any]) -> None:
            found = list(values)
            if len(found) != count:
                raise ScoreError(
                    f"{self._name}: log_extra({column!r}, ...): expected {count} values, one per completion, got "
                    f"{len(found)}"
                )
            extra[str(column)] = [plain(value) for value in found]  # it goes to another process, and to files

        return log_extra

    def _logger(self, metrics: dict[str, float]) -> Callable[[str, float], None]:
        def log_metric(name: str, value: float) -> None:
            if str(name) in OWN_METRICS:
                taken = ", ".join(OWN_METRICS)
                raise ScoreError(f"{self._name}: log_metric({name!r}, ...): choose another name than {taken}")
            try:
                metrics[str(name)] = float(value)
            except (TypeError, ValueError) as error:
                raise ScoreError(
                    f"{self._name}: log_metric({name!r}, ...): expected a number, got {value!r}"
                ) from error

        return log_metric

    def _scores(self, result: list[Any]) -> list[float | None]:
        scores: list[float | None] = []
        for index, value in enumerate(result):
            try:
                score = None if value is None else float(value)
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise ScoreError(f"{self._name}: score {index} must be a number or None, got {value!r}") from error
            if score is not None and (isinstance(value, str) or abs(score) > _FLOAT32_MAX):
                raise ScoreError(f"{self._name}: score {index} must be a finite number or None, got {value!r}")
            scores.append(None if score is None or math.isnan(score) else score)
        return scores
