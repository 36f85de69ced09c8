"""A recipe that does not fit: what is offered fits, is cheap, and can be typed."""

from __future__ import annotations

import pytest

from rlxf.config.load import load_config
from rlxf.planner.device import Device
from rlxf.planner.estimate import estimate_of
from rlxf.planner.overrides import typed
from rlxf.planner.text import memory_table, out_of_memory
from rlxf.planner.ways_out import ways_out
from tests.unit.config.recipes import compose

NAME = "online_dpo_trainer_llama32_1b"


@pytest.mark.parametrize(
    ("name", "device", "gib"),
    [
        (NAME, "910b-64", 40.0),
        (NAME, "910b-64", 26.0),
        ("online_dpo_trainer_llama3_8b", "910b-64", 40.0),
        ("online_dpo_trainer_llama3_8b", "910b-32", 29.5),
        ("online_dpo_trainer_llama3_8b_colocated", "h100-80", 40.0),
        ("sft_trainer_llama3_8b", "910b-64", 30.0),
    ],
)
def test_every_way_out_fits_and_can_be_typed(name: str, device: str, gib: float) -> None:
    config = load_config(compose(name, "dry_run=true", f"plan.device={device}"))
    small = Device.load(device).with_memory(gib * 2**30)
    found = estimate_of(config, small)
    assert not found.fits
    ways = ways_out(config, found)
    assert ways
    for way in ways:
        again = load_config(compose(name, "dry_run=true", f"plan.device={device}", *typed(way.overrides)))
        estimate = estimate_of(again, small)
        assert estimate.fits
        assert estimate.pace == way.estimate.pace
    for i, one in enumerate(ways):
        assert not any(other.overrides.items() <= one.overrides.items() for other in ways[:i])
    lines = out_of_memory(found, ways)
    assert lines[-1].endswith(" ".join(typed(ways[-1].overrides)))
    assert "DOES NOT FIT" in memory_table(found)
    assert "\033[31m" in memory_table(found, color=True)


def test_without_a_way_out_a_search_is_named() -> None:
    config = load_config(compose(NAME, "dry_run=true"))
    found = estimate_of(config, Device.load("910b-64").with_memory(3 * 2**30))
    assert ways_out(config, found) == []
    assert "plan.devices=8x910b-64" in out_of_memory(found, [])[-1]


def test_the_first_ways_out_need_no_more_devices() -> None:
    config = load_config(compose(NAME, "dry_run=true"))
    found = estimate_of(config, Device.load("910b-64").with_memory(40 * 2**30))
    for way in ways_out(config, found):
        assert way.estimate.jobs.num_devices == found.jobs.num_devices
        assert set(way.overrides) <= {
            "actor_rollout.recompute_granularity",
            "actor_rollout.max_tokens_per_micro_batch",
            "actor_rollout.tensor_model_parallel_size",
        }
