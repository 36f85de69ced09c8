"""The parts of device.py that compare a device's numbers with those of a CPU."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.random_world import Shape
from rlxf.core.types import Sequences
from rlxf.platform import Platform, Process, get_platform
from rlxf.platform.attention import AttentionBlocks
from rlxf.platform.elementwise import Elementwise

if TYPE_CHECKING:
    from rlxf.models.megatron.model import MegatronModel

Job = tuple[subprocess.Popen[str], Path]
"""A run that has begun, and its folder."""

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "models" / "tiny"
REPLAY = ROOT / "tests" / "golden" / "tiny_local_seed1_rollouts.jsonl"
CURVE = ROOT / "tests" / "golden" / "tiny_local_seed1.json"
STEPS = 20  # of the stored curve
SHAPES = {
    "135m": Shape(hidden=576, layers=30, ffn=1536, heads=9, kv_heads=3, vocab=49152, positions=8192),
    "1b": Shape(hidden=2048, layers=16, ffn=8192, heads=32, kv_heads=8, vocab=128256, positions=131072),
}
SMALL = Shape(hidden=128, layers=2, ffn=256, heads=4, kv_heads=2, vocab=512, positions=131072)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What every part needs."""

    platform: Platform
    device: torch.device
    scratch: Path
    small: bool  # tiny sizes
    quick: bool  # fewer cases

    @classmethod
    def of(cls, device: str, scratch: Path, *, small: bool, quick: bool) -> Bench:
        platform = get_platform(device)
        return cls(platform=platform, device=platform.set_device(0), scratch=scratch, small=small, quick=quick)

    @property
    def accelerator(self) -> Any:
        """torch's module for this kind of device."""
        return torch.get_device_module(self.platform.torch_device)

    @property
    def is_cpu(self) -> bool:
        return self.platform.name == "cpu"

    def shape(self, name: str) -> Shape:
        return SMALL if self.small else SHAPES[name]

    def folder(self, name: str) -> Path:
        """A random Llama of that shape in bf16, with llama3 rotary embedding at 1B and a tied head; made once."""
        folder = self.scratch / name
        if not (folder / "config.json").exists():
            save_random(folder, self.shape(name), self.device, scaled=name == "1b")
        return folder


def save_random(folder: Path, shape: Shape, device: torch.device, *, scaled: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 100000.0}
    if scaled:
        rope = {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=shape.positions,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=1, rope_parameters=rope,
        rms_norm_eps=1e-5, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)


def load(bench: Bench, folder: Path, dtype: torch.dtype, recompute: str = "none") -> MegatronModel:
    """The folder as this device's megatron model."""
    from rlxf.models.megatron.parallel import ParallelSizes, init_parallel

    layout = init_parallel(bench.platform, Process(), sizes=ParallelSizes(), seed=1, timeout_s=600)
    from rlxf.models.megatron.model import MegatronModel

    return MegatronModel(str(folder), platform=bench.platform, layout=layout, dtype=dtype, recompute=recompute)


