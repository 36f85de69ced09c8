"""The progress line, the final table and the files of a run's report."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from rlxf.assembly.build_run import report_settings
from rlxf.config.schema import RunConfig
from rlxf.core.errors import UnhealthyRun
from rlxf.core.types import Metrics
from rlxf.observe.console import Progressbar, duration, with_error
from rlxf.observe.formulas import read_jsonl
from rlxf.observe.report import Reported, RunReport, make_report
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
    report = make_report(report_settings(config), tmp_path, console)
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


def table_of(
    tmp_path: Path, config: RunConfig, *evaluations: Metrics, earlier: Reported | None = None
) -> list[list[str]]:
    """Head and rows of the final table after evaluations at steps 0, 1, ...; none before a first one that is empty."""
    console, text = plain_console()
    report = make_report(report_settings(config), tmp_path, console, earlier)
    report.evaluated(0, evaluations[0])
    for step, metrics in enumerate(evaluations[1:], start=1):
        report.stepped(step, {**STEP, **metrics})
    report.finished(tmp_path / "policy")
    lines = [line.replace("┃", "│") for line in text.getvalue().splitlines()]
    return [cells for line in lines if (cells := _cells(line))]


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (5.506, 0.1234, "5.506 ± 0.12"), (0.957, 0.0127, "0.957 ± 0.013"), (-3.0, 12.3, "-3.000 ± 12"),
        (1.0, 1.25, "1.000 ± 1.2"), (1.0, 0.0, "1.000 ± 0.000"), (1.0, math.nan, "1.000"),
    ],
)  # fmt: skip
def test_a_standard_error_stands_behind_its_value(value: float, error: float, text: str) -> None:
    assert with_error(value, error) == text


def test_the_table_shows_standard_errors_beside_their_values(tmp_path: Path) -> None:
    config = small_config(training__eval_interval=1, training__train_iters=1, log__tensorboard=False)
    first = {"eval/reward": 1.0, "eval/kl": 0.0, "eval/mine": 0.5, "eval/raw_reward": 1.0}
    last = {"eval/reward": 5.506, "eval/reward_se": 0.1234, "eval/mine": 0.75, "eval/mine_se": 0.02, "eval/odd_se": 3.0}
    head, *rows = table_of(tmp_path, config, first, {**last, "eval/raw_reward": 5.506, "eval/raw_reward_se": 0.1})
    assert head == ["measure", "start", "end"]
    found = {row[0]: row[1:] for row in rows}
    assert found["reward score"] == ["1.000", "5.506 ± 0.12"]
    assert found["mine"] == ["0.500", "0.750 ± 0.020"]
    assert found["odd_se"] == ["-", "3.000"]  # of the user's file: there is no `odd`
    assert not [name for name in found if "reward_se" in name or "mine_se" in name or "before penalties" in name]


def test_with_a_penalty_the_score_before_it_is_a_row(tmp_path: Path) -> None:
    config = small_config(
        training__eval_interval=1, training__train_iters=1, log__tensorboard=False,
        actor_rollout__missing_eos_penalty=0.5,
    )  # fmt: skip
    _, *rows = table_of(tmp_path, config, {"eval/reward": 1.0, "eval/raw_reward": 1.25})
    assert ["reward score before penalties", "1.250", "1.250"] in rows


def test_an_evaluation_alone_has_one_column_of_what_it_measured(tmp_path: Path) -> None:
    config = small_config(training__eval_only=True, log__tensorboard=False)
    earlier = Reported(
        step=3, final_step=3, start={"eval/reward": 1.0, "loss": 0.7}, end={"eval/reward": 2.0, "loss": 0.5}
    )
    head, *rows = table_of(tmp_path, config, {"eval/reward": 3.0, "eval/reward_se": 0.25}, earlier=earlier)
    assert [head, *rows] == [["measure", "value"], ["reward score", "3.000 ± 0.25"]]


def test_what_only_a_later_evaluation_measured_is_not_of_the_start(tmp_path: Path) -> None:
    """As in a run that goes on from a checkpoint of an earlier version, whose evaluations had no standard errors."""
    config = small_config(training__eval_interval=1, training__train_iters=2, log__tensorboard=False)
    later = {"eval/reward": 2.0, "eval/reward_se": 0.5, "eval/greedy_reward": 4.0}
    _, *rows = table_of(tmp_path, config, {"eval/reward": 1.0}, later, later)
    assert ["reward score", "1.000", "2.000 ± 0.50"] in rows
    assert ["reward score, greedy", "-", "4.000"] in rows
    _, *rows = table_of(tmp_path, config, {}, later, later)  # evaluations that began later have a start, too
    assert ["reward score", "2.000 ± 0.50", "2.000 ± 0.50"] in rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("│").split("│")] if line.startswith("│") else []


def test_the_seconds_of_a_resumed_run_are_those_of_all_its_processes(tmp_path: Path) -> None:
    config = small_config(training__train_iters=2, log__tensorboard=False)
    first = make_report(report_settings(config), tmp_path, plain_console()[0])
    before = first.describe()["seconds"]
    assert 0 <= before < 60
    earlier = Reported(step=1, final_step=1, seconds=3675.0)
    console, text = plain_console()
    again = make_report(report_settings(config), tmp_path, console, earlier)
    again.stepped(2, STEP)
    assert again.describe()["seconds"] >= 3675
    again.finished(tmp_path / "policy")
    assert json.loads((tmp_path / "summary.json").read_text())["seconds"] >= 3675
    assert "2 steps in 1:01:1" in text.getvalue()


def ties(step: int) -> Metrics:
    """More and more prompts whose scores are all equal."""
    return {**STEP, "pair/tie_rate": min(step / 40, 0.9)}


def test_a_verdict_is_told_once_and_stands_at_the_end(tmp_path: Path) -> None:
    console, text = plain_console()
    report = make_report(
        report_settings(small_config(log__tensorboard=False, training__train_iters=40)), tmp_path, console
    )
    report.evaluated(0, {})
    for step in range(1, 41):
        report.stepped(step, ties(step))
    report.finished(tmp_path / "policy")
    told = " ".join(text.getvalue().split())
    assert told.count("Ties rising: ") == 2  # when it first held, and below the final table
    (verdict,) = json.loads((tmp_path / "summary.json").read_text())["verdicts"]
    (row,) = read_jsonl(tmp_path / "run.jsonl")
    assert (row["what"], row["name"], row["step"]) == ("verdict", "ties_rising", verdict["step"])
    assert f"step {verdict['step']}: Ties rising: {row['seen']}." in told
    assert f"steps {verdict['step']} to 40: Ties rising: {verdict['seen']}." in told
    assert verdict["last"] == 40


def test_a_run_ends_on_a_verdict_that_it_is_to_end_on_also_when_it_goes_on(tmp_path: Path) -> None:
    def report_of(*stop_on: str, earlier: Reported | None = None) -> RunReport:
        config = small_config(log__tensorboard=False, training__train_iters=80, health__stop_on=stop_on)
        return make_report(report_settings(config), tmp_path, plain_console()[0], earlier)

    report = report_of("collapsed", "ties_rising")

    def go_on() -> None:
        for step in range(1, 81):
            report.require_health()
            report.stepped(step, ties(step))

    message = r"health.stop_on: ties_rising holds since step \d+: .* See docs/health.md#"
    with pytest.raises(UnhealthyRun, match=message) as ended:
        go_on()
    report.close()
    steps = read_jsonl(tmp_path / "metrics.jsonl")[-1]["step"]
    assert 1 < steps < 80
    assert f"since step {steps}" in str(ended.value)
    done = Reported(step=steps, final_step=steps)
    with pytest.raises(UnhealthyRun, match=f"ties_rising holds since step {steps}"):
        report_of("ties_rising", earlier=done).require_health()
    report_of("collapsed", earlier=done).require_health()


def test_texts_with_separators_of_lines_stay_in_their_row(tmp_path: Path) -> None:
    """`str.splitlines` also splits where a text has U+2028 or U+0085, and so do programs of users."""
    config = small_config(log__tensorboard=False, training__eval_interval=1)
    report = make_report(report_settings(config), tmp_path, plain_console()[0])
    answers = [{"prompt": "a\u2028b", "text": "c\u0085d\ne"}]
    report.answered(0, answers)
    report.evaluated(0, {"eval/reward": 1.0})
    report.close()
    assert read_jsonl(tmp_path / "eval.jsonl") == [{"step": 0, "eval/reward": 1.0, "answers": answers}]
    assert len((tmp_path / "eval.jsonl").read_text().splitlines()) == 1
