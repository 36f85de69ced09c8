"""The rules on recorded runs of the tiny world, healthy ones and ones made to fail (``benchmarks/verdicts.py``)."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import verdicts
from benchmarks.verdict_kinds import HEALTHY, KINDS
from rlxf.health import RULES

RUNS = {name: verdicts.recorded(name) for name in KINDS}
ALL = [run for runs in RUNS.values() for run in runs]


@pytest.mark.parametrize("kind", KINDS)
def test_a_recorded_run_raises_what_is_expected_of_its_kind(kind: str) -> None:
    assert RUNS[kind]
    assert {run.seed: wrong for run in RUNS[kind] if (wrong := verdicts.wrong(run))} == {}


def test_there_are_enough_runs() -> None:
    assert len(ALL) >= 60
    assert len(RUNS["good"]) >= 10
    assert sum(len(RUNS[kind.name]) for kind in HEALTHY) >= 15
    failing = {rule: sum(rule in KINDS[run.kind].must for run in ALL) for rule in RULES}
    assert min(failing.values()) >= 3, failing


def test_a_run_that_has_left_the_grammar_raises_a_verdict_before_its_end() -> None:
    broken = [run for run in ALL if run.broken]
    assert len(broken) >= 10
    for run in broken:
        assert min(verdict.step for verdict in run.verdicts) < len(run.rows)


def test_the_page_shows_what_the_rules_say_of_the_runs() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "health.md").read_text(encoding="utf-8")
    for table in (verdicts.by_rule(ALL), verdicts.by_kind(ALL)):
        assert "\n".join(table) in page
