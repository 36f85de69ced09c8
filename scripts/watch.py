"""How a run goes, in a terminal: python scripts/watch.py RUN [--once]. scripts/report.py makes the page of a run."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # also without an installed package

from rlxf.report.watch import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
