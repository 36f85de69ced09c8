"""A Hugging Face folder as a megatron-core model on this rank: build, load, compute, export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rlxf.config.schema import ModelConfig
from rlxf.errors import ConfigError, ModelError
from rlxf.models.hf_folder import HfWeights, load_hf_config
from rlxf.models.logps import target_logps
from rlxf.models.megatron.families import Family, family_of
from rlxf.models.megatron.modules import PackedRotaryEmbedding, block_spec
from rlxf.models.megatron.packing import Packed
from rlxf.models.megatron.parallel import Layout
from rlxf.models.megatron.weights import Entry, Geometry, entries, hf_shapes, load_entries, to_full
from rlxf.platform.base import Platform

ROPE_TYPES = ("default", "linear", "llama3")


class HiddenStates(GPTModel):  # type: ignore[misc]
    """A GPTModel whose last stage gives hidden states: the head is applied to the few rows that need it."""

    def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states

    def forward(self, packed: Packed) -> Tensor:
        """[T, 1, H] hidden states after the final norm, or this stage's output."""
        self.rotary_pos_emb.positions = packed.positions
        hidden: Tensor = super().forward(packed.tokens, None, None, packed_seq_params=packed.parameters())
        return hidden


class MegatronModel:
    """One rank's share of a causal LM or of a reward model.

    Args:
        folder: Hugging Face model folder.
        platform: the device.
        layout: this rank's place.
        dtype: of the parameters.
        reward: a ``*ForSequenceClassification`` with one label instead of a causal LM.
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
        trust_remote_code: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.layout = layout
        self.dtype = dtype
        self.reward = reward
        self.hf_config = load_hf_config(folder, trust_remote_code=trust_remote_code)
        self.family = family_of(self.hf_config, folder)
        _check_head(self.hf_config, HfWeights(folder), folder, reward=reward)
        self.tied = bool(self.hf_config.tie_word_embeddings) or reward
        self.gpt = self._build(platform)
        self._load()

    def _build(self, platform: Platform) -> HiddenStates:
        config = transformer_config(self.hf_config, self.family, dtype=self.dtype, tp_size=self.layout.tp_size)
        gpt = HiddenStates(
            config=config,
            transformer_layer_spec=block_spec(config, platform),
            vocab_size=self.hf_config.vocab_size,
            max_sequence_length=self.hf_config.max_position_embeddings,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=self.tied,
        )
        gpt.rotary_pos_emb = PackedRotaryEmbedding(rope_frequencies(self.hf_config).to(self.layout.device))
        if self.reward:
            gpt.score = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=self.dtype))
        built: HiddenStates = gpt.to(self.layout.device)
        return built

    def _load(self) -> None:
        weights = HfWeights(self.folder)
        try:
            load_entries(
                self.table,
                self.parameters,
                weights.read,
                self.geometry,
                tp_rank=self.layout.tp_rank,
                tp_size=self.layout.tp_size,
            )
        except ValueError as error:
            raise ModelError(f"{self.folder}: {error}") from error

    @cached_property
    def geometry(self) -> Geometry:
        config = self.hf_config
        heads = config.num_attention_heads
        return Geometry(
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    @cached_property
    def table(self) -> list[Entry]:
        """What this rank holds, in the order in which the model computes."""
        layers = [layer.layer_number - 1 for layer in self.gpt.decoder.layers]
        return list(entries(layers, self.family, first=True, last=True, tied=self.tied, reward=self.reward))

    @cached_property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.gpt.named_parameters())

    @property
    def head(self) -> Tensor:
        """[V / tp, H]: this rank's share of the output layer."""
        weight: Tensor = self.gpt.embedding.word_embeddings.weight if self.tied else self.gpt.output_layer.weight
        return weight

    def logps(self, hidden: Tensor, packed: Packed) -> Tensor:
        """[R] float32 log-probabilities of ``packed.targets`` from the hidden states of one forward pass."""
        group = parallel_state.get_tensor_model_parallel_group() if self.layout.tp_size > 1 else None
        return target_logps(hidden[packed.rows, 0].to(self.dtype), self.head, packed.targets, group=group)

    def scores(self, packed: Packed) -> Tensor:
        """[B] float32 scores of a reward model, read at the last token of each sequence."""
        hidden = self.gpt(packed)[packed.rows, 0]  # [B, H]
        return torch.nn.functional.linear(hidden, self.gpt.score).squeeze(1).float()

    def exported_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Hugging Face name and full shape of every tensor that ``export`` can give."""
        for entry in self.table:
            local = self.parameters[entry.parameter].shape
            shapes = hf_shapes(entry, local, self.geometry, self.layout.tp_size)
            yield from zip(entry.hf_names, shapes, strict=True)

    @torch.no_grad()
    def export(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The named full tensors, one parameter at a time; every rank of the role must ask for the same names."""
        wanted = set(names)
        for entry in self.table:
            if not wanted.intersection(entry.hf_names):
                continue
            shards = _gather_tensor_parallel(self.parameters[entry.parameter].detach(), self.layout.tp_size)
            yield from zip(entry.hf_names, to_full(entry.kind, shards, self.geometry), strict=True)


