"""Rules that compare texts: exact, regex, format."""

from __future__ import annotations

from typing import Any

import pytest

from rlxf.config.rules import RuleName
from rlxf.core.errors import ConfigError
from rlxf.core.types import Text
from rlxf.score.rules import make_rule


def score(name: RuleName, options: dict[str, Any], texts: list[str], **columns: list[Any]) -> list[float | None]:
    """Scores of plain completions, which are those of the same completions as chat messages."""
    rule = make_rule(name, options)
    ids = [[1] * len(text) for text in texts]
    plain = rule(["p"] * len(texts), list(texts), ids, **columns)
    prompts: list[Text] = [[{"role": "user", "content": "p"}] for _ in texts]
    chats: list[Text] = [[{"role": "assistant", "content": text}] for text in texts]
    assert rule(prompts, chats, ids, **columns) == plain
    return plain


@pytest.mark.parametrize(
    ("options", "text", "wanted", "result"),
    [
        ({}, " Paris\n", "Paris", 1.0),
        ({}, "paris", "Paris", 0.0),
        ({"ignore_case": True}, "STRASSE", "straße", 1.0),
        ({"strip": False}, " Paris", "Paris", 0.0),
        ({}, "Paris.", "Paris", 0.0),
        ({"ignore_punctuation": True}, "«Paris»!", "Paris", 1.0),
        ({"ignore_punctuation": True}, "Hello world", "Hello, world.", 1.0),
        ({}, "42", 42, 1.0),
        ({}, "B", ["A", "B"], 1.0),
        ({}, "C", ["A", None, "B"], 0.0),
        ({}, "x", None, None),
        ({}, "x", [], None),
        ({}, "", "", 1.0),
    ],
)
def test_exact(options: dict[str, Any], text: str, wanted: Any, result: float | None) -> None:
    assert score("exact", options, [text], answer=[wanted]) == [result]


def test_a_column_that_the_data_lacks_is_named() -> None:
    with pytest.raises(
        ConfigError, match="rule exact reads the column 'answer', and the data has none; its other colum"
    ):
        score("exact", {}, ["x"], solution=["x"])
    with pytest.raises(ConfigError, match="it has no column but the prompt"):
        score("regex", {"column": "patterns"}, ["x"])


@pytest.mark.parametrize(
    ("options", "text", "result"),
    [
        ({"pattern": r"\d+"}, "it is 42.", 1.0),
        ({"pattern": r"\d+"}, "none", 0.0),
        ({"pattern": r"\d+", "match": "whole"}, "it is 42", 0.0),
        ({"pattern": r"\d+", "match": "whole"}, "42", 1.0),
        ({"pattern": "yes"}, "YES", 0.0),
        ({"pattern": "yes", "ignore_case": True}, "YES", 1.0),
        ({"pattern": r"(?s)<a>.*</a>"}, "<a>\n</a>", 1.0),
    ],
)
def test_regex(options: dict[str, Any], text: str, result: float) -> None:
    assert score("regex", options, [text]) == [result]


def test_a_row_without_a_valid_pattern_has_no_score() -> None:
    patterns = [r"^\d$", "(", None, 3, "a"]
    assert score("regex", {"column": "patterns"}, ["1", "1", "1", "1", "b"], patterns=patterns) == [
        1.0, None, None, None, 0.0,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("regex", {"pattern": r"^(a|a)*$", "timeout_s": 0.2}),
        ("regex", {"pattern": r"(a|a)*", "match": "whole", "timeout_s": 0.2}),
        ("format", {"parts": ["a", r"^(a|a)*$"], "timeout_s": 0.2}),
    ],
)
def test_a_pattern_that_never_ends_is_given_up(
    name: RuleName, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert make_rule(name, options)(["p"], ["a" * 60 + "!"], [[1]]) == [None]
    assert f"rule {name}: the pattern" in caplog.text
    assert "more than 0.2 s for a completion of 61 characters, which gets no score" in caplog.text


@pytest.mark.parametrize(
    ("options", "text", "result"),
    [
        ({"parts": ["A", "B"]}, "B A", 1.0),
        ({"parts": ["A", "B"], "in_order": True}, "B A", 0.0),
        ({"parts": ["A", "B"], "in_order": True}, "B A B", 1.0),
        ({"parts": ["AB", "B"], "in_order": True}, "AB", 0.0),
        ({"parts": ["A", "B", "C", "D"], "partial": True}, "A C", 0.5),
        ({"parts": ["A", "B"]}, "A", 0.0),
        ({"parts": "A"}, "A", 1.0),
    ],
)
def test_format(options: dict[str, Any], text: str, result: float) -> None:
    assert score("format", options, [text]) == [result]
