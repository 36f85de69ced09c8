"""The figures of docs/planner.md are those that the planner gives now."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlxf.config.load import load_config
from rlxf.planner.device import Device
from rlxf.planner.estimate import Estimate, device_of, estimate_of
from rlxf.planner.search import search
from rlxf.planner.text import memory_table, out_of_memory, search_table, time_table
from rlxf.planner.ways_out import ways_out
from tests.unit.config.recipes import NAMES, compose

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "planner.md").read_text(encoding="utf-8")
NAME = "online_dpo_trainer_llama3_8b"
GIB = 2**30


def _row(name: str, estimate: Estimate) -> str:
    places = ", ".join(f"{'+'.join(one.place.roles)} {one.worst[1].total / GIB:.0f}" for one in estimate.memory)
    devices = f"{estimate.jobs.num_devices} x {estimate.device.name}"
    memory = f"{places} of {estimate.device.memory / GIB:.0f}".replace("train+infer+ref+reward", "all four")
    return f"| `{name}` | {devices} | {memory} | {estimate.pace.seconds:.3g} | {estimate.pace.busy_all:.0%} |"


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_of_a_recipe_is_on_the_page(name: str) -> None:
    config = load_config(compose(name, "dry_run=true"))
    device, _ = device_of(config)
    if not device.is_cpu:
        assert _row(name, estimate_of(config, device)) in PAGE


def test_the_tables_of_the_page_are_those_of_a_dry_run() -> None:
    config = load_config(compose(NAME, "dry_run=true"))
    estimate = estimate_of(config, Device.load("910b-64"))
    assert memory_table(estimate).partition("\n  ")[0] in PAGE
    assert time_table(estimate).rstrip() in PAGE
    found = search_table(search(config, estimate.device, 16), estimate, 16).splitlines()
    assert "\n".join(found[:7]) in PAGE
    assert found[-1] in PAGE


def test_the_way_out_of_the_page_is_the_first_one() -> None:
    config = load_config(compose(NAME, "dry_run=true", "plan.device=910b-32"))
    estimate = estimate_of(config, Device.load("910b-32"))
    assert "\n".join(out_of_memory(estimate, ways_out(config, estimate))[:2]) in PAGE


def test_two_layouts_that_the_page_weighs_against_each_other() -> None:
    """With half of the share of the peak that is assumed, the other one is faster."""
    config = load_config(compose(NAME, "dry_run=true"))
    device = Device.load("910b-64")
    slow = device.with_figures("test", "2026-11-26", train_share=0.21)
    halves, shared = search(config, device, 16, most=2)
    assert halves.estimate.pace.seconds < shared.estimate.pace.seconds
    seconds = [estimate_of(one.config, slow).pace.seconds for one in (shared, halves)]
    assert "(2) takes {:.3g} s and (1) {:.3g} s".format(*seconds) in PAGE
