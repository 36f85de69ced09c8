"""Questions, answers and verdicts in the files of AlpacaEval 2 and Arena-Hard."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from rlxf.core.errors import DataError
from rlxf.core.files import write_text
from rlxf.core.jsonl import require_file
from rlxf.judge.replies import arena_label

Format = Literal["prompts", "alpaca_eval", "arena_hard"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A question of a benchmark."""

    prompt: str
    row: dict[str, Any]  # as its file has it


def read_questions(path: Path, form: Format) -> list[Question]:
    """The questions of a benchmark's file, a JSON list or one object per line.

    ``alpaca_eval``: ``instruction``, and ``input`` if there is one. ``arena_hard``: ``prompt``, or the first of
    ``turns``.

    Raises:
        DataError: the file holds something else.
    """
    rows = _rows(path)
    read = _alpaca_prompt if form == "alpaca_eval" else _arena_prompt
    expected = "instruction" if form == "alpaca_eval" else "question_id or uid, and prompt or turns"
    questions = []
    for number, row in enumerate(rows):
        prompt = read(row) if isinstance(row, dict) else None
        if prompt is None:
            raise DataError(f"{path}: question {number} has no {expected}, as --format {form} expects")
        questions.append(Question(prompt=prompt, row=row))
    if not questions:
        raise DataError(f"{path}: holds no questions")
    return questions


def _rows(path: Path) -> list[Any]:
    text = require_file(path).read_text(encoding="utf-8", errors="replace")
    try:
        if text.lstrip().startswith("["):
            found = json.loads(text)
            assert isinstance(found, list)  # it begins like one
            return found
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON list, or one JSON object per line: {error}") from error


def _alpaca_prompt(row: dict[str, Any]) -> str | None:
    instruction, more = row.get("instruction"), row.get("input")
    if not isinstance(instruction, str):
        return None
    return f"{instruction}\n\n{more}" if isinstance(more, str) and more else instruction


def _arena_prompt(row: dict[str, Any]) -> str | None:
    prompt, turns = row.get("prompt"), row.get("turns")
    if prompt is None and isinstance(turns, list) and turns:
        prompt = turns[0].get("content") if isinstance(turns[0], dict) else turns[0]
    return prompt if isinstance(prompt, str) and arena_id(row) is not None else None


def arena_id(row: dict[str, Any]) -> str | None:
    """The name of a question of Arena-Hard: of its version 2, or of the one before."""
    found = row.get("uid", row.get("question_id"))
    return None if found is None else str(found)


def write_prompts(path: Path, questions: Sequence[Question], *, chat: bool) -> None:
    """The questions as prompts that the data room reads; ``chat``: each as a message of a user."""
    prompts: list[Any] = [question.prompt for question in questions]
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    write_text(path, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """What both models answered to the same questions, and the verdicts of the judge."""

    questions: Sequence[Question]
    answers: tuple[Sequence[str], Sequence[str]]  # of A and B
    names: tuple[str, str]
    judge: str
    probability: Tensor  # [questions] that the answer of A is better; NaN: no verdict
    as_asked: Tensor  # the same with A's answer first
    swapped: Tensor  # the same with B's answer first


def write_benchmark(folder: Path, form: Format, found: Answered) -> list[Path]:
    """The answers and the verdicts in the benchmark's files; returns their paths.

    ``alpaca_eval``: ``outputs_<model>.json`` for each model, and ``annotations.json`` with A as the model that is
    evaluated (``output_2``) and B as the baseline: a preference of 2 means that A is better. ``arena_hard``:
    ``model_answer/<model>.jsonl`` for each model, and ``model_judgment/<judge>/<A>.jsonl`` with B as the baseline.
    """
    write = _alpaca_eval if form == "alpaca_eval" else _arena_hard
    paths = []
    for name, text in write(found):
        write_text(folder / name, text)
        paths.append(folder / name)
    return paths


def _alpaca_eval(found: Answered) -> Iterator[tuple[str, str]]:
    for name, answers in zip(found.names, found.answers, strict=True):
        rows = [
            {**_without_answer(question.row), "output": answer, "generator": name}
            for question, answer in zip(found.questions, answers, strict=True)
        ]
        yield f"outputs_{name}.json", _list(rows)
    verdicts = zip(found.questions, *found.answers, found.probability.tolist(), strict=True)
    rows = [
        {
            **_without_answer(question.row),
            "output_1": baseline,
            "generator_1": found.names[1],
            "output_2": answer,
            "generator_2": found.names[0],
            "annotator": found.judge,
            "preference": None if math.isnan(probability) else 1 + probability,
        }
        for question, answer, baseline, probability in verdicts
    ]
    yield "annotations.json", _list(rows)


def _without_answer(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("dataset", "instruction", "input") if name in row}


def _list(rows: Sequence[Any]) -> str:
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def _arena_hard(found: Answered) -> Iterator[tuple[str, str]]:
    now = time.time()
    for name, answers in zip(found.names, found.answers, strict=True):
        rows = [
            {
                "question_id": arena_id(question.row),
                "answer_id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{name} {arena_id(question.row)} {answer}")),
                "model_id": name,
                "choices": [{"index": 0, "turns": [{"content": answer}]}],
                "tstamp": now,
                "conv_metadata": {"characters": len(answer)},
            }
            for question, answer in zip(found.questions, answers, strict=True)
        ]
        yield f"model_answer/{name}.jsonl", _lines(rows)
    orders = zip(found.questions, found.as_asked.tolist(), found.swapped.tolist(), strict=True)
    rows = [
        {
            "question_id": arena_id(question.row),
            "model": found.names[0],
            "judge": found.judge,
            # The baseline is assistant A in the first game, and assistant B in the second.
            "games": [{"score": arena_label(1 - swapped)}, {"score": arena_label(as_asked)}],
        }
        for question, as_asked, swapped in orders
    ]
    yield f"model_judgment/{found.judge}/{found.names[0]}.jsonl", _lines(rows)


def _lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
