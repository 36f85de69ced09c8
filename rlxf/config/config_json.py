"""Family and shape of a model, from the ``config.json`` of its folder. Read as plain JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlxf.config.problems import show
from rlxf.config.schema import ModelConfig
from rlxf.core.errors import ConfigError
from rlxf.core.model_folder import assets_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Unsaid:
    """The values that ``transformers`` assumes for keys that a family's ``config.json`` leaves out."""

    num_key_value_heads: int | None = None  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int
    whole_heads: bool = False  # the heads must divide hidden_size even where head_dim is given


# By ``model_type``. The same names as ``rlxf.models.megatron.families.FAMILIES``.
FAMILIES = {
    "llama": Unsaid(max_position_embeddings=2048, whole_heads=True),
    "qwen2": Unsaid(num_key_value_heads=32, max_position_embeddings=32768),
    "qwen3": Unsaid(num_key_value_heads=32, head_dim=128, max_position_embeddings=32768),
}

# Key of a recipe's model section -> key of config.json that has no default.
_REQUIRED = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}


def read_settings(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a Hugging Face folder, of a converted checkpoint, or of the model a checkpoint began with.

    Raises:
        ConfigError: there is none, or it is not a JSON object. The caller puts the folder's name in front of the text.
    """
    file = assets_folder(folder) / "config.json"
    if not file.is_file():
        raise ConfigError("holds no config.json; expected a Hugging Face model folder or a converted checkpoint")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"its config.json cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError("its config.json is not a JSON object")
    return settings


def shape_of(settings: dict[str, Any]) -> ModelConfig:
    """The shape that a ``config.json`` describes, every key of it set.

    Raises:
        ConfigError: another family, a size that is missing or no whole number above 0, or heads that do not divide. The
            caller puts the folder's name in front of the text.
    """
    kind = settings.get("model_type")
    unsaid = FAMILIES.get(kind) if isinstance(kind, str) else None
    if unsaid is None:
        known = ", ".join(FAMILIES)
        raise ConfigError(
            f"its config.json says model_type = {show(kind)}; expected one of {known}: no other is trained"
        )
    sizes = {ours: _size(settings, theirs) for ours, theirs in _REQUIRED.items()}
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    groups = _size(settings, "num_key_value_heads", _left_out(settings, "num_key_value_heads", unsaid, heads))
    head_size = settings.get("head_dim") or unsaid.head_dim
    if width % heads and (head_size is None or unsaid.whole_heads):
        wanted = "a divisor of" if unsaid.whole_heads else "a divisor (or a head_dim) for"
        raise ConfigError(
            f"its config.json says num_attention_heads = {heads}; expected {wanted} hidden_size = {width}"
        )
    if heads % groups:
        expected = f"expected a divisor of num_attention_heads = {heads}"
        raise ConfigError(f"its config.json says num_key_value_heads = {groups}; {expected}")
    return ModelConfig(
        **sizes,
        num_query_groups=groups,
        kv_channels=_size(settings, "head_dim", unsaid.head_dim or width // heads),
        max_position_embeddings=_positions(settings, unsaid),
        untie_embeddings_and_output_weights=not settings.get("tie_word_embeddings", False),
    )


def _left_out(settings: dict[str, Any], key: str, unsaid: Unsaid, heads: int) -> int:
    """Key/value heads if the file gives no number; ``null`` means as many as attention heads in every family."""
    return heads if key in settings or unsaid.num_key_value_heads is None else unsaid.num_key_value_heads


def _size(settings: dict[str, Any], key: str, default: int | None = None) -> int:
    value = settings.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise ConfigError(f"its config.json has no {key}; copy or download it again")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"its config.json says {key} = {show(value)}; expected a whole number, at least 1")
    return value


def _positions(settings: dict[str, Any], unsaid: Unsaid) -> int:
    """The longest sequence; linear scaling of the rotary positions stretches it."""
    positions = _size(settings, "max_position_embeddings", unsaid.max_position_embeddings)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling")
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) != "linear":
        return positions
    factor = rope.get("factor")
    return int(positions * factor) if isinstance(factor, int | float) and factor > 1 else positions
