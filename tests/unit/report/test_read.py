"""Run folders of every age and in every state are read, and a second look reads what is new."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.made_run import Made, make_run
from rlxf.core.errors import ConfigError
from rlxf.report.content import RunPage
from rlxf.report.read import RunReader, read_run

OLD = Path(__file__).parents[2] / "data" / "checkpoint_de81d37" / "undisturbed"


def test_a_whole_run_is_read(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, Made(steps=40, fault=True)))
    assert run.step == 40
    assert len(run.metrics) == 40
    assert list(run.evaluations.steps) == [0, 20, 40]
    assert [step for step, _ in run.answered] == [0, 20, 40]
    assert len(run.samples) == 5 * 16
    assert [row["what"] for row in run.journal] == ["started", "checkpoint", "started", "ended"]
    assert [row["event"] for row in run.events] == ["lost", "recovered"]
    assert run.config["training"]["train_iters"] == 40
    assert run.summary["steps"] == 40
    assert not run.unread


def test_a_run_of_an_earlier_revision_is_read() -> None:
    run = read_run(OLD)
    assert run.step == 6
    assert run.journal == []


@pytest.mark.parametrize("kept", ["config.yaml", "metrics.jsonl", "run.jsonl", "summary.json", "eval.jsonl"])
def test_any_one_of_its_files_is_enough_for_a_page(tmp_path: Path, kept: str) -> None:
    make_run(tmp_path / "whole", Made(steps=20))
    (tmp_path / "part").mkdir()
    shutil.copy(tmp_path / "whole" / kept, tmp_path / "part")
    content = RunPage(RunReader(tmp_path / "part")).content(now=0.0)
    assert content.data["state"]["step"] in (0, 20)
    json.dumps(content.data, allow_nan=False)


def test_half_lines_and_lines_that_are_no_rows_are_left_out_and_told(tmp_path: Path) -> None:
    make_run(tmp_path, Made(steps=4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('no row\n{"step": 5, "loss": NaN, "grad_norm": 1}\n{"step": 6, "lo')
    (tmp_path / "summary.json").write_text('{"steps": 4, ')
    run = read_run(tmp_path)
    assert run.step == 5
    assert run.unread == {"metrics.jsonl": 1, "summary.json": 1}
    notes = RunPage(RunReader(tmp_path)).content(now=0.0).data["notes"]
    assert "1 lines of metrics.jsonl could not be read and are left out." in notes


def test_a_second_look_adds_what_is_new_and_takes_back_what_was_cut(tmp_path: Path) -> None:
    make_run(tmp_path / "run", Made(steps=20, ends=False))
    make_run(tmp_path / "longer", Made(steps=40, ends=False))
    reader = RunReader(tmp_path / "run")
    assert reader.read().step == 20
    for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl"):
        shutil.copyfile(tmp_path / "longer" / name, tmp_path / "run" / name)
    run = reader.read()
    assert (run.step, len(run.metrics), len(run.samples)) == (40, 40, 5 * 16)
    assert list(run.evaluations.steps) == [0, 20, 40]
    rows = (tmp_path / "longer" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(rows[:15]))
    assert len(reader.read().metrics) == 15


def test_a_run_that_went_back_shows_the_later_row_of_a_step(tmp_path: Path) -> None:
    make_run(tmp_path, Made(steps=20))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "loss": 7.0}\n')
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 10, "prompt": "p", "chosen": "again", "rejected": "b"}\n')
    with (tmp_path / "eval.jsonl").open("a") as file:
        file.write('{"step": 15, "eval/kl": 1.0, "answers": []}\n')
    run = read_run(tmp_path)
    assert list(run.evaluations.steps) == [0, 15]
    assert [step for step, _ in run.answered] == [0, 15]
    assert list(run.metrics.steps) == list(range(1, 12))
    assert run.metrics.last("loss") == 7.0
    assert list(run.samples.steps) == [1] * 16 + [10]
    row = run.samples.row(16)
    assert row is not None
    assert row["chosen"] == "again"


def test_evaluations_that_stand_only_in_rows_of_steps_are_found(tmp_path: Path) -> None:
    make_run(tmp_path, Made(steps=40))
    (tmp_path / "eval.jsonl").unlink()
    run = read_run(tmp_path)
    assert list(run.evaluations.steps) == [20, 40]
    assert run.evaluations.first("eval/win_rate") > 0.5


def test_what_is_no_run_folder_is_told_with_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist; expected the folder of a run, such as outputs/"):
        read_run(tmp_path / "gone")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: is a file; expected"):
        read_run(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"is not the folder of a run: it holds none of config\.yaml, metrics\.jsonl"):
        read_run(tmp_path)
    make_run(tmp_path / "recipe" / "date", Made(steps=2))
    with pytest.raises(ConfigError, match=r"did you mean .*recipe/date"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean .*recipe/date"):
        read_run(tmp_path / "recipe")
