"""What sources that score texts are asked, and what they answer. No torch: their processes need none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rlxf.core.types import Text


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """Completions as texts, for whoever scores texts; each list has one entry per completion."""

    prompts: list[Text]  # strings, or chat messages
    completions: list[Text]  # as the prompt is: a string, or one message of the assistant
    completion_ids: list[list[int]]  # sampled token ids, without padding
    columns: dict[str, list[Any]]  # further columns of the data

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """What a source says of the completions that it was asked about."""

    scores: list[float | None]  # one per completion; None: it has no score
    failed: int = 0  # of those without a score: how many have none because a call failed
    problem: str | None = None  # the first failure, in words for the user
    extra: dict[str, list[Any]] = field(default_factory=dict)  # a column per name, one value per completion
    metrics: dict[str, float] = field(default_factory=dict)


class TextSource(Protocol):
    """A source of scores that reads texts: a Python function, a rule, a service."""

    def ask(self, asked: Asked) -> Answered:
        """A score for each completion.

        Raises:
            ScoreError: the whole call failed.
        """
        ...

    def close(self) -> None:
        """End what it has started."""
        ...
