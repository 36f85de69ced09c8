"""The progress line, the final table and the files of a run's report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rlxf.console import Progressbar, duration
from rlxf.metrics import read_jsonl
from rlxf.report import make_report
from tests.unit.small_run import small_config

STEP = {
    "loss": 0.6931,
    "objective/scores": 1.5,
    "rewards/margins": 0.25,
    "objective/kl": 0.5,
    "rollout/tokens_per_s": 900.0,
}


def plain_console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=100), text


def test_without_a_terminal_a_line_comes_every_interval_and_at_the_end() -> None:
    console, text = plain_console()
    bar = Progressbar(console, first_step=0, num_steps=5, interval=2)
    for step in range(1, 6):
        bar.show(step, STEP)
    bar.close()
    assert [line.split("  ")[0] for line in text.getvalue().splitlines()] == ["step 2/5", "step 4/5", "step 5/5"]


def test_the_line_says_reward_margin_kl_speed_and_time_left() -> None:
    console, _ = plain_console()
    line = Progressbar(console, first_step=0, num_steps=5, interval=1).line(1, STEP)
    assert line.startswith("step 1/5  loss 0.6931  reward 1.500  margin 0.250  kl 0.500  tok/s 900  ETA 0:0")


def test_what_a_step_does_not_have_is_not_on_the_line() -> None:
    console, _ = plain_console()
    line = Progressbar(console, first_step=0, num_steps=5, interval=1).line(5, {"loss": 0.5})
    assert line == "step 5/5  loss 0.5000  ETA 0:00"


def test_in_a_terminal_the_line_is_redrawn_in_place() -> None:
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True)
    bar = Progressbar(console, first_step=0, num_steps=5, interval=1)
    for step in range(1, 6):
        bar.show(step, STEP)
    bar.close()
    final = text.getvalue().split("\r")[-1]
    assert "step 5/5" in final


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3675, "1:01:15"), (3599.9, "1:00:00")])
def test_durations_read_as_clocks_do(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_report_of_a_run(tmp_path: Path) -> None:
    console, text = plain_console()
    config = small_config(training__eval_interval=2, training__train_iters=2, log__tensorboard=False)
    report = make_report(config, tmp_path, console)
    report.evaluated(0, {"eval/reward": 1.0, "eval/kl": 0.0, "eval/positive": 0.25})
    report.stepped(1, {**STEP, "pair/tie_rate": 0.5})
    report.stepped(2, {**STEP, "pair/tie_rate": 0.125, "eval/reward": 3.0, "eval/kl": 7.5, "eval/positive": 0.75})
    (tmp_path / "policy" / "adapter").mkdir(parents=True)
    (tmp_path / "policy" / "adapter" / "weights").write_text("12345")
    report.finished(tmp_path / "policy")

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["policy_files"] == {"adapter/weights": 5}
    assert summary["start"]["eval/reward"] == 1.0
    assert summary["start"]["pair/tie_rate"] == 0.5
    assert summary["end"]["eval/kl"] == 7.5
    assert summary["end"]["pair/tie_rate"] == 0.125

    table = {cells[0]: cells[1:] for line in text.getvalue().splitlines() if (cells := _cells(line))}
    assert table["reward score"] == ["1.000", "3.000"]
    assert table["KL to the reference, nats"] == ["0.000", "7.500"]
    assert table["positive"] == ["0.250", "0.750"]  # what eval.metrics adds
    assert table["tie rate"] == ["0.500", "0.125"]
    assert "EOS rate" not in table  # never measured here

    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]  # steps only: each has a loss
    assert [row["step"] for row in read_jsonl(tmp_path / "eval.jsonl")] == [0, 2]
    assert read_jsonl(tmp_path / "metrics.jsonl")[1]["eval/reward"] == 3.0


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")] if line.startswith("│") else []
