"""Chunks that move on while others are sampled: wall and CPU seconds of a step on two cores, and what a chunk costs.

    python benchmarks/streaming.py                        # -> results/streaming.json
    python benchmarks/streaming.py --parts steps --workloads lognormal --sides k0 k0_chunks
    python benchmarks/streaming.py --parts steps --sides k0 k0_chunks --prompts 32 --chunk 4 --steps-per-turn 1
    python benchmarks/streaming.py --parts chunks

``steps``: random Llamas of 26M parameters, four roles on Ray with vLLM, one thread each; 8 prompts (``--prompts``) of
16 to 64 tokens per step, 2 samples each of 64 tokens, or of lognormal lengths (sigma 0.8, mean 64, at most 256).
``k0`` and ``k1`` are ``rollout.lookahead`` 0 and 1, ``_chunks`` the same with ``rollout.stream_prompts``. All programs
are loaded at the same time and take turns of several steps; the first two turns of each do not count. ``hidden`` is
the share of the seconds of scoring and of the reference that lie beside the sampling of the same step.

``host``: the driver's own CPU seconds of a step: 64 stub engines, 64 chunks of 16 prompts, 2 samples each, of a file of
1,000,000 prompts whose answers have all been seen; with a thread for each stage, as in a run, and in one thread.

``chunks``: CPU seconds of scoring, and of the reference, for a step in chunks of so many prompts, over those of the
whole step, in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, random_world, stub_steps, turns  # noqa: E402 - the root must be importable first
from benchmarks.against_trl import spread  # noqa: E402
from benchmarks.ray_overhead import measure_turns  # noqa: E402
from benchmarks.sides import Ours, Work, run_ours  # noqa: E402
from benchmarks.turns import Program, Turn  # noqa: E402

CORES = 2
SIDES = ("k0", "k0_chunks", "k1", "k1_chunks")
WORKLOADS = ("fixed", "lognormal")
PARTS = ("host", "steps", "chunks")


def main() -> None:
    arguments = parse()
    report: dict[str, Any] = {
        "repeats": arguments.repeats, "prompts": arguments.prompts, "chunk": arguments.chunk, "results": {},
        "machine": measure.machine(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        if "host" in arguments.parts:
            report["host"] = stub_steps.measure(arguments.repeats)
            report["host_one_thread"] = stub_steps.measure(arguments.repeats, threads=False)
        if "steps" in arguments.parts:
            world = random_world.build(Path(scratch, "world"), "26M")
            for workload in arguments.workloads:
                print(workload, flush=True)
                folder = Path(scratch, workload)
                made = programs(world, workload, arguments, folder)
                found = measure_turns(made, arguments.repeats)
                report["results"][workload] = summarize(found, arguments.steps_per_turn, folder)
        if "chunks" in arguments.parts:
            report["chunks"] = chunk_costs(Path(scratch, "chunks"), arguments.repeats)
    turns.write_results(arguments.output, report, table(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each program that count")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--prompts", type=int, default=8, help="of a step")
    parser.add_argument("--chunk", type=int, default=1, help="prompts of a chunk")
    parser.add_argument("--steps-per-turn", type=int, default=4)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "streaming.json")
    return parser.parse_args()


def programs(world: random_world.World, workload: str, arguments: argparse.Namespace, folder: Path) -> list[Program]:
    most = 64 if workload == "fixed" else 256
    steps = arguments.steps_per_turn
    work = Work(workloads=(workload,), steps_per_turn=steps, max_new_tokens=most, prompts=arguments.prompts)
    made = []
    for name in arguments.sides:
        overrides: list[tuple[str, str, Any]] = [("rollout", "lookahead", int(name[1])), ("log", "trace", True)]
        if name.endswith("chunks"):
            overrides.append(("rollout", "stream_prompts", arguments.chunk))
        settings = Ours(world=world, work=work, runtime="ray", engine="vllm", overrides=tuple(overrides))
        made.append(Program(name=name, target=run_ours, settings=settings, folder=folder / name, steps_per_turn=steps))
    return made


def summarize(found: Mapping[str, list[Turn]], steps: int, folder: Path) -> dict[str, Any]:
    """Ratios compare turns of the same number, whose steps are the same work."""
    result: dict[str, Any] = {}
    for name, counted in found.items():
        result[name] = {
            "wall_s_per_step": spread([turn.wall_s / steps for turn in counted]),
            "cpu_s_per_step": spread([turn.cpu_s / steps for turn in counted]),
            "wall_over_bound": spread([turn.wall_s / (turn.cpu_s / CORES) for turn in counted]),
        }
        plain = name.removesuffix("_chunks")
        if plain in found and plain != name:
            pairs = list(zip(found[plain], counted, strict=True))
            result[name]["wall_of_plain"] = spread([ours.wall_s / other.wall_s for other, ours in pairs])
            result[name]["cpu_of_plain"] = spread([ours.cpu_s / other.cpu_s for other, ours in pairs])
        traces = sorted((folder / name).rglob("trace.json"))
        if traces:
            result[name]["hidden"] = hidden(json.loads(traces[0].read_text().rstrip().rstrip(",") + "]"))
    return result


def hidden(events: list[dict[str, Any]]) -> dict[str, float]:
    """Of each stage the share of its seconds that lie beside the sampling of the same step; the first two steps apart.

    ``events``: of a run's ``trace.json``.
    """
    spans: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for event in events:
        step = event.get("args", {}).get("step")
        if event.get("ph") == "X" and step is not None and event["name"] in ("gen", "adv", "ref"):
            spans.setdefault((event["name"], step), []).append((event["ts"], event["ts"] + event["dur"]))
    shares = {}
    for stage in ("adv", "ref"):
        beside = total = 0.0
        for (name, step), found in spans.items():
            if name != stage or step <= 2 or ("gen", step) not in spans:
                continue
            begin, end = min(first for first, _ in spans["gen", step]), max(last for _, last in spans["gen", step])
            total += sum(last - first for first, last in found)
            beside += sum(max(min(last, end) - max(first, begin), 0.0) for first, last in found)
        shares[stage] = beside / total if total else float("nan")
    return shares


def chunk_costs(folder: Path, repeats: int) -> dict[str, Any]:
    """CPU seconds of a step's scores and reference values in chunks, over those of the step as a whole."""
    import torch

    from rlxf.assembly.roles import build_models, build_reference
    from rlxf.config.load import load_config
    from rlxf.core.types import Pairs
    from rlxf.platform import Process, get_platform

    torch.set_num_threads(1)
    num_prompts, sizes = 64, (1, 2, 4, 8, 16, 32, 64)
    world = random_world.build(folder / "world", "26M")
    work = Work(workloads=("lognormal",), prompts=num_prompts)
    recipe = Ours(world=world, work=work).recipe()
    for role in ("actor_rollout", "ref", "reward"):
        recipe[role] |= {"micro_batch_size": 8, "max_tokens_per_micro_batch": 2048}
    config, platform = load_config(recipe), get_platform("cpu")
    reference = build_reference(config, platform, Process())
    (scorer,) = build_models(config, platform, Process()).values()
    rollouts = _rollouts(work, num_prompts)
    from rlxf.rollout.chunks import chunks_of

    times: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    for repeat in range(repeats + 1):
        for size in sizes:
            cut = [tuple(range(first, first + size)) for first in range(0, num_prompts, size)]
            chunks = [chunk.rollouts for chunk in chunks_of(rollouts, cut)]
            begin = time.process_time()
            for chunk in chunks:
                scorer.score(chunk)
            middle = time.process_time()
            for chunk in chunks:
                first, second = torch.arange(len(chunk)).view(-1, 2).unbind(1)
                sides = chunk.sequences.select(first), chunk.sequences.select(second)
                reference.logps(Pairs(chosen=sides[0], rejected=sides[1]))
            if repeat:
                times[size].append((middle - begin, time.process_time() - middle))
    return {
        str(size): {
            stage: spread([mine[index] / whole[index] for mine, whole in zip(found, times[num_prompts], strict=True)])
            for index, stage in enumerate(("score", "reference"))
        }
        for size, found in times.items()
    }


