"""Environment variables of worker processes: what the user exported wins over a platform's defaults where it can."""

from __future__ import annotations

from collections.abc import Mapping

# Of vLLM's variables; others are set by the recipe, or needed to load weights.
_USERS_CHOICE = ("VLLM_LOGGING_LEVEL", "VLLM_NO_USAGE_STATS")
# A default that would silence another variable of the user.
_GIVES_WAY_TO = {"HCCL_HOST_SOCKET_PORT_RANGE": "HCCL_IF_BASE_PORT"}

# In place of torch-npu's segments that grow: the allocator of an engine that sleeps asserts that they are off.
NO_EXPANDABLE_SEGMENTS = "expandable_segments:False"


def may_replace(name: str, value: str, exported: str) -> bool:
    """Whether a run works with a user's value of a variable in place of the platform's."""
    if value == NO_EXPANDABLE_SEGMENTS:
        return "expandable_segments:True" not in exported
    return not name.startswith("VLLM_") or name in _USERS_CHOICE


def with_exports(defaults: Mapping[str, str], exported: Mapping[str, str]) -> dict[str, str]:
    """A platform's variables, with the user's value in place of a default unless the run needs the default.

    Args:
        defaults: ``Platform.worker_environment`` or ``rollout_environment``.
        exported: the environment that the command was typed in.
    """
    taken = {
        name: exported[name] if name in exported and may_replace(name, value, exported[name]) else value
        for name, value in defaults.items()
    }
    return {name: value for name, value in taken.items() if not _gives_way(name, exported)}


def differing_exports(defaults: Mapping[str, str], exported: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The exports to report to the user: those that replace a default, and those that the run cannot use.

    Returns:
        Two lists of ``NAME=exported value (instead of default)`` and ``NAME=exported value (needed: value)``.
    """
    taken, refused = [], []
    for name, value in defaults.items():
        found = exported.get(name, value)
        if _gives_way(name, exported):
            other = _GIVES_WAY_TO[name]
            taken.append(f"{other}={exported[other]} (instead of {name}={value})")
        elif found != value and may_replace(name, value, found):
            taken.append(f"{name}={found} (instead of {value})")
        elif found != value:
            refused.append(f"{name}={found} (needed: {value})")
    return taken, refused


def _gives_way(name: str, exported: Mapping[str, str]) -> bool:
    return name in _GIVES_WAY_TO and name not in exported and _GIVES_WAY_TO[name] in exported
