"""The ``rlxf`` command of an installed package. Its first word says what to do; what that needs is imported then."""

from __future__ import annotations

import sys

from rlxf import __version__

USAGE = """usage: rlxf train --config-name RECIPE [key=value ...]    train from a recipe
       rlxf tiny [--out FOLDER] [--fresh]                 make the tiny world, on which the *_tiny recipes train
       rlxf --version
"""


def main() -> int:
    """Do what the first word of the command line says; the exit code."""
    word, *arguments = sys.argv[1:] or ["nothing"]
    if word == "train":
        from .train import main as train

        return train(("rlxf", "train"), arguments)
    if word == "tiny":
        from rlxf.tools.tiny.command import main as tiny

        return tiny(arguments)
    if word in ("--version", "--help", "-h"):
        sys.stdout.write(f"rlxf {__version__}\n" if word == "--version" else USAGE)
        return 0
    sys.stderr.write(f"expected train or tiny after rlxf, got {word}\n{USAGE}")
    return 2
