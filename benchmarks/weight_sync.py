"""What a push of weights costs: an actor process and rollout engines on Ray, through each transport in turn.

    python benchmarks/weight_sync.py            # writes results/weight_sync.json

The cases up to 110M have a Megatron actor and a vLLM engine: a push is that of a driver step without the probe, from
the trainer's parameters into vLLM's. The 1.2B cases measure transports alone (``weight_source.py``): a process that
holds bf16 tensors, and engines of one or of two processes that read a few bytes of each tensor, or copy all into
memory of their own ("copied").

Wall seconds are the driver's. CPU seconds are the operating system's, for driver, actor, engines and Ray together. In
the same run, a plain copy of as many bytes inside one process takes its turns. ``ipc`` is left out: it
needs a device. Bytes through the driver are counted, too (``moved_bytes.py``).
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ray  # noqa: E402 - the repository's root must be importable first
import torch  # noqa: E402

from benchmarks import measure, random_world, turns  # noqa: E402
from benchmarks.moved_bytes import Moved  # noqa: E402
from benchmarks.weight_source import ReceivingWorker, Source, SourceWorker  # noqa: E402
from rlxf.config.schema import RunConfig  # noqa: E402
from rlxf.core.clock import Clock  # noqa: E402
from rlxf.core.stop import Stop  # noqa: E402
from rlxf.platform import get_platform  # noqa: E402
from rlxf.sync.transports import TRANSPORTS  # noqa: E402
from workers.actor import ActorWorker, RemoteActor  # noqa: E402
from workers.engine import RolloutWorker  # noqa: E402
from workers.group import Member, WorkerGroup  # noqa: E402
from workers.remote import Waiter  # noqa: E402
from workers.rollout import RemoteEngines  # noqa: E402

COMPARED = ("shared_memory", "collective", "object_store")
CASES = {  # size, sync.bucket_mb, pushes of a turn
    "tiny": ("tiny", 256, 20),
    "26M": ("26M", 256, 5),
    "26M in buckets of 16 MB": ("26M", 16, 5),
    "110M": ("110M", 256, 3),
    "1.2B": ("1.2B", 256, 2),
}
TINY = random_world.Shape(hidden=96, layers=2, ffn=256, heads=3, kv_heads=3, vocab=586, positions=256)
MEDIUM = random_world.Shape(hidden=768, layers=12, ffn=2048, heads=12, kv_heads=12, vocab=32000)
LARGE = random_world.Shape(hidden=2048, layers=16, ffn=8192, heads=32, kv_heads=8, vocab=128256)  # Llama 3.2 1B
STORE_BYTES = 2_500_000_000  # of Ray's object store: two buckets of the largest case and one that is freed
ONE_COPY = "one copy"
PROCESSES = {"": 1, ", engine of 2": 2}  # of the engine; a name's end
FACTOR, ALLOWANCE_S = 1.5, 0.020  # of one copy: what shared memory may take at 1.2B


def main() -> None:
    arguments = parse()
    report: dict[str, Any] = {
        "what": "pushes of all weights, actor to rollout engine, on Ray",
        "settings": {"repeats": arguments.repeats, "pushes_per_turn": {name: case[2] for name, case in CASES.items()}},
        "load_before": os.getloadavg()[0],
        "machine": measure.machine(),
        "not_measured": {"ipc": "needs a device"},
        "cases": {},
    }
    os.environ.update(measure.environment())
    os.environ["PYTHONPATH"] = str(ROOT)
    torch.set_num_threads(1)
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    try:
        with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
            for case in arguments.cases:
                print(case, "...", file=sys.stderr)
                size, bucket_mb, pushes = CASES[case]
                world = Bare(bucket_mb) if size == "1.2B" else Models(size, Path(scratch, case), bucket_mb)
                try:
                    ways = world.ways(arguments.transports)
                    report["cases"][case] = measured(world, ways, pushes, arguments.repeats)
                finally:
                    world.stop()
    finally:
        ray.shutdown()
    report["goals"] = goals(report["cases"])
    turns.write_results(arguments.output, report, [*table(report), "", *verdicts(report["goals"])])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each way")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--transports", nargs="+", choices=COMPARED, default=list(COMPARED))
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "weight_sync.json")
    return parser.parse_args()


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """One way of a push."""

    transport: str
    engines: RemoteEngines
    processes: int  # of the engine
    prepare: Callable[[], object] = lambda: None  # before it is connected
    check: Callable[[], object] = lambda: None  # after its first push


class World:
    """An actor, and the pushes from it. One actor for all ways: its end is opened anew for every turn."""

    def __init__(self) -> None:
        self.waiter = Waiter(Clock(), Stop(), 600.0)
        self.groups: list[WorkerGroup] = []
        self.actor: RemoteActor

    def start(self, worker: type, role: str, environment: Mapping[str, str], *args: Any) -> WorkerGroup:
        kind: Any = ray.remote(worker)
        env_vars = {**environment, "PYTHONPATH": str(ROOT)}
        handle = kind.options(num_cpus=0, runtime_env={"env_vars": env_vars}).remote(0, 1)
        group = WorkerGroup([Member(handle, f"{role} rank 0", "this one")], self.waiter)
        self.groups.append(group)
        group.call("build", *args)
        return group

    def ways(self, transports: Sequence[str]) -> dict[str, Way]:
        """By name."""
        raise NotImplementedError

    def copy_once(self) -> float:
        """Seconds of one plain copy of all bytes."""
        raise NotImplementedError

    def stop(self) -> None:
        for group in self.groups:
            ray.kill(group.members[0].handle)


class Models(World):
    """A Megatron actor and a vLLM engine."""

    def __init__(self, size: str, scratch: Path, bucket_mb: int) -> None:
        super().__init__()
        platform, config = get_platform("cpu"), recipe(size, scratch, bucket_mb)
        alone = ("127.0.0.1", 0)
        try:
            self.actor = RemoteActor(self.start(ActorWorker, "train", platform.worker_environment(1), config, alone))
            engines = self.start(RolloutWorker, "infer", platform.rollout_environment(1, 1), config, alone)
        except BaseException:
            self.stop()
            raise
        self._engines = RemoteEngines(engines, self.actor)
        num_bytes = sum(bucket.num_bytes for bucket in self.actor.sync_plan())
        self._source, self._target = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))

    def ways(self, transports: Sequence[str]) -> dict[str, Way]:
        return {name: Way(transport=name, engines=self._engines, processes=1) for name in transports}

    def copy_once(self) -> float:
        return timed(lambda: self._target.copy_(self._source))


class Bare(World):
    """A source of bf16 tensors, and engines of one and of two processes without a model."""

    def __init__(self, bucket_mb: int) -> None:
        super().__init__()
        environment = get_platform("cpu").worker_environment(1)
        try:
            self._sources = self.start(SourceWorker, "train", environment, Source(shape=LARGE, bucket_mb=bucket_mb))
            self.actor = RemoteActor(self._sources)
            self._receiving = {
                count: self.start(ReceivingWorker, "infer", environment, count) for count in PROCESSES.values()
            }
        except BaseException:
            self.stop()
            raise
        self._expected: int = self._sources.call("few_bytes")

    def ways(self, transports: Sequence[str]) -> dict[str, Way]:
        found = {}
        for transport in transports:
            for copies in (False, True) if transport == "shared_memory" else (False,):
                for end, count in PROCESSES.items():
                    group = self._receiving[count]
                    found[transport + end + (", copied" if copies else "")] = Way(
                        transport=transport,
                        engines=RemoteEngines(group, self.actor, devices=count),
                        processes=count,
                        prepare=partial(self._prepare, group, copies),
                        check=partial(self._check, group),
                    )
        return found

    def _prepare(self, group: WorkerGroup, copies: bool) -> None:
        for engines in self._receiving.values():  # all connections of the turn before need memory
            engines.call("disconnect")
        group.call("set_copies", copies)
        self._before = group.call("seen")

    def _check(self, group: WorkerGroup) -> None:
        read = [now - before for now, before in zip(group.call("seen"), self._before, strict=True)]
        if set(read) != {self._expected}:
            raise SystemExit(f"an engine read {read}, expected {self._expected} in each process")

    def copy_once(self) -> float:
        seconds: float = self._sources.call("copy_once")
        return seconds


def recipe(size: str, scratch: Path, bucket_mb: int) -> RunConfig:
    """Roles around one model: the tiny world's first policy, or a random one."""
    if size == "tiny":
        subprocess.run([sys.executable, "scripts/build_tiny_world.py"], cwd=ROOT, check=True)
        shape, policy = TINY, ROOT / "models" / "tiny" / "sft"
    else:
        world = random_world.build(scratch / size, MEDIUM if size == "110M" else size)
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


