"""LoRA (Hu et al. 2021) on megatron's parallel linears: y = W x + (alpha / r) B A x, with W frozen.

An adapter is a child module of the linear that it belongs to, so the base keeps its parameter names. Communication
happens at width r and through megatron's mappings, so autograd itself gives every rank the gradients that it needs:

=========  ====================  =====================  =========================================================
linear     A [r, in]             B [out, r]             between A and B
=========  ====================  =====================  =========================================================
column     on every rank         cut like W (rows)      copy, or gather of the sequence; backward sums over ranks
row        cut like W (columns)  on every rank          sum over ranks, or sum and scatter of the sequence
=========  ====================  =====================  =========================================================

Under sequence parallelism the half that is on every rank sees that rank's tokens only; its mark ``sequence_parallel``
lets ``finalize_model_grads`` add the gradients up, as for a norm's weight.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from rlxf.config.roles import LoraConfig
from rlxf.models.megatron.nf4 import Nf4Linear, base_weight
from rlxf.models.megatron.weights import Entry, linear_name

# Dropout's random states are in megatron's tracker, so that recomputation and checkpoints handle them. One is for
# inputs that all tensor-parallel ranks share, one for inputs that are cut.
_REPLICATED, _SHARDED = "lora-dropout-replicated", "lora-dropout-sharded"


class Adapter(torch.nn.Module):
    """The two low-rank matrices of one parallel linear, on this rank.

    Args:
        linear: a column- or row-parallel linear, or its 4-bit form.
        rank: r, the width between the two matrices.
        scale: factor of B A, which is alpha / r of the recipe.
        dropout: share of the adapter's inputs that is zeroed while training.
        seed: of A, which is the same matrix in every parallel layout. B starts at zero.
    """

    def __init__(self, linear: Any, *, rank: int, scale: float, dropout: float, seed: int) -> None:
        super().__init__()
        self.rank = rank
        self.scale = scale
        self.dropout = dropout
        self.enabled = True
        self.group = linear.tp_group
        self.sequence_parallel = linear.config.sequence_parallel and self.group.size() > 1
        self.is_column = linear.weight.partition_dim == 0
        out_size, in_size = linear.weight.shape
        dtype = linear.weight.dtype
        device = next(linear.buffers(), linear.weight).device  # a 4-bit linear's weight has no storage
        first = _initial(rank, in_size if self.is_column else in_size * self.group.size(), seed)
        if not self.is_column:
            first = first.chunk(self.group.size(), dim=1)[self.group.rank()]
        self.lora_A = torch.nn.Parameter(first.to(device=device, dtype=dtype, copy=True))
        self.lora_B = torch.nn.Parameter(torch.zeros(out_size, rank, device=device, dtype=dtype))
        cut, whole = (self.lora_B, self.lora_A) if self.is_column else (self.lora_A, self.lora_B)
        set_tensor_model_parallel_attributes(cut, True, 0 if self.is_column else 1, 1)
        whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[T, 1, out] what the adapter adds to the linear's output; cut over the ranks as that output is."""
        narrow = F.linear(self._dropped(x), self.lora_A)  # [T, 1, r]
        if self.is_column and self.sequence_parallel:
            narrow = gather_from_sequence_parallel_region(narrow, group=self.group)
        elif self.is_column:
            narrow = copy_to_tensor_model_parallel_region(narrow, group=self.group)
        elif self.sequence_parallel:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow, group=self.group)
        else:
            narrow = reduce_from_tensor_model_parallel_region(narrow, group=self.group)
        return self.scale * F.linear(narrow, self.lora_B)

    def _dropped(self, x: Tensor) -> Tensor:
        if not (self.training and self.dropout):
            return x
        alike = self.is_column and not self.sequence_parallel  # every rank holds the same input
        with get_cuda_rng_tracker().fork(_REPLICATED if alike else _SHARDED):
            return F.dropout(x, self.dropout)


def _initial(rank: int, in_size: int, seed: int) -> Tensor:
    """[r, in] float32, uniform in +- 1 / sqrt(in): what PEFT starts from (Kaiming with a = sqrt(5))."""
    bound = in_size**-0.5
    return torch.empty(rank, in_size).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))


