"""Filling a prompt and two answers into a text. What is filled in is data: a placeholder inside it stays as it is."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from rlxf.config.kinds import JudgeAnswer
from rlxf.core.errors import ConfigError

_PLACEHOLDER = re.compile(r"\{(prompt|first|second)\}")


def load_template(path: Path | None, form: JudgeAnswer) -> str:
    """The text of a template file, or the one that comes with rlxf for this form of answer.

    Raises:
        ConfigError: the file cannot be read as UTF-8.
    """
    if path is None:
        return (resources.files("rlxf.judge.templates") / f"{form}.txt").read_text(encoding="utf-8")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"judge.template = {path}: cannot be read as UTF-8 text: {error}") from error


def fill(template: str, *, prompt: str, first: str, second: str) -> str:
    """The template with prompt and answers in place of ``{prompt}``, ``{first}`` and ``{second}``."""
    values = {"prompt": prompt, "first": first, "second": second}
    return _PLACEHOLDER.sub(lambda found: values[found[1]], template)
