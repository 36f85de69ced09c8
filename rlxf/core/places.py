"""Where recipes and launcher are: beside ``rlxf/`` in a checkout, among the packages if installed from a wheel."""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_SCRIPT = "ray_gpt.py"  # the command of a checkout, which a wheel does not have

CHECKOUT = _PACKAGE.parent if (_PACKAGE.parent / _SCRIPT).is_file() else None
RECIPES = CHECKOUT / "configs" / "rlxf" if CHECKOUT else _PACKAGE / "recipes"
TYPED_TRAIN = ("python", _SCRIPT) if CHECKOUT else ("rlxf", "train")  # as people type it


def train_command() -> list[str]:
    """The beginning of the command that trains from a recipe, for a child process in any folder."""
    if CHECKOUT:
        return [sys.executable, str(CHECKOUT / _SCRIPT)]
    # `workers/`, as pyproject.toml names it in the wheel; -P: what lies in the current folder is not imported.
    return [sys.executable, "-P", "-m", "rlxf_workers", "train"]
