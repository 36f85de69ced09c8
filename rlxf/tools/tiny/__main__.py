"""``python -m rlxf.tools.tiny``."""

from __future__ import annotations

import sys

from rlxf.tools.tiny.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], program="python -m rlxf.tools.tiny"))
