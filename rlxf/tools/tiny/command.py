"""The command that makes the tiny world: ``rlxf tiny``, ``python -m rlxf.tools.tiny``, scripts/build_tiny_world.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlxf.core.errors import RlxfError
from rlxf.tools.tiny.assets import ensure, read_report

DEFAULT = Path("models") / "tiny"  # where the recipes look for it, below the current folder


def main(arguments: Sequence[str], *, default: Path = DEFAULT, program: str = "rlxf tiny") -> int:
    """Make the tiny world unless it is there; the exit code.

    Args:
        arguments: of the command line.
        default: the folder when the command line names none.
        program: the command, for its help.
    """
    parser = argparse.ArgumentParser(
        prog=program, description="Make the tiny world: tokenizer, first policy, reward model, prompts."
    )
    parser.add_argument("--out", type=Path, default=default, help="folder (default: models/tiny)")
    parser.add_argument("--fresh", action="store_true", help="make it anew even if it is there")
    given = parser.parse_args(arguments)
    try:
        made = ensure(given.out, fresh=given.fresh, say=_say)
    except RlxfError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    if not made:
        _say(f"{given.out} is up to date")
        return 0
    report = read_report(given.out)
    first = report["first_policy"]
    _say(
        f"done in {report['cpu_seconds']['all']:.0f} CPU s: "
        f"first policy {first['valid']:.1%} valid and {first['positive']:.1%} positive, "
        f"reward model right on {report['reward_accuracy']:.1%} of unseen pairs"
    )
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"[tiny world] {line}\n")
    sys.stdout.flush()
