"""Metrics of the user: ``evaluate`` of the Python file that ``eval.metrics`` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlxf.core.errors import ConfigError, RlxfError
from rlxf.core.types import Metrics
from rlxf.core.user_file import describe, load_function

UserMetrics = Callable[[list[Any], list[str], list[str]], dict[str, float]]
_SIGNATURE = "def evaluate(prompts, completions, initial_completions) -> dict[str, float]"
_WITH_ERRORS = ("reward", "raw_reward", "win_rate", "win_rate_previous", "win_rate_reference")
_SAMPLED = (*_WITH_ERRORS, *(f"{name}_se" for name in _WITH_ERRORS), "length", "eos_rate")
# What an evaluation measures by itself, without ``eval/``.
_JUDGED = ("asked", "cached", "missing", "ties", "position_flip", "calls", "prompt_tokens", "completion_tokens", "cost")
BUILT_IN = frozenset(
    {*_SAMPLED, *(f"greedy_{name}" for name in _SAMPLED), "kl", "kl_se", *(f"judge/{name}" for name in _JUDGED)}
)


def load_metrics(path: str) -> UserMetrics:
    """``evaluate`` of a Python file.

    Raises:
        ConfigError: there is no such file or function, or the file cannot be run.
    """
    return load_function(Path(path), "evaluate", key="eval.metrics", signature=_SIGNATURE)


def call_metrics(
    function: UserMetrics, path: str, prompts: list[Any], texts: list[str], initial_texts: list[str]
) -> Metrics:
    """The metrics that ``function`` returns, by names that begin with ``eval/``.

    Raises:
        ConfigError: it failed, gave something else than numbers by name, or a name that an evaluation has already.
    """
    try:
        found = {str(name): float(value) for name, value in function(prompts, texts, initial_texts).items()}
    except RlxfError:
        raise  # a stop that the user asked for, among others
    except Exception as error:
        raise ConfigError(f"eval.metrics={path}: `evaluate` failed: {describe(error, Path(path))}") from error
    if taken := sorted(BUILT_IN.intersection(found)):
        raise ConfigError(
            f"eval.metrics={path}: `evaluate` returns {', '.join(map(repr, taken))}, but every evaluation has a metric "
            f"of that name (eval/{taken[0]}); give it another name"
        )
    return {f"eval/{name}": value for name, value in found.items()}
