"""Rules that compare the text of a completion: exact, regex, format."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable
from typing import Any

import regex

from rlxf.config.rules import ExactOptions, FormatOptions, RegexOptions
from rlxf.core.types import Text
from rlxf.score.rules.rule import column, text_of

log = logging.getLogger(__name__)


class Exact:
    """1 where the completion is the text of a column, or one of its texts; None where the column is empty."""

    def __init__(self, options: ExactOptions) -> None:
        self._options = options

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        wanted = column(self._options.column, columns, "exact")
        return [self._score(text_of(text), value) for text, value in zip(completions, wanted, strict=True)]

    def _score(self, text: str, wanted: Any) -> float | None:
        texts = wanted if isinstance(wanted, list | tuple) else [wanted]
        known = [self._plain(str(value)) for value in texts if value is not None]
        return float(self._plain(text) in known) if known else None

    def _plain(self, text: str) -> str:
        if self._options.ignore_punctuation:
            text = "".join(char for char in text if not unicodedata.category(char).startswith("P"))
        if self._options.ignore_case:
            text = text.casefold()
        return text.strip() if self._options.strip else text


class Regex:
    """1 where a pattern matches, else 0; None where a row has no valid pattern, or the search takes too long."""

    def __init__(self, options: RegexOptions) -> None:
        self._options = options
        self._search = Search("regex", options.timeout_s, ignore_case=options.ignore_case)
        if options.pattern is not None:
            self._search.compiled(options.pattern)

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        name = self._options.column
        patterns: Iterable[Any] = (
            [self._options.pattern] * len(completions) if name is None else column(name, columns, "regex")
        )
        return [self._score(text_of(text), value) for text, value in zip(completions, patterns, strict=True)]

    def _score(self, text: str, pattern: Any) -> float | None:
        if not isinstance(pattern, str):
            return None
        try:
            found = self._search(pattern, text, whole=self._options.match == "whole")
        except (regex.error, TimeoutError):
            return None
        return float(found is not None)


class Format:
    """1 where all parts are in the completion, else 0; or the share of the parts that are there."""

    def __init__(self, options: FormatOptions) -> None:
        self._options = options
        self._search = Search("format", options.timeout_s)
        for part in options.parts:
            self._search.compiled(part)

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        return [self._score(text_of(text)) for text in completions]

    def _score(self, text: str) -> float | None:
        place = count = 0
        for part in self._options.parts:
            try:
                found = self._search(part, text, place)
            except TimeoutError:
                return None
            count += found is not None
            if found is not None and self._options.in_order:
                place = found.end()
        total = len(self._options.parts)
        return count / total if self._options.partial else float(count == total)


class Search:
    """Regular expressions with a deadline; a pattern may need exponential time for some texts.

    Args:
        rule: for the warning about the first search that takes too long.
        timeout_s: of one search.
        ignore_case: whether upper and lower case are the same.
    """

    def __init__(self, rule: str, timeout_s: float, *, ignore_case: bool = False) -> None:
        self._rule, self._timeout_s = rule, timeout_s
        self._flags = regex.IGNORECASE if ignore_case else 0
        self._said = False

    def compiled(self, pattern: str) -> regex.Pattern[str]:
        return regex.compile(pattern, self._flags)  # which keeps the last few hundred

    def __call__(self, pattern: str, text: str, place: int = 0, *, whole: bool = False) -> regex.Match[str] | None:
        """The match, from ``place`` on.

        Raises:
            TimeoutError: it took too long.
            regex.error: the pattern is wrong.
        """
        compiled = self.compiled(pattern)
        try:
            search = compiled.fullmatch if whole else compiled.search
            return search(text, pos=place, timeout=self._timeout_s)
        except TimeoutError:
            if not self._said:
                self._said = True
                log.warning(
                    "rule %s: the pattern %r took more than %g s for a completion of %d characters, which gets no "
                    "score; write it without nested repetitions", self._rule, pattern, self._timeout_s, len(text),
                )  # fmt: skip
            raise


def think_format(
    prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
) -> list[float | None]:
    """1 for a completion that begins with ``<think>``, has no second one, and closes it; else 0."""
    return [float(_thinks(text_of(text))) for text in completions]


def _thinks(text: str) -> bool:
    rest = text.removeprefix("<think>")
    return rest != text and "<think>" not in rest and "</think>" in rest
