"""Model families: which Hugging Face architectures load here, and where they differ from a plain Llama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlxf.core.errors import ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One family of dense decoder models: RMSNorm, rotary positions, SwiGLU, grouped-query attention."""

    qkv_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head's query and key


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True),
}


def family_of(hf_config: Any, folder: str) -> Family:
    """The family of a ``transformers`` config.

    Raises:
        ModelError: the architecture is not in the table, or uses a variant that this backend does not compute.
    """
    kind = hf_config.model_type
    if kind not in FAMILIES:
        raise ModelError(f'{folder}: model_type "{kind}" is not supported; known: {", ".join(sorted(FAMILIES))}')
    unsupported = [name for name in ("attention_bias", "mlp_bias") if getattr(hf_config, name, False)]
    if getattr(hf_config, "use_sliding_window", False):
        unsupported.append("use_sliding_window")
    if hf_config.hidden_act != "silu":
        unsupported.append(f"hidden_act={hf_config.hidden_act}")
    if unsupported:
        raise ModelError(f"{folder}: {kind} with {', '.join(unsupported)} is not supported")
    return FAMILIES[kind]
