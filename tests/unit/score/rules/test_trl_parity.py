"""TRL's rewards by their names give TRL's values."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.config.rules import RULE_OPTIONS, RuleName
from rlxf.core.types import Text
from rlxf.score.rules import make_rule

rewards = pytest.importorskip("trl.rewards")
pytest.importorskip("math_verify")

SOLUTIONS = [
    r"\frac{1}{3}",
    "42",
    r"$x^2 + 1$",
    r"\boxed{7}",
    "(1, 2)",
    "no mathematics at all",
    "0.5",
    r"$\{1, 2, 3\}$",
    "12%",
    r"\sqrt{2}",
]
ANSWERS = [
    r"My answer is \boxed{\frac{1}{3}}",
    r"My answer is \boxed{\frac{1}{2}}",
    r"\boxed{42}",
    "The answer is 42.",
    "$42$",
    r"final answer is $x^2+1$. I hope",
    r"The answer: \boxed{1 + x^2}",
    r"\boxed{7} and then \boxed{8}",
    r"\boxed{(1, 2)}",
    r"\boxed{\{3, 2, 1\}}",
    r"\boxed{0.5}",
    r"\boxed{1/2}",
    r"\boxed{12\%}",
    r"\boxed{\sqrt 2}",
    r"\boxed{",
    "",
    r"<think> \boxed{42} </think> it is \boxed{7}",
    r"<think> \boxed{42} </think> it is \boxed{42}",
    r"<think> I think \boxed{42}",
    r"a </think> \boxed{7} </think> \boxed{42}",
    r"a </r> \boxed{7} </think> \boxed{42}",
]
PAIRS = [(answer, solution) for answer in ANSWERS for solution in SOLUTIONS]  # of which a test takes a share
IDS = [[1] * (index % 25) for index in range(len(PAIRS))]


def chats(texts: list[str]) -> list[Text]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def ours(name: Any, options: dict[str, Any], texts: list[str], ids: list[list[int]], **columns: Any) -> Any:
    plain = make_rule(name, options)(["p"] * len(texts), list(texts), ids, **columns)
    assert make_rule(name, options)([[]] * len(texts), chats(texts), ids, **columns) == plain
    return plain


@pytest.mark.parametrize(
    ("name", "options", "reference"),
    [
        ("accuracy_reward", {}, rewards.accuracy_reward),
        ("reasoning_accuracy_reward", {}, rewards.reasoning_accuracy_reward),
        (
            "reasoning_accuracy_reward",
            {"reasoning_delimiters": ["</r>", "</think>"]},
            lambda completions, solution, **_: rewards.reasoning_accuracy_reward(
                completions, solution, reasoning_delimiters=["</r>", "</think>"]
            ),
        ),
        ("get_cosine_scaled_reward", {"max_len": 20}, rewards.get_cosine_scaled_reward(max_len=20)),
        (
            "get_cosine_scaled_reward",
            {"max_len": 7, "min_value_wrong": -3.0, "max_value_wrong": 0.0, "min_value_correct": 1.0,
             "max_value_correct": 2.5},
            rewards.get_cosine_scaled_reward(7, -3.0, 0.0, 1.0, 2.5),
        ),
    ],
)  # fmt: skip
def test_accuracy(name: RuleName, options: dict[str, Any], reference: Any) -> None:
    share = slice(None, None, 1 if name == "accuracy_reward" else 3)  # 3 does not divide the number of solutions
    texts, solutions = [list(part) for part in zip(*PAIRS[share], strict=True)]
    ids = IDS[share]
    expected = reference(completions=chats(texts), solution=solutions, completion_ids=ids)
    assert make_rule(name, options)(["p"] * len(texts), list(texts), ids, solution=solutions) == expected
    assert {type(value) for value in expected} == {float, type(None)}
    assert len({value for value in expected if value is not None}) > 1


def test_accuracy_outside_the_main_thread() -> None:
    found: list[Any] = []
    texts, solutions = [list(part) for part in zip(*PAIRS[::7], strict=True)]
    thread = threading.Thread(
        target=lambda: found.extend(ours("accuracy_reward", {}, texts, IDS[::7], solution=solutions))
    )
    thread.start()
    thread.join()
    assert found == rewards.accuracy_reward(completions=chats(texts), solution=solutions)


@given(st.lists(st.lists(st.sampled_from(["<think>", "</think>", "\n", "a", "<think", " "]), max_size=8).map("".join)))
@settings(max_examples=60, deadline=None)
def test_think_format(texts: list[str]) -> None:
    expected = rewards.think_format_reward(completions=chats(texts))
    assert ours("think_format_reward", {}, texts, [[1]] * len(texts)) == expected


TOKENS = st.lists(st.lists(st.integers(0, 3), max_size=12), max_size=6)


@given(TOKENS, st.integers(1, 5), st.floats(-5, 0))
@settings(max_examples=60, deadline=None)
def test_repetition_penalty(rows: list[list[int]], size: int, penalty: float) -> None:
    expected = rewards.get_repetition_penalty_reward(size, penalty)(completion_ids=rows)
    found = ours("get_repetition_penalty_reward", {"ngram_size": size, "max_penalty": penalty}, [""] * len(rows), rows)
    assert found == expected


@given(TOKENS, st.integers(1, 12), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_soft_overlong_punishment(rows: list[list[int]], longest: int, cache: int) -> None:
    cache = min(cache, longest)
    expected = rewards.get_soft_overlong_punishment(longest, cache)(completion_ids=rows)
    options = {"max_completion_len": longest, "soft_punish_cache": cache}
    assert ours("get_soft_overlong_punishment", options, [""] * len(rows), rows) == expected


def test_every_reward_of_trl_is_a_rule() -> None:
    names = {name for name in dir(rewards) if name.endswith(("_reward", "_punishment"))}
    assert len(names) >= 6
    assert names <= set(RULE_OPTIONS)
