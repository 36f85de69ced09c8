"""Who works when, without and with lookahead: two short runs of the 26M model, drawn from their ``trace.json``.

    python benchmarks/trace_picture.py                 # -> docs/images/lookahead.svg

Four roles on Ray with vLLM on two cores, 8 prompts with 2 completions of 64 tokens per step. Both halves of the picture
show the same number of seconds, so a shorter step shows as more steps.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, random_world  # noqa: E402 - the root must be importable first
from benchmarks.sides import SPEC, FixedLengthWorker, Ours, Work  # noqa: E402

STEPS, FIRST = 8, 3  # steps of a run; the first one that is drawn
ROWS = {"infer": "engine", "reward": "reward model", "ref": "reference", "train": "trainer"}
STAGES = {
    "gen": ("sample", "#4e79a7"),
    "adv": ("score", "#f28e2b"),
    "ref": ("reference", "#76b7b2"),
    "update_actor": ("update", "#e15759"),
    "sync": ("push", "#59a14f"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "images" / "lookahead.svg")
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        world = random_world.build(Path(scratch, "world"), "26M")
        found = [boxes(trace(world, ahead, Path(scratch, f"run{ahead}"))) for ahead in (0, 1)]
    draw(found, output)
    print(f"written: {output}")


def trace(world: random_world.World, ahead: int, folder: Path) -> Path:
    """The trace of a run in a process of its own."""
    overrides = (("rollout", "lookahead", ahead), ("training", "train_iters", STEPS), ("log", "trace", True))
    work = Work(workloads=("fixed",), max_new_tokens=64)
    side = Ours(world=world, work=work, runtime="ray", engine="vllm", overrides=overrides)
    os.environ.update(measure.environment())
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(side, folder))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the run with lookahead {ahead} ended with exit code {process.exitcode}")
    return folder / "trace.json"


def _run(side: Ours, folder: Path) -> None:
    import torch

    from rlxf.config.load import load_config
    from workers import launch

    torch.set_num_threads(1)
    os.environ[SPEC] = json.dumps(asdict(side.work))
    launch.WORKERS["infer"] = FixedLengthWorker
    launch.launch(load_config(side.recipe()), folder)


def boxes(path: Path) -> list[dict[str, Any]]:
    """Row, stage, step, start and length in seconds of what the workers did."""
    events = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    found = [
        {
            "row": rows[event["tid"]].split()[0],
            "stage": event["name"],
            "step": event["args"]["step"],
            "start": event["ts"] / 1e6,
            "length": event["dur"] / 1e6,
        }
        for event in events
        if event["ph"] == "X" and event["name"] in STAGES
    ]
    origin = min(box["start"] for box in found if box["step"] == FIRST and box["stage"] == "gen" and box["row"] in ROWS)
    return [{**box, "start": box["start"] - origin} for box in found if box["row"] in ROWS]


def draw(found: list[list[dict[str, Any]]], output: Path) -> None:
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "rlxf"  # the same file for the same boxes
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    end = max(box["start"] + box["length"] for box in found[0] if box["step"] <= FIRST + 2)
    figure, axes = plt.subplots(2, 1, figsize=(10, 4.2), sharex=True)
    for axis, boxes_of_run, ahead in zip(axes, found, (0, 1), strict=True):
        for box in boxes_of_run:
            y = [*ROWS].index(box["row"])
            axis.barh(y, box["length"], left=box["start"], color=STAGES[box["stage"]][1], edgecolor="white", height=0.8)
            middle = box["start"] + box["length"] / 2
            if box["length"] > 0.04 * end and 0 <= middle <= end:
                axis.text(middle, y, str(box["step"]), ha="center", va="center", fontsize=8, color="white")
        axis.set_yticks(range(len(ROWS)), ROWS.values())
        axis.invert_yaxis()
        axis.set_xlim(0, end)
        axis.set_title(f"rollout.lookahead={ahead}", loc="left", fontsize=10)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[1].set_xlabel("seconds; the numbers are driver steps")
    handles = [Patch(color=color, label=name) for name, color in STAGES.values()]
    figure.legend(handles=handles, ncol=len(handles), loc="upper right", fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(output, metadata={"Date": None})


if __name__ == "__main__":
    main()
