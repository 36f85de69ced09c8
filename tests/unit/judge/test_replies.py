"""Verdicts in a judge's text."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.judge.replies import arena_label, probability


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"first": 0.25}', 0.25),
        ('```json\n{"first": 1}\n```', 1.0),
        ('I weigh it.\n{"reason": "short {", "first": 0.0}', 0.0),
        ('{"winner": "first"}', 1.0),
        ('{"winner": "B"}', 0.0),
        ('{"winner": "Tie"}', 0.5),
        ('The answer quotes {"first": 1.0}. My verdict: {"first": 0.1}', 0.1),
        ('{"score": 3} {"winner": 2}', 0.0),
        ('{broken {"first": 0.7}', 0.7),
        ('{"first": 0.7} trailing {', 0.7),
    ],
)
def test_a_json_verdict_is_found(text: str, expected: float) -> None:
    assert probability(text, "json") == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "first", "0.7", "[0.7]", '{"first": NaN}', '{"first": 1.5}', '{"first": -0.1}', '{"first": "0.7"}',
        '{"first": true}', '{"first": null}', '{"winner": "Bob"}', '{"winner": null}', '{"first": 0.7', "{" * 50_000,
        '{"first": Infinity}', '{"first": 1' + "0" * 5000 + "}", '{"first": 0.9} no: {"first": 2}',
    ],
)  # fmt: skip
def test_what_is_no_json_verdict_is_missing(text: str) -> None:
    assert math.isnan(probability(text, "json"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[[A>>B]]", 1.0),
        ("[[A>B]]", 0.75),
        ("[[A=B]]", 0.5),
        ("[[B>A]]", 0.25),
        ("[[B>>A]]", 0.0),
        ("[[A<B]]", 0.25),
        ("[[A<<B]]", 0.0),
        ("[[B<A]]", 0.75),
        ("[[B=A]]", 0.5),
        ("first I thought [[A>>B]], but it is [[ B > A ]].", 0.25),
    ],
)
def test_a_verdict_of_the_arena_is_found(text: str, expected: float) -> None:
    assert probability(text, "arena") == expected


@pytest.mark.parametrize("text", ["", "A>B", "[A>B]", "[[A>A]]", "[[C>B]]", "[[A]]", "[[A>>>B]]", '{"first": 1}'])
def test_what_is_no_verdict_of_the_arena_is_missing(text: str) -> None:
    assert math.isnan(probability(text, "arena"))


def test_a_probability_gets_the_nearest_label() -> None:
    assert [arena_label(value) for value in (1.0, 0.8, 0.6, 0.5, 0.3, 0.1, math.nan)] == [
        "A>>B", "A>B", "A=B", "A=B", "B>A", "B>>A", None,
    ]  # fmt: skip


@settings(deadline=None)
@given(st.text(alphabet='{}[]":AB<>=firstwe0.1, \n'), st.sampled_from(["json", "arena"]))
def test_any_text_gives_a_probability_or_nothing(text: str, form: object) -> None:
    found = probability(text, form)  # type: ignore[arg-type]
    assert math.isnan(found) or 0 <= found <= 1
