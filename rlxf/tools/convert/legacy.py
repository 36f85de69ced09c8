"""Megatron's older layout, which MindSpeed-LLM keeps: a file ``iter_*/mp_rank_TT[_PPP]/model_optim_rng.pt`` per rank.

A rank's file is a pickle. Only tensors and plain values are made from it; what else it asks for is refused by name.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.core.errors import ModelError
from rlxf.models.hf_folder import ModelWeights
from rlxf.models.megatron.weights import Entry, to_full, to_local
from rlxf.tools.convert.layout import Chunk, Shape, Sizes, cut, even_layers
from rlxf.tools.convert.pickles import read_pickle

_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_FILES = ("model_optim_rng.pt", "model_rng.pt")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_SKIPPED = ("_extra_state", "rotary_pos_emb.inv_freq")
_SCORE = "rm_head.weight"  # a linear that is cut along its inputs, as ``linear_proj`` is


class LegacyWeights:
    """The full tensors of a model by their Hugging Face names.

    Args:
        folder: with the ``mp_rank_*`` folders.
        shape: the model that they should hold.
        trust_pickle: let the files use any installed class, not only tensors and plain values.

    Raises:
        ModelError: a rank is missing, a file is damaged or asks for something else, or it is another model.
    """

    def __init__(self, folder: Path, shape: Shape, *, trust_pickle: bool = False) -> None:
        self.folder, self._shape, self._geometry = folder, shape, shape.geometry()
        files = _load(folder, trust_pickle=trust_pickle)
        self.sizes, self.arguments = files.sizes, files.arguments
        states = self._states = files.states
        layers = [[_num_layers(state) for state in states[0, stage]] for stage in range(self.sizes.pp)]
        found = sum(map(sum, layers))
        if found != shape.num_layers:
            raise ModelError(f"{folder}: holds {found} layers; config.json has {shape.num_layers}")
        self.chunks = list(cut(shape, layers))
        self._place: dict[str, tuple[Chunk, Entry, int]] = {}
        for chunk in self.chunks:
            for entry in chunk.entries:
                for index, name in enumerate(entry.hf_names):
                    self._place.setdefault(name, (chunk, entry, index))
                self._check(chunk, entry)
        self._newest: tuple[Entry, list[Tensor]] | None = None
        self._check_vocabulary()

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def names(self) -> set[str]:
        return set(self._place)

    def read(self, name: str) -> Tensor:
        chunk, entry, index = self._place[name]
        if self._newest is None or self._newest[0] is not entry:
            self._newest = (entry, self.full(chunk, entry))
        return self._newest[1][index].contiguous()

    def shape(self, name: str) -> tuple[int, ...]:
        chunk, entry, index = self._place[name]
        shards = [torch.empty_like(shard, device="meta") for shard in self._shards(chunk, entry)]
        return tuple(to_full(self._kind(entry), shards, self._geometry)[index].shape)

    def full(self, chunk: Chunk, entry: Entry) -> list[Tensor]:
        """The full Hugging Face tensors of one parameter, or of one adapter's matrix."""
        shards = self._shards(chunk, entry)
        try:
            return to_full(self._kind(entry), shards, self._geometry)
        except RuntimeError as error:
            shapes = [tuple(shard.shape) for shard in shards]
            raise ModelError(f"{self.folder}: {entry.parameter}: shapes {shapes} do not fit config.json") from error

    def holds(self, chunk: Chunk, parameter: str) -> bool:
        return parameter in self._states[0, chunk.stage][chunk.index]

    @property
    def has_adapters(self) -> bool:
        return any(".lora_A." in name for state in self._states.values() for chunk in state for name in chunk)

    def bias_of_score(self) -> Tensor | None:
        """The reward head's bias, which Hugging Face's head has no place for."""
        return self._states[0, self.sizes.pp - 1][-1].get("rm_head.bias")

    def _shards(self, chunk: Chunk, entry: Entry) -> list[Tensor]:
        name = legacy_name(entry.parameter)
        ranks = [self._states[rank, chunk.stage][chunk.index] for rank in range(self.sizes.tp)]
        return [rank[name] for rank in ranks]

    def _kind(self, entry: Entry) -> Any:
        if entry.parameter != "score":
            return entry.kind
        stage = self._states[0, self.sizes.pp - 1][-1]
        is_whole = stage[_SCORE].shape[1] == self._shape.hf_config.hidden_size
        return "replicated" if is_whole else "row"

    def _check(self, chunk: Chunk, entry: Entry) -> None:
        name = legacy_name(entry.parameter)
        for rank in range(self.sizes.tp):
            if name not in self._states[rank, chunk.stage][chunk.index]:
                hint = "; add --orm" if _SCORE in self._states[rank, self.sizes.pp - 1][-1] else ""
                hint = "; without --orm?" if entry.parameter == "score" else hint
                raise ModelError(f"{self.folder}: {_rank_folder(rank, chunk.stage, self.sizes)} has no {name}{hint}")

    def _check_vocabulary(self) -> None:
        rows = sum(shard.shape[0] for shard in self._shards(self.chunks[0], self.chunks[0].entries[0]))
        wanted = self._geometry.vocab_size
        if rows < wanted:
            raise ModelError(f"{self.folder}: the embedding has {rows} rows; config.json has vocab_size = {wanted}")


def legacy_name(parameter: str) -> str:
    """Name in a rank's file of a parameter as ``named_parameters`` gives it here."""
    if parameter == "score":
        return _SCORE
    place, _, matrix = parameter.partition(".adapter.")
    return f"{place}.{matrix}.default.weight" if matrix else parameter


