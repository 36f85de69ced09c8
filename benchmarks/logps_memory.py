"""Peak memory and CPU seconds of the log-prob pass, chunked as the product does it and through full logits.

    OMP_NUM_THREADS=1 python benchmarks/logps_memory.py              # writes results/logps_memory.json

Every case is a fresh process. Its figure is the peak resident memory during the pass, minus what the process held once
its inputs were ready. With a backward pass it includes the gradients of hidden states and head, which every
implementation must hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402 - the repository's root must be importable first
from rlxf.models.logps import target_logps  # noqa: E402
from rlxf.platform import get_platform  # noqa: E402

GOAL_BYTES = 0.35e9  # of the forward pass, above its inputs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = ("chunked", "full")
PASSES = ("forward", "forward and backward")


def main() -> None:
    arguments = parse()
    if arguments.case:
        way, dtype_name, which = arguments.case
        print(json.dumps(one_case(way, dtype_name, which, arguments)))
        return
    cases = []
    for number, case in enumerate(itertools.product(WAYS, DTYPES, PASSES)):
        print(f"case {number + 1}: {', '.join(case)}", flush=True)
        cases.append(in_a_fresh_process(case, arguments))
    report = {
        "rows": arguments.rows,
        "hidden": arguments.hidden,
        "vocabulary": arguments.vocabulary,
        "cases": cases,
        "machine": measure.machine(),
    }
    for line in table(report):
        print(line)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {arguments.output}")
    late = [c for c in cases if c["way"] == "chunked" and c["pass"] == "forward" and c["peak_bytes"] > GOAL_BYTES]
    if late:
        raise SystemExit(f"above the goal of {GOAL_BYTES / 1e9} GB: {late}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "logps_memory.json")
    return parser.parse_args()


def in_a_fresh_process(case: tuple[str, str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = [f"--{name}={getattr(arguments, name)}" for name in ("rows", "hidden", "vocabulary")]
    command = [sys.executable, __file__, *sizes, "--case", *case]
    done = subprocess.run(command, cwd=ROOT, env=measure.environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def one_case(way: str, dtype_name: str, which: str, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    compute, dtype = (chunked if way == "chunked" else full), DTYPES[dtype_name]
    run_pass(compute, *inputs(8, 256, 512, dtype), backward=True)  # memory that libraries allocate in their first call
    hidden, weight, targets = inputs(arguments.rows, arguments.hidden, arguments.vocabulary, dtype)
    held = psutil.Process().memory_info().rss
    already = peak_rss() - held
    begin = time.process_time()
    run_pass(compute, hidden, weight, targets, backward=which != "forward")
    return {
        "way": way,
        "dtype": dtype_name,
        "pass": which,
        "peak_bytes": peak_rss() - held,
        "peak_bytes_before": already,  # a peak below it would not be seen
        "gradient_bytes": (hidden.nbytes + weight.nbytes) if which != "forward" else 0,
        "cpu_s": time.process_time() - begin,
    }


def inputs(rows: int, hidden: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    states = torch.empty(rows, hidden, dtype=dtype).normal_()
    head = torch.empty(vocabulary, hidden, dtype=dtype).normal_(std=hidden**-0.5)
    return states, head, torch.randint(vocabulary, (rows,))


def run_pass(
    compute: Callable[[Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    backward: bool,
) -> None:
    for leaf in (hidden, weight):
        leaf.requires_grad_(backward)
    values = compute(hidden, weight, targets)
    if backward:
        torch.autograd.backward(values.sum())


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return target_logps(hidden, weight, targets, linear=get_platform("cpu").linear)


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight)
    return logits.log_softmax(dim=-1, dtype=torch.float32).gather(1, targets[:, None])[:, 0]


def peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(report: Mapping[str, Any]) -> Iterator[str]:
    yield "| pass | dtype | way | peak above inputs, GB | of it gradients, GB | CPU s |"
    yield "|---|---|---|---|---|---|"
    for case in report["cases"]:
        peak, gradients = case["peak_bytes"] / 1e9, case["gradient_bytes"] / 1e9
        yield (
            f"| {case['pass']} | {case['dtype']} | {case['way']} | {peak:.2f} | {gradients:.2f} | {case['cpu_s']:.1f} |"
        )


if __name__ == "__main__":
    main()
