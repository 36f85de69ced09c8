"""Whole online-DPO steps here and in TRL: CPU seconds per step, and response tokens per CPU second.

    python benchmarks/against_trl.py                   # fp32 -> results/against_trl.json
    python benchmarks/against_trl.py --dtype bf16      # -> results/against_trl_bf16.json; TRL under bf16 autocast

Random Llamas of 2.5M and 26M parameters, a reward model of the same shape, 8 prompts of 16 to 64 tokens per step, 2
samples each, AdamW, one thread per process. Two workloads: completions of exactly 64 tokens, and of lognormal lengths
(sigma 0.8, mean 64, at most 256). All programs are loaded at the same time and take turns; the first turn of each
workload does not count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure, random_world, turns  # noqa: E402 - the root must be importable first
from benchmarks.sides import SAMPLES, Ours, Trl, Work, run_ours, run_trl  # noqa: E402
from benchmarks.turns import Program, Turn  # noqa: E402
from rlxf.observe.formulas import read_jsonl  # noqa: E402

STEPS_PER_TURN = {"2.5M": 4, "26M": 1}
SIDES = ("trl", "local_hf", "local_hf_mkl", "ray_vllm")


def main() -> None:
    arguments = parse()
    report: dict[str, Any] = {
        "dtype": arguments.dtype,
        "repeats": arguments.repeats,
        "gemm_peak_gflops": turns.gemm_peak(),
        "sizes": {},
        "machine": measure.machine(),
    }
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        for size in arguments.sizes:
            world = random_world.build(Path(scratch, size), size)
            work = Work(steps_per_turn=STEPS_PER_TURN[size], bf16=arguments.dtype == "bf16")
            found = measure_size(programs(world, work, arguments.sides, Path(scratch, "runs", size)), work, arguments)
            report["sizes"][size] = summarize(found, work, world)
    again = turns.gemm_peak()
    report["gemm_peak_gflops"] = {name: max(value, again[name]) for name, value in report["gemm_peak_gflops"].items()}
    turns.write_results(arguments.output, report, table(report))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of each program that count, per workload")
    parser.add_argument("--sizes", nargs="+", choices=tuple(random_world.SIZES), default=list(random_world.SIZES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--output", type=Path, help="default: results/against_trl.json, or ..._bf16.json")
    arguments = parser.parse_args()
    suffix = "" if arguments.dtype == "fp32" else f"_{arguments.dtype}"
    arguments.output = arguments.output or ROOT / "benchmarks" / "results" / f"against_trl{suffix}.json"
    return arguments


def programs(world: random_world.World, work: Work, sides: Sequence[str], folder: Path) -> list[Program]:
    made = []
    for name in sides:
        settings: Trl | Ours
        if name == "trl":
            settings, target = Trl(world=world, work=work), run_trl
        elif name == "ray_vllm":
            settings, target = Ours(world=world, work=work, runtime="ray", engine="vllm"), run_ours
        elif name == "local_hf_mkl" and (work.bf16 or not has_fast_linear()):
            continue  # there is no other path to switch off
        else:
            overrides = (("training", "cpu_linear", "mkl"),) if name == "local_hf_mkl" else ()
            settings, target = Ours(world=world, work=work, overrides=overrides), run_ours
        steps = work.steps_per_turn
        made.append(Program(name=name, target=target, settings=settings, folder=folder / name, steps_per_turn=steps))
    return made


def has_fast_linear() -> bool:
    from rlxf.config.schema import TrainingConfig

    return "cpu_linear" in TrainingConfig.model_fields


def measure_size(made: list[Program], work: Work, arguments: argparse.Namespace) -> dict[str, list[Turn]]:
    """All turns of each program, including the first, uncounted ones. The workloads alternate."""
    found: dict[str, list[Turn]] = {program.name: [] for program in made}
    with turns.running(made):
        for program in turns.in_turn(made, len(work.workloads) * (arguments.repeats + 1), len(work.workloads)):
            turn = program.turn()
            number = len(found[program.name])
            if turn.tokens not in (0, work.turn_tokens(number)):  # 0: sampled in a worker process of Ray
                raise SystemExit(
                    f"{program.name}: {turn.tokens} tokens in turn {number}, not {work.turn_tokens(number)}"
                )
            found[program.name].append(turn)
            print(f"  {program.name}: {turn.cpu_s / work.steps_per_turn:.3f} CPU s per step", flush=True)
        for program in made:
            check_lengths(program, work)
    return found


def check_lengths(program: Program, work: Work) -> None:
    """Check that the metrics of this project report the completion lengths that the workload asked for."""
    path = program.folder / "run" / "metrics.jsonl"
    for step, row in enumerate(read_jsonl(path) if path.exists() else []):
        if abs(row["response_length/mean"] - work.lengths(step).mean()) > 1e-3:
            raise SystemExit(f"{program.name}: {row['response_length/mean']} tokens per completion in step {step + 1}")


def summarize(found: Mapping[str, list[Turn]], work: Work, world: random_world.World) -> dict[str, Any]:
    """Per workload and program: CPU seconds per step, tokens per CPU second, stages with their model FLOPs."""
    result: dict[str, Any] = {}
    for offset, workload in enumerate(work.workloads):
        numbers = range(len(work.workloads) + offset, len(next(iter(found.values()))), len(work.workloads))
        sides = {
            name: summarize_side([all_turns[i] for i in numbers], numbers, work) for name, all_turns in found.items()
        }
        flops = statistics.median(step_flops(number, work, world)["all"] for number in numbers)
        result[workload] = {
            "response_tokens_per_step": statistics.mean(work.turn_tokens(n) / work.steps_per_turn for n in numbers),
            "gflop_per_step": flops,
            "sides": sides,
        }
        for name, side in sides.items():
            side["gflop_per_s"] = {
                stage: statistics.median(
                    step_flops(n, work, world)[stage] / (found[name][n].stages[stage] / work.steps_per_turn)
                    for n in numbers
                )
                for stage in ("gen", "adv", "ref", "update_actor")
                if found[name][numbers[0]].stages.get(stage) and name != "ray_vllm"
            }
        if "trl" in sides:
            base = [turn.cpu_s for turn in (found["trl"][i] for i in numbers)]
            for name, all_turns in found.items():
                ratios = [cpu_s / all_turns[i].cpu_s for cpu_s, i in zip(base, numbers, strict=True)]
                sides[name]["times_trl"] = spread(ratios)
    return result


def summarize_side(counted: Sequence[Turn], numbers: Sequence[int], work: Work) -> dict[str, Any]:
    steps = work.steps_per_turn
    stages = sorted({stage for turn in counted for stage in turn.stages})
    return {
        "cpu_s_per_step": spread([turn.cpu_s / steps for turn in counted]),
        "wall_s_per_step": spread([turn.wall_s / steps for turn in counted]),
        "tokens_per_cpu_s": spread(
            [work.turn_tokens(n) / turn.cpu_s for n, turn in zip(numbers, counted, strict=True)]
        ),
        "stage_cpu_s_per_step": {
            stage: statistics.median(turn.stages.get(stage, 0.0) / steps for turn in counted) for stage in stages
        },
    }


def step_flops(turn: int, work: Work, world: random_world.World) -> dict[str, float]:
    """GFLOP that each stage of a step of this turn needs. Prompts count once, the head at response tokens only.

    Counts products of weight matrices only, no attention: two operations per parameter and token, and three times as
    many for training. Repeated work is not counted, so it lowers a stage's rate.
    """
    texts, shape = world.texts(), world.shape
    prompt_tokens = 0
    for index in range(turn * work.steps_per_turn, (turn + 1) * work.steps_per_turn):
        rows = range(index * work.prompts, (index + 1) * work.prompts)
        prompt_tokens += sum(len(texts[row % len(texts)].split()) for row in rows)
    responses = work.turn_tokens(turn) / work.steps_per_turn
    body = 2e-9 * shape.body * (prompt_tokens / work.steps_per_turn + responses)
    head = 2e-9 * shape.head * responses
    flops = {"gen": body + head, "adv": body, "ref": body + head, "update_actor": 3 * (body + head)}
    return flops | {"all": sum(flops.values())}


def spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "turns": list(values)}


def table(report: Mapping[str, Any]) -> Iterator[str]:
    peak = ", ".join(f"{name} {value:.0f}" for name, value in report["gemm_peak_gflops"].items())
    yield f"{report['dtype']}, {SAMPLES} samples per prompt; one core's GEMM peak in this run, GF/s: {peak}"
    yield "| model, workload | program | CPU s per step (min-max) | response tokens per CPU s | times TRL (min-max) |"
    yield "|---|---|---|---|---|"
    for size, workloads in report["sizes"].items():
        for workload, result in workloads.items():
            for name, side in result["sides"].items():
                cpu, ratio = side["cpu_s_per_step"], side.get("times_trl")
                times = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})" if ratio else "-"
                seconds = f"{cpu['median']:.3f} ({cpu['min']:.3f}-{cpu['max']:.3f})"
                tokens = side["tokens_per_cpu_s"]["median"]
                yield f"| {size}, {workload} | {name} | {seconds} | {tokens:.0f} | {times} |"
    yield ""
    yield "| model, workload, program | " + " | ".join(f"{s}: CPU s (GF/s)" for s in STAGES) + " |"
    yield "|---" * (1 + len(STAGES)) + "|"
    for size, workloads in report["sizes"].items():
        for workload, result in workloads.items():
            for name, side in result["sides"].items():
                if name != "ray_vllm":  # the stages of ray_vllm run in other processes
                    cells = [_cell(side, stage) for stage in STAGES]
                    yield f"| {size}, {workload}, {name} | " + " | ".join(cells) + " |"


STAGES = ("gen", "adv", "ref", "update_actor", "forward", "backward", "sync")


def _cell(side: Mapping[str, Any], stage: str) -> str:
    seconds, rate = side["stage_cpu_s_per_step"].get(stage), side["gflop_per_s"].get(stage)
    if seconds is None:
        return "-"
    return f"{seconds:.3f}" + (f" ({rate:.0f})" if rate else "")


if __name__ == "__main__":
    main()
