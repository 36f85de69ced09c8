"""The command that started a run, and the one that continues it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

TYPED = "command.json"  # in the run folder

_PLAIN = re.compile(r"[\w./:@%+-]+")  # what Hydra reads as one value without quotes
_REPLACED = ("hydra.run.dir", "training.resume")  # the continuing command sets them itself


@dataclass(frozen=True, slots=True)
class Typed:
    """How a run was started."""

    config_name: str
    arguments: tuple[str, ...]
    program: tuple[str, ...] = ("python", "ray_gpt.py")  # or ``rlxf train``, of an installed package

    def __str__(self) -> str:
        return shlex.join([*self.program, *self.arguments])

    def going_on(self, run_dir: Path) -> str:
        """The command that continues the run in ``run_dir``."""
        return self._with(f"hydra.run.dir={_quoted(short(run_dir))}")

    def with_last(self) -> str:
        """The command that continues the newest unfinished run."""
        return self._with("training.resume=last")

    def _with(self, override: str) -> str:
        kept = [argument for argument in self.arguments if argument.lstrip("+").split("=")[0] not in _REPLACED]
        return str(replace(self, arguments=(*kept, override)))


def short(path: Path | str) -> str:
    """A path, relative to the working folder if it is below it: the user types the command again there."""
    path = Path(path).absolute()
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _quoted(value: str) -> str:
    """A value, quoted as Hydra needs it."""
    if _PLAIN.fullmatch(value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
