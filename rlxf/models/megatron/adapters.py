"""The adapters of a whole model: adding, filling, exporting and saving them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from rlxf.config.roles import LoraConfig
from rlxf.core.errors import ConfigError
from rlxf.models.megatron.lora import attach, seed_dropout
from rlxf.models.megatron.model import SCORE, MegatronModel, Piece
from rlxf.models.megatron.nf4 import quantize_base
from rlxf.models.megatron.weights import Entry, adapter_entries, linear_name, load_entries
from rlxf.models.peft_folder import PeftAdapter, read_adapter


def add_adapters(model: MegatronModel, config: LoraConfig, *, seed: int) -> None:
    """Freeze a model that is loaded, put its linears into 4 bits if ``qlora`` asks for it, and give them adapters.

    Raises:
        ConfigError: the adapter of ``lora_load`` has other linears than the recipe; bitsandbytes is missing.
        ModelError: ``lora_load`` holds no adapter of this model.
    """
    given = None if config.lora_load is None else _given(model, config, Path(config.lora_load))
    targets = set(config.lora_target_modules)
    model.adapter_ranks = {
        linear_name(piece.entry): config.lora_r
        for piece in model.pieces
        if piece.entry.parameter.endswith(".weight") and piece.entry.parameter.split(".")[-2] in targets
    }
    if given is not None:
        model.adapter_ranks |= given.ranks
    for chunk, gpt in enumerate(model.chunks):
        table = model.entries_of(chunk)
        if config.qlora:
            quantize_base(gpt, table)
        attach(gpt, table, config, ranks=model.adapter_ranks, seed=seed)
        if given is not None:
            _fill(model, chunk, given)
    seed_dropout(seed, 0)


def _given(model: MegatronModel, config: LoraConfig, folder: Path) -> PeftAdapter:
    adapter = read_adapter(folder, {name: model.weights.shape(name) for name in model.weights.names()})
    if set(adapter.targets) != set(config.lora_target_modules):
        raise ConfigError(
            f"actor_rollout.lora_target_modules = {list(config.lora_target_modules)}: the adapter that "
            f"actor_rollout.lora_load names has {list(adapter.targets)}; set it to that"
        )
    if SCORE in adapter.tensors and not model.reward:
        raise ConfigError(f"actor_rollout.lora_load = {folder}: the adapter is of a reward model; expected stage=rm")
    return adapter


def _fill(model: MegatronModel, chunk: int, given: PeftAdapter) -> None:
    """The given matrices, cut for this rank; a layer that the folder leaves out keeps a fresh adapter, which adds 0."""
    table = _trained(model, model.entries_of(chunk))
    load_entries(
        [entry for entry in table if entry.hf_names[0] in given.tensors],
        dict(model.chunks[chunk].named_parameters()),
        given.tensors.__getitem__,
        model.geometry,
        tp_rank=model.layout.tp_rank,
        tp_size=model.layout.tp_size,
    )


def _trained(model: MegatronModel, table: Iterable[Entry]) -> Iterator[Entry]:
    """The tensors that a run with adapters trains: the adapters' matrices, and a reward model's head."""
    for entry in table:
        yield from [entry] if entry.hf_names == (SCORE,) else adapter_entries([entry], model.adapter_ranks)


@torch.no_grad()
def export_adapters(model: MegatronModel) -> Iterator[tuple[str, Tensor]]:
    """The full matrices on rank 0, named as in ``PeftAdapter.tensors``; every rank exhausts the iterator."""
    pieces, shapes = list[Piece](), dict[str, tuple[int, ...]]()
    for piece in model.pieces:
        found = list(_trained(model, [piece.entry]))
        pieces += [Piece(piece.stage, piece.chunk, entry) for entry in found]
        if found == [piece.entry]:
            shapes[SCORE] = model.shape_of(SCORE)
        elif found:
            first, second = found
            rank = model.adapter_ranks[linear_name(piece.entry)]
            sizes = [model.weights.shape(name) for name in piece.entry.hf_names]
            shapes[first.hf_names[0]] = (rank, sizes[0][1])
            shapes |= {name: (size[0], rank) for name, size in zip(second.hf_names, sizes, strict=True)}
    yield from model.collect(pieces, shapes.__getitem__)


def sharded_adapters(model: MegatronModel, chunk: int) -> dict[str, Any]:
    """The matrices of one chunk as megatron's distributed checkpoint takes them: parameter -> its place in the whole.

    A reward model's head is among them. On disk they have Hugging Face names, which count layers over all pipeline
    stages; any layout can load them.
    """
    state: dict[str, Any] = {}
    parameters = dict(model.chunks[chunk].named_parameters())
    for entry in _trained(model, model.entries_of(chunk)):
        parameter = parameters[entry.parameter]
        name = entry.hf_names[0]
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        (value,) = make_sharded_tensors_for_checkpoint(
            {name: parameter},
            "",
            {name: parameter.partition_dim} if is_cut else {},
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ).values()
        # Each rank holds a share of gate and one of up, which are not neighbours in the whole.
        state[entry.parameter] = apply_swiglu_sharded_factory(value, ()) if entry.kind == "gate_up" else value
    return state
