"""Where a step's time goes: the tiny recipe on Ray with vLLM, and the same loop in one process with the HF engine.

    python benchmarks/step_time.py              # writes results/step_time.json

Each layout runs ``--repeats`` times, in turn (A B B A ...), so that a machine that slows down slows both. Wall seconds
per stage are the run's own ``timing/*``; CPU seconds are read from the operating system, for every process of the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402 - the repository's root must be importable first
from benchmarks.measure import Measured  # noqa: E402

RECIPE = "online_dpo_trainer_tiny"
LAYOUTS = {
    "ray_vllm": ("runtime=ray", "rollout.engine=vllm"),
    "local_hf": ("runtime=local", "rollout.engine=hf"),
    "ray_hf": ("runtime=ray", "rollout.engine=hf"),  # against local_hf: what Ray alone costs
}
STAGES = ("gen", "adv", "ref", "update_actor", "sync", "all")


def main() -> None:
    arguments = parse()
    subprocess.run([sys.executable, "scripts/build_tiny_world.py"], cwd=ROOT, check=True)
    runs: dict[str, list[dict[str, Any]]] = {layout: [] for layout in arguments.layouts}
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        for number, layout in enumerate(in_turn(arguments.layouts, arguments.repeats)):
            print(f"run {number + 1} of {arguments.repeats * len(arguments.layouts)}: {layout}", flush=True)
            runs[layout].append(one_run(layout, Path(scratch, str(number)), arguments))
    report = {
        "recipe": RECIPE,
        "steps": arguments.steps,
        "steps_left_out_at_the_start": arguments.skip,
        "layouts": {layout: summarize(found) for layout, found in runs.items()},
        "machine": measure.machine(),
    }
    for line in table(report):
        print(line)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {arguments.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each layout")
    parser.add_argument("--steps", type=int, default=60, help="steps of each run")
    parser.add_argument("--skip", type=int, default=10, help="first steps of each run that do not count")
    parser.add_argument("--layouts", nargs="+", choices=tuple(LAYOUTS), default=["ray_vllm", "local_hf"])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "step_time.json")
    arguments = parser.parse_args()
    if arguments.skip >= arguments.steps:
        parser.error(f"--skip {arguments.skip} leaves none of {arguments.steps} steps")
    return arguments


def in_turn(layouts: Sequence[str], repeats: int) -> Iterator[str]:
    """Every layout once per repeat, the order turned round each time."""
    for repeat in range(repeats):
        yield from layouts if repeat % 2 == 0 else reversed(layouts)


def one_run(layout: str, run_dir: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    overrides = (f"training.train_iters={arguments.steps}", "training.eval_interval=0")
    done = measure.run(RECIPE, *LAYOUTS[layout], *overrides, run_dir=run_dir)
    return {
        "wall_s": {stage: seconds(done, stage, arguments.skip) for stage in STAGES},
        "cpu_s_per_step": done.cpu_per_step(arguments.skip),
        "start_s": done.start_s,
        "outside_steps_s": done.outside_s,
        "total_wall_s": done.wall_s,
        "total_cpu_s": done.cpu_s,
        "load_before": done.load,
    }


def seconds(done: Measured, stage: str, skip: int) -> list[float]:
    """Wall seconds of a stage in every step that counts. A step without pairs lacks some stages."""
    rows = done.steps[skip:]
    return [float(row[f"timing/{stage}"]) for row in rows if f"timing/{stage}" in row]


def summarize(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    parts = sorted({part for run in runs for part in run["cpu_s_per_step"]})
    return {
        "wall_s_per_step": {stage: over_steps([run["wall_s"][stage] for run in runs]) for stage in STAGES},
        "cpu_s_per_step": {part: over_runs([run["cpu_s_per_step"].get(part, 0.0) for run in runs]) for part in parts}
        | {"all": over_runs([sum(run["cpu_s_per_step"].values()) for run in runs])},
        **{
            name: over_runs([run[name] for run in runs])
            for name in ("start_s", "outside_steps_s", "total_wall_s", "total_cpu_s", "load_before")
        },
    }


def over_steps(runs: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Median and spread over the steps of all runs, and the median of each run."""
    values = sorted(value for run in runs for value in run)
    return {
        "median": statistics.median(values),
        "p10": values[len(values) // 10],
        "p90": values[len(values) * 9 // 10],
        "min": values[0],
        "max": values[-1],
        "steps": len(values),
        "median_of_each_run": [statistics.median(run) for run in runs],
    }


def over_runs(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": list(values)}


def table(report: Mapping[str, Any]) -> Iterator[str]:
    layouts: Mapping[str, Any] = report["layouts"]
    yield "| ms per step, median (10 %-90 %) | " + " | ".join(layouts) + " |"
    yield "|---" * (1 + len(layouts)) + "|"
    for stage in STAGES:
        cells = [found["wall_s_per_step"][stage] for found in layouts.values()]
        texts = [f"{1e3 * c['median']:.0f} ({1e3 * c['p10']:.0f}-{1e3 * c['p90']:.0f})" for c in cells]
        yield f"| wall, {stage} | " + " | ".join(texts) + " |"
    parts = dict.fromkeys(part for found in layouts.values() for part in found["cpu_s_per_step"])
    for part in parts:
        found_parts = [found["cpu_s_per_step"].get(part) for found in layouts.values()]
        texts = [f"{1e3 * cell['median']:.0f}" if cell else "-" for cell in found_parts]
        yield f"| CPU, {part} | " + " | ".join(texts) + " |"
    for name, label in (
        ("start_s", "from command to first step, s"),
        ("outside_steps_s", "outside of steps, s"),
        ("total_wall_s", "whole run, s"),
        ("total_cpu_s", "whole run, CPU s"),
    ):
        texts = [f"{found[name]['median']:.1f}" for found in layouts.values()]
        yield f"| {label} | " + " | ".join(texts) + " |"


if __name__ == "__main__":
    main()
