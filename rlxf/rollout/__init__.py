"""Sampling completions: one protocol (``engine.py``), and the engines that speak it."""

from __future__ import annotations

from collections.abc import Callable

from rlxf.platform.base import Platform
from rlxf.rollout.engine import EngineSettings, RolloutEngine
from rlxf.rollout.hf import HfEngine
from rlxf.rollout.vllm import VllmEngine

__all__ = ["ENGINES", "HfEngine", "VllmEngine"]

ENGINES: dict[str, Callable[[EngineSettings, Platform], RolloutEngine]] = {"vllm": VllmEngine, "hf": HfEngine}
