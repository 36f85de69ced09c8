"""A rule for completions that must be JSON of a given form."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import regex
from jsonschema_specifications import REGISTRY
from referencing.exceptions import Unresolvable

from rlxf.config.rules import JsonSchemaOptions
from rlxf.core.errors import ConfigError
from rlxf.core.types import Text
from rlxf.score.rules.match import Search
from rlxf.score.rules.rule import column, text_of

log = logging.getLogger(__name__)

_FENCES = ("```", "~~~")


class JsonSchema:
    """1 where the completion, or the first fenced block in it, is JSON that fits the schema; else 0.

    None where a row has no valid schema, where the schema refers to one that it does not hold (nothing is fetched from
    the network), or where one of its patterns takes too long.

    Raises:
        ConfigError: the file with the schema is missing or wrong.
    """

    def __init__(self, options: JsonSchemaOptions) -> None:
        self._column = options.column
        self._search = Search("json_schema", options.timeout_s)
        self._classes: dict[Any, Any] = {}  # jsonschema's class of a draft -> ours
        self._fixed = None if options.column is not None else self._validator(_schema(options))
        self._said = False

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        if self._column is None:
            return [self._score(text_of(text), self._fixed) for text in completions]
        schemas = column(self._column, columns, "json_schema")
        return [
            self._score(text_of(text), self._of_row(schema)) for text, schema in zip(completions, schemas, strict=True)
        ]

    def _of_row(self, schema: Any) -> Any:
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            return self._validator(schema) if isinstance(schema, Mapping) else None
        except (ValueError, jsonschema.SchemaError):
            return None

    def _validator(self, schema: Mapping[str, Any]) -> Any:
        base = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        base.check_schema(schema)
        if base not in self._classes:
            self._classes[base] = self._with_deadline(base)
        return self._classes[base](schema, registry=REGISTRY)  # the drafts; without it, it would ask the network

    def _with_deadline(self, base: Any) -> Any:
        """jsonschema's class, with our search for the keywords that hold a pattern."""

        def pattern(validator: Any, wanted: str, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
            if isinstance(value, str) and self._search(wanted, value) is None:
                yield jsonschema.ValidationError(f"{value!r} does not match {wanted!r}")

        def properties(validator: Any, wanted: Any, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
            for name, inner in wanted.items():
                for key, item in value.items() if isinstance(value, dict) else ():
                    if self._search(name, key) is not None:
                        yield from validator.descend(item, inner, path=key, schema_path=name)

        def others(validator: Any, wanted: Any, value: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
            known, names = schema.get("properties", {}), schema.get("patternProperties", {})
            for key, item in value.items() if isinstance(value, dict) else ():
                if key not in known and not any(self._search(name, key) for name in names):
                    yield from validator.descend(item, wanted, path=key)

        keywords = {"pattern": pattern, "patternProperties": properties, "additionalProperties": others}
        return jsonschema.validators.extend(base, keywords)

    def _score(self, text: str, validator: Any) -> float | None:
        if validator is None:
            return None
        try:
            return float(validator.is_valid(json_in(text)))
        except (ValueError, ArithmeticError):  # no JSON, or numbers without end
            return 0.0
        except (TimeoutError, regex.error):
            return None
        except (Unresolvable, RecursionError) as error:
            if not self._said:
                self._said = True
                why = (
                    "refers to itself without end" if isinstance(error, RecursionError) else f"cannot be used: {error}"
                )
                log.warning("rule json_schema: a schema %s; its completions get no score", why)
            return None


def _schema(options: JsonSchemaOptions) -> Mapping[str, Any]:
    if options.file is None:
        assert options.inline is not None  # the options hold one of the two
        return options.inline
    try:
        found = json.loads(Path(options.file).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            jsonschema.validators.validator_for(found).check_schema(found)
            return found
        problem = "expected a mapping"
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        problem = str(error).splitlines()[0]
    raise ConfigError(f"rule json_schema: {options.file} holds no JSON schema: {problem}")


def json_in(text: str) -> Any:
    """The value of a text that is JSON, or else of the first fenced block in it.

    Raises:
        ValueError: neither is JSON. NaN and Infinity are none, and what is nested too deeply to be read is none.
    """
    try:
        return _read(text)
    except ValueError:
        block = first_block(text)
        if block is None:
            raise
        return _read(block)


def _read(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def first_block(text: str) -> str | None:
    """What is between the first two fences (lines that begin with three backticks or tildes); None if there is none.

    The second fence may be missing: the block then ends with the text.
    """
    fence = ""
    inside: list[str] = []
    for line in text.splitlines():
        bare = line.strip()
        if fence and bare.startswith(fence) and not bare.strip(fence[0]):
            return "\n".join(inside)
        if fence:
            inside.append(line)
        else:
            fence = next((mark for mark in _FENCES if bare.startswith(mark)), "")
    return "\n".join(inside) if fence else None