def random_sequences(
    num: int, prompts: tuple[int, int], completions: tuple[int, int], vocab: int, *, per_prompt: int = 2, seed: int = 0
) -> Sequences:
    """``num`` sequences; ``per_prompt`` in a row have the same prompt. Lengths are uniform in the ranges."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (1,), generator=draw))
        found: list[int] = torch.randint(2, vocab, (length,), generator=draw).tolist()
        return found

    shared = [tokens(*prompts) for _ in range(-(-num // per_prompt))]
    return Sequences.from_rows(
        [shared[row // per_prompt] for row in range(num)], [tokens(*completions) for _ in range(num)]
    )


def distance(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of ``wanted``."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm())


def attention(bench: Bench) -> dict[str, Any]:
    """Packed blocks of different lengths, the last ones with keys before their own; against float64 on the CPU."""
    cpu, found = get_platform("cpu"), dict[str, Any]()
    own = [1, 7, 64, 129, 300] if not bench.small else [1, 5, 9]
    queries, keys = [*own, 3, 50], [*own, 40, 77]
    for dtype in (torch.float32, torch.bfloat16):
        for heads, kv_heads, size in ((8, 8, 64), (8, 2, 64), (4, 2, 32), (32, 8, 128)):
            torch.manual_seed(0)
            shapes = ((sum(queries), heads), (sum(keys), kv_heads), (sum(keys), kv_heads), (sum(queries), heads))
            *given, grad = (torch.randn(*shape, size).to(dtype) for shape in shapes)
            results = []
            for platform, device, wide in ((cpu, "cpu", True), (bench.platform, bench.device, False)):
                leaves = [(x.double() if wide else x).to(device).requires_grad_() for x in given]
                blocks = AttentionBlocks.of(queries, keys, torch.device(device))
                out = platform.packed_attention(*leaves, blocks, size**-0.5)
                out.backward(grad.to(out))
                results.append([out, *(leaf.grad for leaf in leaves)])
            names = ("output", "grad_q", "grad_k", "grad_v")
            case = f"{str(dtype).removeprefix('torch.')} {heads}/{kv_heads} heads of {size}"
            found[case] = {n: distance(a, b) for n, a, b in zip(names, results[1], results[0], strict=True)}
    return found


def elementwise(bench: Bench) -> dict[str, Any]:
    """Norm, rotation and gate of the platform against plain torch in float64, at two sizes of a compiled kernel."""
    calls: dict[str, Callable[..., Tensor]] = {
        "rms_norm": lambda owner, x, weight: owner.rms_norm(x, weight, 1e-5),
        "rotate": lambda owner, heads, cos, sin: owner.rotate(heads, cos, sin),
        "swiglu": lambda owner, x: owner.swiglu(x),
    }
    found: dict[str, Any] = {}
    for dtype, rows in itertools.product((torch.float32, torch.bfloat16), (33, 257)):
        torch.manual_seed(rows)
        angles = torch.outer(torch.arange(rows).float(), 0.5 ** torch.arange(32).float())
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        inputs = {
            "rms_norm": [torch.randn(rows, 1, 512), torch.randn(512)],
            "rotate": [torch.randn(rows, 6, 64), angles.cos(), angles.sin()],
            "swiglu": [torch.randn(rows, 1, 512)],
        }
        for name, call in calls.items():
            given = [value.to(dtype) for value in inputs[name]]
            results = []
            for owner, device, wide in (
                (Elementwise(), "cpu", True),
                (bench.platform.elementwise, bench.device, False),
            ):
                leaves = [(x.double() if wide else x).to(device).detach().requires_grad_() for x in given]
                out = call(owner, *leaves)
                out.backward(torch.ones_like(out))
                results.append([out, leaves[0].grad])
            distances = [distance(a, b) for a, b in zip(results[1], results[0], strict=True)]
            found[f"{name} {str(dtype).removeprefix('torch.')} {rows} rows"] = dict(
                zip(("output", "grad"), distances, strict=True)
            )
    return found


def hf_logps(folder: Path, sequences: Sequences, device: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Log-probs of all completion tokens by transformers, a sequence at a time; and the embedding's gradient."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    found = []
    for row, start in zip(sequences.rows(), sequences.prompt_lengths.tolist(), strict=True):
        tokens = torch.tensor(row, device=device)
        logits = model(tokens[None]).logits[0, start - 1 : -1].float()
        logps = logits.log_softmax(-1).gather(1, tokens[start:, None])[:, 0]
        logps.sum().backward()
        found.append(logps.detach().cpu())
    grad = model.model.embed_tokens.weight.grad
    return torch.cat(found), None if grad is None else grad.cpu()


def own_logps(bench: Bench, folder: Path, sequences: Sequences, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The same by the megatron model, packed with shared prompts."""
    from rlxf.models.megatron.packing import pack_for_logps

    model = load(bench, folder, dtype)
    packed = pack_for_logps(sequences, model.layout)
    values = model.logps(model.last(packed), packed)
    values.sum().backward()
    return values.detach().cpu(), model.last.embedding.word_embeddings.weight.grad.cpu()


