"""The tables of a dry run."""

from __future__ import annotations

import pytest

from rlxf.config.load import load_config
from rlxf.planner.device import Device
from rlxf.planner.estimate import device_of, estimate_of
from rlxf.planner.text import memory_table, time_table
from tests.unit.config.recipes import NAMES, compose

CPU = {"memory_gib": 24.0, "fp32_tflops": 0.1, "bf16_tflops": 0.2, "memory_gb_per_s": 20.0}


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_has_its_tables(name: str) -> None:
    config = load_config(compose(name, "dry_run=true"))
    device, _ = device_of(config)
    estimate = estimate_of(config, device.with_probe(CPU).with_cores(2) if device.is_cpu else device)
    memory, time = memory_table(estimate), time_table(estimate)
    for role in estimate.jobs.devices:
        assert role in memory
        assert f"busy {role}" in time
    assert time.count("<- this recipe") == 1
    assert f"{estimate.pace.seconds:.3g}" in next(line for line in time.splitlines() if "<- this" in line)
    assert "estimate" in memory.splitlines()[0]
    assert "estimate" in time.splitlines()[0]
    assert not any(line.endswith(" ") for line in (memory + time).splitlines())


def test_a_lookahead_of_its_own_is_among_the_paces() -> None:
    config = load_config(compose("online_dpo_trainer_llama3_8b", "dry_run=true", "rollout.lookahead=3"))
    text = time_table(estimate_of(config, Device.load("910b-64")))
    (own,) = [line for line in text.splitlines() if "<- this recipe" in line]
    assert own.startswith("lookahead 3, streaming")


def test_dollars_are_those_of_all_devices() -> None:
    config = load_config(compose("online_dpo_trainer_llama3_8b", "dry_run=true", "plan.price=1.5"))
    estimate = estimate_of(config, Device.load("910b-64"))
    expected = 1000 * estimate.pace.seconds / 3600 * 16 * 1.5
    assert estimate.dollars == pytest.approx(expected)
    assert f"1,000 steps: {expected:,.0f} dollars" in time_table(estimate)
    free = load_config(compose("online_dpo_trainer_llama3_8b", "dry_run=true"))
    assert "dollars" not in time_table(estimate_of(free, Device.load("910b-64")))
