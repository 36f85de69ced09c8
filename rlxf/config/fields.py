"""Conversions and checks of single values, shared by the schema's sections."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class LocalPath:
    """Marks a field that names something on disk; ``load.py`` makes it absolute, ``folders.py`` checks that it exists.

    ``output`` need not exist. ``words``: values that are no path.
    """

    kind: Literal["file", "folder", "output"]
    words: tuple[str, ...] = ()


def finite(value: Any) -> Any:
    """The value as float; refuses nan and infinity, leaves what is no number to pydantic."""
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
    """YAML and JSON know only lists."""
    return tuple(value) if isinstance(value, list) else value


def as_list(value: Any) -> Any:
    """One name, or a list of names, as a tuple."""
    return (value,) if isinstance(value, str) else as_tuple(value)


def as_stage(value: Any) -> Any:
    """``orm`` (outcome reward model) is what the reference implementation calls ``rm``."""
    return "rm" if value == "orm" else value


def as_names(value: Any) -> Any:
    """One name or a list of them; ``none`` is none."""
    if isinstance(value, str):
        return () if value == "none" else (value,)
    return as_tuple(value)
