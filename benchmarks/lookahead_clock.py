"""Quality against wall clock, without and with lookahead: the quick start's recipe on Ray with vLLM.

    python benchmarks/lookahead_clock.py    # -> results/lookahead_clock.json, docs/images/lookahead_clock.svg

The seconds are those of the steps (``timing/all``), without evaluations. The runs take turns: k = 0, k = 1, k = 0, ...
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402 - the repository's root must be importable first
from benchmarks.tiny_learning import RECIPE, evaluations  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "lookahead_clock.json"
SHOWN = ("positive", "win_truth", "valid", "kl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--ahead", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "images" / "lookahead_clock.svg")
    arguments = parser.parse_args()
    subprocess.run([sys.executable, "scripts/build_tiny_world.py"], cwd=ROOT, check=True)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        for seed in arguments.seeds:
            for ahead in arguments.ahead:
                found.append(one_run(seed, ahead, Path(scratch, f"{seed}_{ahead}")))
                last = found[-1]["evaluations"][-1]
                print(
                    f"seed {seed}, k {ahead}: {last['seconds']:.1f} s,", {key: last[key] for key in SHOWN}, flush=True
                )
    RESULTS.write_text(json.dumps({"runs": found, "machine": measure.machine()}, indent=1) + "\n")
    for ahead in arguments.ahead:
        ends = [run["evaluations"][-1] for run in found if run["ahead"] == ahead]
        means = {key: round(fmean(end[key] for end in ends), 3) for key in ("seconds", *SHOWN)}
        print(f"k {ahead}, mean of the last evaluations: {means}")
    draw(found, arguments.plot)


def one_run(seed: int, ahead: int, folder: Path) -> dict[str, Any]:
    done = measure.run(RECIPE, f"training.seed={seed}", f"rollout.lookahead={ahead}", run_dir=folder)
    ends = [0.0, *accumulate(float(row["timing/all"]) for row in done.steps)]
    rows = [
        {"step": int(row["step"]), "seconds": ends[int(row["step"])], **{key: row[key] for key in SHOWN}}
        for row in evaluations(folder)
    ]
    return {"seed": seed, "ahead": ahead, "cpu_s": done.cpu_s, "wall_s": done.wall_s, "evaluations": rows}


def draw(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "rlxf"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    colors = {0: "#4e79a7", 1: "#e15759", 2: "#59a14f"}
    for axis, key in zip(axes, ("positive", "valid"), strict=True):
        named = set[int]()
        for run in found:
            rows, ahead = run["evaluations"], run["ahead"]
            label = None if ahead in named else f"lookahead {ahead}"
            named.add(ahead)
            seconds = [row["seconds"] for row in rows]
            axis.plot(seconds, [row[key] for row in rows], marker="o", ms=3, color=colors.get(ahead), label=label)
        axis.set_title(key, fontsize=10)
        axis.set_ylim(0, 1)
        axis.set_xlabel("seconds of training steps")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
