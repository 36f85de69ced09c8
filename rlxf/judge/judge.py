"""The judge's protocol: which of two answers to a prompt is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from rlxf.core.types import Text

Columns = Mapping[str, Sequence[Any]]
"""Further columns of the data: one value per comparison."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What an answer of a service took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A judge's answer to one question."""

    probability: float = math.nan  # that the first answer is better; NaN: no verdict
    final: bool = True  # whether the same question would get the same answer; false: the call failed, ask again
    usage: Usage | None = None  # of a call that was paid for
    reply: str | None = None  # what the judge wrote


Heard = Callable[[Mapping[int, Verdict]], None]
"""Told of verdicts as they come, by the numbers of their questions. Any thread may call it."""


def ignore(verdicts: Mapping[int, Verdict]) -> None:
    """For callers that need the probabilities only."""


class Judge(Protocol):
    """Compares two answers to the same prompt.

    Two questions: ``prompts = ["Say hi", "Say hi"]``, ``first = ["hi", "no"]``, ``second = ["no", "no"]``: ``compare``
    gives ``tensor([0.9, 0.5])``.
    """

    @property
    def identity(self) -> Mapping[str, Any]:
        """Everything that decides its verdicts, as JSON data: kind, model, template, content of the function's file."""
        ...

    @property
    def reads_columns(self) -> bool:
        """Whether its verdicts depend on further columns of the data, too."""
        ...

    @property
    def is_symmetric(self) -> bool:
        """Whether swapping the answers always gives one minus the probability. Then one order is asked."""
        ...

    def compare(
        self,
        prompts: Sequence[Text],
        first: Sequence[str],
        second: Sequence[str],
        columns: Columns,
        *,
        heard: Heard = ignore,
    ) -> Tensor:
        """[N] float32 probability that the first answer is better; NaN where there is no verdict.

        ``heard`` is told of each question once, before the call ends.

        Raises:
            ScoreError: the judge cannot answer at all, such as a Python function that fails.
        """
        ...


def plain_text(text: Text) -> str:
    """A prompt as one string: chat messages one after the other, each with its role if there are several."""
    if isinstance(text, str):
        return text
    if len(text) == 1:
        return str(text[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in text)
