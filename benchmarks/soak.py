"""A long run of small steps: memory, open files, threads and CPU seconds that must not grow, and no false kills.

    python benchmarks/soak.py                                # 2,000 steps -> results/soak.json
    python benchmarks/soak.py --steps 200 --from 50          # a short one -> results/soak_200.json
    python benchmarks/soak.py --steps 200 --from 50 --load 20    # beside as many busy processes: false kills only
    python benchmarks/soak.py --engine stub                  # workers that do nothing -> results/soak_stub.json

Ray with vLLM, two engines and lookahead 1. Rollouts are recorded, and a checkpoint is written every 50 steps. The
script looks at every process of the run once a second, and ends with an error if a limit is not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, random_world, turns  # noqa: E402 - the repository's root must be importable first
from benchmarks.measure import DRIVER, RAY  # noqa: E402
from rlxf.core.events import NAME as EVENTS  # noqa: E402
from rlxf.observe.formulas import read_jsonl  # noqa: E402
from rlxf.observe.memory import theil_sen  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
SHAPE = random_world.Shape(hidden=64, layers=2, ffn=128, heads=2, kv_heads=1, vocab=512)
STEPS = 2000
LOOK_S = 1.0
POINTS = 60  # of each curve in the results
WINDOW = 200  # steps whose CPU seconds are compared: at the beginning and at the end
SURE = 2.0  # standard deviations below a slope that is reported as its lower bound
MAX_KB, MAX_CPU_RATIO = 20.0, 1.1  # of each process a step; of the last steps to the first ones
MAX_MORE = 4  # files or threads over the whole run: Ray adds a thread or two when the machine is busy
# oneDNN keeps the kernels of its last 1,024 shapes: 45 MB in an engine, which it fills in the first 1,500 steps.
KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
STUB, MAX_KB_OF_DRIVER = "stub", 1.0  # workers that do nothing: what is left is the driver


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """One process at one moment."""

    step: float  # complete driver steps; between two rows of the run a part of one
    rss: int  # bytes
    files: int
    threads: int


def main() -> None:
    arguments = parse()
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch, busy(arguments.load):
        report = soak(arguments, Path(scratch))
    turns.write_results(arguments.output, report, table(report))
    if report["broken"]:
        raise SystemExit("\n".join(report["broken"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--from", type=int, default=200, dest="begin", help="slopes begin after that many steps")
    parser.add_argument("--engine", choices=("vllm", "hf", STUB), default="vllm")
    parser.add_argument("--load", type=int, default=0, help="busy processes beside the run; then only kills count")
    parser.add_argument(
        "--max-kb",
        type=float,
        help=f"largest growth of a process, KB a step (default {MAX_KB:g}; the driver of stubs {MAX_KB_OF_DRIVER:g})",
    )
    parser.add_argument("--output", type=Path, help="where the figures go")
    parser.add_argument("overrides", nargs="*", help="of the recipe: key=value")
    arguments = parser.parse_args()
    if arguments.output is None:
        parts = [
            "" if arguments.engine == "vllm" else f"_{arguments.engine}",
            "" if arguments.steps == STEPS else f"_{arguments.steps}",
            f"_load{arguments.load}" if arguments.load else "",
        ]
        arguments.output = RESULTS / f"soak{''.join(parts)}.json"
    return arguments


def soak(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run, and what was seen of it."""
    write_recipe(folder)
    stubs = arguments.engine == STUB
    engine = ("rollout.engine=hf", "sync.verify_first=0") if stubs else (f"rollout.engine={arguments.engine}",)
    run_dir, options = folder / "run", (*engine, f"training.train_iters={arguments.steps}")
    program = ["-m", "benchmarks.soak_stubs"] if stubs else ["ray_gpt.py"]
    command = [sys.executable, *program, "--config-dir", str(folder), "--config-name", "soak"]
    command += [f"hydra.run.dir={run_dir}", *options, *arguments.overrides]
    run_dir.mkdir()
    begin, loads = time.perf_counter(), [os.getloadavg()[0]]
    with (run_dir / "output.txt").open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=KERNELS | dict(measure.environment()), stdout=output, stderr=subprocess.STDOUT
        )
        seen = Seen(process.pid, run_dir)
        try:
            while process.poll() is None:
                seen.look()
                loads.append(os.getloadavg()[0])
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_S)
        finally:
            process.terminate()  # has an effect only if the benchmark was interrupted
            process.wait()
    if process.returncode:
        raise SystemExit(
            f"{' '.join(command)}\nended with {process.returncode}:\n{measure.tail(run_dir / 'output.txt')}"
        )
    report: dict[str, Any] = {
        "steps": arguments.steps, "from": arguments.begin, "engine": arguments.engine,
        "wall_s": time.perf_counter() - begin, "load_before": loads[0], "load_largest": max(loads),
        "events": dict(Counter(row["event"] for row in read_events(run_dir))),
        "processes": seen.slopes(arguments.begin, arguments.steps), "cpu": seen.cpu(arguments.begin, arguments.steps),
        "memory_mb": seen.memory(), "machine": measure.machine(),
    }  # fmt: skip
    return report | {"broken": broken(report, arguments)}


