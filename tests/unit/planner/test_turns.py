"""Trainer and engines on the same devices: what leaves a device and comes back costs time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlxf.config.load import load_config
from rlxf.planner.device import Device
from rlxf.planner.jobs import jobs_of
from rlxf.planner.memory import utilization_of
from rlxf.planner.states import trained_state_bytes
from rlxf.planner.time import push_of, sampling, stages_of
from tests.unit.config.recipes import compose


@pytest.mark.parametrize(("name", "more"), [("h100-80", 0.0), ("910b-64", 2 * 8.03e9)])
def test_taking_turns_costs_two_copies_of_what_leaves_the_device(name: str, more: float) -> None:
    device = Device.load(name)
    jobs = jobs_of(load_config(compose("online_dpo_trainer_llama3_8b_colocated", "dry_run=true")))
    states = trained_state_bytes(jobs.train)
    moved = states.main + states.moments
    assert moved > 8e9  # 12 bytes for each of 8e9 weights, on eight devices
    apart = push_of(replace(jobs, takes_turns=False), device).seconds
    turns = push_of(jobs, device).seconds - apart
    assert turns == pytest.approx(2 * (moved + more) / device.host, rel=0.01)


def test_engines_beside_others_decode_as_many_sequences_as_their_share_of_memory_holds() -> None:
    jobs = jobs_of(load_config(compose("online_dpo_trainer_llama3_8b_colocated", "dry_run=true")))
    device = Device.load("h100-80").with_memory(37 * 2**30)
    assert jobs.engine is not None
    share = utilization_of(jobs, device)
    assert jobs.engine.utilization is None
    assert share is not None
    seconds = stages_of(jobs, device)["gen"].seconds
    assert seconds == sampling(replace(jobs.engine, utilization=share), jobs.work, device).seconds
    assert seconds > 1.5 * sampling(replace(jobs.engine, utilization=0.9), jobs.work, device).seconds
