"""The JSON that the service reads and answers: our form, and those of OpenRLHF and slime."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlxf.core.types import Text
from rlxf.score.texts import Asked

Scores = list[float | None]
_FORMS = (
    '{"prompts": [...], "completions": [...]}, {"query": [...], "prompts": [...], "labels": [...]} (OpenRLHF) or '
    '{"prompt": ..., "response": ..., "label": ...} (slime)'
)


class BadBody(ValueError):
    """A request cannot be understood; says what was expected and what came."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What a request asks for."""

    asked: Asked
    ended: list[bool]  # per completion: it is whole, and not cut at a length limit
    answer: Callable[[Scores], Any]  # the JSON of the response

    def __len__(self) -> int:
        return len(self.asked.completions)


def read(content: bytes) -> Wanted:
    """What a request's body asks for; its keys say which form it has.

    Raises:
        BadBody: it has none of the three.
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadBody(f"expected JSON in one of the forms {_FORMS}; it cannot be read: {error}") from error
    if not isinstance(body, dict):
        raise BadBody(f"expected a JSON object in one of the forms {_FORMS}, got {_kind(body)}")
    if "completions" in body:
        return _ours(body)
    if "query" in body:
        return _openrlhf(body)
    if "response" in body:
        return _slime(body)
    found = ", ".join(sorted(body))[:200] or "none"
    raise BadBody(f"expected one of the forms {_FORMS}, got an object with the keys: {found}")


def _ours(body: dict[str, Any]) -> Wanted:
    completions = _list(body, "completions")
    count = len(completions)
    prompts = _column(body, "prompts", count)
    texts = [_text(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    pairs = enumerate(zip(texts, completions, strict=True))
    ids = _column(body, "completion_ids", count) if "completion_ids" in body else [[] for _ in completions]
    ended = _column(body, "ended", count) if "ended" in body else [True] * count
    for index, (row, end) in enumerate(zip(ids, ended, strict=True)):
        if not isinstance(row, list) or not all(type(token) is int for token in row):
            raise BadBody(f"completion_ids[{index}]: expected a list of token ids, got {_kind(row)}")
        if not isinstance(end, bool):
            raise BadBody(f"ended[{index}]: expected true or false, got {_kind(end)}")
    own = ("prompts", "completions", "completion_ids", "ended")
    asked = Asked(
        prompts=texts,
        completions=[_completion(prompt, text, f"completions[{i}]") for i, (prompt, text) in pairs],
        completion_ids=ids,
        columns={name: _column(body, name, count) for name in body if name not in own},
    )
    return Wanted(asked=asked, ended=ended, answer=lambda scores: {"scores": scores})


def _openrlhf(body: dict[str, Any]) -> Wanted:
    """``query`` is prompt and completion as one text; without its prompt the completion cannot be told, and is all."""
    queries = _strings(_list(body, "query"), "query")
    count = len(queries)
    prompts = _strings(_column(body, "prompts", count), "prompts") if body.get("prompts") else [""] * count
    labels = _column(body, "labels", count) if body.get("labels") else []
    pairs = [(p if q.startswith(p) else "", q) for p, q in zip(prompts, queries, strict=True)]
    asked = Asked(
        prompts=[prompt for prompt, _ in pairs],
        completions=[query[len(prompt) :] for prompt, query in pairs],
        completion_ids=[[] for _ in queries],
        columns={"labels": labels} if any(label not in ("", None) for label in labels) else {},
    )
    # Its trainer reads both names; extra_logs is part of the form.
    answer = lambda scores: {"rewards": scores, "scores": scores, "extra_logs": {}}  # noqa: E731
    return Wanted(asked=asked, ended=[True] * count, answer=answer)


def _slime(body: dict[str, Any]) -> Wanted:
    if "prompt" not in body:
        raise BadBody('prompt: missing; expected {"prompt": ..., "response": ..., "label": ...}')
    prompt = _text(body["prompt"], "prompt")
    label = body.get("label")
    asked = Asked(
        prompts=[prompt],
        completions=[_completion(prompt, body["response"], "response")],
        completion_ids=[[]],
        columns={} if label is None else {"label": [label]},
    )
    return Wanted(asked=asked, ended=[True], answer=lambda scores: scores[0])


def _list(body: dict[str, Any], name: str) -> list[Any]:
    value = body.get(name)
    if not isinstance(value, list):
        raise BadBody(f"{name}: expected a list, got {_kind(value)}")
    return value


def _column(body: dict[str, Any], name: str, count: int) -> list[Any]:
    if name not in body:
        raise BadBody(f"{name}: missing; expected a list of {count} values, one per completion")
    values = _list(body, name)
    if len(values) != count:
        raise BadBody(f"{name}: expected {count} values, one per completion, got {len(values)}")
    return values


def _strings(values: Sequence[Any], name: str) -> list[str]:
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise BadBody(f"{name}[{index}]: expected a string, got {_kind(value)}")
    return list(values)


def _text(value: Any, place: str) -> Text:
    """A string, or chat messages."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise BadBody(f"{place}: expected a string or a list of chat messages, got {_kind(value)}")
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise BadBody(f"{place}[{index}]: expected an object with the strings role and content")
    return value


def _completion(prompt: Text, value: Any, place: str) -> Text:
    """The completion in its prompt's kind: a string, or one message of the assistant."""
    text = _text(value, place)
    if isinstance(prompt, str):
        if not isinstance(text, str):
            raise BadBody(f"{place}: expected a string, as its prompt is, got chat messages")
        return text
    if isinstance(text, str):
        return [{"role": "assistant", "content": text}]
    if len(text) != 1 or text[0]["role"] != "assistant":
        raise BadBody(f"{place}: expected one message of the assistant, got {len(text)} messages")
    return text


def _kind(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {
        str: "a string",
        list: "an empty list" if value == [] else "a list",
        dict: "an object",
        bool: "a truth value",
    }
    return names.get(type(value), "a number")
