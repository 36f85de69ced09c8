"""Rules that compare an answer with the right one as mathematics: math, and TRL's accuracy rewards.

The package math-verify reads and compares. It ends what takes too long by a signal, which works in a process's main
thread only; elsewhere there is no limit but that of the whole call (``reward.timeout_s``).
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Any

from rlxf.config.rules import AccuracyOptions, CosineOptions, MathOptions, ReasoningAccuracyOptions
from rlxf.core.errors import ConfigError
from rlxf.core.types import Text
from rlxf.score.rules.rule import column, text_of

log = logging.getLogger(__name__)

# As TRL has them, in seconds.
_READ_S, _COMPARE_S = 10, 5

# Characters of a completion that the rule math reads: math-verify's searches take the square of a text's length, and
# a policy that repeats numbers up to its limit would need seconds a completion.
_MOST_READ = 2000

Parsed = list[Any]  # what math-verify makes of a text: sympy's expressions, and the text that it took


class Verifier:
    """math-verify, with its time limits where they work.

    Args:
        read_s: limit for reading one text.
        compare_s: limit for one comparison.

    Raises:
        ConfigError: the package is missing.
    """

    def __init__(self, read_s: int, compare_s: int) -> None:
        try:
            import math_verify
            from latex2sympy2_extended import NormalizationConfig
        except ImportError as error:
            raise ConfigError(
                f'this rule needs the package math-verify: {error}; install it with pip install "rlxf[math]"'
            ) from error
        self._library = math_verify
        self._units = NormalizationConfig(units=True)
        self._read_s, self._compare_s = read_s, compare_s
        self._said = False
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it writes whole completions into the log

    def plain(self, text: str) -> Parsed:
        """Of a text with an answer of any kind; empty if there is none."""
        return list(self._library.parse(text, parsing_timeout=self._limit(self._read_s)))

    def expression(self, text: str) -> Parsed:
        """Of a text that is a number or an arithmetic expression."""
        configs = [self._library.ExprExtractionConfig()]
        return list(self._library.parse(text, configs, parsing_timeout=self._limit(self._read_s)))

    def answer(self, text: str, *, latex_only: bool) -> Parsed:
        """Of a completion, what is boxed first. ``latex_only``: as TRL, which takes one marked LaTeX answer."""
        latex = self._library.LatexExtractionConfig(
            normalization_config=self._units, boxed_match_priority=0, try_extract_without_anchor=not latex_only
        )
        configs = [latex] if latex_only else [latex, self._library.ExprExtractionConfig()]
        mode = "first_match" if latex_only else "any_match"
        limit = self._limit(self._read_s)
        return list(self._library.parse(text, configs, extraction_mode=mode, parsing_timeout=limit))

    def equal(self, right: Parsed, answer: Parsed) -> bool:
        return bool(self._library.verify(right, answer, timeout_seconds=self._limit(self._compare_s)))

    def _limit(self, seconds: int) -> int | None:
        if threading.current_thread() is threading.main_thread():
            return seconds
        if not self._said:
            self._said = True
            log.warning(
                "math-verify runs outside the main thread, where its time limits do not work; an answer that it cannot "
                "finish holds up the whole call"
            )
        return None


class Math:
    """1 where the answer of a completion equals the column's, else 0; None where the column has no answer."""

    def __init__(self, options: MathOptions) -> None:
        self._options = options
        self._verifier = Verifier(options.timeout_s, options.timeout_s)

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        answers = column(self._options.column, columns, "math")
        right = _each_once(answers, self._right)
        return [self._score(text_of(text), gold) for text, gold in zip(completions, right, strict=True)]

    def _right(self, value: str) -> Parsed:
        text = _behind(value, self._options.column_after)
        if text is None or not text.strip():
            return []
        text = text.strip()
        if any(mark in text for mark in ("$", "\\boxed", "\\(", "\\[")):
            return self._verifier.plain(text)
        # Without a mark math-verify would take the last number out of a formula: 3 of \frac{1}{3}.
        bare = not any(char.isalpha() or char == "\\" for char in text)
        found = self._verifier.expression(text) if bare else []
        return found or self._verifier.plain(f"\\boxed{{{text}}}")

    def _score(self, text: str, right: Parsed) -> float | None:
        if not right:
            return None
        answer = _behind(text, self._options.after)
        if answer is None:
            return 0.0
        return float(self._verifier.equal(right, self._verifier.answer(_end(answer), latex_only=False)))


class Accuracy:
    """TRL's ``accuracy_reward``; given delimiters, its ``reasoning_accuracy_reward``."""

    def __init__(self, options: AccuracyOptions) -> None:
        self._column = options.column
        self._delimiters = options.reasoning_delimiters if isinstance(options, ReasoningAccuracyOptions) else None
        self._verifier = Verifier(_READ_S, _COMPARE_S)

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        solutions = column(self._column, columns, "accuracy_reward")
        right = _each_once(solutions, self._verifier.plain)
        return [self._score(text_of(text), gold) for text, gold in zip(completions, right, strict=True)]

    def _score(self, text: str, right: Parsed) -> float | None:
        if self._delimiters is not None:
            delimiter = next((delimiter for delimiter in self._delimiters if delimiter in text), None)
            if delimiter is None:
                return 0.0  # TRL looks at the solution only after this
            text = text.split(delimiter)[-1]
        if not right:
            return None
        return float(self._verifier.equal(right, self._verifier.answer(text, latex_only=True)))


class Cosine:
    """TRL's ``get_cosine_scaled_reward`` (Yeo et al. 2025, appendix C.1)."""

    def __init__(self, options: CosineOptions) -> None:
        self._options = options
        self._accuracy = Accuracy(options)

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        right = self._accuracy(prompts, completions, completion_ids, **columns)
        return [self._score(is_right, len(ids)) for is_right, ids in zip(right, completion_ids, strict=True)]

    def _score(self, is_right: float | None, length: int) -> float | None:
        if is_right is None:
            return None
        options = self._options
        short, long = options.min_value_wrong, options.max_value_wrong
        if is_right:
            short, long = options.max_value_correct, options.min_value_correct
        # Past max_len the cosine would rise again.
        phase = math.cos(math.pi * min(length / options.max_len, 1.0))
        return long + 0.5 * (short - long) * (1.0 + phase)


def _each_once(values: Any, parse: Callable[[str], Parsed]) -> list[Parsed]:
    """Each value parsed: the samples of a prompt have the same one. An empty value gives nothing."""
    known: dict[str, Parsed] = {}
    found = []
    for value in values:
        text = "" if value is None else str(value)
        if text not in known:
            known[text] = parse(text) if text else []
        found.append(known[text])
    return found


def _end(text: str) -> str:
    """Of a long text what follows its last box, or else its end."""
    if len(text) <= _MOST_READ:
        return text
    box = text.rfind("\\boxed")
    return text[-_MOST_READ:] if box < 0 else text[box : box + _MOST_READ]


def _behind(text: str, mark: str | None) -> str | None:
    """What follows the last ``mark``; None if the text has none of it."""
    if mark is None:
        return text
    return text.rpartition(mark)[2] if mark in text else None
