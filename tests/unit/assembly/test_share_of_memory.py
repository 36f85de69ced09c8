"""The share of a device's memory that a vLLM engine is started with if the recipe leaves it open."""

from __future__ import annotations

from typing import Any

import pytest

from rlxf import rollout
from rlxf.assembly.roles import build_engine
from rlxf.config.load import load_config
from rlxf.planner.device import Device
from rlxf.planner.jobs import jobs_of
from rlxf.planner.memory import utilization_of
from rlxf.platform.cpu import CpuPlatform
from tests.unit.config.recipes import compose

NAME = "online_dpo_trainer_llama3_8b_colocated"


def _started_with(monkeypatch: pytest.MonkeyPatch, memory: int, *arguments: str) -> float | None:
    """The share that the engine of a recipe is built with on a device of so many bytes."""
    found: list[Any] = []
    monkeypatch.setitem(rollout.ENGINES, "vllm", lambda settings, platform: found.append(settings))
    monkeypatch.setattr(CpuPlatform, "total_memory", lambda platform: memory)
    monkeypatch.setattr(CpuPlatform, "name", "cuda")
    config = load_config(compose(NAME, "dry_run=true", "training.device=cuda", *arguments))
    build_engine(config, CpuPlatform())
    share: float | None = found[0].rollout.gpu_memory_utilization
    return share


def test_it_is_planned_for_the_memory_of_the_device_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = jobs_of(load_config(compose(NAME, "dry_run=true")))
    shares = [_started_with(monkeypatch, gib * 2**30) for gib in (60, 79, 140)]
    assert shares == [utilization_of(jobs, Device.load("h100-80").with_memory(gib * 2**30)) for gib in (60, 79, 140)]
    assert shares == sorted(shares)  # type: ignore[type-var]
    assert shares[0] != shares[2]


def test_the_recipes_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _started_with(monkeypatch, 79 * 2**30, "rollout.gpu_memory_utilization=0.4") == 0.4


def test_an_engine_that_does_not_fit_asks_for_no_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _started_with(monkeypatch, 8 * 2**30) == 0.95


def test_it_is_planned_for_the_device_at_hand_and_not_for_the_one_that_the_recipe_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = _started_with(monkeypatch, 79 * 2**30, "plan.device=910b-64", "training.device=auto")
    assert named == _started_with(monkeypatch, 79 * 2**30)


def test_a_cpu_has_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _started_with(monkeypatch, 0) is None
