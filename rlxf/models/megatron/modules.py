"""The modules that replace Transformer Engine's on every device: RMSNorm, core attention with its rotation, the gate.

With them megatron-core's fp32 logits equal Hugging Face's bit for bit on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rlxf.models.megatron.linear import column_parallel, row_parallel
from rlxf.models.megatron.packing import PackedStream
from rlxf.platform.base import Platform


class RMSNorm(torch.nn.Module):
    """Root mean square norm (Zhang & Sennrich 2019) over the last dimension, by the platform's kernel."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, *, platform: Platform, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self._norm = platform.elementwise.rms_norm
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradients of parameters with this mark over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x, self.weight, self.eps)


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention of packed sequences through the platform's kernel. No padding, no [T, T] tensor of scores.

    It turns queries and keys by their rotary angles, too: Megatron's own way splits the packed tensor at the sequence
    bounds, which it reads from the device, once for queries and once for keys in every layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        platform: Platform,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self._attend, self._rotate = platform.packed_attention, platform.elementwise.rotate
        self._scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """``query`` [T / cp, heads, d], ``key`` and ``value`` [T / cp, kv_heads, d] -> [T / cp, heads * d]."""
        assert isinstance(packed_seq_params, PackedStream), "this backend computes packed sequences only"
        blocks, rotation = packed_seq_params.blocks, packed_seq_params.rotation
        assert blocks is not None
        assert rotation is not None
        query, key = self._rotate(query, *rotation), self._rotate(key, *rotation)
        if self.config.context_parallel_size > 1:
            group = parallel_state.get_context_parallel_group()
            key, value = (gather_from_sequence_parallel_region(x.contiguous(), group=group) for x in (key, value))
        if blocks.kv_rows is not None:
            key, value = key.index_select(0, blocks.kv_rows), value.index_select(0, blocks.kv_rows)
        out = self._attend(query, key, value, blocks.sizes, self._scale)
        return out.reshape(out.size(0), -1)


class SwiGLU(MegatronModule):  # type: ignore[misc]
    """The gate of Megatron's MLP by the platform's kernel."""

    def __init__(self, config: TransformerConfig, *, platform: Platform) -> None:
        super().__init__(config)
        self._swiglu = platform.elementwise.swiglu

    def forward(self, x: Tensor) -> Tensor:
        """[..., F] from gate and linear part side by side, [..., 2F]."""
        return self._swiglu(x)


def rotation(positions: Tensor, inverse_frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[T, 1, head_size] cosine and sine of the angles of tokens at ``positions``; once for all layers of a pass."""
    angles = torch.outer(positions.to(inverse_frequencies.dtype), inverse_frequencies)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def block_spec(
    config: TransformerConfig, platform: Platform, *, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, built from the modules above."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    own = {"platform": platform}
    norm = ModuleSpec(module=RMSNorm, params=own)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    attention = parts.self_attention.submodules
    attention.core_attention = ModuleSpec(module=CoreAttention, params=own)
    attention.linear_qkv, attention.linear_proj = column_parallel(platform), row_parallel(platform)
    mlp = parts.mlp.submodules
    mlp.linear_fc1, mlp.linear_fc2 = column_parallel(platform), row_parallel(platform)
    mlp.activation_func = ModuleSpec(module=SwiGLU, params=own)
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)
