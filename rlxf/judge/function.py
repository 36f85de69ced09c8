"""A judge that is a Python function."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.core.errors import ConfigError, RlxfError, ScoreError
from rlxf.core.files import file_digest
from rlxf.core.types import Text
from rlxf.core.user_file import describe
from rlxf.judge.judge import Columns, Heard, Verdict, ignore

SIGNATURE = "def judge(prompts, first, second, **columns) -> list[float | None]"
_GIVEN = ("prompts", "first", "second")


class FunctionJudge:
    """Calls ``judge`` of a Python file once for all questions.

    ``prompts``, ``first`` and ``second`` are strings; where a prompt is a chat, it is a list of messages, and its
    answers are lists of one message. Each further column of the data comes as a keyword, with one value per question.
    The function, which may be ``async``, returns for each question the probability that the first answer is better, or
    None.

    Args:
        function: is called with keywords.
        path: of its file, whose content is a part of the judge's identity.
        key: what named the file, for messages.
    """

    is_symmetric = False
    reads_columns = True

    def __init__(self, function: Callable[..., Any], path: Path, *, key: str = "judge.function") -> None:
        self._function = function
        self._path = path
        self._name = f"{key}={path}"
        self._digest = file_digest(path)
        self._require_accepts(dict.fromkeys(_GIVEN), complete=False)  # the data's columns are not known yet

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"kind": "function", "content": self._digest}

    def compare(
        self,
        prompts: Sequence[Text],
        first: Sequence[str],
        second: Sequence[str],
        columns: Columns,
        *,
        heard: Heard = ignore,
    ) -> Tensor:
        """[N] float32 probability that the first answer is better; NaN where the function returned None.

        Raises:
            ScoreError: the function failed, or what it returned is not one probability per question.
        """
        arguments: dict[str, Any] = {
            "prompts": [_copy(prompt) for prompt in prompts],
            "first": [_answer(prompt, text) for prompt, text in zip(prompts, first, strict=True)],
            "second": [_answer(prompt, text) for prompt, text in zip(prompts, second, strict=True)],
        }
        for name, values in columns.items():
            if name in arguments:
                raise ConfigError(f"{self._name}: rename column {name!r} of the data; `judge` gets its own {name}")
            arguments[name] = list(values)
        self._require_accepts(arguments, complete=True)
        found = self._probabilities(self._call(arguments), len(prompts))
        heard({index: Verdict(probability=value) for index, value in enumerate(found)})
        return torch.tensor(found, dtype=torch.float32)

    def _require_accepts(self, arguments: dict[str, Any], *, complete: bool) -> None:
        signature = inspect.signature(self._function)
        try:
            (signature.bind if complete else signature.bind_partial)(**arguments)
        except TypeError as error:
            raise ConfigError(
                f"{self._name}: `judge` cannot be called with {', '.join(arguments)}: {error}; expected `{SIGNATURE}`"
            ) from error

    def _call(self, arguments: dict[str, Any]) -> Any:
        try:
            result = self._function(**arguments)
            if inspect.isawaitable(result):
                result = asyncio.run(_wait(result))
            return list(result) if isinstance(result, Iterable) else result  # a generator fails only here
        except RlxfError:  # a stop request reached the program inside the function
            raise
        except Exception as error:
            raise ScoreError(f"{self._name}: `judge` failed: {describe(error, self._path)}") from error

    def _probabilities(self, result: Any, count: int) -> list[float]:
        if not isinstance(result, list):
            raise ScoreError(f"{self._name}: expected a list of {count} probabilities, got {type(result).__name__}")
        if len(result) != count:
            raise ScoreError(f"{self._name}: expected {count} probabilities, one per question, got {len(result)}")
        return [self._probability(index, value) for index, value in enumerate(result)]

    def _probability(self, index: int, value: Any) -> float:
        expected = f"{self._name}: answer {index} must be a probability from 0 to 1, or None, got {value!r}"
        if value is None:
            return math.nan
        if isinstance(value, str):
            raise ScoreError(expected)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ScoreError(expected) from error
        if not 0 <= number <= 1 and not math.isnan(number):
            raise ScoreError(expected)
        return number


async def _wait(result: Any) -> Any:
    return await result


def _copy(text: Text) -> Text:
    """A copy for the user's function, which may change its messages."""
    return text if isinstance(text, str) else [dict(message) for message in text]


def _answer(prompt: Text, answer: str) -> Text:
    return answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
