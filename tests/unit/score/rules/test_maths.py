"""Answers that are compared as mathematics."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from rlxf.core.errors import ConfigError
from rlxf.score.rules import make_rule

pytest.importorskip("math_verify")


def score(options: dict[str, Any], text: str, answer: Any) -> float | None:
    return make_rule("math", options)(["p"], [text], [[1]], answer=[answer])[0]


@pytest.mark.parametrize(
    ("text", "answer", "result"),
    [
        ("The answer is 42.", 42, 1.0),
        ("The answer is 42.", "42", 1.0),
        ("First 42, then 43", "42", 0.0),
        (r"so \boxed{42}, not 43", "42", 1.0),
        ("It is 1,234", "1234", 1.0),
        ("It is 1234", "1,234", 1.0),
        ("Half of it: 0.5", "1/2", 1.0),
        (r"\boxed{\frac{1}{3}}", r"\frac{1}{3}", 1.0),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{3}", 0.0),
        (r"\boxed{3}", r"\frac{1}{3}", 0.0),
        (r"$x = \sqrt{8}$", r"2\sqrt{2}", 1.0),
        (r"\boxed{2x + 2}", "2(x+1)", 1.0),
        (r"\boxed{(1, 2)}", "(1,2)", 1.0),
        (r"\boxed{(2, 1)}", "(1,2)", 0.0),
        (r"\boxed{B}", "B", 1.0),
        (r"\boxed{A}", "B", 0.0),
        (r"\boxed{12}", r"$12$", 1.0),
        ("I do not know", "42", 0.0),
        ("", "42", 0.0),
        ("42", None, None),
        ("42", "", None),
        ("42", "  ", None),
    ],
)
def test_math(text: str, answer: Any, result: float | None) -> None:
    assert score({}, text, answer) == result


def test_what_stands_before_the_marks_is_not_read() -> None:
    assert score({"column_after": "####"}, "72", "48 / 2 = 24\n#### 72") == 1.0
    assert score({"column_after": "####"}, "72", "no mark: 72") is None
    assert score({"after": "</think>"}, "<think>43</think> 42", "42") == 1.0
    assert score({"after": "</think>"}, "<think>42</think> 43", "42") == 0.0
    assert score({"after": "</think>"}, "<think>42", "42") == 0.0


def test_of_a_long_completion_the_last_box_or_the_end_is_read() -> None:
    words = "so we go on " * 1000
    assert score({}, f"{words} it is 42.", "42") == 1.0
    assert score({}, f"it is 42. {words}", "42") == 0.0
    assert score({}, rf"\boxed{{41}} {words} \boxed{{42}} {words}", "42") == 1.0


def test_a_policy_that_repeats_itself_costs_little_time() -> None:
    """Read as a whole, each would need a minute: the searches take the square of the length."""
    begin = time.monotonic()
    rule = make_rule("math", {"timeout_s": 60})
    assert (
        rule(["p"] * 4, ["1 " * 20_000, "1\n" * 20_000, "1," * 20_000, "7" * 40_000], [[1]] * 4, answer=["3"] * 4)
        == [0.0] * 4
    )
    assert time.monotonic() - begin < 15


def test_an_answer_that_takes_too_long_is_wrong() -> None:
    begin = time.monotonic()
    assert score({"timeout_s": 1}, r"\boxed{9^{9^{9^{9}}}}", "7") == 0.0
    assert time.monotonic() - begin < 20


def test_outside_the_main_thread_it_works_without_limits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    found: list[float | None] = []
    thread = threading.Thread(target=lambda: found.append(score({}, r"\boxed{42}", "42")))
    thread.start()
    thread.join()
    assert found == [1.0]
    assert "outside the main thread" in caplog.text


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r'needs the package math-verify.*pip install "rlxf\[math\]"'):
        make_rule("math")
