"""Texts in the columns of a row: what must be there, and how a conversation is cut into prompt and answer."""

from __future__ import annotations

from typing import Any

from rlxf.core.jsonl import Row
from rlxf.core.types import Messages, Text
from rlxf.data.text import is_chat, text_problem

Pair = tuple[Text, Text, Text]  # prompt, chosen and rejected completion: all strings, or all chat messages
Example = tuple[Text, Text]  # prompt and completion; the completion of a chat may hold later turns of the user


class BadRow(Exception):
    """A row does not hold what its format requires; the message names the mistake."""


def missing(row: Row, column: str) -> str | None:
    if column in row:
        return None
    has = ", ".join(repr(name) for name in list(row)[:8]) or "none"
    return f"field {column!r} is missing; the row has: {has}"


def text_field(row: Row, column: str) -> Text:
    """The string or the chat messages in a column that must be there."""
    if problem := missing(row, column) or text_problem(row[column], f"field {column!r}"):
        raise BadRow(problem)
    value: Text = row[column]
    return value


def prompt_field(row: Row, column: str) -> Text:
    return answerable(text_field(row, column), f"field {column!r}")


def checked(messages: Messages, name: str) -> Messages:
    if problem := text_problem(messages, name):
        raise BadRow(problem)
    return messages


def answerable(prompt: Text, name: str) -> Text:
    """A prompt, if it leaves the next turn to the assistant."""
    if isinstance(prompt, list) and prompt[-1]["role"] == "system":
        raise BadRow(f"{name}: the last message has role 'system'; a prompt ends with a message to answer, from 'user'")
    return prompt


def up_to_the_answer(messages: Messages, name: str) -> Text:
    """A conversation without the assistant's turns at its end."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    if not end:
        raise BadRow(
            f"{name} holds nothing but answers of the assistant; a prompt has a message to answer, from 'user'"
        )
    return answerable(messages[:end], name)


def at_first_answer(messages: Messages) -> Example:
    """A conversation, cut in front of the assistant's first turn."""
    require_assistant(messages)
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    if not first:
        raise BadRow("the conversation begins with the assistant; expected a message to answer in front of it")
    return messages[:first], messages[first:]


def require_assistant(messages: Text) -> None:
    if isinstance(messages, list) and not any(message["role"] == "assistant" for message in messages):
        raise BadRow("the conversation holds no message with role 'assistant', so there is nothing to learn from")


def require_answer(name: str, prompt: Messages, side: Text) -> None:
    if not side:
        raise BadRow(f"the {name} conversation holds nothing beyond the prompt")
    if side[: len(prompt)] == prompt:
        raise BadRow(
            f"the {name} messages repeat the prompt; leave the prompt out of them, or leave out the prompt field"
        )


def require_one_kind(**texts: Text) -> None:
    if len({is_chat(text) for text in texts.values()}) > 1:
        kinds = ", ".join(
            f"{name} is {'chat messages' if is_chat(text) else 'a string'}" for name, text in texts.items()
        )
        raise BadRow(f"the {_COUNTS[len(texts)]} texts of a row must be of one kind, but {kinds}")


_COUNTS = {2: "two", 3: "three"}


def asks(chosen: Messages, rejected: Messages, prompt: str) -> bool:
    """Whether both conversations begin with the same messages, and the last of these is the prompt."""
    shared = common_start(chosen, rejected)
    return bool(shared) and isinstance(chosen[shared - 1], dict) and chosen[shared - 1].get("content") == prompt


def shared_start(chosen: Text, rejected: Text) -> Pair:
    """What both sides share, and what each has beyond it. A space before the difference goes with the sides."""
    if is_chat(chosen) != is_chat(rejected):
        require_one_kind(chosen=chosen, rejected=rejected)
    shared = common_start(chosen, rejected)
    if isinstance(chosen, str) and shared and chosen[shared - 1] == " ":
        shared -= 1
    if isinstance(chosen, str) and not chosen[:shared].strip():
        raise BadRow("there is no prompt field, and chosen and rejected start differently: no common prompt")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(side, str) and len(side) == shared:
            raise BadRow(f"the {name} text holds nothing beyond the prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def common_start(left: Any, right: Any) -> int:
    """How many leading items two lists, or characters two strings, share."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
