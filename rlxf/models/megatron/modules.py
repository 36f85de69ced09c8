"""The modules that replace Transformer Engine's on every device: RMSNorm, core attention, rotary embedding.

With them megatron-core's fp32 logits equal Hugging Face's bit for bit on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
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
    """Root mean square norm (Zhang & Sennrich 2019) over the last dimension, computed in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums the gradients of parameters with this mark over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)
        normed = F.rms_norm(x.float(), (x.size(-1),), None, self.eps).to(x.dtype)
        return self.weight * normed


class CoreAttention(MegatronModule):  # type: ignore[misc]
    """Causal attention of packed sequences through the platform's kernel. No padding, no [T, T] tensor of scores."""

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
        self._attend = platform.packed_attention
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
        blocks = packed_seq_params.blocks
        assert blocks is not None
        if self.config.context_parallel_size > 1:
            group = parallel_state.get_context_parallel_group()
            key, value = (gather_from_sequence_parallel_region(x.contiguous(), group=group) for x in (key, value))
        if blocks.kv_rows is not None:
            key, value = key[blocks.kv_rows], value[blocks.kv_rows]
        out = self._attend(query, key, value, blocks.cu_seqlens_q, blocks.cu_seqlens_kv, self._scale)
        return out.reshape(out.size(0), -1)


class PackedRotaryEmbedding(RotaryEmbedding):  # type: ignore[misc]
    """Rotary angles of packed tokens: row ``t`` belongs to ``positions[t]``, which restarts with each sequence.

    The angles of all tokens are gathered once, so every layer rotates the packed tensor in one call. Megatron's own way
    splits it at the sequence bounds in each layer.
    """

    def __init__(self, inv_freq: Tensor) -> None:
        head_size = 2 * inv_freq.numel()
        super().__init__(kv_channels=head_size, rotary_percent=1.0, use_cpu_initialization=True)
        self.inv_freq = inv_freq
        self.positions = torch.empty(0, dtype=torch.int64)

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """[T, 1, 1, head_size] angles of ``positions``."""
        freqs = torch.outer(self.positions.to(self.inv_freq.dtype), self.inv_freq)
        return torch.cat((freqs, freqs), dim=-1)[:, None, None, :]


def block_spec(
    config: TransformerConfig, platform: Platform, *, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage, built from the modules above."""
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = ModuleSpec(module=CoreAttention, params={"platform": platform})
    attention.linear_qkv, attention.linear_proj = column_parallel(platform), row_parallel(platform)
    mlp = parts.mlp.submodules
    mlp.linear_fc1, mlp.linear_fc2 = column_parallel(platform), row_parallel(platform)
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
