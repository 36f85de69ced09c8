"""Metrics of the user: ``evaluate`` of the Python file that ``eval.metrics`` names."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlxf.errors import ConfigError, RlxfError
from rlxf.types import Metrics

UserMetrics = Callable[[list[Any], list[str], list[str]], dict[str, float]]
_SIGNATURE = "def evaluate(prompts, completions, initial_completions) -> dict[str, float]"


def load_metrics(path: str) -> UserMetrics:
    """``evaluate`` of a Python file.

    Raises:
        ConfigError: there is no such file or function, or the file cannot be run.
    """
    spec = importlib.util.spec_from_file_location("rlxf_eval_metrics", Path(path))
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ConfigError(f"eval.metrics={path}: no such Python file; expected one with `{_SIGNATURE}`")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except RlxfError:
        raise  # a stop that the user asked for, among others
    except Exception as error:
        raise ConfigError(f"eval.metrics={path}: cannot be loaded: {type(error).__name__}: {error}") from error
    function: UserMetrics | None = getattr(module, "evaluate", None)
    if not callable(function):
        raise ConfigError(f"eval.metrics={path}: defines no function `evaluate`; expected `{_SIGNATURE}`")
    return function


def call_metrics(
    function: UserMetrics, path: str, prompts: list[Any], texts: list[str], initial_texts: list[str]
) -> Metrics:
    """What ``function`` says, by names that begin with ``eval/``.

    Raises:
        ConfigError: it failed, or gave something else than numbers by name.
    """
    try:
        return {f"eval/{name}": float(value) for name, value in function(prompts, texts, initial_texts).items()}
    except RlxfError:
        raise  # a stop that the user asked for, among others
    except Exception as error:
        raise ConfigError(f"eval.metrics={path}: `evaluate` failed: {type(error).__name__}: {error}") from error
