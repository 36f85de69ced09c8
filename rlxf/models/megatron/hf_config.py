"""What a Hugging Face folder's config.json asks of megatron-core, and whether it fits the recipe and the role."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from rlxf.config.schema import ModelConfig
from rlxf.core.errors import ConfigError, ModelError
from rlxf.models.hf_folder import ModelWeights
from rlxf.models.megatron.families import Family
from rlxf.models.megatron.parallel import Layout

ROPE_TYPES = ("default", "linear", "llama3")


def transformer_config(
    hf_config: Any, family: Family, layout: Layout, *, dtype: torch.dtype, recompute: str = "none"
) -> TransformerConfig:
    """megatron-core's config of a Hugging Face model."""
    heads = hf_config.num_attention_heads
    fixed_length = layout.vp_size > 1  # interleaved stages mix up the messages that carry varying shapes
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
        use_te_activation_func=True,  # the layer spec's own module for gate and product, ours (modules.py)
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp_size,
        pipeline_model_parallel_size=layout.pp_size,
        virtual_pipeline_model_parallel_size=layout.vp_size if layout.vp_size > 1 else None,
        context_parallel_size=layout.cp_size,
        sequence_parallel=layout.sequence_parallel,
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # Fused kernels need Transformer Engine or Apex.
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        # False would leave the parameters without their tensor-parallel marks: gradient norms then count shards twice.
        perform_initialization=True,
        variable_seq_lengths=not fixed_length,
        moe_token_dispatcher_type="alltoall",  # variable_seq_lengths needs it, also in a dense model
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


def check_head(hf_config: Any, weights: ModelWeights, folder: str, *, reward: bool, new_head: bool = False) -> None:
    """Refuse a folder whose head is not the role's. ``new_head``: a reward model may begin as a language model.

    Raises:
        ModelError: a reward model where a language model is expected, the other way round, or several labels.
    """
    has_score = "score.weight" in weights
    if not reward:
        if has_score:
            raise ModelError(f"{folder}: holds a reward model (score.weight); this role needs a causal language model")
        return
    if not has_score and new_head:
        return
    if not has_score:
        raise ModelError(
            f"{folder}: no score.weight; reward.load needs a *ForSequenceClassification with one label "
            "(a new, random head would give random scores)"
        )
    labels = weights.read("score.weight").shape[0]
    if labels != 1:
        raise ModelError(f"{folder}: the reward head has {labels} labels; expected 1 (num_labels=1)")


def check_shape(section: ModelConfig, hf_config: Any, *, role: str, name: str) -> None:
    """Compare the shape that the recipe was checked with to the folder that this process loads.

    The checked shape is that of the folder on the machine where the command was typed.

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
        f"model.{name}.{key} = {getattr(section, key)}, but the folder that {role}.load names has {value} where this "
        "process runs; give every machine the same folder"
        for key, value in found.items()
        if getattr(section, key) != value
    ]
    if problems:
        raise ConfigError(*problems)
