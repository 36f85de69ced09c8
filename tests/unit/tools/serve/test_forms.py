"""Which requests the service understands, and what it says of others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlxf.tools.serve.forms import BadBody, read

USER = [{"role": "user", "content": "q"}]
REPLY = [{"role": "assistant", "content": "a"}]


def test_our_form() -> None:
    body = {"prompts": ["p", USER], "completions": ["c", "a"], "topic": [1, None], "ended": [True, False]}
    wanted = read(json.dumps(body).encode())
    assert wanted.asked.prompts == ["p", USER]
    assert wanted.asked.completions == ["c", REPLY]  # of the kind of its prompt
    assert wanted.asked.completion_ids == [[], []]
    assert wanted.asked.columns == {"topic": [1, None]}
    assert wanted.ended == [True, False]
    assert wanted.answer([1.0, None]) == {"scores": [1.0, None]}


def test_a_text_is_whole_unless_it_is_said_to_be_cut() -> None:
    assert read(b'{"prompts": ["p"], "completions": ["c"], "completion_ids": [[3]]}').ended == [True]


def test_the_form_of_openrlhf() -> None:
    wanted = read(json.dumps({"query": ["p c", "other"], "prompts": ["p", "p"], "labels": ["x", ""]}).encode())
    assert wanted.asked.prompts == ["p", ""]
    assert wanted.asked.completions == [" c", "other"]
    assert wanted.asked.columns == {"labels": ["x", ""]}
    assert wanted.answer([1.0, 2.0]) == {"rewards": [1.0, 2.0], "scores": [1.0, 2.0], "extra_logs": {}}
    assert read(b'{"query": ["a"], "prompts": ["a"], "labels": [""]}').asked.columns == {}
    assert read(b'{"query": ["a"]}').asked.completions == ["a"]


def test_the_form_of_slime() -> None:
    wanted = read(json.dumps({"prompt": USER, "response": "a", "label": "x"}).encode())
    assert (wanted.asked.prompts, wanted.asked.completions, wanted.asked.columns) == ([USER], [REPLY], {"label": ["x"]})
    assert wanted.answer([0.5]) == 0.5
    assert read(b'{"prompt": "p", "response": "a", "label": null}').asked.columns == {}


BAD: list[tuple[Any, str]] = [
    ("{", "expected JSON in one of the forms"),
    (b"\xff\xfe\x00", "expected JSON in one of the forms"),
    ([1], "expected a JSON object in one of the forms"),
    ({"text": "a"}, "expected one of the forms .*got an object with the keys: text"),
    ({}, "got an object with the keys: none"),
    ({"completions": ["c"]}, "^prompts: missing; expected a list of 1 values"),
    ({"completions": "c", "prompts": ["p"]}, "^completions: expected a list, got a string"),
    ({"completions": ["c"], "prompts": ["p", "q"]}, "^prompts: expected 1 values, one per completion, got 2"),
    ({"completions": ["c"], "prompts": [3]}, r"^prompts\[0\]: expected a string or a list of chat messages, got a num"),
    ({"completions": [None], "prompts": ["p"]}, r"^completions\[0\]: expected a string or .*, got nothing"),
    ({"completions": [REPLY], "prompts": ["p"]}, r"^completions\[0\]: expected a string, as its prompt is"),
    ({"completions": [USER], "prompts": [USER]}, r"^completions\[0\]: expected one message of the assistant"),
    ({"completions": ["c"], "prompts": [[]]}, r"^prompts\[0\]: expected a string or .*, got an empty list"),
    ({"completions": ["c"], "prompts": [[{"role": "user"}]]}, r"^prompts\[0\]\[0\]: expected an object with the"),
    ({"completions": ["c"], "prompts": ["p"], "ended": [1]}, r"^ended\[0\]: expected true or false, got a number"),
    ({"completions": ["c"], "prompts": ["p"], "completion_ids": [[1.5]]}, r"^completion_ids\[0\]: expected a list of"),
    ({"completions": ["c"], "prompts": ["p"], "topic": "x"}, "^topic: expected a list, got a string"),
    ({"query": [1]}, r"^query\[0\]: expected a string, got a number"),
    ({"query": ["a"], "labels": ["x", "y"]}, "^labels: expected 1 values"),
    ({"response": "a"}, "^prompt: missing"),
]


@pytest.mark.parametrize(("body", "said"), BAD, ids=[said for _, said in BAD])
def test_another_body_is_told_what_is_wrong(body: Any, said: str) -> None:
    content = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
    with pytest.raises(BadBody, match=said) as raised:
        read(content)
    assert "\n" not in str(raised.value)
