"""Environment variables of worker processes: what the user exported wins over a platform's defaults."""

from __future__ import annotations

from collections.abc import Mapping

_USERS_CHOICE = ("VLLM_LOGGING_LEVEL",)  # of vLLM's variables; others are set by the recipe, or needed to load weights


def is_needed(name: str) -> bool:
    """Whether a run works only with the platform's value of this variable."""
    return name.startswith("VLLM_") and name not in _USERS_CHOICE


def with_exports(defaults: Mapping[str, str], exported: Mapping[str, str]) -> dict[str, str]:
    """A platform's variables, with the user's value in place of a default unless the run needs the default.

    Args:
        defaults: ``Platform.worker_environment`` or ``rollout_environment``.
        exported: the environment that the command was typed in.
    """
    return {name: value if is_needed(name) else exported.get(name, value) for name, value in defaults.items()}


def differing_exports(defaults: Mapping[str, str], exported: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The exports to report to the user: those that replace a default, and those that the run cannot use.

    Returns:
        Two lists of ``NAME=exported value (instead of default)`` and ``NAME=exported value (needed: value)``.
    """
    differing = {name: value for name, value in defaults.items() if exported.get(name, value) != value}
    taken = [f"{n}={exported[n]} (instead of {value})" for n, value in differing.items() if not is_needed(n)]
    refused = [f"{n}={exported[n]} (needed: {value})" for n, value in differing.items() if is_needed(n)]
    return taken, refused
