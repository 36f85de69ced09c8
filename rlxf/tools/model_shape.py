"""The model section of a recipe, made from a model's folder."""

from __future__ import annotations

from pathlib import Path

from rlxf.config.schema import ModelConfig
from rlxf.core.errors import ModelError
from rlxf.models.hf_folder import load_hf_config


def model_shape(folder: Path, *, trust_remote_code: bool) -> ModelConfig:
    """What the folder's ``config.json`` says of its shape.

    Raises:
        ModelError: it is no folder of a decoder-only language model.
    """
    found = load_hf_config(folder, trust_remote_code=trust_remote_code)
    try:
        return ModelConfig(
            num_layers=found.num_hidden_layers,
            hidden_size=found.hidden_size,
            ffn_hidden_size=found.intermediate_size,
            num_attention_heads=found.num_attention_heads,
            num_query_groups=getattr(found, "num_key_value_heads", None),
            kv_channels=getattr(found, "head_dim", None),
            vocab_size=found.vocab_size,
            max_position_embeddings=found.max_position_embeddings,
        )
    except AttributeError as error:
        raise ModelError(f"{folder}: {found.model_type} is no decoder-only language model ({error})") from error
