"""A Python function of the user that is asked about texts: what it takes, what it gives, and how it fails. No torch."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlxf.core.errors import ConfigError, RlxfError, ScoreError
from rlxf.core.user_file import describe

if TYPE_CHECKING:
    from rlxf.core.types import Text


class UserFunction:
    """Calls a function, which may be asynchronous, with keywords.

    Args:
        function: of the user, or of a rule.
        name: how messages name it: ``reward.function=my.py``.
        title: what it is called in its file: ``reward``.
        signature: what it should look like, for messages.
        given: the keywords that every call has; those of the data's columns are not known yet.
        path: its file, whose line messages name; None: it is not the user's.

    Raises:
        ConfigError: the function does not take ``given``.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        name: str,
        *,
        title: str,
        signature: str,
        given: Collection[str],
        path: Path | None,
    ) -> None:
        self._function, self.name, self._title = function, name, title
        self._signature, self._path = signature, path
        self._require_accepts(dict.fromkeys(given), complete=False)

    def __call__(self, arguments: dict[str, Any], count: int, *, what: str, each: str) -> list[Any]:
        """The list that the function returned.

        Args:
            arguments: all keywords, those of the data's columns too.
            count: values that are expected.
            what: those values, for messages: "scores".
            each: what each is of: "completion".

        Raises:
            ConfigError: the function does not take these keywords.
            ScoreError: it failed, or did not return ``count`` values.
        """
        self._require_accepts(arguments, complete=True)
        result = self._call(arguments)
        if not isinstance(result, list):
            raise ScoreError(f"{self.name}: expected a list of {count} {what}, got {type(result).__name__}")
        if len(result) != count:
            raise ScoreError(f"{self.name}: expected {count} {what}, one per {each}, got {len(result)}")
        return result

    def _require_accepts(self, arguments: dict[str, Any], *, complete: bool) -> None:
        signature = inspect.signature(self._function)
        try:
            (signature.bind if complete else signature.bind_partial)(**arguments)
        except TypeError as error:
            raise ConfigError(
                f"{self.name}: `{self._title}` cannot be called with {', '.join(arguments)}: {error}; expected "
                f"`{self._signature}`"
            ) from error

    def _call(self, arguments: dict[str, Any]) -> Any:
        try:
            result = self._function(**arguments)
            if inspect.isawaitable(result):
                result = asyncio.run(_awaited(result))
            return list(result) if isinstance(result, Iterable) else result  # a generator fails only here
        except RlxfError:  # a stop request reached the program inside the function
            raise
        except Exception as error:
            text = describe(error, self._path) if self._path else f"{type(error).__name__}: {error}"
            raise ScoreError(f"{self.name}: `{self._title}` failed: {text}") from error


async def _awaited(result: Awaitable[Any]) -> Any:
    return await result


def copied(text: Text) -> Text:
    """A copy for the user's function, which may change its messages."""
    return text if isinstance(text, str) else [dict(message) for message in text]


def as_answer(prompt: Text, answer: str) -> Text:
    """An answer in the form of its prompt: a string, or one message of the assistant."""
    return answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