def _gather_tensor_parallel(shard: Tensor, tp_size: int) -> list[Tensor]:
    if tp_size == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(tp_size)]
    dist.all_gather(shards, shard.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return shards


def transformer_config(hf_config: Any, family: Family, *, dtype: torch.dtype, tp_size: int) -> TransformerConfig:
    """megatron-core's config of a Hugging Face model."""
    heads = hf_config.num_attention_heads
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        num_attention_heads=heads,
        num_query_groups=getattr(hf_config, "num_key_value_heads", None) or heads,
        kv_channels=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        ffn_hidden_size=hf_config.intermediate_size,
        layernorm_epsilon=hf_config.rms_norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Fused kernels need Transformer Engine or Apex.
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        # False would leave the parameters without their tensor-parallel marks: gradient norms then count shards twice.
        perform_initialization=True,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",  # asked for by variable_seq_lengths, also in a dense model
        calculate_per_token_loss=True,  # gradients are sums, divided once by the number of pairs of all ranks
    )


def rope_frequencies(hf_config: Any) -> Tensor:
    """[head_size / 2] float32 inverse frequencies, as ``transformers`` computes them.

    Raises:
        ModelError: a rotary embedding that this backend does not compute.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = getattr(hf_config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f'rope_type "{kind}" is not supported; known: {", ".join(ROPE_TYPES)}, over whole heads')
    if kind != "default":
        frequencies: Tensor = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))[0]
        return frequencies
    size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    base: float = rope.get("rope_theta", 10000.0)
    inverse: Tensor = 1.0 / (base**exponents)
    return inverse


def _check_head(hf_config: Any, weights: HfWeights, folder: str, *, reward: bool) -> None:
    has_score = "score.weight" in weights
    if not reward:
        if has_score:
            raise ModelError(f"{folder}: holds a reward model (score.weight); this role needs a causal language model")
        return
    if not has_score:
        raise ModelError(
            f"{folder}: no score.weight; reward.load needs a *ForSequenceClassification with one label "
            "(a head made up at random would score at random)"
        )
    labels = weights.read("score.weight").shape[0]
    if labels != 1:
        raise ModelError(f"{folder}: the reward head has {labels} labels; expected 1 (num_labels=1)")


def check_shape(section: ModelConfig, hf_config: Any, *, role: str, name: str) -> None:
    """Compare a recipe's model section with the folder that the role loads.

    Raises:
        ConfigError: they differ; one line per key.
    """
    heads = hf_config.num_attention_heads
    found = {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "ffn_hidden_size": hf_config.intermediate_size,
        "num_attention_heads": heads,
        "kv_heads": getattr(hf_config, "num_key_value_heads", None) or heads,
        "head_size": getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
    }
    problems = [
        f"model.{name}.{key} = {getattr(section, key)}, but the model that {role}.load names has {value}; "
        f"choose the fitting `{role}.model` or correct its file"
        for key, value in found.items()
        if getattr(section, key) != value
    ]
    if problems:
        raise ConfigError(*problems)
