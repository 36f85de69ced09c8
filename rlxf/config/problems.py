"""Mistakes of a recipe as lines for its author: ``key = value: what is expected; did you mean "..."``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import ErrorDetails

from rlxf.config.devices import SYNONYMS
from rlxf.core.words import nearest

_LONGEST_VALUE = 80

# Values that other programs use; query, key and value are one matrix here, as gate and up are.
_VALUE_SYNONYMS = SYNONYMS | {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "linear_qkv"),
    **dict.fromkeys(("gate_proj", "up_proj", "gate_up_proj"), "linear_fc1"),
    "o_proj": "linear_proj",
    "down_proj": "linear_fc2",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. ``keys``: the keys of the merged recipe that it is about; each of them is reported once only."""

    keys: tuple[str, ...]
    text: str


def show(value: Any) -> str:
    """A value as YAML would hold it, short enough for one line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def wrong(key: str, value: Any, expected: str, *also: str) -> Problem:
    """``key = value: expected``; ``also`` names the other keys that take part in the mistake."""
    return Problem((key, *also), f"{key} = {show(value)}: {expected}")


_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a section with keys of its own",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
}
_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("greater than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}


def expectation(error: ErrorDetails) -> str:
    """What one of pydantic's errors expected, in words."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind in _BOUNDS:
        words, limit = _BOUNDS[kind]
        return f"expected {words} {context[limit]:g}"
    if kind == "literal_error":
        return _one_of(value, context["expected"])
    if kind == "value_error":
        return f"expected {context['error']}"
    expected = f"expected {_KINDS[kind]}" if kind in _KINDS else error["msg"]
    if kind in ("int_type", "float_type") and isinstance(value, str):
        return f"{expected}, got text{unquoted(value)}"
    if kind in ("int_type", "float_type") and isinstance(value, bool):
        return f"{expected}, got {show(value)}"
    return expected


def unquoted(value: str) -> str:
    """What is said of a number in quotes."""
    try:
        float(value)
    except ValueError:
        return ""
    return "; write it without quotes"


def _one_of(value: Any, expected: str) -> str:
    """``expected`` is pydantic's list of the allowed values, quoted."""
    choices = [choice.strip("'") for choice in expected.replace(" or ", ", ").split(", ")]
    near = nearest(_VALUE_SYNONYMS.get(value, value), choices) if isinstance(value, str) else None
    only = "only " if len(choices) == 1 else "one of "
    return f"expected {only}{', '.join(choices)}" + (f'; did you mean "{near}"?' if near else "")


def lines(problems: Iterable[Problem]) -> list[str]:
    """The problems' texts, each once: one wrong value in ``training`` fails in every role that inherits it."""
    return list(dict.fromkeys(problem.text for problem in problems))


def concerning(problems: Iterable[Problem], keys: Sequence[str]) -> bool:
    return any(key in problem.keys for problem in problems for key in keys)