def compare_model(bench: Bench, folder: Path, vocab: int) -> dict[str, Any]:
    sequences = random_sequences(4 if bench.small else 8, (8, 40), (5, 90), vocab)
    wanted = hf_logps(folder, sequences, "cpu", torch.float32)
    found: dict[str, Any] = {"tokens": len(wanted[0]), "mean_logp": float(wanted[0].mean())}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        there = hf_logps(folder, sequences, bench.device, dtype)
        own = own_logps(bench, folder, sequences, dtype)
        cases = {f"hf {name}": there, f"megatron {name}": own}
        for case, (logps, grad) in cases.items():
            found[f"{case} - cpu fp32"] = {
                "mean": float((logps - wanted[0]).abs().mean()),
                "max": float((logps - wanted[0]).abs().max()),
                "embedding_grad": distance(grad, wanted[1]),  # type: ignore[arg-type]
            }
        difference = (own[0] - there[0]).abs()
        found[f"megatron - hf, {name}"] = {"mean": float(difference.mean()), "max": float(difference.max())}
    return found


def model_tiny(bench: Bench) -> dict[str, Any]:
    folder = TINY / "sft"
    vocab: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    return compare_model(bench, folder, vocab)


def model_135m(bench: Bench) -> dict[str, Any]:
    return compare_model(bench, bench.folder("135m"), bench.shape("135m").vocab)


def model_1b(bench: Bench) -> dict[str, Any]:
    return compare_model(bench, bench.folder("1b"), bench.shape("1b").vocab)


def recipe(bench: Bench) -> dict[str, Any]:
    """The quick start's recipe in one process: recorded rollouts, then its own; on the device and on the CPU."""
    steps, stored = 4 if bench.small else STEPS, json.loads(CURVE.read_text())
    rollouts = (f"rollout.replay_path={REPLAY}", "rollout.engine=replay", f"training.train_iters={STEPS}")
    live = (f"training.train_iters={steps}", "rollout.engine=hf")
    name = bench.platform.name
    jobs = {"replay": (name, rollouts), "live": (name, live), "live on the cpu": ("cpu", live)}
    processes = {job: run_recipe(bench, job, device, options) for job, (device, options) in jobs.items()}
    curves: dict[str, list[float]] = {}
    found: dict[str, Any] = {}
    for job, (process, folder) in processes.items():
        said, _ = process.communicate()
        if process.returncode:
            found[job] = f"FAILED: {said[-600:]}"
            continue
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curves[job] = [row["loss"] for row in rows]
        found[job] = {"first": curves[job][0], "last": curves[job][-1], "losses": curves[job]}
        found[job]["s_per_step"] = rows[-1].get("timing/all", float("nan"))
        found[job]["logp_diff_max"] = max(row.get("rollout/logp_diff_max") or 0.0 for row in rows)
    pairs = {
        "replay - stored": ("replay", stored["replay_loss"]),
        "live - cpu": ("live", curves.get("live on the cpu")),
    }
    for case, (job, other) in pairs.items():
        if job in curves and other:
            differences = [abs(a - b) for a, b in zip(curves[job], other, strict=True)]
            found[case] = {
                "first": differences[0],
                "mean": sum(differences) / len(differences),
                "max": max(differences),
            }
    return found


def run_recipe(bench: Bench, job: str, device: str, options: Sequence[str]) -> Job:
    """The quick start's recipe with ``options``, begun: in one process, unless they say ``runtime=ray``."""
    folder = bench.scratch / job.replace(" ", "_")
    return started(["ray_gpt.py", *tiny_arguments(folder, device, options)], device), folder


def tiny_arguments(folder: Path, device: str, options: Sequence[str]) -> list[str]:
    runtime = [] if any(option.startswith("runtime=") for option in options) else ["runtime=local"]
    return [
        "--config-name", "online_dpo_trainer_tiny", "training.seed=1", f"training.device={device}",
        "training.eval_interval=0", f"hydra.run.dir={folder}", *runtime, *options,
    ]  # fmt: skip


def started(arguments: Sequence[str], device: str) -> subprocess.Popen[str]:
    environment = {**os.environ, **get_platform(device).worker_environment(2)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "attention": attention,
    "elementwise": elementwise,
    "model_tiny": model_tiny,
    "model_135m": model_135m,
    "model_1b": model_1b,
    "recipe": recipe,
}
