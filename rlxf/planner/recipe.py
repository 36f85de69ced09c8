"""A recipe file of what the search has found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlxf.core.errors import ConfigError
from rlxf.core.files import write_text
from rlxf.planner.search import Found

_MARK = "# Not yet run. Written by plan.write; planning again replaces this file."


def write_recipe(path: Path, base: str, typed: Mapping[str, Any], found: Found) -> None:
    """Write a recipe that begins with another one and changes its layout.

    Args:
        path: of the file; it is replaced only if this function wrote it.
        base: name of the recipe that was planned.
        typed: what the command line changed in it, by ``section.key``.
        found: the layout.

    Raises:
        ConfigError: the file is something else, or cannot be written.
    """
    estimate = found.estimate
    title = (
        f"# {base} for {estimate.jobs.num_devices} x {estimate.device.name}, laid out by the planner: by estimate "
        f"{estimate.pace.seconds:.3g} s a step"
    )
    if path.exists() and not _is_ours(path):
        raise ConfigError(f"plan.write = {path}: the file exists and is no recipe of the planner; name another one")
    sections: dict[str, dict[str, Any]] = {}
    for key, value in {**typed, **found.overrides, "plan.device": estimate.device.name}.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = list(value) if isinstance(value, tuple) else value
    body = yaml.safe_dump({"defaults": [base, "_self_"]}, sort_keys=False)
    body += "\n" + yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
    try:
        write_text(path, f"{title}\n{_MARK}\n{body}")
    except OSError as error:
        raise ConfigError(f"plan.write = {path}: cannot be written: {error.strerror or error}") from error


def _is_ours(path: Path) -> bool:
    try:
        return _MARK in path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