def _key(*parts: Any) -> int:
    """A seed in [0, 2**63) that depends on ``parts`` only."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def attach(gpt: Any, table: Iterable[Entry], config: LoraConfig, *, ranks: Mapping[str, int], seed: int) -> None:
    """Freeze a chunk of a model and give linears fresh adapters; call it before the gradient buffers are made.

    Args:
        gpt: the chunk.
        table: its parameters.
        config: ``lora_r`` > 0, ``lora_alpha`` and ``lora_dropout``.
        ranks: Hugging Face name of a linear (of the first where several are fused) -> the rank of its adapter.
        seed: of the run.
    """
    for name, parameter in gpt.named_parameters():
        parameter.requires_grad_(name == "score")  # a reward model's head trains beside the adapters
    for entry in table:
        place, _, kind = entry.parameter.rpartition(".")
        name = linear_name(entry)
        if kind != "weight" or name not in ranks:
            continue
        linear = gpt.get_submodule(place)
        linear.adapter = Adapter(
            linear,
            rank=ranks[name],
            scale=config.lora_alpha / config.lora_r,
            dropout=config.lora_dropout,
            seed=_key(seed, name),
        )
        linear.register_forward_hook(_add_adapter)
    if gpt.pre_process:
        # A recomputed layer hands gradients back only if its input asks for one, which a frozen embedding's does not.
        gpt.embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())


def _add_adapter(linear: Any, inputs: tuple[Tensor], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    if not linear.adapter.enabled:
        return output
    product, bias = output
    return product + linear.adapter(inputs[0]), bias


def adapters(chunks: Iterable[Any]) -> Iterator[Adapter]:
    """All adapters of a model's chunks on this rank."""
    return (module for gpt in chunks for module in gpt.modules() if isinstance(module, Adapter))


@contextmanager
def adapters_off(chunks: Sequence[Any]) -> Iterator[None]:
    """Compute with the base alone, bit for bit what the model computes without adapters."""
    before = [(adapter, adapter.enabled) for adapter in adapters(chunks)]
    for adapter, _ in before:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in before:
            adapter.enabled = enabled


def seed_dropout(seed: int, step: int) -> None:
    """Seed dropout's random states for one driver step, so that a resumed run draws the same numbers as the first one.

    Ranks that hold other tokens or layers draw other numbers; tensor-parallel ranks agree where they hold the same.
    """
    tracker = get_cuda_rng_tracker()
    place = (
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    for name, key in ((_REPLICATED, (*place, "alike")), (_SHARDED, (*place, tp_rank))):
        number = _key(seed, step, *key)
        tracker.states_.pop(name, None)
        tracker.seeds_.discard(number)  # the tracker refuses a seed that it has seen
        tracker.add(name, number)


def dropout_states() -> dict[str, Tensor]:
    """Dropout's random states as they are now, for ``set_dropout_states``."""
    states: dict[str, Tensor] = get_cuda_rng_tracker().get_states()
    return {name: states[name] for name in (_REPLICATED, _SHARDED) if name in states}


def set_dropout_states(states: Mapping[str, Tensor]) -> None:
    """Dropout goes on from here; a state that is not among them has no value any more."""
    tracker = get_cuda_rng_tracker()
    others = {name: state for name, state in tracker.get_states().items() if name not in (_REPLICATED, _SHARDED)}
    tracker.set_states(others | dict(states))


@torch.no_grad()
def merged_weight(linear: Any) -> Tensor:
    """This rank's share of W + scale * B A, computed in fp32, in W's dtype; W itself for a linear without adapter."""
    weight = base_weight(linear)
    if not hasattr(linear, "adapter"):
        return weight
    adapter: Adapter = linear.adapter
    return (weight.float() + adapter.scale * (adapter.lora_B.float() @ adapter.lora_A.float())).to(weight.dtype)


def exported_parameter(gpt: Any, name: str) -> Tensor:
    """This rank's share of a parameter as the whole model has it: adapters merged, 4-bit weights written out.

    Args:
        gpt: the model.
        name: of a parameter of the base, as in ``named_parameters``.
    """
    place, _, kind = name.rpartition(".")
    owner = gpt.get_submodule(place)
    written_out = kind == "weight" and (hasattr(owner, "adapter") or isinstance(owner, Nf4Linear))
    value: Tensor = merged_weight(owner) if written_out else getattr(owner, kind)
    return value.detach()
