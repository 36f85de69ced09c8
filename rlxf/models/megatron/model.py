"""A Hugging Face folder as a megatron-core model on this rank: build, load, compute, export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from rlxf.core.errors import ModelError
from rlxf.core.read_position import READ_AT, TRAINED_AT
from rlxf.models.hf_folder import load_hf_config
from rlxf.models.logps import log_collisions, target_logps
from rlxf.models.megatron.dist_folder import open_weights
from rlxf.models.megatron.families import family_of
from rlxf.models.megatron.hf_config import check_head, rope_frequencies, transformer_config
from rlxf.models.megatron.lora import exported_parameter
from rlxf.models.megatron.modules import block_spec, rotation
from rlxf.models.megatron.packing import Packed
from rlxf.models.megatron.parallel import Layout
from rlxf.models.megatron.weights import Entry, Geometry, entries, load_entries, to_full
from rlxf.models.tokenizer import padding_id
from rlxf.platform.base import Platform

SCORE = "score.weight"  # a reward model's head


class HiddenStates(GPTModel):  # type: ignore[misc]
    """A GPTModel whose last stage gives hidden states: the head is applied to the few rows that need it.

    ``inverse_frequencies`` ([head_size / 2] float32) of the rotary embedding, which core attention applies.
    """

    def __init__(self, *, inverse_frequencies: Tensor, **settings: Any) -> None:
        super().__init__(position_embedding_type="none", **settings)
        self._inverse_frequencies = inverse_frequencies

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states

    def forward(self, packed: Packed) -> Tensor:
        """[T / cp, 1, H] final hidden states, or this stage's output; with sequence parallel [T / tp, 1, H]."""
        turned = rotation(packed.positions, self._inverse_frequencies, self.config.params_dtype)
        hidden: Tensor = super().forward(packed.tokens, None, None, packed_seq_params=packed.parameters(turned))
        return hidden

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        if hasattr(self, "score"):  # megatron-core's own takes an output layer for granted
            return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)


@dataclass(frozen=True, slots=True)
class Piece:
    """One parameter of the whole model: where it is, and what it holds."""

    stage: int  # pipeline rank
    chunk: int  # which of the stage's chunks
    entry: Entry


