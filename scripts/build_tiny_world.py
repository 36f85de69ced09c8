"""Make the tiny world of the quick start and the tests: ``scripts/build_tiny_world.py [--fresh] [--out FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also without an installed package

from rlxf.tools.tiny.command import DEFAULT, main  # noqa: E402 (the path comes first)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], default=ROOT / DEFAULT, program="build_tiny_world.py"))
