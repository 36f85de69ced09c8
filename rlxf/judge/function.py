"""A judge that is a Python function."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.core.errors import ConfigError, ScoreError
from rlxf.core.files import file_digest
from rlxf.core.types import Text
from rlxf.core.user_function import UserFunction, as_answer, copied
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
        self._name = f"{key}={path}"
        self._digest = file_digest(path)
        self._call = UserFunction(function, self._name, title="judge", signature=SIGNATURE, given=_GIVEN, path=path)

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
            "prompts": [copied(prompt) for prompt in prompts],
            "first": [as_answer(prompt, text) for prompt, text in zip(prompts, first, strict=True)],
            "second": [as_answer(prompt, text) for prompt, text in zip(prompts, second, strict=True)],
        }
        for name, values in columns.items():
            if name in arguments:
                raise ConfigError(f"{self._name}: rename column {name!r} of the data; `judge` gets its own {name}")
            arguments[name] = list(values)
        result = self._call(arguments, len(prompts), what="probabilities", each="question")
        found = [self._probability(index, value) for index, value in enumerate(result)]
        heard({index: Verdict(probability=value) for index, value in enumerate(found)})
        return torch.tensor(found, dtype=torch.float32)

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
