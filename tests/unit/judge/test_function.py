"""A Python function that judges."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from rlxf.config.judge import JudgeConfig
from rlxf.core.errors import ConfigError, RlxfError, ScoreError
from rlxf.core.types import Text
from rlxf.judge import JUDGES, Judge, JudgeParts


def judge(folder: Path, body: str, arguments: str = "prompts, first, second, **columns", kind: str = "def") -> Judge:
    path = folder / "mine.py"
    path.write_text(f"{kind} judge({arguments}):\n    {body}\n")
    return JUDGES["function"](JudgeParts(config=JudgeConfig(function=str(path))))


PROMPTS: list[Text] = ["p", [{"role": "user", "content": "q"}]]


def test_it_gets_strings_or_messages_and_the_columns(tmp_path: Path) -> None:
    body = (
        "assert (prompts[0], first[0], second[0]) == ('p', 'a', 'b')\n"
        "    assert prompts[1] == [{'role': 'user', 'content': 'q'}]\n"
        "    assert first[1] == [{'role': 'assistant', 'content': 'c'}]\n"
        "    prompts[1][0]['content'] = 'changed'\n"
        "    return [float(value == 'yes') for value in columns['good']]"
    )
    found = judge(tmp_path, body).compare(PROMPTS, ["a", "c"], ["b", "d"], {"good": ["yes", "no"]})
    assert found.tolist() == [1.0, 0.0]
    assert PROMPTS[1] == [{"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("return [0.25, None]", "def"),
        ("yield 0.25\n    yield float('nan')", "def"),
        ("import asyncio\n    await asyncio.sleep(0)\n    return [0.25, None]", "async def"),
        ("import numpy\n    return numpy.array([0.25, numpy.nan])", "def"),
    ],
)
def test_a_number_is_a_probability_and_none_is_no_verdict(tmp_path: Path, body: str, kind: str) -> None:
    heard: dict[int, float] = {}
    found = judge(tmp_path, body, kind=kind).compare(
        ["p", "p"], ["a", "a"], ["b", "b"], {},
        heard=lambda verdicts: heard.update({index: said.probability for index, said in verdicts.items()}),
    )  # fmt: skip
    assert found[0] == heard[0] == 0.25
    assert math.isnan(found[1])
    assert math.isnan(heard[1])


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return 0.5", "expected a list of 2 probabilities, got float"),
        ("return [0.5]", "expected 2 probabilities, one per question, got 1"),
        ("return [0.5, 1.5]", "answer 1 must be a probability from 0 to 1, or None, got 1.5"),
        ("return [-0.1, 0.5]", "answer 0 must be a probability from 0 to 1, or None, got -0.1"),
        ("return ['0.5', 0.5]", "answer 0 must be a probability from 0 to 1, or None, got '0.5'"),
        ("return [float('inf'), 0.5]", "answer 0 must be a probability"),
        ("return [first, 0.5]", "answer 0 must be a probability"),
        ("raise ValueError('no')", r"`judge` failed: .*mine\.py:2: ValueError: no"),
    ],
)
def test_a_function_that_fails_is_named(tmp_path: Path, body: str, says: str) -> None:
    with pytest.raises(ScoreError, match=says) as caught:
        judge(tmp_path, body).compare(["p", "p"], ["a", "a"], ["b", "b"], {})
    assert "judge.function=" in str(caught.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "no such file; expected a Python file with `def judge"),
        ("x = 1", "defines no function `judge`"),
        ("judge = 3", "`judge` is a int"),
        ("def judge(prompts): ...", "cannot be called with prompts, first, second"),
        ("import nowhere_at_all", r"cannot be loaded: .*mine\.py:1: ModuleNotFoundError"),
    ],
)
def test_a_wrong_file_is_refused_when_the_run_starts(tmp_path: Path, source: str | None, says: str) -> None:
    path = tmp_path / "mine.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ConfigError, match=says):
        JUDGES["function"](JudgeParts(config=JudgeConfig(function=str(path))))


def test_columns_that_it_does_not_take_and_those_that_it_has_already_are_named(tmp_path: Path) -> None:
    found = judge(tmp_path, "return [0.5]", "prompts, first, second")
    with pytest.raises(ConfigError, match="cannot be called with prompts, first, second, topic"):
        found.compare(["p"], ["a"], ["b"], {"topic": ["x"]})
    with pytest.raises(ConfigError, match="rename column 'first' of the data"):
        found.compare(["p"], ["a"], ["b"], {"first": ["x"]})


def test_a_stop_inside_the_function_is_a_stop(tmp_path: Path) -> None:
    body = "from rlxf.core.errors import StopRequested\n    raise StopRequested('now')"
    with pytest.raises(RlxfError, match="now"):
        judge(tmp_path, body).compare(["p"], ["a"], ["b"], {})


def test_another_content_is_another_judge(tmp_path: Path) -> None:
    one = judge(tmp_path, "return [0.5]").identity
    assert one == judge(tmp_path, "return [0.5]").identity
    assert one != judge(tmp_path, "return [0.6]").identity
