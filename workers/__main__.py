"""``python -m rlxf_workers``: the ``rlxf`` command, by the interpreter that is running."""

from __future__ import annotations

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
