"""Models with LoRA adapters: attach them, give them values, take them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.models.backend import load_model, token_logps
from rlxf.models.megatron.lora import adapter_entries, adapters, attach, exported_parameter
from rlxf.models.megatron.nf4 import quantize_base
from rlxf.models.megatron.packing import pack_for_logps
from rlxf.models.megatron.weights import load_entries, to_full
from rlxf.models.peft_folder import PeftAdapter
from rlxf.platform import Process, get_platform
from rlxf.types import Sequences
from tests.settings import run_config

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def adapted_model(
    folder: Path, process: Process | None = None, *, given: PeftAdapter | None = None, seed: int = 1, **actor: Any
) -> Any:
    """The model in ``folder`` with fresh adapters, or with ``given`` ones; ``actor`` are keys of actor_rollout."""
    config = run_config(folder, **({"lora_r": 4, "lora_alpha": 8.0} | actor))
    model = load_model(config, "actor_rollout", get_platform("cpu"), process or Process())
    if config.actor_rollout.qlora:
        quantize_base(model.gpt, model.table)
    attach(model.gpt, model.table, config.actor_rollout, seed=seed, ranks=given.ranks if given else None)
    if given:
        load_entries(
            list(adapter_entries(model.table, model.gpt)),
            dict(model.gpt.named_parameters()),
            given.tensors.__getitem__,
            model.geometry,
            tp_rank=model.layout.tp_rank,
            tp_size=model.layout.tp_size,
        )
    return model


@torch.no_grad()
def randomize_adapters(model: Any, seed: int = 0) -> None:
    """Values that move the logits clearly; B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters(model.gpt):
        for matrix in (adapter.lora_A, adapter.lora_B):
            matrix.copy_(0.1 * torch.randn(matrix.shape, generator=generator))


def _gathered(shard: Tensor, tp_size: int) -> list[Tensor]:
    from rlxf.models.megatron.model import _gather_tensor_parallel

    return _gather_tensor_parallel(shard.detach(), tp_size)


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """The full matrices, by the names of ``PeftAdapter.tensors``; every rank calls it."""
    parameters = dict(model.gpt.named_parameters())
    found: dict[str, Tensor] = {}
    for entry in adapter_entries(model.table, model.gpt):
        shards = _gathered(parameters[entry.parameter], model.layout.tp_size)
        found |= zip(entry.hf_names, to_full(entry.kind, shards, model.geometry), strict=True)
    return found


def merged_tensors(model: Any) -> dict[str, Tensor]:
    """The whole model by Hugging Face names, adapters merged; every rank calls it."""
    found: dict[str, Tensor] = {}
    for entry in model.table:
        shards = _gathered(exported_parameter(model.gpt, entry.parameter), model.layout.tp_size)
        found |= zip(entry.hf_names, to_full(entry.kind, shards, model.geometry), strict=True)
    return found


def logps(model: Any, sequences: Sequences) -> Tensor:
    """Log-probabilities of the completions' tokens."""
    return token_logps(model, sequences, sequences_per_forward=5)


def gradients(model: Any, sequences: Sequences) -> dict[str, Tensor]:
    """Of the sum of ``logps``, for every parameter that has one."""
    model.gpt.zero_grad()
    packed = pack_for_logps(sequences, torch.device("cpu"))
    model.logps(model.gpt(packed), packed).sum().backward()
    return {name: p.grad.clone() for name, p in model.gpt.named_parameters() if p.grad is not None}
