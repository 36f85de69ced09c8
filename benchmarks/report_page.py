"""What the page of a run costs: bytes, seconds and memory to make it, seconds until it is open in Chromium.

    OMP_NUM_THREADS=1 python benchmarks/report_page.py                  # writes results/report_page.json
    python benchmarks/report_page.py --cases steps_10000 --repeats 3

The run folders are made (`made_run.py`). ``first`` is a command of its own, its start included; ``again`` is what a
process beside a run takes when a step and its pairs have come. ``opened`` is the time from the address to a page that
answers to the keyboard, its first charts drawn, in a new headless Chromium context.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402 - the repository's root must be importable first
from benchmarks.made_run import Made, make_run  # noqa: E402
from rlxf.report.make import Page  # noqa: E402
from rlxf.report.read import RunReader  # noqa: E402
from tests.page.browser import chromium, url_of  # noqa: E402

CASES = {
    "quick_start": Made(steps=100),
    "steps_1000": Made(steps=1000, samples_interval=8, tokens=64),  # 2,016 pairs
    "steps_1000_long": Made(steps=1000, samples_interval=8, tokens=512),
    "steps_10000": Made(steps=10_000, eval_interval=100, samples_interval=10, tokens=64),  # 16,016 pairs
}
MAKE = """
import re, sys, time
from pathlib import Path
from rlxf.report.command import main
if main([sys.argv[1]]):
    sys.exit(1)
print(time.process_time(), re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""
SEVERAL = 3  # runs on the page of the last case


def main() -> None:
    arguments = read_arguments()
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        for case in arguments.cases:
            print(case, flush=True)
            cases[case] = measured(make_run(Path(name) / case, CASES[case]), arguments.repeats)
            print(json.dumps(cases[case]), flush=True)
        folders = [make_run(Path(name) / str(seed), Made(steps=1000, seed=seed)) for seed in range(1, SEVERAL + 1)]
        page = Path(name) / "several.html"
        Page(folders, page).write()
        cases["several"] = {"mb": page.stat().st_size / 1e6, "opened": opened(page, arguments.repeats)}
    report = {"machine": measure.machine(), "repeats": arguments.repeats, "cases": cases}
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "report_page.json")
    return parser.parse_args()


def measured(folder: Path, repeats: int) -> dict[str, Any]:
    """Of the page of one run."""
    first = [made(folder) for _ in range(repeats)]
    page = folder / "report.html"
    files = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
    return {
        "files_mb": files / 1e6,
        "pairs": len(RunReader(folder).read().samples),
        "mb": page.stat().st_size / 1e6,
        "first_cpu_s": spread([cpu for cpu, _ in first]),
        "first_rss_mib": max(rss for _, rss in first),
        "again_cpu_s": spread(again(folder, repeats)),
        "opened": opened(page, repeats),
    }


def made(folder: Path) -> tuple[float, float]:
    """CPU seconds and largest resident memory in MiB of a process that makes the page."""
    done = subprocess.run(
        [sys.executable, "-c", MAKE, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    seconds, kib = done.stdout.split()[-2:]
    return float(seconds), int(kib) / 1024


def again(folder: Path, repeats: int) -> list[float]:
    """CPU seconds of a page that is renewed after a step."""
    page = Page([folder], folder / "report.html")
    page.write()
    found = []
    for _ in range(repeats):
        for name in ("metrics.jsonl", "samples.jsonl"):
            lines = (folder / name).read_text().splitlines()
            row = json.loads(lines[-1])
            with (folder / name).open("a") as file:
                file.write(json.dumps({**row, "step": row["step"] + 1}) + "\n")
        began = time.process_time()
        page.write()
        found.append(time.process_time() - began)
    return found


def opened(page: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Wall seconds until the page is open, and CPU seconds of the browser's thread that does it."""
    wall, cpu = [], []
    with chromium() as browser:
        for _ in range(repeats + 1):
            context = browser.new_context(viewport={"width": 1400, "height": 1000})
            tab = context.new_page()
            session = context.new_cdp_session(tab)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            began = time.perf_counter()
            tab.goto(url_of(page))
            tab.wait_for_selector("html[data-ready]")
            tab.keyboard.press("j")
            tab.evaluate("new Promise(requestAnimationFrame)")
            wall.append(time.perf_counter() - began)
            metrics = session.send("Performance.getMetrics")["metrics"]
            cpu.append(next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration"))
            context.close()
    return {"wall_s": spread(wall[1:]), "cpu_s": spread(cpu[1:])}  # the first one also starts parts of the browser


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    main()
