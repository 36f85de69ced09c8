"""The recipe that sets nothing: every key of the schema, so that each can be seen and overridden in any recipe."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticUndefined

from rlxf.config.keys import ROLES, SECTIONS
from rlxf.config.schema import RunConfig


def unset_recipe() -> dict[str, Any]:
    """All keys with their defaults. Keys of roles are ``None`` (unset): a value would override that of ``training``."""
    recipe: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if name in ROLES:
            recipe[name] = dict.fromkeys(ROLES[name].model_fields)
        elif name in SECTIONS:
            recipe[name] = {key: _default(inner.default) for key, inner in SECTIONS[name].model_fields.items()}
        else:
            recipe[name] = {} if name == "model" else field.default
    return recipe


def _default(value: Any) -> Any:
    if value is PydanticUndefined:
        return None
    return list(value) if isinstance(value, tuple) else value
