"""docs/health.md says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlxf.health import RULES, Rule
from rlxf.health.rules import EVALUATED, STEPPED
from rlxf.health.thresholds import THRESHOLDS, table
from tests.unit.test_docs import metric_names

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "health.md").read_text(encoding="utf-8")


def section(rule: Rule) -> str:
    """The text under a rule's heading, without marks of code."""
    found = re.search(rf"^## {re.escape(rule.title)}$(.*?)(?=^## )", PAGE, re.MULTILINE | re.DOTALL)
    return found[1].replace("`", "") if found else ""


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_has_a_section_with_its_words(rule: Rule) -> None:
    for words in (rule.name, rule.why, rule.advice):
        assert words in section(rule)


def test_the_table_of_thresholds_is_the_codes() -> None:
    assert "\n".join(table()) in PAGE
    assert {one.rule for one in THRESHOLDS} == set(RULES)


def test_rules_read_metrics_that_are_explained() -> None:
    assert {*STEPPED, *EVALUATED} <= metric_names()