def copies_of_a_byte(transport: str, processes: int) -> int:
    """From the trainer's tensor until every process of an engine can read it. By how the transport is made."""
    return {
        "shared_memory": 1,  # into the memory that all map
        "collective": 1 + 2 * processes,  # into the bucket; gloo's socket: into the kernel and out of it, for each
        # Into the bucket, into Ray's store, which an engine of one process maps. An engine of several hands it on:
        # into the kernel and out of it, for each.
        "object_store": 2 if processes == 1 else 2 + 2 * processes,
    }[transport]


def measured(world: World, ways: Mapping[str, Way], pushes: int, repeats: int) -> dict[str, Any]:
    """Turns of every way, and of a plain copy, in turn. A way's first push after it is connected does not count."""
    plan = world.actor.sync_plan()
    tree = measure.ProcessTree(os.getpid())
    wall: dict[str, list[float]] = {name: [] for name in (*ways, ONE_COPY)}
    cpu: dict[str, list[float]] = {name: [] for name in wall}
    first: dict[str, list[float]] = {name: [] for name in ways}
    through_driver: dict[str, list[int]] = {name: [] for name in ways}

    def push(way: Way) -> None:
        way.engines.begin_update()
        for index, bucket in enumerate(plan):
            way.engines.send(index, bucket)
        way.engines.end_update(1)

    world.copy_once()  # touches the memory
    for repeat in range(repeats):
        for name in list(wall) if repeat % 2 == 0 else reversed(list(wall)):
            once: Callable[[], float] = world.copy_once
            if name in ways:
                way = ways[name]
                way.prepare()
                way.engines.connect(TRANSPORTS[way.transport])
                once = partial(timed, partial(push, way))
                first[name].append(once())
                way.check()
            gc.collect()
            before, moved = sum(tree.cpu_seconds().values()), Moved()
            wall[name] += [once() for _ in range(pushes)]
            if name in ways:
                through_driver[name].append(moved.bytes() // pushes)
            cpu[name].append((sum(tree.cpu_seconds().values()) - before) / pushes)
    num_bytes = sum(bucket.num_bytes for bucket in plan)
    return {
        "num_bytes": num_bytes,
        "num_buckets": len(plan),
        "first_push_s": {name: spread(values) for name, values in first.items()},
        "wall_s": {name: spread(values) for name, values in wall.items()},
        "cpu_s": {name: spread(values) for name, values in cpu.items()},
        "gb_per_s": {name: num_bytes / statistics.median(values) / 1e9 for name, values in wall.items()},
        "copies_of_a_byte": {name: copies_of_a_byte(way.transport, way.processes) for name, way in ways.items()},
        "bytes_through_driver": {name: statistics.median(values) for name, values in through_driver.items()},
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


def goals(cases: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """What was found and its limit, of each goal that was measured."""
    found = {
        f"{case}, {name}: bytes through the driver, of all bytes": {"found": count / result["num_bytes"], "limit": 0.02}
        for case, result in cases.items()
        if result["num_bytes"] > 1e8  # else the calls themselves are more than that
        for name, count in result["bytes_through_driver"].items()
    }
    medians = {name: value["median"] for name, value in cases.get("1.2B", {"wall_s": {}})["wall_s"].items()}
    if "shared_memory" in medians:
        one, two = ("shared_memory" + end for end in PROCESSES)
        limit = FACTOR * medians[ONE_COPY] + ALLOWANCE_S
        found[f"1.2B, shared_memory: of {FACTOR:g} copies + {1e3 * ALLOWANCE_S:g} ms"] = {
            "found": medians[one] / limit,
            "limit": 1.0,
        }
        found["1.2B, shared_memory: a byte of an engine of 2 processes, of one of 1"] = {
            "found": medians[two] / medians[one],
            "limit": 1.05,  # two processes read, and measurements vary
        }
    return found


def verdicts(found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    for name, values in found.items():
        met = "met" if values["found"] <= values["limit"] else "MISSED"
        yield f"{name}: {values['found']:.3g}, at most {values['limit']:g}: {met}"


def table(report: Mapping[str, Any]) -> Iterator[str]:
    yield "| ms per push, median (10 %-90 %) | MB | buckets | wall | CPU | GB/s | copies | KB through the driver |"
    yield "|---|---|---|---|---|---|---|---|"
    for case, found in report["cases"].items():
        for name, wall in found["wall_s"].items():
            times = [
                f"{1e3 * c['median']:.1f} ({1e3 * c['p10']:.1f}-{1e3 * c['p90']:.1f})"
                for c in (wall, found["cpu_s"][name])
            ]
            driver = found["bytes_through_driver"].get(name)
            cells = [
                f"{found['num_bytes'] / 1e6:.1f}",
                str(found["num_buckets"]),
                *times,
                f"{found['gb_per_s'][name]:.2f}",
                str(found["copies_of_a_byte"].get(name, 1)),
                "-" if driver is None else f"{driver / 1e3:.0f}",
            ]
            yield f"| {case}, {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
