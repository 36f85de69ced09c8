"""Models with LoRA adapters: load them as a run does, give the adapters values, take them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.assembly.roles import load_role
from rlxf.core.types import Sequences
from rlxf.models.backend import token_logps
from rlxf.models.batching import MicroBatchLimits
from rlxf.models.megatron.adapters import export_adapters
from rlxf.models.megatron.lora import adapters
from rlxf.models.megatron.packing import pack_for_logps
from rlxf.platform import Process, get_platform
from tests.settings import run_config

TARGETS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
LORA = {"lora_r": 4, "lora_alpha": 8.0}


def loaded(folder: Path, *, seed: int = 1, **actor: Any) -> Any:
    """The actor's model; ``actor`` are keys of actor_rollout."""
    config = run_config(folder, **actor)
    training = config.training.model_copy(update={"seed": seed})
    return load_role(
        config.model_copy(update={"training": training}),
        "actor_rollout",
        get_platform("cpu", cpu_linear="mkl"),
        Process(),
    )


def adapted_model(folder: Path, *, seed: int = 1, **actor: Any) -> Any:
    """The same with adapters of rank 4."""
    return loaded(folder, seed=seed, **(LORA | actor))


@torch.no_grad()
def randomize_adapters(model: Any, seed: int = 0) -> None:
    """Values that move the logits clearly; B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters(model.chunks):
        for matrix in (adapter.lora_A, adapter.lora_B):
            matrix.copy_(0.1 * torch.randn(matrix.shape, generator=generator))


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """The full matrices, by the names of ``PeftAdapter.tensors``."""
    return {name: value.detach().clone() for name, value in export_adapters(model)}


def merged_tensors(model: Any) -> dict[str, Tensor]:
    """The whole model by Hugging Face names, adapters merged."""
    names = [name for name, _ in model.exported_shapes()]
    return {name: value.clone() for name, value in model.export(names)}


def logps(model: Any, sequences: Sequences) -> Tensor:
    """Log-probabilities of the completions' tokens."""
    return token_logps(model, sequences, MicroBatchLimits(num_sequences=100))


def gradients(model: Any, sequences: Sequences) -> dict[str, Tensor]:
    """Of the sum of ``logps``, for every parameter that has one."""
    gpt = model.last
    gpt.zero_grad()
    packed = pack_for_logps(sequences, model.layout, share_prompts=False)
    model.logps(gpt(packed), packed).sum().backward()
    return {name: p.grad.clone() for name, p in gpt.named_parameters() if p.grad is not None}
