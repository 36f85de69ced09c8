"""Train from a recipe: ``python ray_gpt.py --config-name online_dpo_trainer_tiny [key=value ...]``."""

from __future__ import annotations

import sys

from rlxf.core.command import short
from workers.train import main

if __name__ == "__main__":
    sys.exit(main(("python", short(sys.argv[0])), sys.argv[1:]))
