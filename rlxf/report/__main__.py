"""``python -m rlxf.report RUN [RUN ...]``."""

import sys

from rlxf.report.command import main

if __name__ == "__main__":
    sys.exit(main())
