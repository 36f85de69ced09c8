"""A recipe as it was written -> the same recipe in plain layout, with known keys only and without unset ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlxf.config.keys import (
    ALIASES,
    MOVED_FILES,
    NOT_YET,
    REFERENCE_LAYOUT,
    ROLES,
    SECTIONS,
    TOP_LEVEL,
    WHY_NOT_YET,
    is_known,
    is_legacy,
    is_not_yet,
    unknown_key,
)
from rlxf.config.problems import Problem, show, wrong

logger = logging.getLogger(__name__)

Section = dict[str, Any]
_MANDATORY = "???"  # how a recipe marks a value that its user must give


def normalise(raw: Mapping[str, Any]) -> tuple[Section, list[Problem]]:
    """The recipe's known keys that are set (``null`` is unset), and every key that cannot be understood."""
    problems: list[Problem] = []
    recipe: Section = {}
    for name, value in _in_plain_layout(raw, problems).items():
        if name not in TOP_LEVEL:
            problems.append(wrong(str(name), value, unknown_key((str(name),))))
        elif name not in SECTIONS and name != "model":
            if value is not None:
                recipe[name] = value
        elif value is not None and not isinstance(value, Mapping):
            problems.append(wrong(name, value, "expected a section with keys of its own"))
        elif name == "model":
            recipe[name] = _models(value or {}, problems)
        else:
            recipe[name] = _known(name, name, value or {}, problems)
    _warn_of_legacy(raw)
    _resolve_aliases(recipe, problems)
    _follow_moved_files(recipe)
    return recipe, problems


def _in_plain_layout(raw: Mapping[str, Any], problems: list[Problem]) -> Section:
    """Moves ``actor_rollout_ref.{actor_rollout,ref}`` to the top; where both layouts set a key, the plain one wins."""
    plain: Section = {name: value for name, value in raw.items() if name != REFERENCE_LAYOUT}
    nested = raw.get(REFERENCE_LAYOUT) or {}
    if not isinstance(nested, Mapping):
        problems.append(wrong(REFERENCE_LAYOUT, nested, "expected the sections actor_rollout and ref"))
        return plain
    for name, section in nested.items():
        if name not in ("actor_rollout", "ref"):
            key = f"{REFERENCE_LAYOUT}.{name}"
            problems.append(wrong(key, section, "unknown section; actor_rollout_ref holds actor_rollout and ref"))
        elif isinstance(section, Mapping) and isinstance(plain.get(name) or {}, Mapping):
            own = {key: value for key, value in (plain.get(name) or {}).items() if value is not None}
            plain[name] = {**section, **own}
        elif section is not None:
            problems.append(wrong(f"{REFERENCE_LAYOUT}.{name}", section, "expected a section with keys of its own"))
    return plain


def _models(models: Mapping[str, Any], problems: list[Problem]) -> Section:
    known: Section = {}
    for name, shape in models.items():
        if isinstance(shape, Mapping):
            known[str(name)] = _known("model", f"model.{name}", shape, problems)
            padded = known[str(name)].pop("padded_vocab_size", None)  # what reference model files call it
            if padded is not None:
                known[str(name)].setdefault("vocab_size", padded)
        else:
            problems.append(
                wrong(f"model.{name}", shape, "expected a section with a model's shape, such as num_layers")
            )
    return known


def _known(section: str, prefix: str, values: Mapping[str, Any], problems: list[Problem]) -> Section:
    """The set keys of one section; legacy keys are left out, unknown ones reported."""
    known: Section = {}
    for name, value in values.items():
        key, full = str(name), f"{prefix}.{name}"
        if is_legacy(section, key):
            continue
        if is_not_yet(section, key):
            off = NOT_YET.get(key)
            if value not in (None, off):
                why = WHY_NOT_YET.get(key, WHY_NOT_YET["num_experts"])
                expected = f"{why}; leave it out" + (f" or set it to {show(off)}" if off is not None else "")
                problems.append(wrong(full, value, expected))
        elif not is_known((*prefix.split("."), key)):
            problems.append(wrong(full, value, unknown_key((*prefix.split("."), key))))
        elif value == _MANDATORY:
            problems.append(
                wrong(full, value, "the recipe leaves this value to you; give it, for example on the command line")
            )
        elif value is not None:
            known[key] = value
    return known


def _legacy_keys(raw: Mapping[str, Any]) -> Iterator[str]:
    plain = _in_plain_layout(raw, [])
    for section in SECTIONS:
        values = plain.get(section)
        if isinstance(values, Mapping):
            yield from (f"{section}.{key}" for key in values if is_legacy(section, str(key)))
    models = plain.get("model")
    for name, shape in models.items() if isinstance(models, Mapping) else ():
        if isinstance(shape, Mapping):
            yield from (f"model.{name}.{key}" for key in shape if is_legacy("model", str(key)))


def _warn_of_legacy(raw: Mapping[str, Any]) -> None:
    found = list(_legacy_keys(raw))
    if found:
        logger.warning("accepted without effect: %s", ", ".join(found))


def _follow_moved_files(recipe: Section) -> None:
    """A recipe of an earlier version may name a file of the library that has moved since."""
    for (section, key), (old, module) in MOVED_FILES.items():
        value = recipe.get(section, {}).get(key)
        if isinstance(value, str) and value.endswith(old) and not Path(value).exists():
            logger.warning("%s.%s = %s has moved; the module %s is used", section, key, value, module)
            recipe[section][key] = module


def _resolve_aliases(recipe: Section, problems: list[Problem]) -> None:
    for (section, alias), (target, key) in ALIASES.items():
        if alias not in recipe.get(section, {}):
            continue
        value = recipe[section].pop(alias)
        field = SECTIONS[target].model_fields[key]
        if target not in ROLES and recipe.get(target, {}).get(key) == field.default:  # the composed recipe has it
            del recipe[target][key]
        own = recipe.setdefault(target, {}).setdefault(key, value)
        if own != value:
            expected = f"{target}.{key} = {own} has another value; keep {target}.{key} and remove this key"
            problems.append(wrong(f"{section}.{alias}", value, expected))
        else:
            logger.warning("%s.%s is read as %s.%s", section, alias, target, key)
