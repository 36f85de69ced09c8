"""Hugging Face names and layouts <-> this rank's megatron parameters. Pure functions and one table.

megatron packs query, key and value per key/value group into ``linear_qkv``, and gate and up into ``linear_fc1``; tensor
parallelism cuts columns (dim 0), rows (dim 1) or the vocabulary (dim 0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlxf.models.megatron.families import Family

Kind = Literal["replicated", "vocab", "row", "qkv", "gate_up"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One megatron parameter and the Hugging Face tensors that it holds."""

    parameter: str  # local name, as in ``named_parameters``
    hf_names: tuple[str, ...]
    kind: Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """What cutting and packing needs to know."""

    kv_heads: int
    head_size: int
    heads: int
    vocab_size: int
    padded_vocab_size: int  # vocabulary and padding; every tensor-parallel rank has an equal share

    @classmethod
    def of(cls, hf_config: Any, *, tp_size: int = 1) -> Geometry:
        """That of a ``transformers`` config; the vocabulary is filled up so that every rank has as many rows."""
        heads = hf_config.num_attention_heads
        return cls(
            heads=heads,
            kv_heads=getattr(hf_config, "num_key_value_heads", None) or heads,
            head_size=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
            vocab_size=hf_config.vocab_size,
            padded_vocab_size=-(-hf_config.vocab_size // tp_size) * tp_size,
        )


def entries(
    layers: Sequence[int], family: Family, *, first: bool, last: bool, tied: bool, reward: bool
) -> Iterator[Entry]:
    """The parameters of one pipeline stage, in the order in which a model computes.

    Args:
        layers: global indices of the stage's layers; local index is the position.
        family: what differs from a plain Llama.
        first: the stage holds the embedding. last: it holds the final norm and the head.
        tied: the head is the embedding.
        reward: the head is a score of one number, held outside the megatron model as ``score``.
    """
    if first:
        yield Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")
    for local, layer in enumerate(layers):
        yield from _layer_entries(f"decoder.layers.{local}.", f"model.layers.{layer}.", family)
    if last:
        yield Entry("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated")
        if reward:
            yield Entry("score", ("score.weight",), "replicated")
        elif not tied:
            yield Entry("output_layer.weight", ("lm_head.weight",), "vocab")
        elif not first:
            yield Entry("output_layer.weight", ("model.embed_tokens.weight",), "vocab")


def _layer_entries(own: str, hf: str, family: Family) -> Iterator[Entry]:
    attention = f"{own}self_attention."
    yield Entry(f"{own}input_layernorm.weight", (f"{hf}input_layernorm.weight",), "replicated")
    for part in ("weight", "bias") if family.qkv_bias else ("weight",):
        names = tuple(f"{hf}self_attn.{x}_proj.{part}" for x in "qkv")
        yield Entry(f"{attention}linear_qkv.{part}", names, "qkv")
    if family.qk_norm:
        yield Entry(f"{attention}q_layernorm.weight", (f"{hf}self_attn.q_norm.weight",), "replicated")
        yield Entry(f"{attention}k_layernorm.weight", (f"{hf}self_attn.k_norm.weight",), "replicated")
    yield Entry(f"{attention}linear_proj.weight", (f"{hf}self_attn.o_proj.weight",), "row")
    yield Entry(f"{own}pre_mlp_layernorm.weight", (f"{hf}post_attention_layernorm.weight",), "replicated")
    yield Entry(f"{own}mlp.linear_fc1.weight", (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"), "gate_up")
    yield Entry(f"{own}mlp.linear_fc2.weight", (f"{hf}mlp.down_proj.weight",), "row")


def linear_name(entry: Entry) -> str:
    """Hugging Face name of the linear that holds a parameter, of the first where several are fused."""
    return entry.hf_names[0].rpartition(".")[0]  # counts layers over all pipeline stages


def adapter_entries(table: Iterable[Entry], ranks: Mapping[str, int]) -> Iterator[Entry]:
    """The adapters' matrices among ``table``'s linears: name here, names in a PEFT folder, how they are cut.

    Query, key and value share one A, as gate and up do; it stands under the name of the first of them.
    """
    for entry in table:
        place, _, kind = entry.parameter.rpartition(".")
        if kind != "weight" or linear_name(entry) not in ranks:
            continue
        is_row = entry.kind == "row"
        second = tuple(f"{name.removesuffix('.weight')}.lora_B.weight" for name in entry.hf_names)
        yield Entry(
            f"{place}.adapter.lora_A", (f"{linear_name(entry)}.lora_A.weight",), "row" if is_row else "replicated"
        )
        yield Entry(f"{place}.adapter.lora_B", second, "replicated" if is_row else entry.kind)


def to_local(kind: Kind, tensors: Sequence[Tensor], geometry: Geometry, *, tp_rank: int, tp_size: int) -> Tensor:
    """This rank's share of the full Hugging Face tensors of one entry."""
    if kind == "replicated":
        return tensors[0]
    if kind == "row":
        return tensors[0].chunk(tp_size, dim=1)[tp_rank]
    if kind == "gate_up":
        return torch.cat([tensor.chunk(tp_size)[tp_rank] for tensor in tensors])
    if kind == "qkv":
        return _pack_qkv(tensors, geometry).chunk(tp_size)[tp_rank]
    missing = geometry.padded_vocab_size - geometry.vocab_size
    return torch.nn.functional.pad(tensors[0], (0, 0, 0, missing)).chunk(tp_size)[tp_rank]


def to_full(kind: Kind, shards: Sequence[Tensor], geometry: Geometry) -> list[Tensor]:
    """The full Hugging Face tensors of one entry from all ranks' shares; the inverse of ``to_local``."""
    if kind == "replicated":
        return [shards[0]]
    if kind == "row":
        return [torch.cat(list(shards), dim=1)]
    if kind == "gate_up":
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([gate for gate, _ in halves]), torch.cat([up for _, up in halves])]
    full = torch.cat(list(shards))
    return _unpack_qkv(full, geometry) if kind == "qkv" else [full[: geometry.vocab_size]]


def _pack_qkv(tensors: Sequence[Tensor], geometry: Geometry) -> Tensor:
    tail = tensors[0].shape[1:]
    groups = [tensor.reshape(geometry.kv_heads, -1, *tail) for tensor in tensors]
    return torch.cat(groups, dim=1).reshape(-1, *tail)


def _unpack_qkv(packed: Tensor, geometry: Geometry) -> list[Tensor]:
    per_group = geometry.heads // geometry.kv_heads * geometry.head_size
    groups = packed.reshape(geometry.kv_heads, per_group + 2 * geometry.head_size, *packed.shape[1:])
    parts = torch.split(groups, [per_group, geometry.head_size, geometry.head_size], dim=1)
    return [part.reshape(-1, *packed.shape[1:]) for part in parts]


def load_entries(
    table: Sequence[Entry],
    parameters: dict[str, Tensor],
    read: Callable[[str], Tensor],
    geometry: Geometry,
    *,
    tp_rank: int,
    tp_size: int,
) -> None:
    """Fill this rank's parameters from full Hugging Face tensors.

    Raises:
        ValueError: a tensor has another shape than its parameter; names both.
    """
    for entry in table:
        own = parameters[entry.parameter]
        local = to_local(
            entry.kind, [read(name) for name in entry.hf_names], geometry, tp_rank=tp_rank, tp_size=tp_size
        )
        if local.shape != own.shape:
            names = ", ".join(entry.hf_names)
            raise ValueError(f"{names}: shape {tuple(local.shape)}, but the model's config asks for {tuple(own.shape)}")
        own.data.copy_(local)
