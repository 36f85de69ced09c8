"""What the planner says and what runs take: CPU seconds of each stage, and which layout of one machine is fastest.

    python benchmarks/planner.py                               # both parts -> results/planner.json
    python benchmarks/planner.py --parts stages --apply        # and write the shares into configs/rlxf/device/cpu.yaml
    python benchmarks/planner.py --parts regret --layouts "one process" "four roles" --steps 3

``stages``: a random model of 26M parameters (and 2.5M, without a bar) through the product's own roles in fp32, engine
hf. The shares of a core that the planner needs come from two cases in one rank; other lengths, other passes, DP2 and
TP2 are predicted with them. Figures are CPU seconds of all ranks, beside the rate of products that was probed in the
same process. ``regret``: twelve layouts of a whole run of the 26M model on this machine, wall seconds of a step. The
machine must be quiet for it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, planner_regret, planner_stages, random_world, turns  # noqa: E402
from rlxf.core.places import RECIPES  # noqa: E402
from rlxf.planner.device import FOLDER, Device  # noqa: E402
from rlxf.platform.probe import num_cores, probe_cpu  # noqa: E402

BAR, REGRET_BAR = 0.25, 0.10
CPU_FILE = RECIPES / FOLDER / "cpu.yaml"
SOURCE = "benchmarks/results/planner.json"


def main() -> None:
    arguments = parse()
    os.environ.update(measure.environment())
    report: dict[str, Any] = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    report |= {"bar": BAR, "regret_bar": REGRET_BAR, "machine": measure.machine()}
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        if "stages" in arguments.parts:
            earlier = report["stages"]["cases"] if arguments.refit else None
            report["stages"] = stages(Path(scratch, "stages"), arguments.repeats, earlier)
            if arguments.apply:
                apply(report["stages"]["shares"], CPU_FILE)
        if "regret" in arguments.parts:
            report["regret"] = layouts(Path(scratch, "regret"), arguments)
    turns.write_results(arguments.output, report, table(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [layout.name for layout in planner_regret.LAYOUTS]
    parser.add_argument("--parts", nargs="+", choices=("stages", "regret"), default=["stages", "regret"])
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each stage")
    parser.add_argument("--apply", action="store_true", help="write the shares into the file of the device cpu")
    parser.add_argument("--refit", action="store_true", help="stages: predict anew what the results measured")
    parser.add_argument("--layouts", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, default=5, help="of each layout's run; the first one does not count")
    parser.add_argument("--output", type=Path, default=ROOT / SOURCE)
    return parser.parse_args()


def stages(folder: Path, repeats: int, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    """``earlier``: cases that were measured before; None: measure them."""
    cases = planner_stages.CASES
    load = os.getloadavg()[0]
    worlds = {size: random_world.build(folder / size, shape) for size, shape in planner_stages.SHAPES.items()}
    found = planner_stages.run(cases, worlds, repeats) if earlier is None else planner_stages.again(earlier)
    shares = planner_stages.fit(cases, found, worlds)
    compared = planner_stages.compare(cases, found, worlds, shares)
    name, error = planner_stages.worst(compared)
    return {"shares": shares, "cases": compared, "worst": name, "worst_error": error, "load_before": load}


def apply(shares: Mapping[str, float], path: Path) -> None:
    """Write the shares into a file of a device, with their source and today's date."""
    text = path.read_text()
    for key, value in shares.items():
        line = f'{key}: {{value: {value:.3g}, source: "{SOURCE}", date: "{date.today().isoformat()}"}}'
        text, count = re.subn(rf"^{key}:.*(\n  .*)*", line, text, flags=re.MULTILINE)
        assert count == 1, key
    path.write_text(text)


def layouts(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = [layout for layout in planner_regret.LAYOUTS if layout.name in arguments.layouts]
    load = os.getloadavg()[0]
    device = Device.load("cpu").with_probe(probe_cpu()).with_cores(num_cores())
    found = planner_regret.run(chosen, folder, arguments.steps, device)
    figures = {key: getattr(device.file, key).value for key in probe_cpu()}
    return {"layouts": found, **planner_regret.regret(found), "figures": figures, "load_before": load}


def table(report: Mapping[str, Any]) -> Iterator[str]:
    if "stages" in report:
        part = report["stages"]
        yield "shares: " + ", ".join(f"{key} {value:.3g}" for key, value in part["shares"].items())
        yield "| predicted / measured | " + " | ".join(planner_stages.STAGES) + " |"
        yield "|---" * (1 + len(planner_stages.STAGES)) + "|"
        for name, case in part["cases"].items():
            cells = (case["stages"].get(stage) for stage in planner_stages.STAGES)
            texts = (f"{cell['ratio']:.2f}" if cell else "-" for cell in cells)
            yield f"| {name}{'' if case['barred'] else ' (no bar)'} | " + " | ".join(texts) + " |"
        yield f"furthest off: {part['worst']}, {part['worst_error']:.0%}; bar {report['bar']:.0%}"
    if "regret" in report:
        part = report["regret"]
        yield "| layout | predicted, s | measured, s | CPU s per step |"
        yield "|---" * 4 + "|"
        for name, found in sorted(part["layouts"].items(), key=lambda item: item[1]["step_s"]):
            cells = (found[key] for key in ("step_s", "measured_s", "cpu_s_per_step"))
            yield f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |"
        yield (
            f"first choice: {part['first_choice']}, {part['regret']:.0%} slower than {part['fastest']}; "
            f"bar {report['regret_bar']:.0%}; rank correlation {part['rank_correlation']:.2f}"
        )


if __name__ == "__main__":
    main()
