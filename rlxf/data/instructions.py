"""The formats of instruction tuning, Alpaca and ShareGPT, made into chat messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlxf.core.jsonl import Row, describe
from rlxf.core.types import Messages, Text
from rlxf.data.fields import (
    BadRow,
    Example,
    Pair,
    at_first_answer,
    checked,
    missing,
    require_answer,
    text_field,
    up_to_the_answer,
)
from rlxf.data.text import is_chat

ALPACA = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    **{name: name for name in ("history", "system", "chosen", "rejected")},
}
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool"), "tool"),
    "system": "system",
}  # ShareGPT's name of a speaker -> role


@dataclass(frozen=True, slots=True)
class Alpaca:
    """Texts of the roles in columns of their own, made into chat messages. ``columns``: a key of `ALPACA` -> column."""

    columns: Mapping[str, str]

    @property
    def prompt_columns(self) -> frozenset[str]:
        return frozenset(self.columns[name] for name in ("prompt", "query", "history", "system"))

    def prompt(self, row: Row) -> Text:
        asked = row.get(self.columns["prompt"])
        system = self._text(row, "system")
        messages: Messages = [{"role": "system", "content": system}] if system else []
        if is_chat(asked):
            return messages + checked(asked, f"field {self.columns['prompt']!r}")
        for turn in self._history(row):
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
        question = "\n".join(part for part in (self._text(row, "prompt"), self._text(row, "query")) if part)
        if not question.strip():
            raise BadRow(missing(row, self.columns["prompt"]) or f"field {self.columns['prompt']!r} is empty")
        return checked([*messages, {"role": "user", "content": question}], "the row's conversation")

    def pair(self, row: Row) -> Pair:
        both = row.get(self.columns["response"])
        if is_chat(both) and len(both) == 2 and row.get(self.columns["chosen"]) is None:
            row = {**row, self.columns["chosen"]: both[0], self.columns["rejected"]: both[1]}
        prompt, chosen, rejected = self.prompt(row), self._answer(row, "chosen"), self._answer(row, "rejected")
        assert isinstance(prompt, list)
        require_answer("chosen", prompt, chosen)
        require_answer("rejected", prompt, rejected)
        return prompt, chosen, rejected

    def example(self, row: Row) -> Example:
        prompt = self.prompt(row)
        assert isinstance(prompt, list)
        return at_first_answer(prompt + self._answer(row, "response"))

    def _answer(self, row: Row, name: str) -> Messages:
        column = self.columns[name]
        value = text_field(row, column)
        return [{"role": "assistant", "content": value}] if isinstance(value, str) else value

    def _text(self, row: Row, name: str) -> str:
        """The text of an optional column; empty where there is none."""
        column = self.columns[name]
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise BadRow(f"field {column!r}: expected a string, got {describe(value)}")
        return value or ""

    def _history(self, row: Row) -> list[list[str]]:
        column = self.columns["history"]
        turns = row.get(column) or []
        if not isinstance(turns, list):
            raise BadRow(f"field {column!r}: expected a list of [question, answer], got {describe(turns)}")
        for turn in turns:
            if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
                raise BadRow(f"field {column!r}: expected [question, answer] in the list, got {describe(turn)}")
        return turns


@dataclass(frozen=True, slots=True)
class ShareGpt:
    """``conversations`` of {from, value}; in pairs ``chosen`` and ``rejected`` are the answer to it."""

    columns: Mapping[str, str]

    @property
    def prompt_columns(self) -> frozenset[str]:
        return frozenset((self.columns["system"],))

    def prompt(self, row: Row) -> Text:
        return up_to_the_answer(self._conversation(row), f"field {self.columns['prompt']!r}")

    def pair(self, row: Row) -> Pair:
        prompt = self._conversation(row)
        sides = [self._turns(row, self.columns[name]) for name in ("chosen", "rejected")]
        for name, side in zip(("chosen", "rejected"), sides, strict=True):
            require_answer(name, prompt, side)
        return prompt, sides[0], sides[1]

    def example(self, row: Row) -> Example:
        return at_first_answer(self._conversation(row))

    def _conversation(self, row: Row) -> Messages:
        system = row.get(self.columns["system"])
        if system is not None and not isinstance(system, str):
            raise BadRow(f"field {self.columns['system']!r}: expected a string, got {describe(system)}")
        head: Messages = [{"role": "system", "content": system}] if system else []
        return head + self._turns(row, self.columns["prompt"])

    def _turns(self, row: Row, column: str) -> Messages:
        """The turns in a column: a list of them, one of them, or the text of an answer."""
        if problem := missing(row, column):
            raise BadRow(problem)
        value = row[column]
        if isinstance(value, str):
            value = {"from": "gpt", "value": value}
        turns = value if isinstance(value, list) else [value]
        return checked([_turn(turn, f"field {column!r}") for turn in turns], f"field {column!r}")


def _turn(turn: Any, name: str) -> dict[str, str]:
    if not isinstance(turn, dict) or "value" not in turn or "from" not in turn:
        raise BadRow(f"{name}: expected objects with 'from' and 'value', got {describe(turn)}")
    if turn["from"] not in _ROLES:
        raise BadRow(f"{name}: 'from' is {describe(turn['from'])}; known: {', '.join(_ROLES)}")
    return {"role": _ROLES[turn["from"]], "content": turn["value"]}