_State = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class _RankFiles:
    """What the files of all ranks hold."""

    states: dict[tuple[int, int], list[_State]]  # tensor and pipeline rank -> the states of its chunks
    sizes: Sizes
    arguments: Any  # of the program that wrote them; None if they are not there


def _load(folder: Path, *, trust_pickle: bool) -> _RankFiles:
    paths: dict[tuple[int, int], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _RANK.fullmatch(path.name)
        if match is None:
            raise ModelError(f"{path}: not a rank of a dense model; checkpoints with experts (MoE) are not supported")
        paths[int(match[1]), int(match[2] or 0)] = path
    if not paths:
        raise ModelError(f"{folder}: no mp_rank_* folder; expected a checkpoint in Megatron's older layout")
    tp, pp = (max(rank[axis] for rank in paths) + 1 for axis in (0, 1))
    for rank in ((t, p) for p in range(pp) for t in range(tp)):
        if rank not in paths:
            name = _rank_folder(*rank, Sizes(tp=tp, pp=pp))
            raise ModelError(f"{folder}: {name} is missing ({len(paths)} of {tp * pp} ranks are there)")
    files = {rank: read_pickle(_file(path), trust_pickle=trust_pickle) for rank, path in paths.items()}
    states = {rank: _chunks(paths[rank], file) for rank, file in files.items()}
    vp = {len(chunks) for chunks in states.values()}
    if len(vp) != 1:
        raise ModelError(f"{folder}: its ranks hold {sorted(vp)} chunks of the model; expected as many in each")
    return _RankFiles(states=states, sizes=Sizes(tp=tp, pp=pp, vp=vp.pop()), arguments=files[0, 0].get("args"))


def _chunks(path: Path, state: Any) -> list[_State]:
    names = [name for name in ("model", *(f"model{i}" for i in range(64))) if isinstance(state, dict) and name in state]
    if not names:
        raise ModelError(f"{path}: no model in it; expected `model` (or `model0`, `model1` ...)")
    chunks = []
    for name in names:
        kept: _State = {}
        for key, value in state[name].items():
            if isinstance(value, Tensor) and not key.endswith(_SKIPPED):
                kept[key.removeprefix("module.").replace(".base_layer.", ".")] = value
        chunks.append(kept)
    return chunks


def _num_layers(state: Iterable[str]) -> int:
    return len({match[1] for name in state if (match := _LAYER.match(name))})


def _file(folder: Path) -> Path:
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    raise ModelError(f"{folder}: no {_FILES[0]} in it; copy the checkpoint again")


def _rank_folder(tp_rank: int, stage: int, sizes: Sizes) -> str:
    return f"mp_rank_{tp_rank:02d}" if sizes.pp == 1 else f"mp_rank_{tp_rank:02d}_{stage:03d}"


def write_legacy(folder: Path, weights: ModelWeights, shape: Shape, sizes: Sizes, *, dtype: torch.dtype) -> None:
    """Write ``mp_rank_*`` into ``folder``, which exists: one pipeline rank in memory at a time."""
    geometry = shape.geometry(sizes.tp)
    chunks = list(cut(shape, even_layers(shape, sizes)))
    arguments = _arguments(shape, sizes, dtype)
    for stage in range(sizes.pp):
        ranks: list[dict[str, Any]] = [
            {"args": arguments, "checkpoint_version": 3.0, "iteration": 1} for _ in range(sizes.tp)
        ]
        for chunk in (chunk for chunk in chunks if chunk.stage == stage):
            key = "model" if sizes.vp == 1 else f"model{chunk.index}"
            for entry in chunk.entries:
                full = [weights.read(name).to(dtype) for name in entry.hf_names]
                kind = "row" if entry.parameter == "score" else entry.kind
                for tp_rank, rank in enumerate(ranks):
                    own = to_local(kind, full, geometry, tp_rank=tp_rank, tp_size=sizes.tp)
                    # A view would be saved with all the memory that it looks into.
                    rank.setdefault(key, {})[legacy_name(entry.parameter)] = own.clone().contiguous()
        for tp_rank, rank in enumerate(ranks):
            place = folder / _rank_folder(tp_rank, stage, sizes)
            place.mkdir()
            torch.save(rank, place / _FILES[0])


def _arguments(shape: Shape, sizes: Sizes, dtype: torch.dtype) -> argparse.Namespace:
    """What Megatron's own loader checks before it loads the weights."""
    config, geometry = shape.hf_config, shape.geometry(sizes.tp)
    per_chunk = shape.num_layers // (sizes.pp * sizes.vp)
    return argparse.Namespace(
        num_layers=shape.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=geometry.heads,
        group_query_attention=geometry.kv_heads != geometry.heads,
        num_query_groups=geometry.kv_heads,
        kv_channels=geometry.head_size,
        seq_length=config.max_position_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        padded_vocab_size=geometry.padded_vocab_size,
        make_vocab_size_divisible_by=1,
        untie_embeddings_and_output_weights=not shape.tied,
        add_qkv_bias=shape.family.qkv_bias,
        qk_layernorm=shape.family.qk_norm,
        add_bias_linear=False,
        add_position_embedding=False,
        position_embedding_type="rope",
        rotary_base=(getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0),
        normalization="RMSNorm",
        norm_epsilon=config.rms_norm_eps,
        swiglu=True,
        use_mcore_models=True,
        params_dtype=dtype,
        tensor_model_parallel_size=sizes.tp,
        pipeline_model_parallel_size=sizes.pp,
        num_layers_per_virtual_pipeline_stage=per_chunk if sizes.vp > 1 else None,
        iteration=1,
        consumed_train_samples=0,
        consumed_valid_samples=0,
    )