def write_recipe(folder: Path) -> None:
    """Random models of 0.1M parameters, four prompts a step, two completions of up to 16 tokens each."""
    world = random_world.build(folder / "world", SHAPE)
    load = str(world.policy)
    content = {
        "defaults": ["rlxf_schema", "_self_"],
        "model": {"small": SHAPE.section()},
        "training": {
            "stage": "ray_online_dpo", "device": "cpu", "global_batch_size": 4, "seq_length": 96,
            "save_interval": 50, "keep_latest": 2,
        },
        "actor_rollout": {
            "model": "small", "load": load, "data_path": str(world.prompts), "max_prompt_length": 72,
            "max_new_tokens": 16, "ppo_mini_batch_size": 4, "micro_batch_size": 4, "lr": 1e-5, "num_gpus_for_infer": 2,
        },
        "ref": {"model": "small", "load": load},
        "reward": {"model": "small", "load": str(world.reward)},
        "rollout": {"lookahead": 1},
        "log": {"rollouts": True},
        "resource_pool": {"actor_rollout": [3], "ref": [1], "reward": [1]},
    }  # fmt: skip
    (folder / "soak.yaml").write_text(yaml.safe_dump(content))


class Seen:
    """What was seen of the processes of a run."""

    def __init__(self, pid: int, run_dir: Path) -> None:
        self._root, self._run_dir = psutil.Process(pid), run_dir
        self._names: dict[psutil.Process, str] = {}
        self._looks: dict[str, list[Look]] = {}
        self._cpu = measure.ProcessTree(pid)
        self._cpu_at: list[tuple[float, float]] = []  # step, seconds of all processes

    def look(self) -> None:
        """Note what they use now."""
        step = measure.num_rows(self._run_dir)
        self._cpu_at.append((step, sum(self._cpu.cpu_seconds().values())))
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (self._root, *self._root.children(recursive=True)):
                self._look_at(process, step)

    def _look_at(self, process: psutil.Process, step: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
            name = self._name(process)
            if name is not None:
                look = Look(
                    step=step, rss=process.memory_info().rss, files=process.num_fds(), threads=process.num_threads()
                )
                self._looks.setdefault(name, []).append(look)

    def _name(self, process: psutil.Process) -> str | None:
        """The driver, or a worker; Ray's own processes are none of them."""
        if process not in self._names:
            part = DRIVER if process == self._root else measure.part_of(process)
            if part == RAY:  # perhaps a worker that has no name yet
                return None
            number = sum(name.split()[0] == part for name in self._names.values())
            self._names[process] = f"{part} {number}" if number else part
        return self._names[process]

    def slopes(self, begin: int, end: int) -> dict[str, dict[str, float]]:
        """Of each process from step ``begin`` to before ``end``: growth in KB, files and threads a step."""
        looks = self._looks.items()
        return {name: dict(_slopes([look for look in some if begin <= look.step < end])) for name, some in looks}

    def memory(self) -> dict[str, list[tuple[float, float]]]:
        """Of each process at most ``POINTS`` pairs of a step and MB, for a look at the curve."""
        return {
            name: [(look.step, round(look.rss / 2**20, 2)) for look in looks[:: len(looks) // POINTS + 1]]
            for name, looks in self._looks.items()
        }

    def cpu(self, begin: int, steps: int) -> dict[str, float]:
        """CPU seconds of all processes for the first steps after ``begin``, and for the last ones."""
        window = min(WINDOW, (steps - begin) // 3)
        first = self._cpu_s(begin, begin + window)
        last = self._cpu_s(steps - window, steps)
        return {"window": window, "first_s": first, "last_s": last, "ratio": last / first}

    def _cpu_s(self, begin: int, end: int) -> float:
        import numpy as np

        first_seen = dict(reversed(self._cpu_at))  # when a step was first complete
        steps = sorted(first_seen)
        at = np.interp([begin, end], steps, [first_seen[step] for step in steps])
        return float(at[1] - at[0])


def _slopes(looks: Sequence[Look]) -> Iterator[tuple[str, float]]:
    """Looks of the same step are one: their mean."""
    by_step: dict[float, list[Look]] = {}
    for look in looks:
        by_step.setdefault(look.step, []).append(look)
    steps = sorted(by_step)
    for name, scale in {"rss": 1024.0, "files": 1.0, "threads": 1.0}.items():
        values = [sum(getattr(look, name) for look in by_step[step]) / len(by_step[step]) / scale for step in steps]
        slope = theil_sen(steps, values, SURE)
        unit = "kb" if name == "rss" else name
        yield f"{unit}_a_step", slope.value
        yield f"{unit}_a_step_least", slope.least
        yield f"{unit}_first", values[0]
        yield f"{unit}_last", values[-1]


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Faults: an undisturbed run has no file of them."""
    path = run_dir / EVENTS
    return read_jsonl(path) if path.exists() else []


def broken(report: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """The limits that the run did not keep."""
    found = [f"{count} events {what} in an undisturbed run" for what, count in report["events"].items()]
    if arguments.load:
        return found
    span = arguments.steps - arguments.begin
    for name, slopes in report["processes"].items():
        limit = arguments.max_kb
        if limit is None:
            limit = MAX_KB_OF_DRIVER if name == DRIVER and arguments.engine == STUB else MAX_KB
        if slopes["kb_a_step"] > limit:
            found.append(f"{name}: memory grows by {slopes['kb_a_step']:.1f} KB a step, limit {limit:g}")
        for what in ("files", "threads"):
            if slopes[f"{what}_a_step"] * span > MAX_MORE:
                found.append(f"{name}: {what} grow from {slopes[f'{what}_first']:.0f} to {slopes[f'{what}_last']:.0f}")
    if report["cpu"]["ratio"] > MAX_CPU_RATIO:
        found.append(f"CPU seconds of the last steps: {report['cpu']['ratio']:.2f} x the first, limit {MAX_CPU_RATIO}")
    return found


def table(report: dict[str, Any]) -> Iterator[str]:
    yield f"{'process':12} {'KB a step (at least)':>22} {'MB':>14} {'files':>10} {'threads':>10}"
    for name, slopes in report["processes"].items():
        growth = f"{slopes['kb_a_step']:.1f} ({slopes['kb_a_step_least']:.1f})"
        memory = f"{slopes['kb_first'] / 1024:.0f} -> {slopes['kb_last'] / 1024:.0f}"
        counts = [f"{slopes[f'{what}_first']:.0f} -> {slopes[f'{what}_last']:.0f}" for what in ("files", "threads")]
        yield f"{name:12} {growth:>22} {memory:>14} {counts[0]:>10} {counts[1]:>10}"
    cpu = report["cpu"]
    seconds = f"{cpu['first_s']:.1f} first, {cpu['last_s']:.1f} last, ratio {cpu['ratio']:.3f}"
    yield f"CPU seconds of {cpu['window']} steps: {seconds}"
    rest = f"wall {report['wall_s']:.0f} s; largest load {report['load_largest']:.1f}"
    yield f"events: {report['events'] or 'none'}; {rest}"


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that always want a core, inside."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()


if __name__ == "__main__":
    main()
