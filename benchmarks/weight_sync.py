"""What a push of weights costs: one actor process and one vLLM engine on Ray, through both transports in turn.

    python benchmarks/weight_sync.py            # writes results/weight_sync.json

A push is that of a driver step without the probe: it moves all buckets from the trainer's parameters into vLLM's. Wall
seconds are the driver's; CPU seconds are the operating system's, for driver, actor, engine and Ray together, over a
turn of several pushes. For comparison, the same run measures a plain copy of as many bytes between two buffers of one
process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ray  # noqa: E402 - the repository's root must be importable first
import torch  # noqa: E402

from benchmarks import measure, random_world, turns  # noqa: E402
from rlxf.config.schema import RunConfig  # noqa: E402
from rlxf.core.clock import Clock  # noqa: E402
from rlxf.core.stop import Stop  # noqa: E402
from rlxf.platform import get_platform  # noqa: E402
from rlxf.sync.transports import TRANSPORTS  # noqa: E402
from workers.actor import ActorWorker, RemoteActor  # noqa: E402
from workers.group import Member, WorkerGroup  # noqa: E402
from workers.remote import Waiter  # noqa: E402
from workers.rollout import RemoteEngines, RolloutWorker  # noqa: E402

COMPARED = ("object_store", "shared_memory")
CASES = {"tiny": ("tiny", 256), "26M": ("26M", 256), "26M in buckets of 16 MB": ("26M", 16)}  # size, sync.bucket_mb
PUSHES_PER_TURN = {"tiny": 20, "26M": 5}
TINY = random_world.Shape(hidden=96, layers=2, ffn=256, heads=3, kv_heads=3, vocab=586, positions=256)


def main() -> None:
    arguments = parse()
    report: dict[str, Any] = {
        "what": "pushes of all weights, actor to vLLM engine, on Ray",
        "settings": {"repeats": arguments.repeats, "pushes_per_turn": PUSHES_PER_TURN},
        "load_before": os.getloadavg()[0],
        "machine": measure.machine(),
        "cases": {},
    }
    os.environ.update(measure.environment())
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
            for case in arguments.cases:
                size, bucket_mb = CASES[case]
                config = recipe(size, Path(scratch, case), bucket_mb)
                found = {name: Pushes(config, name) for name in arguments.transports}
                report["cases"][case] = measured(found, PUSHES_PER_TURN[size], arguments.repeats)
                for pushes in found.values():
                    pushes.stop()
    finally:
        ray.shutdown()
    turns.write_results(arguments.output, report, table(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each transport that count")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--transports", nargs="+", choices=COMPARED, default=list(COMPARED))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "weight_sync.json")
    return parser.parse_args()


def recipe(size: str, scratch: Path, bucket_mb: int) -> RunConfig:
    """Roles around one model: the tiny world's first policy, or a random one."""
    if size == "tiny":
        subprocess.run([sys.executable, "scripts/build_tiny_world.py"], cwd=ROOT, check=True)
        shape, policy = TINY, ROOT / "models" / "tiny" / "sft"
    else:
        world = random_world.build(scratch / size, size)
        shape, policy = world.shape, world.policy
    role = {"model": size, "load": str(policy), "seq_length": 128}
    return RunConfig.model_validate(
        {
            "training": {"stage": "ray_online_dpo", "device": "cpu"},
            "model": {size: shape.section()},
            "actor_rollout": {**role, "max_prompt_length": 64},
            "ref": role,
            "reward": role,
            "rollout": {"engine": "vllm"},
            "sync": {"bucket_mb": bucket_mb},
        }
    )


class Pushes:
    """An actor and an engine of their own, and the pushes between them."""

    def __init__(self, config: RunConfig, transport: str) -> None:
        platform = get_platform("cpu")
        self._waiter = Waiter(Clock(), Stop(), 600.0)
        actors = self._start(ActorWorker, "train", config, platform.worker_environment(1))
        engines = self._start(RolloutWorker, "infer", config, platform.rollout_environment(1, 1))
        self._groups = (actors, engines)
        self._actor = RemoteActor(actors)
        self._engines = RemoteEngines(engines, self._actor)
        self._engines.connect(TRANSPORTS[transport])
        self._plan = self._actor.sync_plan()
        self.num_bytes = sum(bucket.num_bytes for bucket in self._plan)
        self.num_buckets = len(self._plan)
        self.first_s = self.push()

    def _start(self, worker: type, role: str, config: RunConfig, environment: Mapping[str, str]) -> WorkerGroup:
        env_vars = {**environment, "PYTHONPATH": str(ROOT)}
        kind: Any = ray.remote(worker)
        handle = kind.options(num_cpus=0, runtime_env={"env_vars": env_vars}).remote(0, 1)
        group = WorkerGroup([Member(handle, f"{role} rank 0", "this one")], self._waiter)
        group.call("build", config, ("127.0.0.1", 0))
        return group

    def push(self) -> float:
        """Wall seconds of one."""
        begin = time.perf_counter()
        self._engines.begin_update()
        for index, bucket in enumerate(self._plan):
            self._engines.send(index, bucket)
        self._engines.end_update(1)
        return time.perf_counter() - begin

    def stop(self) -> None:
        for group in self._groups:
            ray.kill(group.members[0].handle)


def measured(found: Mapping[str, Pushes], pushes: int, repeats: int) -> dict[str, Any]:
    """Turns of every transport in turn, and of a plain copy; the first turn of each does not count."""
    num_bytes = next(iter(found.values())).num_bytes
    source, target = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
    made: dict[str, Callable[[], float]] = {name: one.push for name, one in found.items()}
    made["one_copy"] = lambda: timed(lambda: target.copy_(source))
    tree = measure.ProcessTree(os.getpid())
    wall: dict[str, list[float]] = {name: [] for name in made}
    cpu: dict[str, list[float]] = {name: [] for name in made}
    for repeat in range(repeats + 1):
        for name in list(made) if repeat % 2 == 0 else reversed(list(made)):
            before = sum(tree.cpu_seconds().values())
            seconds = [made[name]() for _ in range(pushes)]
            spent = (sum(tree.cpu_seconds().values()) - before) / pushes
            if repeat:
                wall[name] += seconds
                cpu[name].append(spent)
    return {
        "num_bytes": num_bytes,
        "num_buckets": next(iter(found.values())).num_buckets,
        "first_push_s": {name: one.first_s for name, one in found.items()},
        "wall_s": {name: spread(values) for name, values in wall.items()},
        "cpu_s": {name: spread(values) for name, values in cpu.items()},
    }


def timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def spread(values: list[float]) -> dict[str, Any]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p10": ordered[len(ordered) // 10],
        "p90": ordered[len(ordered) * 9 // 10],
        "min": ordered[0],
        "max": ordered[-1],
        "count": len(ordered),
    }


def table(report: Mapping[str, Any]) -> Iterator[str]:
    yield "| ms per push, median (10 %-90 %) | MB | buckets | wall | CPU, all processes |"
    yield "|---|---|---|---|---|"
    for case, found in report["cases"].items():
        for name, wall in found["wall_s"].items():
            cells = [
                f"{1e3 * c['median']:.1f} ({1e3 * c['p10']:.1f}-{1e3 * c['p90']:.1f})"
                for c in (wall, found["cpu_s"][name])
            ]
            yield (
                f"| {case}, {name} | {found['num_bytes'] / 1e6:.1f} | {found['num_buckets']} | "
                + " | ".join(cells)
                + " |"
            )


if __name__ == "__main__":
    main()
