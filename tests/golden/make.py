"""Store the first steps of the tiny recipe anew: ``python tests/golden/make.py``, after a change that may move them.

A change that moves the curve shows both curves and says why (``git diff tests/golden``).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.runs import tiny


def main() -> None:
    tiny.build_world()
    with tempfile.TemporaryDirectory() as scratch:
        live = tiny.run_tiny(Path(scratch, "live"), "log.rollouts=true", "training.eval_interval=0")
        rows = (live.folder / "rollouts.jsonl").read_text().splitlines(keepends=True)
        tiny.ROLLOUTS.write_text("".join(rows[: tiny.NUM_STEPS * tiny.STEP_SIZE]))
        content = {
            "recipe": "online_dpo_trainer_tiny runtime=local training.seed=1",
            "models": tiny.model_files(),
            "loss": live.losses[: tiny.NUM_STEPS],
            "replay_loss": tiny.replay(Path(scratch, "replay")).losses,
        }
    tiny.CURVE.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {tiny.CURVE}, {tiny.ROLLOUTS}")


if __name__ == "__main__":
    main()
