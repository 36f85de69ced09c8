"""How soon a lost or hung worker is noticed, how long it takes until it is back, and whether any number changes.

Whole runs on Ray with small random models and the HF engine; the faults come at chosen calls (``tests/cluster``).

    OMP_NUM_THREADS=1 python benchmarks/recovery.py            # -> results/recovery.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rlxf.observe.formulas import read_jsonl  # noqa: E402
from tests.cluster.conftest import Recipe, environment, make_recipe  # noqa: E402
from tests.cluster.faults import Fault, run  # noqa: E402
from tests.runs.small import CLOCKED  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "recovery.json"
COMMON = (
    *("training.train_iters=12", "training.save_interval=3", "log.rollouts=true", "log.tensorboard=false"),
    *("resilience.max_recoveries=20", "resilience.min_deadline_s=5"),
)
PLACES = (
    ("infer", "generate", 3), ("infer", "load_bucket", 6), ("ref", "logps", 5), ("reward", "score", 7),
    ("train", "update", 9), ("train", "send_bucket", 13),
)  # fmt: skip


def faults(how: Any) -> list[Fault]:
    """One fault at each place; a call that hangs is noticed by its phase's median, which takes earlier calls."""
    return [Fault(role=role, method=method, call=call, how=how) for role, method, call in PLACES]


def measure(
    recipe: Recipe, folder: Path, how: str, lookahead: int, undisturbed: dict[int, Any]
) -> list[dict[str, Any]]:
    """A row for each fault of a run."""
    planned, run_dir = faults(how), folder / "run"
    command = recipe.command(run_dir, *COMMON, f"rollout.lookahead={lookahead}")
    folder.mkdir()
    done = run(command, folder / "plan", planned, environment(), timeout_s=600)
    if done.returncode:
        raise SystemExit(done.stderr)
    exact = numbers(run_dir) == undisturbed[lookahead]
    events = read_jsonl(run_dir / "events.jsonl")
    rows = []
    for index, fault in enumerate(planned):
        began = (folder / "plan" / f"{index}.done").stat().st_mtime
        later = [row for row in events if at(row) >= began - 0.05]
        noticed = next(row for row in later if row["event"] in ("lost", "hung"))
        back = next(row for row in later[later.index(noticed) :] if row["event"] in ("recovered", "rebuilt"))
        rows.append(
            {
                "role": fault.role, "phase": fault.method, "how": how, "lookahead": lookahead, "exact": exact,
                "noticed_s": round(at(noticed) - began, 2), "back_s": round(at(back) - at(noticed), 2),
                "steps_lost": back["steps_lost"],
            }
        )  # fmt: skip
    return rows


def at(row: dict[str, Any]) -> float:
    return datetime.fromisoformat(row["time"]).timestamp()


def numbers(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(run_dir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKED)} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--how", nargs="+", default=["kill", "stop", "hang"], choices=["kill", "stop", "hang"])
    parser.add_argument("--lookahead", nargs="+", type=int, default=[0, 1])
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        recipe, undisturbed = make_recipe(Path(scratch)), {}
        for lookahead in options.lookahead:
            folder = Path(scratch) / f"undisturbed{lookahead}"
            command = recipe.command(folder, *COMMON, f"rollout.lookahead={lookahead}", "runtime=local")
            subprocess.run(command, env=environment(), check=True, capture_output=True)
            undisturbed[lookahead] = numbers(folder)
        for how in options.how:
            for lookahead in options.lookahead:
                rows += measure(recipe, Path(scratch) / f"{how}{lookahead}", how, lookahead, undisturbed)
    RESULTS.write_text(json.dumps({"min_deadline_s": 5, "cores": os.cpu_count(), "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(" | ".join(str(value) for value in row.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
