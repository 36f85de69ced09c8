"""Verdicts on the page are those of the rules on the rows of the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.made_run import Made, make_run
from rlxf.health import Health, facts_of
from rlxf.report.content import RunPage
from rlxf.report.read import RunReader
from rlxf.report.verdicts import Verdicts


def test_verdicts_are_those_of_the_rules(tmp_path: Path) -> None:
    reader = RunReader(make_run(tmp_path, Made(steps=120, kl=60)))
    run = reader.read()
    health = Health(facts_of(run.config))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    health.restore(rows, [json.loads((tmp_path / "eval.jsonl").read_text().splitlines()[0])])
    found = Verdicts().update(run)
    assert [verdict["name"] for verdict in found] == [verdict.name for verdict in health.verdicts]
    assert "over_optimised" in [verdict["name"] for verdict in found]
    marks = [mark for mark in RunPage(reader).content(now=0.0).data["marks"] if mark["kind"] == "verdict"]
    assert [mark["step"] for mark in marks] == sorted(verdict["step"] for verdict in found)


def test_evaluations_that_are_in_no_row_of_a_step_are_given_to_the_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[str, int]] = []
    add = Health.add
    monkeypatch.setattr(Health, "add", lambda self, step, row: given.append(("step", step)) or add(self, step, row))
    monkeypatch.setattr(Health, "add_evaluation", lambda self, step, row: given.append(("evaluation", step)) or [])
    make_run(tmp_path, Made(steps=20))
    Verdicts().update(RunReader(tmp_path).read())
    assert given[:3] == [("evaluation", 0), ("step", 1), ("evaluation", 1)]  # `add` looks for one in every row
    assert given.count(("evaluation", 20)) == 1
    (tmp_path / "metrics.jsonl").unlink()  # as of a run that only evaluates
    given.clear()
    Verdicts().update(RunReader(tmp_path).read())
    assert given == [("evaluation", 0), ("evaluation", 20)]


def test_a_healthy_run_has_none(tmp_path: Path) -> None:
    run = RunReader(make_run(tmp_path, Made(steps=60, kl=4))).read()
    assert Verdicts().update(run) == []


def test_a_second_look_is_a_first_look_at_all(tmp_path: Path) -> None:
    make_run(tmp_path / "whole", Made(steps=120, kl=60))
    make_run(tmp_path / "run", Made(steps=120, kl=60))
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(rows[:70]))
    reader, verdicts = RunReader(tmp_path / "run"), Verdicts()
    verdicts.update(reader.read())
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.writelines(rows[70:])
    whole = Verdicts().update(RunReader(tmp_path / "whole").read())
    assert verdicts.update(reader.read()) == whole
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(rows[:10]))
    assert verdicts.update(reader.read()) == []
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(rows))
    assert verdicts.update(reader.read()) == whole
