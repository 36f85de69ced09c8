"""The command that started a run, and the one that goes on with it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

TYPED = "command.json"  # in the run folder

_PLAIN = re.compile(r"[\w./:@%+-]+")  # what Hydra reads as one value without quotes
_REPLACED = ("hydra.run.dir", "training.resume")  # the command that goes on names its own


@dataclass(frozen=True, slots=True)
class Typed:
    """How a run was started: ``python ray_gpt.py`` and its arguments."""

    config_name: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(["python", "ray_gpt.py", *self.arguments])

    def going_on(self, run_dir: Path) -> str:
        """The command that goes on with the run in ``run_dir``."""
        return str(Typed(self.config_name, (*self._kept(), f"hydra.run.dir={_quoted(_short(run_dir))}")))

    def with_last(self) -> str:
        """The command that goes on with the newest unfinished run."""
        return str(Typed(self.config_name, (*self._kept(), "training.resume=last")))

    def _kept(self) -> tuple[str, ...]:
        return tuple(argument for argument in self.arguments if argument.lstrip("+").split("=")[0] not in _REPLACED)


def _short(folder: Path) -> str:
    """Relative to the working folder, where the command is typed again, if it is below it."""
    folder = folder.absolute()
    here = Path.cwd()
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else str(folder)


def _quoted(value: str) -> str:
    """As Hydra reads it."""
    if _PLAIN.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
