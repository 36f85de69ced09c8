"""Train from a recipe: ``python ray_gpt.py --config-name online_dpo_trainer_tiny [key=value ...]``."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from rlxf.config.load import load_config
from rlxf.core.errors import ConfigError, RlxfError
from workers import cli
from workers.dry_run import dry_run, require_cores


def start(composed: DictConfig, command: cli.Command) -> None:
    """Check the composed recipe, then run it, or print its plan."""
    config = load_config(cli.plain(composed, command.problems), earlier=command.problems, typed=command.keys)
    if config.dry_run:
        dry_run(config)
    elif config.runtime == "ray":
        require_cores(config)  # before torch and Ray are imported
        from workers.launch import launch

        launch(config, cli.run_folder(), cli.typed(command))
    else:
        from rlxf.assembly.local import launch

        launch(config, cli.run_folder(), cli.typed(command))


def main() -> int:
    """The exit code: 0, or that of the error, which is printed without a traceback."""
    command = cli.read_command(sys.argv[1:])
    sys.argv[1:] = command.arguments

    @hydra.main(version_base="1.3", config_path="configs/rlxf", config_name=None)
    def job(composed: DictConfig) -> None:
        try:
            start(composed, command)
        except RlxfError as error:
            raise SystemExit(cli.report(error)) from None  # Hydra lets this pass without a word of its own
        finally:
            cli.discard_empty(cli.run_folder())

    try:
        cli.check(command)
        cli.register()
        job()
    except cli.COMPOSE_ERRORS as error:
        return cli.report(ConfigError(*command.problems, cli.explain(error, command.arguments)))
    except (RlxfError, OSError) as error:  # OSError: a run folder that cannot be made, a full disk
        return cli.report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