def _rollouts(work: Work, num_prompts: int) -> Any:
    """Random tokens of the lengths of the workload's first step."""
    import numpy as np
    import torch

    from rlxf.core.types import PromptBatch, Tokens
    from rlxf.rollout.engine import Completion, pack_rollouts

    draw = np.random.default_rng(5)
    prompts = [draw.integers(2, 8192, draw.integers(16, 65)).tolist() for _ in range(num_prompts)]
    batch = PromptBatch(
        prompts=Tokens.from_rows(prompts),
        row_ids=torch.arange(num_prompts),
        positions=torch.arange(num_prompts),
        texts=("",) * num_prompts,
        columns={},
    )
    lengths = work.lengths(0).flatten().tolist()
    completions = [
        Completion(tokens=[*draw.integers(2, 8192, length - 1).tolist(), random_world.EOS], logps=[0.0] * length)
        for length in lengths
    ]
    return pack_rollouts(batch, 2, completions, 0)


def table(report: Mapping[str, Any]) -> Iterator[str]:
    columns = ("wall s per step", "CPU s per step", "wall / (CPU / 2)", "wall, of whole steps", "CPU, of whole steps")
    if report["results"]:
        yield "| lengths | program | " + " | ".join(columns) + " | score hidden | reference hidden |"
        yield "|---" * 9 + "|"
    for workload, sides in report["results"].items():
        for name, side in sides.items():
            keys = ("wall_s_per_step", "cpu_s_per_step", "wall_over_bound", "wall_of_plain", "cpu_of_plain")
            shares = side.get("hidden", {})
            cells = [*(_cell(side.get(key)) for key in keys), *(f"{shares.get(s, 0):.2f}" for s in ("adv", "ref"))]
            yield f"| {workload} | {name} | " + " | ".join(cells) + " |"
    if "host" in report:
        alone = _cell(report["host_one_thread"])
        yield f"driver's own CPU of a step, 64 engines, 64 chunks, ms: {_cell(report['host'])}; in one thread {alone}"
    if "chunks" in report:
        yield "| prompts of a chunk, of 64 | score, CPU of the whole step's | reference |"
        yield "|---|---|---|"
        for size, found in report["chunks"].items():
            yield f"| {size} | {_cell(found['score'])} | {_cell(found['reference'])} |"


def _cell(values: Mapping[str, Any] | None) -> str:
    if values is None:
        return "-"
    return f"{statistics.median(values['turns']):.3f} ({values['min']:.3f}-{values['max']:.3f})"


if __name__ == "__main__":
    main()