class MegatronModel:
    """One rank's share of a causal LM or of a reward model.

    Args:
        folder: Hugging Face model folder.
        platform: the device.
        layout: this rank's place.
        dtype: of the parameters.
        reward: a ``*ForSequenceClassification`` with one label instead of a causal LM.
        new_head: seed of a reward head that a causal LM gets here; None: the folder must have one.
        recompute: activations that a backward pass computes again: ``none``, ``selective`` (attention), ``full``.
        trust_remote_code: let the folder's own code build its config.

    Raises:
        ModelError: the folder does not hold such a model.
    """

    def __init__(
        self,
        folder: str,
        *,
        platform: Platform,
        layout: Layout,
        dtype: torch.dtype,
        reward: bool = False,
        new_head: int | None = None,
        recompute: str = "none",
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.layout = layout
        self.platform = platform
        self.dtype = dtype
        self.reward = reward
        self.hf_config = load_hf_config(folder, trust_remote_code=trust_remote_code)
        self.family = family_of(self.hf_config, folder)
        self.weights = open_weights(folder, self.hf_config)
        check_head(self.hf_config, self.weights, folder, reward=reward, new_head=new_head is not None)
        self._new_head = None if new_head is None or SCORE in self.weights else _random_head(self.hf_config, new_head)
        self.tied = bool(self.hf_config.tie_word_embeddings) and not reward
        self.config = transformer_config(self.hf_config, self.family, layout, dtype=dtype, recompute=recompute)
        self.adapter_ranks: dict[str, int] = {}  # Hugging Face name of a linear with a LoRA adapter -> its rank
        self.chunks = [self._build(platform, stage) for stage in range(layout.vp_size)]
        self._load()

    def _build(self, platform: Platform, vp_stage: int) -> HiddenStates:
        """The layers that this rank computes as one; a rank has several such chunks with virtual pipeline stages."""
        stage = vp_stage if self.layout.vp_size > 1 else None
        place = {"ignore_virtual": False, "vp_stage": stage}
        gpt = HiddenStates(
            config=self.config,
            transformer_layer_spec=block_spec(self.config, platform, vp_stage=stage),
            vocab_size=self.geometry.padded_vocab_size,
            max_sequence_length=self.hf_config.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(**place),
            post_process=parallel_state.is_pipeline_last_stage(**place),
            inverse_frequencies=rope_frequencies(self.hf_config).to(self.layout.device),
            share_embeddings_and_output_weights=self.tied,
            vp_stage=stage,
        )
        if self.reward and gpt.post_process:
            del gpt.output_layer
            gpt.score = torch.nn.Parameter(torch.zeros(1, self.config.hidden_size, dtype=self.dtype))
        built: HiddenStates = gpt.to(self.layout.device)
        return built

    def _load(self) -> None:
        for chunk, gpt in enumerate(self.chunks):
            try:
                load_entries(
                    self.entries_of(chunk),
                    dict(gpt.named_parameters()),
                    self._read,
                    self.geometry,
                    tp_rank=self.layout.tp_rank,
                    tp_size=self.layout.tp_size,
                )
            except ValueError as error:
                raise ModelError(f"{self.folder}: {error}") from error

    def _read(self, name: str) -> Tensor:
        return self._new_head if name == SCORE and self._new_head is not None else self.weights.read(name)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The full shape of a tensor that ``export`` can give."""
        return tuple(self._new_head.shape) if name == SCORE and self._new_head is not None else self.weights.shape(name)

    def config_changes(self) -> dict[str, Any]:
        """The entries in which ``config.json`` of a saved model differs from that of ``folder``."""
        changes: dict[str, Any] = {"dtype": str(self.dtype).removeprefix("torch.")}
        if self.reward:
            changes[READ_AT] = TRAINED_AT
        if self._new_head is not None:
            kind = type(self.hf_config).__name__.removesuffix("Config")
            changes |= {"architectures": [f"{kind}ForSequenceClassification"], "num_labels": 1}
            changes |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
            # transformers reads the score of a padded row at the last token that is not this one.
            changes |= {"pad_token_id": self.hf_config.pad_token_id or padding_id(self.folder)}
        return changes

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry.of(self.hf_config, tp_size=self.layout.tp_size)

    @cached_property
    def pieces(self) -> list[Piece]:
        """Every parameter of the whole model, in the order in which it computes; the same list on every rank."""
        own = [[layer.layer_number - 1 for layer in gpt.decoder.layers] for gpt in self.chunks]
        stages: list[list[list[int]]] = [own] * self.layout.pp_size
        if self.layout.pp_size > 1:
            stages = [[]] * self.layout.pp_size
            dist.all_gather_object(stages, own, group=parallel_state.get_pipeline_model_parallel_group())
        places = [(chunk, stage) for chunk in range(self.layout.vp_size) for stage in range(self.layout.pp_size)]
        found = []
        for chunk, stage in places:
            ends = {"first": (chunk, stage) == places[0], "last": (chunk, stage) == places[-1]}
            held = entries(stages[stage][chunk], self.family, **ends, tied=self.tied, reward=self.reward)
            found += [Piece(stage, chunk, entry) for entry in held]
        return found

    def entries_of(self, chunk: int) -> list[Entry]:
        """The parameters of one of this rank's chunks."""
        return [piece.entry for piece in self.pieces if (piece.stage, piece.chunk) == (self.layout.pp_rank, chunk)]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Compute without dropout inside the block."""
        for gpt in self.chunks:
            gpt.eval()
        try:
            yield
        finally:
            for gpt in self.chunks:
                gpt.train()

    def requires_grad_(self, wanted: bool) -> None:
        for gpt in self.chunks:
            gpt.requires_grad_(wanted)

    @property
    def last(self) -> HiddenStates:
        """The chunk that holds the head on the last stage."""
        return self.chunks[-1]

    @property
    def head(self) -> Tensor:
        """[padded V / tp, H]: this rank's share of the output layer; the last stage has one."""
        weight: Tensor = self.last.shared_embedding_or_output_weight() if self.tied else self.last.output_layer.weight
        return weight

    def logps(self, hidden: Tensor, packed: Packed) -> Tensor:
        """[packed.num_values] float32 log-probabilities of the targets, from hidden states of the last stage."""
        group = parallel_state.get_tensor_model_parallel_group() if self.layout.tp_size > 1 else None
        platform = self.platform
        values = target_logps(
            self._read_rows(hidden, packed),
            self.head,
            packed.targets,
            group=group,
            vocab_size=self.hf_config.vocab_size,
            chunks=platform.logit_chunks,
            linear=platform.linear,
            elementwise=platform.elementwise,
        )
        return self._of_all(values, packed)

    @torch.no_grad()
    def log_collisions(self, hidden: Tensor, packed: Packed) -> Tensor:
        """[packed.num_values] float32: log of the sum of all tokens' squared probabilities where a target stands."""
        group = parallel_state.get_tensor_model_parallel_group() if self.layout.tp_size > 1 else None
        values = log_collisions(
            self._read_rows(hidden, packed),
            self.head,
            group=group,
            vocab_size=self.hf_config.vocab_size,
            chunks=self.platform.logit_chunks,
            linear=self.platform.linear,
        )
        return self._of_all(values, packed)

    def _read_rows(self, hidden: Tensor, packed: Packed) -> Tensor:
        """[R, H] hidden states of ``packed.rows``."""
        return self._whole(hidden)[:, 0].index_select(0, packed.rows).to(self.dtype)

    def scores(self, hidden: Tensor, packed: Packed) -> Tensor:
        """[B] float32 scores of a reward model, read at the last token of each sequence."""
        rows = self._whole(hidden)[:, 0].index_select(0, packed.rows)  # [B, H]
        return self._of_all(torch.nn.functional.linear(rows, self.last.score).squeeze(1).float(), packed)

    def _whole(self, hidden: Tensor) -> Tensor:
        """[T / cp, 1, H]: hidden states of all tokens of this context rank."""
        if not self.layout.sequence_parallel:
            return hidden
        whole: Tensor = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return whole

    def _of_all(self, values: Tensor, packed: Packed) -> Tensor:
        """The values of all context-parallel ranks; the gradient of each goes back to the rank that computed it."""
        if packed.places is None:
            return values
        empty = values.new_zeros(packed.num_values)
        whole: Tensor = reduce_from_tensor_model_parallel_region(
            empty.index_copy(0, packed.places, values), group=parallel_state.get_context_parallel_group()
        )
        return whole

    def exported_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Hugging Face name and full shape of every tensor that ``export`` can give."""
        for piece in self._exported():
            for name in piece.entry.hf_names:
                yield name, self.shape_of(name)

    @torch.no_grad()
    def export(
        self,
        names: Sequence[str],
        local: Callable[[Piece], Tensor] | None = None,
        *,
        everywhere: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """The named full tensors on rank 0, one parameter at a time, LoRA merged; nothing on the other ranks.

        Every rank of the role must ask for the same names and exhaust the iterator: the tensors' shares are collected
        from the tensor-parallel ranks and passed to the first pipeline stage.

        Args:
            names: by Hugging Face.
            local: this rank's share of a parameter in place of the model's own.
            everywhere: on every rank.
        """
        wanted = set(names)
        pieces = (piece for piece in self._exported() if wanted.intersection(piece.entry.hf_names))
        yield from self.collect(pieces, self.shape_of, local, everywhere=everywhere)

    def local_pieces(self) -> Iterator[Piece]:
        """The parameters that ``export`` asks this rank for its share of."""
        return (piece for piece in self._exported() if piece.stage == self.layout.pp_rank)

    @torch.no_grad()
    def export_all(self, local: Callable[[Piece], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Export every tensor in fp32; ``local`` gives this rank's share of each parameter in place of the model."""
        yield from self.collect(self._exported(), self.shape_of, local, torch.float32)

    def collect(
        self,
        pieces: Iterable[Piece],
        shape_of: Callable[[str], tuple[int, ...]],
        local: Callable[[Piece], Tensor] | None = None,
        dtype: torch.dtype | None = None,
        *,
        everywhere: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """The full tensors of some parameters, as ``export`` gives them.

        Args:
            pieces: the parameters.
            shape_of: name -> full shape.
            local: this rank's share of a parameter that its stage holds; None: the parameter itself, LoRA merged.
            dtype: of what ``local`` gives; None: the model's.
            everywhere: on every rank.
        """
        if not everywhere and not self.layout.is_first_replica:
            return
        for piece in pieces:
            share = local or self.local_weight
            full = self._full(piece, shape_of, share, dtype or self.dtype, everywhere=everywhere)
            if everywhere or self.layout.pp_rank == self.layout.tp_rank == 0:
                yield from zip(piece.entry.hf_names, full, strict=True)

    def _exported(self) -> Iterator[Piece]:
        """All parameters but the copy of a tied embedding that the last of several stages holds."""
        seen = set[tuple[str, ...]]()
        for piece in self.pieces:
            if piece.entry.hf_names not in seen:
                seen.add(piece.entry.hf_names)
                yield piece

    def _full(
        self,
        piece: Piece,
        shape_of: Callable[[str], tuple[int, ...]],
        local: Callable[[Piece], Tensor],
        dtype: torch.dtype,
        *,
        everywhere: bool,
    ) -> list[Tensor]:
        """The full tensors of one parameter, on the first stage's first rank; meaningless on other ranks.

        ``everywhere``: on every rank.
        """
        layout, full = self.layout, list[Tensor]()
        if piece.stage == layout.pp_rank:
            own = local(piece).detach()
            full = to_full(piece.entry.kind, _gather_tensor_parallel(own, layout.tp_size), self.geometry)
        group = parallel_state.get_pipeline_model_parallel_group()
        if everywhere and layout.pp_size > 1:
            return self._broadcast(piece, full, shape_of, dtype, group)
        if piece.stage == 0 or layout.tp_rank != 0:
            return full
        if piece.stage == layout.pp_rank:
            for tensor in full:
                dist.send(tensor.contiguous(), group=group, group_dst=0)
        elif layout.pp_rank == 0:
            for name in piece.entry.hf_names:
                tensor = torch.empty(shape_of(name), dtype=dtype, device=layout.device)
                dist.recv(tensor, group=group, group_src=piece.stage)
                full.append(tensor)
        return full

    def _broadcast(
        self,
        piece: Piece,
        full: list[Tensor],
        shape_of: Callable[[str], tuple[int, ...]],
        dtype: torch.dtype,
        group: dist.ProcessGroup,
    ) -> list[Tensor]:
        """The full tensors of one parameter from its stage to all stages."""
        if piece.stage != self.layout.pp_rank:
            empty = (
                torch.empty(shape_of(name), dtype=dtype, device=self.layout.device) for name in piece.entry.hf_names
            )
            full = list(empty)
        full = [tensor.contiguous() for tensor in full]
        for tensor in full:
            dist.broadcast(tensor, group=group, group_src=piece.stage)
        return full

    def local_weight(self, piece: Piece) -> Tensor:
        """This rank's share of a parameter that its stage holds, LoRA merged."""
        return exported_parameter(self.chunks[piece.chunk], piece.entry.parameter)


def _random_head(hf_config: Any, seed: int) -> Tensor:
    """[1, H] as ``transformers`` initialises a linear layer, and the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    deviation: float = hf_config.initializer_range
    return deviation * torch.randn(1, hf_config.hidden_size, generator=generator)


def _gather_tensor_parallel(shard: Tensor, tp_size: int) -> list[Tensor]:
    if tp_size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(tp_size)]
    dist.all_gather(shards, shard.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return shards
