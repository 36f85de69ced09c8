"""Data files, a tokenizer and the command, for tests of the preprocessing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlxf.data.indexed import IndexedRows
from scripts.preprocess_data import main
from tests.data_world import chat_tokenizer

ORCA = [
    {"system": "", "question": "What is 1+1?", "chosen": "2", "rejected": "3"},
    {"system": "Be brief.", "question": "Name a colour.", "chosen": "Red", "rejected": "Why?"},
    {"system": None, "question": "Say hello.", "chosen": "Hello!", "rejected": "No."},
]
LLAMA3_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
LLAMA3_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n"
LLAMA3_ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
TOKENIZER = chat_tokenizer()


class World:
    """A folder with a byte tokenizer, and the command run on data that is written there."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.tokenizer = folder / "tokenizer"
        self.prefix = folder / "out" / "data"
        self.said = ""
        self._capture = capture
        TOKENIZER.save_pretrained(self.tokenizer)

    def write(self, rows: Sequence[Any] | bytes, name: str = "data.jsonl") -> Path:
        path = self.folder / name
        lines = rows if isinstance(rows, bytes) else "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(lines)
        return path

    def run(self, *flags: str, handler: str | None = None, **changed: str | None) -> int:
        """The exit code; what it said is in ``said``. A flag given as None is left out."""
        given: dict[str, str | None] = {
            "input": str(self.folder / "data.jsonl"),
            "tokenizer-name-or-path": str(self.tokenizer),
            "output-prefix": str(self.prefix),
            "handler-name": handler,
        } | {name.replace("_", "-"): value for name, value in changed.items()}
        words = [word for name, value in given.items() if value is not None for word in (f"--{name}", value)]
        code = main([*words, *flags])
        self.said = self._capture.readouterr().err
        return code

    def made(self) -> list[dict[str, list[int]]]:
        """The rows of the files."""
        rows = IndexedRows(self.prefix)
        return [rows[i] for i in range(len(rows))]

    def outputs(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.prefix.parent.glob("*"))}


def text(ids: Sequence[int]) -> str:
    """What ids say; labels without those that no loss counts."""
    return str(TOKENIZER.decode([token for token in ids if token != -100]))


def texts(rows: Sequence[Mapping[str, Sequence[int]]], key: str) -> list[str]:
    return [text(row[key]) for row in rows]
