"""Completions cut into the texts of their tokens."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.observe.tokens import answer, beside_reference, pieces, rounded
from tests.tiny_models import byte_tokenizer

TOKENIZER = byte_tokenizer()
END = 2


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=20))
def test_the_pieces_are_the_text(text: str) -> None:
    tokens = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    found = pieces(TOKENIZER, [*tokens, END])
    assert len(found) == len(tokens) + 1
    assert "".join(found) == TOKENIZER.decode([*tokens, END])


def test_a_character_of_several_tokens_stands_at_its_last_one() -> None:
    assert pieces(TOKENIZER, TOKENIZER("aéb", add_special_tokens=False)["input_ids"]) == ["a", "", "é", "b"]


def test_a_completion_that_ends_within_a_character_says_so() -> None:
    first, *_ = TOKENIZER("é", add_special_tokens=False)["input_ids"]
    assert pieces(TOKENIZER, [first]) == ["\N{REPLACEMENT CHARACTER}"]
    assert pieces(TOKENIZER, []) == []


def test_what_is_not_known_is_null() -> None:
    assert rounded([-0.123456, math.nan]) == [-0.1235, None]
    assert beside_reference([-1.0, -2.0], [-1.5, -2.25]) == 0.75
    assert beside_reference([-1.0, math.nan], [-1.5, -2.25]) is None


def test_an_answer_has_both_models_and_its_kl() -> None:
    tokens = TOKENIZER("ab", add_special_tokens=False)["input_ids"]
    assert answer(TOKENIZER, tokens, [-1.0, -0.5], [-2.0, -0.25]) == {
        "kl": pytest.approx(0.75),
        "tokens": ["a", "b"],
        "logps": [-1.0, -0.5],
        "reference_logps": [-2.0, -0.25],
    }
