"""Other values for keys of a recipe that was checked: the recipe with them, and the words to type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlxf.config.checks import mistakes
from rlxf.config.schema import RunConfig

Overrides = Mapping[str, Any]  # ``section.key`` -> value, as the checked recipe holds it


def changed(config: RunConfig, overrides: Overrides) -> RunConfig | None:
    """The recipe with other values; None if the checks of recipes refuse it."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    update = {section: getattr(config, section).model_copy(update=values) for section, values in sections.items()}
    found = config.model_copy(update=update)
    return None if mistakes(found) else found


def different(config: RunConfig, overrides: Overrides) -> dict[str, Any]:
    """Those of the values that the recipe does not have already."""
    return {key: value for key, value in overrides.items() if value_of(config, key) != value}


def value_of(config: RunConfig, key: str) -> Any:
    """The recipe's value of ``section.key``."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def typed(overrides: Overrides) -> list[str]:
    """As words of the command line: ``resource_pool.ref=[8,8]``."""
    return [f"{key}={_word(value)}" for key, value in overrides.items()]


def _word(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{','.join(map(_word, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)
