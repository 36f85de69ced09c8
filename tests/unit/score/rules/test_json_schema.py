"""Completions that must be JSON of a form."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from rlxf.core.errors import ConfigError
from rlxf.score.rules import make_rule
from rlxf.score.rules.json_schema import first_block

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


def score(options: dict[str, Any], *texts: str, **columns: list[Any]) -> list[float | None]:
    return make_rule("json_schema", options)(["p"] * len(texts), list(texts), [[1]] * len(texts), **columns)


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ('{"age": 3}', 1.0),
        (' {"age": 3}\n', 1.0),
        ('{"age": "3"}', 0.0),
        ("{}", 0.0),
        ("no JSON", 0.0),
        ("", 0.0),
        ('Here:\n```json\n{"age": 3}\n```\nDone.', 1.0),
        ('Here:\n~~~\n{"age": 3}\n~~~', 1.0),
        ('```\n{"age": 3}', 1.0),
        ('```\n{"age": "x"}\n```\n```\n{"age": 3}\n```', 0.0),  # the first block counts
        ('Here: {"age": 3}', 0.0),
        ('{"age": NaN}', 0.0),
        ('{"age": ' + "1" * 5000 + "}", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_a_completion_fits_or_not(text: str, result: float) -> None:
    assert score({"inline": SCHEMA}, text) == [result]


def test_a_schema_from_a_file_or_a_column(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    assert score({"file": str(path)}, '{"age": 3}', "3") == [1.0, 0.0]
    rows = [SCHEMA, json.dumps(SCHEMA), {"type": "integer"}, None, "{", {"type": "no such type"}, "[]"]
    assert score({"column": "form"}, *['{"age": 3}'] * 7, form=rows) == [1.0, 1.0, 0.0, None, None, None, None]


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": r"^(a|a)*$"},
        {"type": "object", "patternProperties": {r"^(a|a)*$": {}}},
        {"type": "object", "patternProperties": {r"^(a|a)*$": {}}, "additionalProperties": False},
    ],
)
def test_a_pattern_of_a_schema_that_never_ends_is_given_up(schema: dict[str, Any]) -> None:
    word = "a" * 60 + "!"
    text = json.dumps({word: 1} if "type" in schema else word)
    assert score({"inline": schema, "timeout_s": 0.2}, text) == [None]


def test_patterns_of_a_schema_mean_what_they_mean_elsewhere() -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"pattern": "^[a-z]+$"}},
        "patternProperties": {"^n_": {"type": "integer"}},
        "additionalProperties": False,
    }
    texts = ['{"name": "x"}', '{"name": "X"}', '{"n_a": 1}', '{"n_a": "1"}', '{"other": 1}', '{"name": "x", "n_b": 2}']
    assert score({"inline": schema}, *texts) == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]


def test_a_schema_elsewhere_is_not_fetched(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[Any] = []

    def refuse(address: Any, *_: Any, **__: Any) -> None:
        asked.append(address)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert score({"inline": {"$ref": "http://127.0.0.1:9/schema.json"}}, "{}", "{}") == [None, None]
    assert asked == []
    assert caplog.text.count("its completions get no score") == 1


def test_a_schema_of_itself_gives_no_score() -> None:
    assert score({"inline": {"$ref": "#"}}, "{}") == [None]


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    with pytest.raises(ConfigError, match="holds no JSON schema"):
        score({"file": str(path)}, "{}")
    path.write_text('{"type": "objct"}')
    with pytest.raises(ConfigError, match="'objct' is not valid"):
        score({"file": str(path)}, "{}")


def test_the_first_block_of_a_text() -> None:
    assert first_block("a\n```python\nx\n\ny\n```\n```\nz\n```") == "x\n\ny"
    assert first_block("  ```\nx\n  ```  ") == "x"
    assert first_block("```\nx\n```json\ny\n```") == "x\n```json\ny"
    assert first_block("no `code` block") is None
