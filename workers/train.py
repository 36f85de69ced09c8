"""Training from a recipe: what ``python ray_gpt.py`` and ``rlxf train`` do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import hydra
from omegaconf import DictConfig

from rlxf.assembly.planning import Recipe
from rlxf.config.load import load_config
from rlxf.core.allocator import share_heap
from rlxf.core.command import Typed
from rlxf.core.errors import ConfigError, RlxfError
from rlxf.core.garbage import searched_seldom
from rlxf.core.places import RECIPES
from rlxf.planner.estimate import device_of

from . import cli
from .dry_run import dry_run, require_cores


def main(program: Sequence[str], arguments: Sequence[str]) -> int:
    """Train from the recipe that the command line names.

    Args:
        program: the command as it was typed, without its arguments; messages name it.
        arguments: what followed it.

    Returns:
        The exit code: 0, or that of the error, which is printed without a traceback.
    """
    command = cli.read_command(arguments)
    sys.argv[1:] = command.arguments

    @hydra.main(version_base="1.3", config_path=str(RECIPES), config_name=None)
    def job(composed: DictConfig) -> None:
        try:
            start(composed, command, replace(cli.typed(command), program=tuple(program)))
        except RlxfError as error:
            raise SystemExit(cli.report(error)) from None  # Hydra lets this pass without a word of its own
        finally:
            cli.discard_empty(cli.run_folder())

    try:
        cli.check(command, program)
        cli.register()
        job()
    except cli.COMPOSE_ERRORS as error:
        return cli.report(ConfigError(*command.problems, cli.explain(error, command.arguments)))
    except (RlxfError, OSError) as error:  # OSError: a run folder that cannot be made, a full disk
        return cli.report(error)
    return 0


def start(composed: DictConfig, command: cli.Command, typed: Typed) -> None:
    """Check the composed recipe, then run it, or print its plan."""
    raw = cli.plain(composed, command.problems)
    config = load_config(raw, earlier=command.problems, typed=command.keys)
    device_of(config)  # a device that does not exist is told before anything starts
    if config.dry_run:
        dry_run(config, Recipe(name=typed.config_name, typed=cli.typed_values(command, raw)))
        return
    if config.runtime == "ray":
        require_cores(config)  # before torch and Ray are imported
        share_heap()  # before there are threads
    with searched_seldom():
        if config.runtime == "ray":
            from .launch import launch
        else:
            from rlxf.assembly.local import launch
    launch(config, cli.run_folder(), typed)
