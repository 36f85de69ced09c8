"""What the fast linear path of a CPU gains: GF/s of each product, and one pass of a 26M model with it on and off.

    OMP_NUM_THREADS=1 python benchmarks/cpu_linear.py              # writes results/cpu_linear.json

CPU seconds of one thread. The paths take turns within each repeat, so that a machine that slows down slows all of them.
Every shape is measured on both paths, including those that the rule in ``rlxf/platform/linear.py`` leaves to MKL. The
table shows why the rule has these bounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measure  # noqa: E402 - the repository's root must be importable first
from benchmarks.step_time import over_runs  # noqa: E402
from rlxf.core.types import Sequences  # noqa: E402
from rlxf.models.megatron.parallel import ParallelSizes, init_parallel  # noqa: E402
from rlxf.platform import Process, get_platform, linear  # noqa: E402
from rlxf.platform.linear import Linear, OneDnnLinear  # noqa: E402

# rows, inputs, outputs: decode of a small batch, a training micro-batch, the head, a tiny model.
SHAPES = [
    *((rows, 512, 1408) for rows in (1, 2, 4, 8, 16, 64, 512, 2048)),
    *((rows, 512, 8192) for rows in (1, 8, 32, 512)),
    (512, 1408, 512), (512, 512, 512), (64, 2048, 8192), (256, 64, 192), (256, 128, 384), (256, 256, 256),
]  # fmt: skip
PATHS: dict[str, tuple[Linear, torch.dtype]] = {
    "mkl": (Linear(), torch.float32),
    "onednn": (OneDnnLinear(), torch.float32),
    "bf16": (Linear(), torch.bfloat16),
}
MODEL = {
    "num_hidden_layers": 7, "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
NUM_SEQUENCES, PROMPT_TOKENS, COMPLETION_TOKENS = 8, 64, 192
MIN_SECONDS = 0.02  # shortest measurement of a product

Paths = Mapping[str, Callable[[], Any]]


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"repeats": arguments.repeats}
    with tempfile.TemporaryDirectory(prefix="rlxf") as scratch:
        report["model"] = model_pass(Path(scratch), arguments.repeats)
    report["products"] = [found for shape in SHAPES for found in products(shape, arguments.repeats)]
    report["machine"] = measure.machine()
    for line in table(report):
        print(line)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {arguments.output}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each path")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "cpu_linear.json")
    return parser.parse_args()


def products(shape: tuple[int, int, int], repeats: int) -> Iterator[dict[str, Any]]:
    """GF/s of each path for the three products of one layer."""
    linear.MIN_ROWS = linear.MIN_WEIGHT_ELEMENTS = 1  # measure the path, not the rule
    rows, size, outputs = shape
    x, weight, grad = torch.randn(rows, size), torch.randn(outputs, size), torch.randn(rows, outputs)
    for name, inputs in (("output", (x, weight)), ("grad_input", (grad, weight)), ("grad_weight", (grad, x))):
        calls = {path: call(getattr(layer, name), inputs, dtype) for path, (layer, dtype) in PATHS.items()}
        flop = 2e-9 * rows * size * outputs
        seconds = cpu_seconds(calls, repeats, MIN_SECONDS)
        speed = {path: over_runs([flop / value for value in values]) for path, values in seconds.items()}
        yield {"rows": rows, "inputs": size, "outputs": outputs, "product": name, "gflops": speed}


def call(product: Callable[..., Tensor], inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Callable[[], Tensor]:
    ready = [tensor.to(dtype) for tensor in inputs]
    return lambda: product(*ready)


def cpu_seconds(calls: Paths, repeats: int, min_seconds: float = 0.0) -> dict[str, list[float]]:
    """CPU seconds of one call of each path, ``repeats`` times, in turn."""
    counts = {}
    for name, run in calls.items():
        run()  # the first call with a shape compiles its kernel
        counts[name] = max(1, round(min_seconds / max(timed(run, 1), 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats):
        for name in calls if repeat % 2 == 0 else reversed(list(calls)):
            seconds[name].append(timed(calls[name], counts[name]))
    return seconds


def timed(run: Callable[[], Any], count: int) -> float:
    begin = time.process_time()
    for _ in range(count):
        run()
    return (time.process_time() - begin) / count


def model_pass(folder: Path, repeats: int) -> dict[str, Any]:
    """Forward and backward of the product's own model on packed sequences, CPU seconds per path."""
    import transformers

    transformers.LlamaForCausalLM(transformers.LlamaConfig(**MODEL)).save_pretrained(folder)
    passes = {
        path: one_pass(folder, "mkl" if type(layer) is Linear else "onednn", dtype)
        for path, (layer, dtype) in PATHS.items()
    }
    seconds = cpu_seconds(passes, repeats)
    num_tokens = NUM_SEQUENCES * (PROMPT_TOKENS + COMPLETION_TOKENS)
    return {
        "shape": MODEL,
        "sequences": NUM_SEQUENCES,
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": COMPLETION_TOKENS,
        "cpu_s": {path: over_runs(values) for path, values in seconds.items()},
        "tokens_per_cpu_s": {path: over_runs([num_tokens / v for v in values]) for path, values in seconds.items()},
    }


def one_pass(folder: Path, choice: Any, dtype: torch.dtype) -> Callable[[], None]:
    platform = get_platform("cpu", cpu_linear=choice)
    layout = init_parallel(platform, Process(), sizes=ParallelSizes(), seed=1, timeout_s=60)
    from rlxf.models.megatron.model import MegatronModel
    from rlxf.models.megatron.packing import pack_for_logps

    model = MegatronModel(str(folder), platform=platform, layout=layout, dtype=dtype)
    tokens = torch.randint(MODEL["vocab_size"], (NUM_SEQUENCES, PROMPT_TOKENS + COMPLETION_TOKENS)).tolist()
    rows = Sequences.from_rows([row[:PROMPT_TOKENS] for row in tokens], [row[PROMPT_TOKENS:] for row in tokens])
    packed = pack_for_logps(rows, layout.device)

    def run() -> None:
        model.gpt.zero_grad()
        torch.autograd.backward(model.logps(model.gpt(packed), packed).sum())

    return run


def table(report: Mapping[str, Any]) -> Iterator[str]:
    yield "| 26M model, forward and backward | " + " | ".join(PATHS) + " |"
    yield "|---" * (1 + len(PATHS)) + "|"
    for name in ("cpu_s", "tokens_per_cpu_s"):
        yield f"| {name} | " + " | ".join(cell(report["model"][name][path], ".3g") for path in PATHS) + " |"
    yield ""
    yield "| GF/s: rows x inputs x outputs | product | " + " | ".join(PATHS) + " | onednn / mkl |"
    yield "|---" * (3 + len(PATHS)) + "|"
    for found in report["products"]:
        speed = found["gflops"]
        ratio = speed["onednn"]["median"] / speed["mkl"]["median"]
        shape = f"{found['rows']} x {found['inputs']} x {found['outputs']}"
        cells = " | ".join(cell(speed[path], ".0f") for path in PATHS)
        yield f"| {shape} | {found['product']} | {cells} | {ratio:.2f} |"


def cell(values: Mapping[str, Any], form: str) -> str:
    return f"{values['median']:{form}} ({values['min']:{form}}-{values['max']:{form}})"


if __name__ == "__main__":
    main()
