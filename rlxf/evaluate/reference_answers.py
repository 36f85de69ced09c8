"""Answers of somebody else to the evaluation prompts: a column of their data, or a file that is searched by prompt."""

from __future__ import annotations

from typing import Any

from rlxf.config.schema import EvalConfig
from rlxf.core.errors import DataError
from rlxf.core.jsonl import JsonLines, Row
from rlxf.core.types import PromptBatch
from rlxf.judge.judge import plain_text

_PROMPT_KEYS = ("prompt", "instruction")
_ANSWER_KEYS = ("answer", "output", "completion")


def reference_answers(config: EvalConfig, prompts: PromptBatch) -> list[str] | None:
    """One answer per prompt; None if the recipe names no reference answers.

    Raises:
        DataError: a prompt has no answer, or the file or the column is wrong.
    """
    if config.reference_column is not None:
        return _column(config.reference_column, prompts)
    return _file(config.reference_answers, prompts) if config.reference_answers is not None else None


def _column(name: str, prompts: PromptBatch) -> list[str]:
    key = f"eval.reference_column = {name!r}"
    if name not in prompts.columns:
        there = ", ".join(prompts.columns) or "none"
        raise DataError(f"{key}: the evaluation data have no such column; their further columns: {there}")
    answers = [_answer(value) for value in prompts.columns[name]]
    for row, answer in zip(prompts.row_ids.tolist(), answers, strict=True):
        if answer is None:
            raise DataError(f"{key}: row {row} holds no answer; expected text, or a chat message with content")
    return [str(answer) for answer in answers]


def _file(path: str, prompts: PromptBatch) -> list[str]:
    rows = JsonLines(path, _wrong)
    answers: dict[str, str] = {}
    for number in range(len(rows)):
        row = rows[number]
        answers.setdefault(plain_text(_first(row, _PROMPT_KEYS)), str(_answer(_first(row, _ANSWER_KEYS))))
    found = [answers.get(plain_text(text)) for text in prompts.texts]
    missing = [plain_text(text) for text, answer in zip(prompts.texts, found, strict=True) if answer is None]
    if missing:
        raise DataError(
            f"eval.reference_answers = {path}: no answer to {len(missing)} of {len(found)} evaluation prompts, such as "
            f"{missing[0][:60]!r}; add them, or evaluate on the file's prompts (eval.data_path)"
        )
    return [str(answer) for answer in found]


def _wrong(row: Row) -> str | None:
    prompt = _first(row, _PROMPT_KEYS)
    if not isinstance(prompt, str) and _answer(prompt) is None:
        return f"expected the prompt, text or chat messages, in {' or '.join(_PROMPT_KEYS)}"
    if _answer(_first(row, _ANSWER_KEYS)) is None:
        return f"expected the answer, text or a chat message, in {', '.join(_ANSWER_KEYS[:-1])} or {_ANSWER_KEYS[-1]}"
    return None


def _first(row: Row, keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if key in row), None)


def _answer(value: Any) -> str | None:
    """Text, or the content of the last chat message."""
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        value = value[-1].get("content")
    return value if isinstance(value, str) else None
