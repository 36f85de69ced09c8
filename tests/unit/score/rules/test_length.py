"""The length rule; TRL's rules of the same file are in test_trl_parity.py."""

from __future__ import annotations

from typing import Any

import pytest

from rlxf.score.rules import make_rule


@pytest.mark.parametrize(
    ("options", "results"),
    [
        ({"min": 2}, [0.0, 1.0, 1.0, 1.0]),
        ({"max": 3}, [1.0, 1.0, 1.0, 0.0]),
        ({"min": 2, "max": 3}, [0.0, 1.0, 1.0, 0.0]),
        ({"min": 0, "max": 0}, [0.0, 0.0, 0.0, 0.0]),
        ({"min": 3, "slack": 4}, [0.5, 0.75, 1.0, 1.0]),
        ({"max": 1, "slack": 2}, [1.0, 0.5, 0.0, 0.0]),
    ],
)
def test_tokens_between_two_limits(options: dict[str, Any], results: list[float]) -> None:
    rows = [[7] * count for count in (1, 2, 3, 4)]
    assert make_rule("length", options)(["p"] * 4, ["", "", "", ""], rows) == results


def test_words_and_characters() -> None:
    texts: list[Any] = ["one two  three", "one", [{"role": "assistant", "content": "one\ntwo"}]]
    ids = [[1]] * 3
    assert make_rule("length", {"unit": "words", "min": 2})(["p"] * 3, texts, ids) == [1.0, 0.0, 1.0]
    assert make_rule("length", {"unit": "characters", "max": 7})(["p"] * 3, texts, ids) == [0.0, 1.0, 1.0]
