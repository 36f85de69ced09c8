"""Bytes of activations by formula against real passes: what graphs keep, and how much exists at most."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

from rlxf.planner.activations import Seen, activation_bytes, seen
from rlxf.planner.jobs import TrainJob
from rlxf.planner.transients import CHUNKS, backward_bytes, forward_bytes
from rlxf.platform.compiled import CompiledElementwise
from rlxf.platform.cpu import CpuPlatform
from rlxf.platform.cuda import CudaPlatform
from rlxf.platform.npu import NpuPlatform
from tests.planner_ranks import Case, Rows, kept_on

TP2 = {"tensor_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
PP2 = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
CP2 = {"context_parallel_size": 2}
SP = {"sequence_parallel": True}
VP2 = {"virtual_pipeline_model_parallel_size": 2, "max_tokens_per_micro_batch": 99, "ppo_mini_batch_size": 4}
BF16 = {"bf16": True}
LORA = {"lora_r": 4}
FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective"}
WHOLE = {"micro_batch_size": 2, "ppo_mini_batch_size": 2}  # one pass of two sequences
PASSES = {"micro_batch_size": 1, "ppo_mini_batch_size": 4}  # four of them
KEPT = 0.03  # how near kept bytes must be, relative
PEAK = 0.15
SMALL = 0.05  # of the total: such a component need not be near

LONG = Rows(prompt=200, completion=3)  # layers, not the head, decide
SHARED = Rows(shared=True)


def _run(name: str, settings: dict[str, Any], rows: Rows, kind: str = "llama", **sizes: int) -> tuple[Case, Rows]:
    """With an MLP as wide as usual beside its hidden size, if ``sizes`` says nothing else."""
    sizes = {"intermediate_size": 448} | sizes
    return Case(name=name, settings=WHOLE | settings, kind=kind, stage="sft", sizes=sizes), rows


ALONE: list[tuple[Case, Rows]] = [
    _run("fp32", {}, Rows(), "llama"),
    _run("bf16-long", BF16, LONG, "qwen2"),
    _run("norms-bf16", BF16, Rows(), "qwen3"),
    _run("shared", {}, SHARED, "llama"),
    _run("selective", SELECTIVE, Rows(), "qwen3"),
    _run("full-bf16", FULL | BF16, LONG, "llama"),
    _run("lora", LORA, Rows(), "llama"),
    _run("attention-bf16", BF16, LONG, intermediate_size=192),  # it has more than the MLP at a time
    _run("vocabulary", {}, Rows(prompt=5, completion=20), vocab_size=4096),  # its gradient is much of the peak
]
ALONE_SLOW: list[tuple[Case, Rows]] = [
    _run("bf16", BF16, Rows(prompt=10, completion=90), "qwen2"),
    _run("norms", {}, LONG, "qwen3"),
    _run("shared-bf16", BF16, SHARED, "qwen3"),
    _run("selective-bf16", SELECTIVE | BF16, Rows(), "llama"),
    _run("full", FULL, Rows(), "qwen3"),
    _run("lora-part-bf16", LORA | BF16 | {"lora_target_modules": ["linear_qkv"]}, LONG, "qwen3"),
    _run("qlora", LORA | {"qlora": True}, Rows(), "llama"),
]
TWO: list[tuple[Case, Rows]] = [
    _run("tp2", TP2, Rows(), "llama"),
    _run("tp2-sp-bf16", TP2 | SP | BF16, LONG, "qwen3"),
    _run("cp2", CP2, Rows(), "llama"),
    _run("pp2", PP2 | PASSES, Rows(count=4), "llama"),
]
TWO_SLOW: list[tuple[Case, Rows]] = [
    _run("tp2-sp-lora", TP2 | SP | LORA, Rows(), "llama"),
    _run("cp2-bf16", CP2 | BF16, LONG, "qwen3"),
    _run("cp2-shared", CP2, SHARED, "qwen3"),
    _run("pp2-full", PP2 | PASSES | FULL | BF16, Rows(count=4), "llama"),
    _run("pp2-vp2", PP2 | VP2, Rows(count=4), "llama"),
]
FOUR_SLOW: list[tuple[Case, Rows]] = [
    _run("tp4-two-kv-heads", TP4, Rows(), "llama"),
    _run("tp4-two-kv-heads-bf16", TP4 | SP | BF16, LONG, "qwen2"),
    _run("tp4-norms", TP4, Rows(), "qwen3"),
    _run("pp4", PP4 | PASSES, Rows(count=4), "llama"),
    _run("tp2-pp2", TP2 | SP | PP2 | PASSES | BF16, Rows(count=4), "qwen3"),
    _run("tp2-cp2", TP2 | SP | CP2, Rows(prompt=41), "llama"),
]


def _predicted(job: TrainJob, rows: Rows, passes: int) -> tuple[dict[str, float], float, float]:
    """Kept bytes by component, peak of a forward pass, peak of an update."""
    count = rows.count // passes
    shared = rows.prompt if rows.shared else 0
    tokens = shared + count * (rows.prompt * (not rows.shared) + rows.completion - 1)
    read = count * rows.completion
    view: Seen | None = seen(tokens, count, shared, cp=job.layout.cp, together=count)
    one = (job.shape, job.layout, job.precision)
    given: dict[str, Any] = {"rows": read, "view": view, "kind": "cpu"}
    kept = dict(activation_bytes(*one, job.recompute, tokens, passes, job.lora, **given))
    forward = forward_bytes(*one, tokens, lora=job.lora, **given)
    extra = sum(backward_bytes(*one, job.recompute, tokens, lora=job.lora, **given).values())
    return kept, forward, sum(kept.values()) + extra


def _check(runs: list[tuple[Case, Rows]], world_size: int, root: Path) -> None:
    found = kept_on(runs, world_size, root)
    wrong = []
    for case, rows in runs:
        job = case.job(root, world_size)
        passes = 1 if case.settings["ppo_mini_batch_size"] == WHOLE["ppo_mini_batch_size"] else rows.count
        kept, forward, update = _predicted(job, rows, passes)
        ranks = found[case.name]
        most = max((rank["kept"] for rank in ranks), key=lambda parts: sum(parts.values()))
        if job.layout.pp > 1:  # graphs do not show what the schedule keeps, by which another stage may have most
            most = ranks[-1 if "head" in kept else 0]["kept"]
        hidden = {"stage ends"} | ({"positions"} if job.recompute != "none" else set())  # the latter lie in a closure
        pairs = {name: (most.get(name, 0), size) for name, size in kept.items() if name not in hidden}
        total = sum(real for real, _ in pairs.values())
        pairs["all kept"] = total, sum(value for _, value in pairs.values())
        layout = job.layout
        worst = max if layout.pp * layout.cp > 1 else min  # ranks of one stage differ only by what gloo holds
        pairs["forward"] = worst(rank["forward"] for rank in ranks), forward
        pairs["update"] = worst(rank["update"] for rank in ranks), update
        for name, (real, value) in pairs.items():
            limit = PEAK if name in ("forward", "update") else KEPT
            if real > SMALL * total and abs(value - real) > limit * real:
                wrong.append(f"{case.name}: {name}: {real}, predicted {value:.0f} ({value / real - 1:+.0%})")
    assert not wrong, "\n".join(wrong)


def test_activations_are_those_of_one_real_rank(tmp_path: Path) -> None:
    _check(ALONE, 1, tmp_path)


def test_activations_are_those_of_two_real_ranks(tmp_path: Path) -> None:
    _check(TWO, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("runs", "world_size"), [(ALONE_SLOW, 1), (TWO_SLOW, 2), (FOUR_SLOW, 4)], ids=["1", "2", "4"])
def test_activations_of_more_layouts_are_those_of_real_ranks(
    tmp_path: Path, runs: list[tuple[Case, Rows]], world_size: int
) -> None:
    _check(runs, world_size, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shlex.quote(torch.__file__) != torch.__file__, reason="torch calls g++ without quotes")
@pytest.mark.parametrize(("part", "numbers"), [("swiglu", 2 * 192), ("rotate", 2 * 32)])
def test_a_compiled_kernel_keeps_its_input_or_its_angles(
    part: str, numbers: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is taken for granted of a GPU: gate and up, cosine and sine, and nothing in between."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # which runs of other tests have set for this process
    kept, made = dict[int, int](), CompiledElementwise()
    angles = [torch.randn(50, 1, 32, dtype=torch.bfloat16) for _ in range(2)]
    shape, more = ((50, 2 * 192), []) if part == "swiglu" else ((50, 4, 32), angles)
    x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) * 1

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    switched_on = torch._dynamo.config.patch(disable=False)
    with switched_on, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        getattr(made, part)(x, *more)
    assert "torch.compile failed" not in caplog.text  # the plain rotation keeps the same
    assert sum(kept.values()) == 50 * 2 * numbers


@pytest.mark.parametrize("platform", [CpuPlatform(), CudaPlatform, NpuPlatform], ids=["cpu", "cuda", "npu"])
def test_parts_of_logits_are_those_of_the_platform(platform: Any) -> None:
    chunks, ours = platform.logit_chunks, CHUNKS[platform.name]
    assert (ours.elements, ours.rows, ours.columns) == (chunks.elements, chunks.rows, chunks.columns)
