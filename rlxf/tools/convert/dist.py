"""Writing megatron's distributed checkpoint: one tensor in memory at a time, no process group."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from rlxf.models.hf_folder import ModelWeights
from rlxf.models.megatron.dist_folder import FORMAT, TORCH_DIST, stored_name
from rlxf.models.megatron.weights import Geometry, to_local
from rlxf.tools.convert.layout import Shape

# Linears whose (empty) extra state megatron keeps for every layer, and asks for when it loads.
_LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


def write_dist(folder: Path, weights: ModelWeights, shape: Shape, *, tp_size: int, dtype: torch.dtype) -> None:
    """Write the model into ``folder``, which exists.

    Args:
        folder: of the checkpoint itself, not the one above it.
        weights: full tensors by their Hugging Face names.
        shape: the model.
        tp_size: the vocabulary is filled up so that so many ranks have as many rows each.
        dtype: of the parameters.
    """
    geometry = shape.geometry(tp_size)
    pieces = [piece for entry in shape.table for piece in _pieces(entry, weights, shape, geometry)]
    pieces += [
        _State(f"decoder.layers.{linear}._extra_state/shard_{layer}_{shape.num_layers}")
        for linear in _LINEARS
        for layer in range(shape.num_layers)
    ]
    planner = _LazyPlanner(pieces, dtype)
    save({}, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
    torch.save({"checkpoint_version": 3.0, "iteration": 1}, folder / "common.pt")
    (folder / FORMAT).write_text(json.dumps(TORCH_DIST))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """One parameter, and its place in the tensor of the checkpoint that holds it."""

    name: str
    size: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class _State:
    """An empty extra state."""

    name: str


def _pieces(entry: Any, weights: ModelWeights, shape: Shape, geometry: Geometry) -> list[_Piece | _State]:
    name, layer = stored_name(entry.parameter)
    empty = [torch.empty(weights.shape(hf_name), device="meta") for hf_name in entry.hf_names]
    own = tuple(to_local(entry.kind, empty, geometry, tp_rank=0, tp_size=1).shape)

    def make() -> Tensor:
        tensors = [weights.read(hf_name) for hf_name in entry.hf_names]
        whole = to_local(entry.kind, tensors, geometry, tp_rank=0, tp_size=1)
        return whole if layer is None else whole[None]

    if layer is None:
        return [_Piece(name=name, size=own, offsets=(0,) * len(own), sizes=own, make=make)]
    size, offsets = (shape.num_layers, *own), (layer, *(0 for _ in own))
    return [_Piece(name=name, size=size, offsets=offsets, sizes=(1, *own), make=make)]


class _LazyPlanner(DefaultSavePlanner):
    """Says what will be written, and makes each tensor when the writer comes to it."""

    def __init__(self, pieces: list[_Piece | _State], dtype: torch.dtype) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._dtype = dtype
        self._makers = {
            MetadataIndex(piece.name, torch.Size(piece.offsets)): piece.make
            for piece in pieces
            if isinstance(piece, _Piece)
        }
        self._items = [self._item(piece) for piece in pieces]

    def _item(self, piece: _Piece | _State) -> WriteItem:
        if isinstance(piece, _State):
            data = BytesIOWriteData(nbytes=len(_empty_state().getbuffer()))
            return WriteItem(index=MetadataIndex(piece.name), type=WriteItemType.BYTE_IO, bytes_io_data=data)
        chunk = ChunkStorageMetadata(offsets=torch.Size(piece.offsets), sizes=torch.Size(piece.sizes))
        whole = TensorWriteData(
            chunk=chunk, properties=TensorProperties(dtype=self._dtype), size=torch.Size(piece.size)
        )
        index = MetadataIndex(piece.name, chunk.offsets)
        return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=whole)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return _empty_state()
        return self._makers[write_item.index]().to(self._dtype).contiguous()


def _empty_state() -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save([None], buffer)  # a list, as megatron wraps whatever it saves
    return buffer
