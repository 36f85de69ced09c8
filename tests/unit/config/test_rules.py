"""Options of rules: what is wrong is one line that names the option and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from rlxf.config.rules import RULE_ALIASES, RULE_OPTIONS, Rule, RuleName, rule_options, rule_problems
from rlxf.core.errors import ConfigError
from rlxf.score.rules import RULES

KEY = "reward.sources.mine.options"

WRONG: list[tuple[str, Any, str]] = [
    ("math", {"colum": "x"}, '.colum: unknown option of rule math; did you mean "column"?'),
    ("math", {"solution": "x"}, '.solution: unknown option of rule math; did you mean "column"?'),
    ("math", {"column": 3}, ".column = 3: expected text"),
    ("math", {"timeout_s": 0}, ".timeout_s = 0: expected at least 1"),
    ("math", ["column"], ' = ["column"]: expected a section with options of its own'),
    ("exact", {"ignore_case": "yes"}, '.ignore_case = "yes": expected true or false'),
    ("exact", {"zzz": 1}, ".zzz: unknown option of rule exact; it has column, ignore_case, strip, ignore_punctuation"),
    ("regex", {}, " = {}: expected one of pattern, column; none is set"),
    ("regex", {"pattern": "a", "column": "b"}, "expected one of pattern, column; pattern and column are set"),
    ("regex", {"pattern": "("}, '.pattern = "(": expected a regular expression: missing )'),
    ("regex", {"pattern": 3}, ".pattern = 3: expected text"),
    ("regex", {"pattern": "a", "match": "all"}, '.match = "all": expected one of anywhere, whole'),
    ("regex", {"pattern": "a", "timeout_s": -1.0}, ".timeout_s = -1.0: expected greater than 0"),
    ("regex", {"pattern": "a", "timeout_s": float("inf")}, ".timeout_s = Infinity: expected a finite number"),
    ("json_schema", {"schema": {}}, '.schema: unknown option of rule json_schema; did you mean "inline"?'),
    ("json_schema", {}, "expected one of file, inline, column; none is set"),
    ("json_schema", {"inline": {"type": "objct"}}, '.inline = {"type": "objct"}: expected a JSON schema: $.type: '),
    ("json_schema", {"inline": "{}"}, '.inline = "{}": expected a section with keys of its own'),
    ("json_schema", {"file": "/nowhere.json"}, '.file = "/nowhere.json": expected a file with a JSON schema: No such'),
    ("length", {}, " = {}: expected min, max or both"),
    ("length", {"min": 5, "max": 4}, ' = {"min": 5, "max": 4}: expected a max of at least min = 5'),
    ("length", {"max": -1}, ".max = -1: expected at least 0"),
    ("length", {"max_tokens": 5}, '.max_tokens: unknown option of rule length; did you mean "max"?'),
    ("length", {"max": 5, "unit": "token"}, 'did you mean "tokens"?'),
    ("format", {}, ".parts is required: regular expressions; each must match somewhere in the completion"),
    ("format", {"parts": []}, ".parts = []: expected at least one"),
    ("format", {"parts": ["a", "[", "("]}, '.parts = ["a", "[", "("]: expected a regular expression: '),
    ("classifier", {}, ".load is required: folder of a Hugging Face"),
    ("classifier", {"load": "/nowhere"}, '.load = "/nowhere": expected a Hugging Face folder with a classifier: conf'),
    ("classifier", {"load": "/x", "label": 1.5}, ".label = 1.5: expected the name of a label, or its index"),
    ("classifier", {"load": "/x", "output": "score"}, '.output = "score": expected one of probability, logit'),
    ("think_format_reward", {"a": 1}, ".a: unknown option of rule think_format_reward; it has none"),
    ("repetition_penalty", {"max_penalty": 1.0}, ".max_penalty = 1.0: expected at most 0"),
    ("repetition_penalty", {"ngram_size": 0}, ".ngram_size = 0: expected at least 1"),
    ("get_soft_overlong_punishment", {"max_completion_len": 4}, ".soft_punish_cache is required: "),
    (
        "get_soft_overlong_punishment",
        {"max_completion_len": 4, "soft_punish_cache": 5},
        "expected a soft_punish_cache of at most max_completion_len = 4",
    ),
    (
        "cosine_scaled",
        {"max_len": 9, "max_length": 9},
        '.max_length: unknown option of rule get_cosine_scaled_reward; did you mean "max_len"?',
    ),
    ("accuracy_reward", {"column": None}, ".column = null: expected text"),
    ("reasoning_accuracy", {"reasoning_delimiters": []}, ".reasoning_delimiters = []: expected at least one"),
    ("maths", {}, ': "maths" is no rule; did you mean "math"?'),
    ("zzz", {}, ': "zzz" is no rule; known: math, exact'),
]


@pytest.mark.parametrize(("name", "options", "says"), WRONG)
def test_a_wrong_option_is_one_line(name: str, options: Any, says: str) -> None:
    first = next(rule_problems(KEY, name, options))
    assert first.text.startswith(KEY)
    assert says in first.text
    assert "\n" not in first.text
    assert KEY in first.keys


def test_all_wrong_options_are_named_at_once() -> None:
    options = {"parts": ["(", "["], "in_order": 1, "patial": True}
    assert [problem.text.partition(" ")[0] for problem in rule_problems(KEY, "format", options)] == [
        f"{KEY}.parts", f"{KEY}.in_order", f"{KEY}.patial:",
    ]  # fmt: skip


def test_a_file_with_a_wrong_schema_is_named(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    for content, says in (
        ("{", "it is not JSON"),
        ("[]", "a mapping"),
        ('{"type": 3}', "expected a JSON schema: $.type"),
    ):
        path.write_text(content)
        (line,) = rule_problems(KEY, "json_schema", {"file": str(path)})
        assert line.text.startswith(f"{KEY}.file = ")
        assert says in line.text
    path.write_text("{}")
    assert list(rule_problems(KEY, "json_schema", {"file": str(path)})) == []


@pytest.mark.parametrize(
    ("config", "label", "says"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, None, ".load = "),
        ({"architectures": ["BertForSequenceClassification"]}, None, "one of the labels LABEL_0 (0), LABEL_1 (1)"),
        ({"architectures": ["BertForSequenceClassification"]}, 2, ".label = 2: expected one of the labels LABEL_0 (0)"),
        (
            {"architectures": ["BertForSequenceClassification"], "id2label": {"1": "toxic", "0": "clean"}},
            "toxik",
            'labels clean (0), toxic (1); did you mean "toxic"?',
        ),
        ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "x"}}, None, None),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 1}, None, None),
        ({"architectures": ["BertForSequenceClassification"]}, "LABEL_1", None),
    ],
)
def test_a_classifier_has_the_label(tmp_path: Path, config: dict[str, Any], label: Any, says: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = [problem.text for problem in rule_problems(KEY, "classifier", {"load": str(tmp_path), "label": label})]
    assert found == [] if says is None else says in found[0]


def test_a_dry_run_forgives_missing_files() -> None:
    assert list(rule_problems(KEY, "classifier", {"load": "/nowhere"}, files=False)) == []
    assert list(rule_problems(KEY, "json_schema", {"file": "/nowhere"}, files=False)) == []


def test_every_rule_has_options_and_code() -> None:
    assert set(RULE_OPTIONS) == set(RULES) == set(get_args(RuleName))
    assert set(RULE_ALIASES.values()) <= set(RULES)
    assert not set(RULE_ALIASES) & set(RULES)
    for model in RULE_OPTIONS.values():
        assert model.__doc__
        assert all(field.description for field in model.model_fields.values())


def test_a_short_name_stands_for_its_rule() -> None:
    assert TypeAdapter[RuleName](Rule).validate_python("repetition_penalty") == "get_repetition_penalty_reward"
    assert TypeAdapter[RuleName](Rule).validate_python("math") == "math"


def test_paths_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert rule_options("classifier", {"load": "toxic"}).model_dump()["load"] == str(tmp_path / "toxic")


def test_wrong_options_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match=r"options of rule length = \{\}: expected min, max or both"):
        rule_options("length", {})
