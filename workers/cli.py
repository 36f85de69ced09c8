"""The command line: settings with which Hydra accepts every schema key, and its errors in plain sentences."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlxf.config.defaults import unset_recipe
from rlxf.config.keys import is_known, plain_layout, unknown_key
from rlxf.core.command import Typed
from rlxf.core.errors import ConfigError, RlxfError, notes_of
from rlxf.core.places import RECIPES
from rlxf.core.words import nearest

from .usage import help_text

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError)

_OPTIONS_WITH_VALUE = {
    *("--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd"),
    *("--package", "-p", "--cfg", "-c", "--experimental-rerun"),
}
_OPTIONS_WITHOUT_VALUE = {"--multirun", "-m", "--run", "-r", "--resolve"}
_OPTIONS_THAT_ONLY_SHOW = {"--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--version"}
_OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[^=+~]+)(?P<value>=.*)?", re.DOTALL)
_SWEEP = re.compile(r"Ambiguous value for argument '\+*(?P<key>[^=]+)=(?P<value>.*)'$", re.MULTILINE)  # Hydra's words
_GROUPS = ("model", "rlxf_schema")  # config groups: chosen, not set


@dataclass(frozen=True, slots=True)
class Command:
    """A command line for Hydra, the unknown keys that were taken out of it, and what was typed."""

    arguments: list[str]
    problems: list[str]
    typed: tuple[str, ...]
    keys: frozenset[str]  # that it sets, in the plain layout; `model` for a choice of model files

    @property
    def only_shows(self) -> bool:
        return any(argument.split("=")[0] in _OPTIONS_THAT_ONLY_SHOW for argument in self.arguments)


def read_command(arguments: Sequence[str]) -> Command:
    """``key=value`` becomes ``++key=value`` for a schema key, whatever the recipe lists; unknown keys are taken out."""
    options: list[str] = []
    overrides: list[str] = []
    problems: list[str] = []
    before = ""
    for argument in arguments:
        if argument.startswith("-") or before in _OPTIONS_WITH_VALUE or _belongs_to(before, argument):
            options.append(argument)
        elif "=" not in argument and not argument.startswith("~"):
            problems.append(f"{argument}: expected key=value, such as training.seed=1")
        else:
            override, problem = _read_override(argument)
            overrides += [override] if override else []
            problems += [problem] if problem else []
        before = argument
    given = {override.split("=")[0] for override in overrides}
    ours = [f"{key}={value}" for key, value in _HYDRA_DEFAULTS.items() if key not in given]
    keys = frozenset(override.lstrip("+").split("=")[0] for override in overrides if "=" in override)
    return Command([*ours, *overrides, *options], problems, tuple(arguments), keys)


def _belongs_to(option: str, argument: str) -> bool:
    """Whether a bare word is the value of an option whose value is optional (``--info defaults``) or not known here."""
    return option.startswith("-") and "=" not in option + argument and option not in _OPTIONS_WITHOUT_VALUE


_HYDRA_DEFAULTS = {"hydra/output": "rlxf", "hydra/job_logging": "rlxf", "hydra.output_subdir": "null"}


def _read_override(argument: str) -> tuple[str | None, str | None]:
    """The override as Hydra shall see it, or what is wrong with its key."""
    match = _OVERRIDE.fullmatch(argument)
    if match is None:
        return argument, None
    sign, key, value = match["sign"] or "", match["key"], match["value"]
    path = plain_layout(key.split("."))
    if key.startswith("hydra") or "/" in key or "@" in key or key in _GROUPS:
        return argument, None
    if not is_known(path):
        text = unknown_key(path)
        return None, f"{key} = {value[1:]}: {text}" if value else f"{key}: {text}"
    name = ".".join(path)
    if sign != "~":
        return f"++{name}{value}", None
    return (f"++{name}=null" if value is None and len(path) > 1 else argument), None


def register() -> None:
    """Tell Hydra the schema (``rlxf_schema`` in a recipe's defaults list) and where runs go."""
    store = ConfigStore.instance()
    store.store(name="rlxf_schema", node=unset_recipe())
    folder = "outputs/${hydra.job.config_name}/"
    output = {
        "run": {"dir": folder + "${now:%Y-%m-%d_%H-%M-%S}"},
        "sweep": {"dir": folder + "multirun_${now:%Y-%m-%d_%H-%M-%S}", "subdir": "${hydra.job.num}"},
    }
    store.store(group="hydra/output", name="rlxf", node=output, package="hydra")
    handler = {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stderr"}
    job_logging = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(levelname)s: %(message)s"}},
        "handlers": {"console": handler},
        "root": {"level": "WARNING", "handlers": ["console"]},
        "loggers": {"rlxf": {"level": "INFO"}, __package__: {"level": "INFO"}},
    }
    store.store(group="hydra/job_logging", name="rlxf", node=job_logging, package="hydra.job_logging")
    warnings.filterwarnings(
        "ignore", message=".*Defaults list is missing `_self_`"
    )  # then the recipe itself comes last
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing; `explain` makes one line of it


def plain(composed: DictConfig, problems: Sequence[str]) -> dict[str, Any]:
    """The composed recipe as plain data, its interpolations resolved."""
    try:
        raw = OmegaConf.to_container(composed, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(*problems, _interpolation(error)) from error
    assert isinstance(raw, dict)
    return {str(key): value for key, value in raw.items()}


def _interpolation(error: BaseException) -> str:
    key = getattr(error, "full_key", None) or "recipe"
    return f"{key}: {_first_line(error)}"


def run_folder() -> Path:
    """This job's folder (``hydra.run.dir``), which Hydra has made."""
    return Path(HydraConfig.get().runtime.output_dir)


def typed(command: Command) -> Typed:
    """How this job was started; a job of a sweep, with the values that it has in it."""
    hydra, name = HydraConfig.get(), str(HydraConfig.get().job.config_name)
    if hydra.mode is not RunMode.MULTIRUN:
        return Typed(name, command.typed)
    flags = [a for a in command.typed if a.startswith("--") and "=" in a]  # --config-dir=recipes
    for option in sorted(_OPTIONS_WITH_VALUE):
        if option in command.typed:
            flags += [option, _value_of((option,), command.typed)]
    return Typed(name, (*flags, *(override.lstrip("+") for override in hydra.overrides.task)))


def typed_values(command: Command, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the command line sets in the sections of a recipe, by ``section.key``, for a recipe that repeats it."""
    found = {}
    for key in sorted(command.keys):
        section, _, name = key.partition(".")
        values = raw.get(section)
        if section not in ("plan", "hydra", *_GROUPS) and isinstance(values, dict) and name in values:
            found[key] = values[name]
    return found


def discard_empty(folder: Path) -> None:
    """Remove the folder of a run that did not start, and the folders of ``outputs`` that it alone was in."""
    root = Path.cwd() / "outputs"
    for empty in (folder, *folder.parents):
        if not (empty == folder or empty.is_relative_to(root)) or not empty.is_dir() or any(empty.iterdir()):
            return
        empty.rmdir()


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """One clear line for an error of Hydra, OmegaConf or the YAML reader."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        return _missing(error, arguments)
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        where = f"{mark.name}:{mark.line + 1}" if mark else "recipe"
        return f"{where}: not valid YAML: {' '.join(part for part in (error.problem, error.context) if part)}"
    if isinstance(error, OmegaConfBaseException):
        return _interpolation(error)
    if isinstance(error, ConfigCompositionException) and (sweep := _SWEEP.match(str(error))):
        key, value = sweep["key"], sweep["value"]
        return f"{key} = {value}: several values; a list is typed {key}=[{value}], and --multirun makes a run of each"
    if isinstance(error, OverrideParseException):
        return f"{error.override.lstrip('+')}: cannot be read as key=value: {_first_line(error)}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _missing(error: MissingConfigException, arguments: Sequence[str]) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    name = name.removesuffix(".yaml")
    known = sorted(file.stem for folder in _folders(arguments) for file in (folder / group).glob("*.yaml"))
    if group and not known:
        return f"{group!r}, named in the defaults list, is no group of recipes; known: model"
    near = nearest(name, known)
    what = f"{group} {name!r}, named in the defaults list," if group else f"recipe {name!r}"
    hint = f'did you mean "{near}"? ' if near else ""
    return f"{what} does not exist; {hint}known: {', '.join(known) or 'none'}"


def _folders(arguments: Sequence[str]) -> list[Path]:
    """The folders where recipes are looked for."""
    given = [_value_of(names, arguments) for names in (("--config-path", "-cp"), ("--config-dir", "-cd"))]
    return [RECIPES, *(Path(folder).expanduser() for folder in given if folder)]


def require_recipe(arguments: Sequence[str]) -> None:
    """Hydra without a recipe composes an empty one, and fails with a traceback on bytes that are no text.

    Raises:
        ConfigError: no recipe is named, or it is not UTF-8 text.
    """
    recipe = _value_of(("--config-name", "-cn"), arguments)
    helps = {"--help", "-h", "--hydra-help", "--version", "--shell-completion", "-sc", "--experimental-rerun"}
    if not recipe and not helps & {argument.split("=")[0] for argument in arguments}:
        known = sorted(file.stem for folder in _folders(arguments) for file in folder.glob("*.yaml"))
        raise ConfigError(f"--config-name is required: the recipe to run; known: {', '.join(known)}")
    for file in (folder / f"{recipe.removesuffix('.yaml')}.yaml" for folder in _folders(arguments) if recipe):
        try:
            if file.is_file():
                file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: expected UTF-8 text, got another byte at position {error.start}") from error


def _value_of(options: Sequence[str], arguments: Sequence[str]) -> str:
    """The value that the command line gives to an option, which has several names; empty when it gives none."""
    for i, argument in enumerate(arguments):
        option, _, value = argument.partition("=")
        if option in options:
            return value or next(iter(arguments[i + 1 :]), "")
    return ""


def check(command: Command, program: Sequence[str]) -> None:
    """Mistakes that can be found before Hydra composes; ``--help`` is answered, and ends the program.

    ``program``: the command as it was typed, without its arguments; the answer names it.

    Raises:
        ConfigError: there is no such recipe, or a command that only shows the recipe has wrong keys.
    """
    if not {"--help", "-h"}.isdisjoint(command.typed):
        sys.stdout.write(help_text(program, _folders(command.typed)))
        raise SystemExit(0)
    require_recipe(command.arguments)
    if command.only_shows and command.problems:
        raise ConfigError(*command.problems)


def report(error: RlxfError | OSError) -> int:
    """Print an error as plain lines, with its notes; its exit code."""
    logging.getLogger(__name__).debug("stopped", exc_info=error)
    sys.stderr.write("".join(f"{line}\n" for line in (error, *notes_of(error))))
    return error.exit_code if isinstance(error, RlxfError) else 1
