"""The command that makes a page: ``python scripts/report.py RUN [RUN ...]``, ``python -m rlxf.report RUN``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import webbrowser
from collections.abc import Sequence
from pathlib import Path

from rlxf.core.errors import ConfigError, RlxfError
from rlxf.report.make import LEAST_INTERVAL_S, NAME, NICE, Page, follow


def read_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="report",
        description="One page of a run, or of several beside each other. Runs may go on, have ended, or be old.",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run folder")
    parser.add_argument(
        "--output", type=Path, help=f"the page (RUN/{NAME}; of several runs {NAME} in the current folder)"
    )
    parser.add_argument("--open", choices=("yes", "no"), default="no", help="open the page in a browser (no)")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="renew the page while the run goes on; ends when standard input is closed",
    )
    parser.add_argument(
        "--interval",
        type=float,
        default=LEAST_INTERVAL_S,
        help=f"least seconds between two pages of --follow ({LEAST_INTERVAL_S:g})",
    )
    found = parser.parse_args(arguments)
    if found.follow and len(found.runs) > 1:
        parser.error(f"--follow takes one run, got {len(found.runs)}")
    if found.interval <= 0:
        parser.error(f"--interval: expected seconds above 0, got {found.interval:g}")
    return found


def run(arguments: argparse.Namespace) -> Path:
    """Make the page; where it is.

    Raises:
        ConfigError: a folder is none of a run, or the page has no place.
        DiskError: the disk does not take it.
    """
    folders: list[Path] = list(dict.fromkeys(arguments.runs))
    default = folders[0] / NAME if len(folders) == 1 else Path(NAME)
    output: Path = arguments.output or default
    if output.is_dir():
        raise ConfigError(f"--output {output}: is a folder; expected the name of a file, such as {output / NAME}")
    page = Page(folders, output)
    if arguments.follow:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # they reach the whole group; the page ends after the run
        os.nice(max(NICE - os.nice(0), 0))
        follow(page, folders[0], sys.stdin.buffer, interval_s=arguments.interval)
    else:
        page.write()
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; an error is one line."""
    found = read_arguments(arguments)
    try:
        output = run(found)
    except RlxfError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    if not found.follow:
        size = output.stat().st_size
        sys.stdout.write(f"{output}: {size / 1e6:.1f} MB\n")
        if found.open == "yes":
            webbrowser.open(output.absolute().as_uri())
    return 0
