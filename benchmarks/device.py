"""What this machine's device computes and how fast: attention, log-probs, a recipe, training at 1B, sampling, weights.

    python benchmarks/device.py                          # -> results/device.json
    python benchmarks/device.py --device cpu --small     # a smoke test without an accelerator, some minutes

Every part runs by itself: one that fails or takes too long is reported and ends no other. Parts that compare numbers
run side by side; after them the parts that measure time run one after the other, alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402 - the repository's root must be importable first

# Parts of one group share a process. Groups of NUMBERS run side by side, then those of RUNS; of SPEED each runs alone.
NUMBERS: dict[str, tuple[str, ...]] = {
    "kernels": ("attention", "elementwise"),
    "models": ("model_tiny", "model_135m", "model_1b"),
    "recipes": ("recipe",),
}
RUNS: dict[str, tuple[str, ...]] = {
    "variants": ("variants",),
    "colocated": ("colocated",),
}
SPEED: dict[str, tuple[str, ...]] = {
    "speed": ("ceiling", "head", "syncs", "training", "sampling"),
    "weights": ("weights",),
    "large": ("large",),
}
PARTS = tuple(part for group in (NUMBERS | RUNS | SPEED).values() for part in group)


def main() -> None:
    arguments = parse()
    if arguments.group:
        run_group(arguments)
        return
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        report: dict[str, Any] = {"machine": machine(arguments.device), "parts": {}}
        for groups in (NUMBERS, RUNS, *({name: SPEED[name]} for name in SPEED)):
            wanted = {name: [part for part in parts if part in arguments.parts] for name, parts in groups.items()}
            found = run_groups({name: parts for name, parts in wanted.items() if parts}, arguments, Path(scratch))
            report["parts"].update(found)
            report["seconds"] = round(time.perf_counter() - begin, 1)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    for line in table(report):
        print(line, flush=True)
    print(f"\nwritten: {arguments.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="as training.device")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does every part run?")
    parser.add_argument("--quick", action="store_true", help="the first case of training only")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that one part may take")
    parser.add_argument("--group-limit", type=float, default=300.0, help="seconds that a group of parts may take")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "device.json")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_groups(groups: Mapping[str, Sequence[str]], arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """What the parts of each group found, a process per group, all at the same time."""
    processes = {}
    for name, parts in groups.items():
        options = ["--device", arguments.device, "--limit", str(arguments.limit), "--parts", *parts]
        command = [sys.executable, __file__, "--group", name, "--scratch", str(scratch), *options]
        command += [f"--{name}" for name in ("small", "quick") if getattr(arguments, name)]
        processes[name] = subprocess.Popen(command, cwd=ROOT, env=environment(arguments.device), start_new_session=True)
    deadline, found = time.monotonic() + arguments.group_limit, {}
    for name, process in processes.items():
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        file = scratch / f"{name}.json"
        done = json.loads(file.read_text()) if file.exists() else {}
        ended = f"its process ended with {process.returncode}"
        found.update({part: done.get(part, {"error": ended}) for part in groups[name]})
    return found


def environment(device: str) -> dict[str, str]:
    """As a worker of a run has it."""
    from rlxf.platform import get_platform

    platform = get_platform(device)
    threads = 2 if platform.name == "cpu" else 8
    return {**os.environ, **platform.worker_environment(threads), "PYTHONUNBUFFERED": "1"}


def run_group(arguments: argparse.Namespace) -> None:
    """The parts of one group in this process; after each the results so far are in the group's file."""
    from benchmarks import device_numbers, device_runs, device_speed
    from benchmarks.device_numbers import Bench

    bench = Bench.of(arguments.device, arguments.scratch, small=arguments.small, quick=arguments.quick)
    functions: dict[str, Callable[[Bench], dict[str, Any]]] = (
        device_numbers.PARTS | device_speed.PARTS | device_runs.PARTS
    )
    file, found = arguments.scratch / f"{arguments.group}.json", {}
    for part in arguments.parts:
        begin = time.perf_counter()
        try:
            with time_limit(arguments.limit):
                found[part] = functions[part](bench)
        except Exception as error:  # noqa: BLE001 - of whatever kind: the other parts go on
            traceback.print_exc()
            frames = traceback.format_exc().splitlines()
            found[part] = {"error": f"{type(error).__name__}: {str(error)[:500]}", "traceback": frames[-12:]}
        found[part]["seconds"] = round(time.perf_counter() - begin, 2)
        print(f"[{part}] {found[part]['seconds']} s {found[part].get('error', 'ok')}", flush=True)
        file.write_text(json.dumps(found))


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError inside the block once it has taken longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def machine(device: str) -> dict[str, Any]:
    """``measure.machine``, and the device."""
    import torch

    from rlxf.platform import get_platform

    platform = get_platform(device)
    found = measure.machine() | {"device": platform.name}
    if platform.name != "cpu":
        properties = torch.get_device_module(platform.torch_device).get_device_properties(0)
        found |= {"device_name": properties.name, "device_memory_gib": round(properties.total_memory / 2**30, 1)}
    return found


def table(report: Mapping[str, Any]) -> Iterator[str]:
    """A line per part, and one per case of it."""
    yield f"{report['machine'].get('device_name', report['machine']['processor'])}, {report['seconds']} s"
    for part, found in report["parts"].items():
        if "error" in found:
            yield f"| {part} | FAILED: {found['error'][:160]} |"
        for name, case in found.items():
            if name in ("error", "traceback", "seconds"):
                continue
            yield f"| {part} | {name} | {text(case)} |"


def text(case: Any) -> str:
    if isinstance(case, Mapping):
        return ", ".join(f"{key} {text(value)}" for key, value in case.items() if not isinstance(value, list))
    return f"{case:.4g}" if isinstance(case, float) else str(case)[:200]


if __name__ == "__main__":
    main()
