"""`run.jsonl`: starts, checkpoints and ends, one row each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlxf.core.errors import TrainingError
from rlxf.observe.diary import NAME, Diary, started


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()]


def start(folder: Path, step: int = 0) -> Any:
    return started(folder, step=step, num_steps=9, recipe="small", command=["python", "ray_gpt.py"], device="cpu")


def test_a_run_that_ends_well(tmp_path: Path) -> None:
    with start(tmp_path):
        Diary(tmp_path).write("checkpoint", 4, folder="iter_0000004")
    first, saved, last = rows(tmp_path)
    assert (first["what"], first["step"], first["num_steps"], first["recipe"]) == ("started", 0, 9, "small")
    assert first["command"] == ["python", "ray_gpt.py"]
    assert {"python", "torch", "transformers"} <= set(first["versions"])
    assert first["machine"]["devices"] == "cpu"
    assert first["machine"]["memory_gib"] > 0
    assert (saved["what"], saved["step"], saved["folder"]) == ("checkpoint", 4, "iter_0000004")
    assert (last["what"], last["step"], last["exit_code"]) == ("ended", 9, 0)
    assert first["time"] <= saved["time"] <= last["time"]


def test_a_run_that_fails_and_goes_on(tmp_path: Path) -> None:
    error = TrainingError("the loss is nan")
    error.complete_steps = 3
    with pytest.raises(TrainingError), start(tmp_path):
        raise error
    with pytest.raises(KeyboardInterrupt), start(tmp_path, step=3):
        raise KeyboardInterrupt
    found = rows(tmp_path)
    assert [row["what"] for row in found] == ["started", "ended"] * 2
    assert (found[1]["step"], found[1]["exit_code"], found[1]["message"]) == (3, 1, "the loss is nan")
    assert (found[2]["step"], found[3]["step"], found[3]["message"]) == (3, 3, "KeyboardInterrupt()")


def test_a_disk_that_takes_no_row_ends_nothing(tmp_path: Path) -> None:
    with start(tmp_path / "missing"):
        pass
    assert not (tmp_path / "missing").exists()
