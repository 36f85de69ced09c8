"""Conversions and checks of single values, shared by the schema's sections."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlxf.config.problems import unquoted


@dataclass(frozen=True, slots=True)
class LocalPath:
    """Marks a field that names something on disk; ``load.py`` makes it absolute, ``folders.py`` checks that it exists.

    ``data`` is a file or a folder; ``output`` need not exist. ``words``: values that are no path. ``module``: the name
    of a Python module that is installed, such as ``rlxf.tools.tiny.truth``, stands for its file.
    """

    kind: Literal["file", "folder", "data", "output"]
    words: tuple[str, ...] = ()
    module: bool = False


def finite(value: Any) -> Any:
    """The value as float. Refuses nan and infinity; a value that is not a number is left to pydantic."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


def as_pool(value: Any) -> Any:
    """Processes per node as a tuple: ``4`` is ``(4,)``, ``[4, 4]`` is ``(4, 4)``."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    if isinstance(value, list | tuple) and not value:
        raise ValueError("processes per node, such as 4 or [4, 4]")
    return as_tuple(value)


def as_tuple(value: Any) -> Any:
    """A list as a tuple: YAML and JSON know only lists."""
    return tuple(value) if isinstance(value, list) else value


def as_list(value: Any) -> Any:
    """One name, or a list of names, as a tuple."""
    return (value,) if isinstance(value, str) else as_tuple(value)


def as_beta(value: Any) -> Any:
    """One number above 0, or a tuple of them; a list of one is that number."""
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("a number, or a list of numbers: one for each epoch, the last one for all later epochs")
        numbers = tuple(_beta(number) for number in value)
        return numbers[0] if len(numbers) == 1 else numbers
    return _beta(value)


def _beta(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = f", got text{unquoted(value)}" if isinstance(value, str) else ""
        raise ValueError(f"a number, or a list of numbers{hint}")
    number: float = finite(value)
    if number <= 0:
        raise ValueError("greater than 0")
    return number


def as_stops(value: Any) -> Any:
    """One text or a list of them as a tuple, none of which is empty."""
    texts = as_list(value)
    if isinstance(texts, tuple) and any(not isinstance(text, str) or not text for text in texts):
        raise ValueError('a list of texts that are not empty, such as ["###"]')
    return texts


STRUCTURES = ("regex", "json", "choice", "grammar")


def as_structure(value: Any) -> Any:
    """One of ``STRUCTURES`` with its value; of ``json`` the schema itself, also where a file was named."""
    expected = f"a mapping with one of {', '.join(STRUCTURES)}, such as {{regex: '[0-9]+'}}"
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) != 1 or (kind := next(iter(value))) not in STRUCTURES:
        raise ValueError(expected)
    content = value[kind]
    if kind == "json":
        return {kind: _json_schema(content)}
    if kind == "choice":
        texts = list(content) if isinstance(content, list | tuple) else []
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError("choice to be a list of texts, of which a completion is one; numbers need quotes")
        return {kind: texts}
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"{kind} to be a text that is not empty")
    if kind == "regex" and "\\p" not in content:  # which Python's module does not know
        try:
            re.compile(content)
        except re.error as error:
            raise ValueError(f"regex to be a regular expression: {error}") from None
    return {kind: content}


def _json_schema(content: Any) -> dict[str, Any]:
    """A JSON schema: as a mapping, as text, or in a file."""
    where = "json"
    if isinstance(content, str) and not content.lstrip().startswith("{"):
        where = content
        try:
            content = Path(content).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"json to be a JSON schema, or a file that holds one: {where}: {error.strerror}") from None
    try:
        schema = json.loads(content) if isinstance(content, str) else content
    except ValueError as error:
        raise ValueError(f"{where} to hold a JSON schema: {error}") from None
    if not isinstance(schema, dict) or not schema:
        raise ValueError(f"{where} to hold a JSON schema: a mapping that is not empty")
    return schema


def as_stage(value: Any) -> Any:
    """``orm`` (outcome reward model) is what the reference implementation calls ``rm``."""
    return "rm" if value == "orm" else value


def as_names(value: Any) -> Any:
    """One name or a list of names as a tuple; ``none`` gives an empty one."""
    if isinstance(value, str):
        return () if value == "none" else (value,)
    return as_tuple(value)


def as_paths(value: Any) -> Any:
    """One path or a list of them as a tuple."""
    if value in ("", []):
        raise ValueError("a path, or a list of paths")
    return (value,) if isinstance(value, str) else as_tuple(value)


def as_shares(value: Any) -> Any:
    """Megatron's ``95,5,0`` as (95.0, 5.0, 0.0); a missing share is 0."""
    expected = "three shares (train, validation, test), such as [95,5,0]; not negative, the first above 0"
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int | float) else value
    try:
        shares = [float(part) for part in parts]
    except (TypeError, ValueError):
        raise ValueError(expected) from None
    shares += [0.0] * (3 - len(shares))
    if len(shares) != 3 or not all(math.isfinite(share) and share >= 0 for share in shares) or not shares[0]:
        raise ValueError(expected)
    return tuple(shares)


MAP_KEYS = ("prompt", "query", "response", "history", "system", "chosen", "rejected")


def as_map_keys(value: Any) -> Any:
    """A mapping, or one in JSON, from the keys of ``MAP_KEYS`` to columns; an empty text means no column."""
    try:
        mapping = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"a mapping, or one in JSON: {error}") from None
    if mapping is None:
        return None
    if not isinstance(mapping, dict) or not all(isinstance(column, str) for column in mapping.values()):
        raise ValueError(f"a mapping from {', '.join(MAP_KEYS)} to names of columns")
    if unknown := [key for key in mapping if key not in MAP_KEYS]:
        raise ValueError(f"a mapping from {', '.join(MAP_KEYS)} to names of columns; {unknown[0]!r} is none of them")
    if mapping.get("prompt") == "":
        raise ValueError("a column for 'prompt', which cannot be empty")
    return mapping


def as_options(value: Any) -> Any:
    """A mapping, or one in JSON."""
    try:
        mapping = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"a mapping, or one in JSON: {error}") from None
    if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
        raise ValueError("a mapping, or one in JSON")
    try:
        json.dumps(mapping, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("values that JSON has: text, finite numbers, true, false, null, lists and mappings") from None
    return mapping
