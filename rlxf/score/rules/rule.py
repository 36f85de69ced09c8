"""What a rule is, and how it reads texts and columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from rlxf.core.errors import ConfigError
from rlxf.core.types import Text


class RewardFunction(Protocol):
    """Scores completions, with TRL's arguments; each list has one entry per completion."""

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        """One score per completion; None where the rule cannot judge.

        Args:
            prompts: strings, or chat messages.
            completions: of the same kind.
            completion_ids: sampled token ids, without padding.
            columns: further columns of the data.

        Raises:
            ConfigError: the data has no column that the rule reads.
        """
        ...


def text_of(text: Text) -> str:
    """A completion or a prompt as one string: of chat messages, the contents, a line each."""
    return text if isinstance(text, str) else "\n".join(str(message["content"] or "") for message in text)


def column(name: str, columns: dict[str, Any], rule: str) -> Sequence[Any]:
    """The values of a column, one per completion.

    Raises:
        ConfigError: the data has no such column.
    """
    if name not in columns:
        has = f"its other columns are {', '.join(sorted(columns))}" if columns else "it has no column but the prompt"
        raise ConfigError(f"rule {rule} reads the column {name!r}, and the data has none; {has}")
    values: Sequence[Any] = columns[name]
    return values
