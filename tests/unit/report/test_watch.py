"""A run in a terminal."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlxf.report.watch import main, sparkline, visible
from tests.data_world import write_rows


def made_run(folder: Path, **ended: Any) -> Path:
    """A run of 60 steps whose scores tie more and more, and whose texts would steer a terminal."""
    start = {"what": "started", "time": "2026-01-02T03:04:05+00:00", "step": 0, "num_steps": 100, "recipe": "mine"}
    folder.mkdir()
    write_rows(folder / "run.jsonl", [start, *([{"what": "ended", "time": start["time"], **ended}] if ended else [])])
    rows = [
        {"step": step, "loss": 0.69, "pair/tie_rate": min(step / 50, 1.0), "timing/all": 2.0, "timing/gen": 1.5,
         "timing/idle_train": 0.25, "rollout/tokens_per_s": 1234.5, "objective/kl": step / 10}
        for step in range(1, 61)
    ]  # fmt: skip
    write_rows(folder / "metrics.jsonl", rows)
    pair = {"step": 50, "prompt": [{"role": "user", "content": "say\x1b[31m"}], "chosen": "good\x07", "rejected": "bad"}
    write_rows(folder / "samples.jsonl", [{**pair, "chosen_score": 1.25, "rejected_score": None}])
    event = {"time": "2026-01-02T03:05:06.789+00:00", "event": "lost", "message": "infer rank 0 died"}
    write_rows(folder / "events.jsonl", [event])
    return folder


def shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(folder), "--once"]) == 0
    return capsys.readouterr().out


def test_a_look_at_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = shown(made_run(tmp_path / "run", step=60, exit_code=75, message="devices are missing"), capsys)
    assert "mine  devices are missing  step 60 of 100" in text
    assert "Ties rising, since step " in text
    assert "seconds of the newest step: gen 1.50" in text
    assert "idle: train 25%" in text
    assert "1,234 sampled tokens per second" in text
    assert "2026-01-02 03:05:06  infer rank 0 died" in text
    assert "pair of step 50: say\\x1b[31m" in text
    assert "chosen (1.250): good\\x07" in text
    assert "rejected: bad" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_a_run_that_goes_on_says_how_long(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = shown(made_run(tmp_path / "run"), capsys)
    assert "step 60 of 100  2:00, 1:20 left" in text


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'none'}: does not exist")
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--interval", "0"])


def test_a_new_run_without_a_step_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.jsonl").write_text(
        json.dumps({"what": "started", "step": 0, "num_steps": 3, "recipe": "mine"}) + "\n"
    )
    assert "step 0 of 3" in shown(tmp_path, capsys)


@given(st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), max_size=200))
def test_a_curve_is_one_line_of_bounded_length(values: list[float]) -> None:
    line = sparkline(range(1, len(values) + 1), values)
    assert len(line) <= 32
    assert all(one in " ▁▂▃▄▅▆▇█" for one in line)


def test_a_curve_goes_from_its_smallest_to_its_largest_number() -> None:
    assert sparkline([1, 2, 3, 4], [0.0, 7.0, math.nan, 3.0]) == "▁█ ▄"
    assert sparkline([1, 2], [0.0, 2.2e-313]) == "▁█"  # 1 over their difference is no float
    assert sparkline([1, 2], [5.0, 5.0]) == "▁▁"
    assert sparkline([], []) == ""


@given(st.text())
def test_no_text_steers_a_terminal(text: str) -> None:
    assert all(one.isprintable() or one == "\n" for one in visible(text))
