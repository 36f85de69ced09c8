"""A page of a run, or of several beside each other: python scripts/report.py RUN [RUN ...] [--output FILE]."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also without an installed package

from rlxf.report.command import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
