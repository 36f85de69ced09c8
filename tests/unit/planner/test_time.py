"""Seconds behave as those of devices do, and reproduce what was measured on one."""

from __future__ import annotations

import json
import timeit
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.device_numbers import SHAPES, random_sequences
from rlxf.planner.device import Device, device_names
from rlxf.planner.flops import forward_flops, stream
from rlxf.planner.jobs import Layout, Lora, Pass, Shape, Work
from rlxf.planner.time import Stage, forward, push, sampling, stages_of, update
from tests.unit.planner.worlds import BUDGET, SHAPE_1B, WORK, engine_job, forward_job, jobs, train_job

MEASURED = Path(__file__).parents[3] / "benchmarks" / "results" / "device_h200.json"
H100 = Device.load("h100-80")
FREE = H100.with_figures(  # links and launches cost nothing
    "test", "2026-11-26", link_gb_per_s=1e9, network_gb_per_s=1e9, latency_us=0, pass_ms=0, token_ms=0
)  # fmt: skip


def measured_cases() -> list[str]:
    training = json.loads(MEASURED.read_text())["parts"]["training"]
    return [name for name, row in training.items() if isinstance(row, dict)]


@pytest.mark.parametrize("case", measured_cases())
def test_training_of_1b_on_an_h200_takes_as_long_as_was_measured(case: str) -> None:
    row = json.loads(MEASURED.read_text())["parts"]["training"][case]
    both = random_sequences(64, (256, 512), (256, 768), SHAPES["1b"].vocab)
    work = Work(
        prompts=32, samples=1, pairs=32.0, prompt_tokens=float(both.prompt_lengths.float().mean()),
        completion_tokens=float(both.completion_lengths.float().mean()),
    )  # fmt: skip
    budget = int(case.split()[0]) if "tokens" in case else None
    largest = Pass(tokens=budget or 4 * 2048, rows=1, sequences=2 if budget else 8, budget=budget is not None)
    job = train_job(largest=largest, recompute="full" if "full" in case else "none")
    found = update(job, work, Device.load("h200-141"))
    assert found.seconds == pytest.approx(row["s_per_step"], rel=0.15)
    assert found.flops == pytest.approx(row["tflops"] * 1e12 * row["s_per_step"], rel=0.02)


@pytest.mark.parametrize("name", device_names())
def test_every_device_has_figures_with_sources(name: str) -> None:
    device = Device.load(name)
    for key, figure in device.file:
        if isinstance(figure, dict) or hasattr(figure, "source"):
            assert figure.source, key
            assert figure.value is not None or device.is_cpu, key
    if not device.is_cpu:
        assert all(stage.seconds > 0 for stage in stages_of(jobs(), device).values())


STAGES: dict[str, Callable[[Layout, Device], Stage]] = {
    "update": lambda layout, device: update(train_job(layout=layout), WORK, device),
    "ref": lambda layout, device: forward(forward_job(layout=layout), WORK, device),
    "gen": lambda layout, device: sampling(engine_job(engines=layout.dp, tp=layout.tp), WORK, device),
}


@pytest.mark.parametrize(
    ("stage", "axis"),
    [
        *((stage, axis) for stage in ("update", "ref") for axis in ("dp", "tp", "pp", "cp")),
        ("gen", "dp"),
        ("gen", "tp"),
    ],
)
def test_more_devices_are_never_slower_if_they_talk_for_free(stage: str, axis: str) -> None:
    sizes = (1, 2, 4) if axis == "pp" else (1, 2, 4, 8)  # four passes: a longer pipeline idles more than it gains
    found = [STAGES[stage](Layout(**{axis: size}), FREE) for size in sizes]
    seconds = [one.seconds for one in found]
    assert all(b <= a * 1.0001 for a, b in pairwise(seconds)), seconds
    assert seconds[-1] < 0.75 * seconds[0]
    assert {one.flops for one in found} == {found[0].flops}
    assert [one.devices for one in found] == list(sizes)


def test_shares_of_ranks_are_whole_units() -> None:
    """Three pairs on two ranks take as long as four."""
    largest = Pass(tokens=1, rows=1, sequences=2, budget=False)
    three, four = (
        update(
            train_job(layout=Layout(dp=2), mini_batch=pairs, largest=largest),
            replace(WORK, prompts=pairs, pairs=float(pairs)),
            FREE,
        ).seconds
        for pairs in (3, 4)
    )
    assert three == pytest.approx(four)


def test_recompute_costs_a_pass_through_the_layers_and_selective_one_through_attention() -> None:
    none, selective, full = (
        update(train_job(recompute=kind), WORK, FREE).seconds for kind in ("none", "selective", "full")
    )
    assert none < selective < full
    assert full / none < 4 / 3  # the head is computed again anyway
    assert full / none > 1.15


def test_an_update_takes_its_operations_over_the_share_of_the_peak() -> None:
    device = FREE.with_figures("test", "2026-11-26", memory_gb_per_s=1e9)
    flops = forward_flops(SHAPE_1B, stream(256, 512, 2, share=True).times(128))
    reached = device.peak("bf16") * device.train_share
    every = 3 * flops.body + 3 * flops.attention + 4 * flops.head
    frozen = 2 * flops.body + 3 * flops.attention + 3 * flops.head
    assert update(train_job(), WORK, device).seconds == pytest.approx(every / reached, rel=1e-4)
    assert update(train_job(lora=LORA), WORK, device).seconds == pytest.approx(frozen / reached, rel=1e-4)
    assert forward(forward_job(), WORK, device).seconds == pytest.approx(
        flops.total / device.peak("bf16") / device.forward_share
    )


def test_shared_prompts_cost_less_the_longer_they_are() -> None:
    ratios = []
    for prompt in (64.0, 1024.0):
        work = replace(WORK, prompt_tokens=prompt)
        shared, apart = (update(train_job(share_prompts=share), work, FREE).seconds for share in (True, False))
        ratios.append(shared / apart)
    assert ratios[1] < ratios[0] < 1


@pytest.mark.parametrize("stage", STAGES)
def test_twice_the_prompts_take_at_most_twice_as_long_and_a_device_twice_as_fast_half(stage: str) -> None:
    call = STAGES[stage]
    one = call(Layout(), FREE).seconds
    fast = FREE.with_figures(
        "test", "2026-11-26", bf16_tflops=2 * 989.0, memory_gb_per_s=2 * 3350.0
    )  # fmt: skip
    assert call(Layout(), fast).seconds == pytest.approx(one / 2)


LORA = Lora(rank=16, targets=("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), four_bits=False)


def test_small_passes_cost_launches_and_sums_of_gradients() -> None:
    def seconds(largest: Pass, device: Device, lora: Lora | None = None) -> float:
        return update(train_job(largest=largest, lora=lora), WORK, device).seconds

    small = Pass(tokens=512, rows=512, sequences=2, budget=True)
    assert seconds(small, H100) > 1.5 * seconds(BUDGET, H100)
    sums = 12 * SHAPE_1B.parameters / FREE.bandwidth  # a gradient in bf16 twice, its sum in fp32 twice
    passes = 128 - 4 * 5  # 4 optimizer steps of 32 or of 5 passes
    assert seconds(small, FREE) - seconds(BUDGET, FREE) == pytest.approx(passes * sums)
    assert seconds(small, FREE, LORA) == pytest.approx(seconds(BUDGET, FREE, LORA))


def test_adapters_save_the_gradients_of_weights_and_the_optimizer() -> None:
    whole, adapted = (update(train_job(lora=one), WORK, H100).seconds for one in (None, LORA))
    assert 0.6 < adapted / whole < 0.8


def test_a_pipeline_idles_at_its_ends() -> None:
    """Eight passes on four stages: 11 rounds for 8; virtual stages make the gap smaller."""
    large = replace(SHAPE_1B, vocab=1)  # no head: all stages are alike
    largest = Pass(tokens=1, rows=1, sequences=8, budget=False)
    work = replace(WORK, prompts=32, pairs=32.0)
    alone = update(train_job(shape=large, largest=largest), work, FREE).seconds
    piped = update(train_job(shape=large, largest=largest, layout=Layout(pp=4)), work, FREE).seconds
    virtual = update(train_job(shape=large, largest=largest, layout=Layout(pp=4, vp=2)), work, FREE).seconds
    assert piped / (alone / 4) == pytest.approx(11 / 8, rel=0.01)
    assert virtual / (alone / 4) == pytest.approx(1 + 3 / 16, rel=0.01)


def test_tensor_parallel_over_machines_is_slow() -> None:
    inside, outside = (
        update(train_job(layout=Layout(tp=8)), WORK, replace_per_node(H100, nodes)).seconds for nodes in (8, 4)
    )
    assert outside > 2 * inside


def replace_per_node(device: Device, per_node: int) -> Device:
    return replace(device, file=device.file.model_copy(update={"per_node": per_node}))


def test_a_mesh_of_links_is_slow_between_two() -> None:
    device = Device.load("910b-64")
    assert device.speed(2) == pytest.approx(device.speed(8) / 7)
    assert device.speed(9) == device.network


def test_decoding_is_bound_by_memory_until_the_batch_is_large() -> None:
    def token(sequences: int) -> float:
        work = Work(prompts=sequences, samples=1, prompt_tokens=1.0, completion_tokens=101.0)
        return sampling(engine_job(slots=10_000), work, FREE).seconds

    weights = 100 * SHAPE_1B.parameters * 2 / FREE.bandwidth
    assert token(1) == pytest.approx(weights, rel=0.02)
    assert token(64) < 1.5 * token(1)
    assert token(4096) > 10 * token(1)


def test_more_sequences_than_slots_take_rounds_and_long_ones_a_tail() -> None:
    one, half = (sampling(engine_job(slots=slots), WORK, H100).seconds for slots in (256, 128))
    assert 1.3 < half / one < 2.1
    tail = sampling(engine_job(), replace(WORK, longest=3.0), H100).seconds
    alone = sampling(engine_job(), replace(WORK, prompts=1, samples=1), H100).seconds
    assert tail - sampling(engine_job(), WORK, H100).seconds == pytest.approx(2 * alone, rel=0.05)


def test_room_for_keys_and_values_bounds_the_batch() -> None:
    wide, narrow = (
        sampling(engine_job(utilization=share), replace(WORK, prompts=1024), H100).seconds for share in (0.9, 0.08)
    )
    assert narrow > 1.5 * wide


def test_an_hf_engine_draws_its_noise_on_the_host() -> None:
    """64 rows of a 1B model on an H200: 13 ms a token greedily, 231 ms with noise (docs/platforms.md)."""
    work = Work(prompts=32, samples=2, prompt_tokens=100.0, completion_tokens=33.0)
    row = json.loads(MEASURED.read_text())["parts"]["sampling"]["sampled"]
    device = Device.load("h200-141")
    found = sampling(engine_job(kind="hf"), work, device).seconds / 32
    assert found == pytest.approx(row["ms_per_token_step"] / 1e3, rel=0.15)


def test_weights_of_shared_devices_are_copied_in_place() -> None:
    job, engine = train_job(layout=Layout(tp=4)), engine_job(engines=4)
    shared, apart = (push(job, engine, H100, shared=kind) for kind in (True, False))
    assert (shared.devices, apart.devices) == (4, 8)
    assert shared.seconds < apart.seconds
    far = push(job, engine_job(engines=16), H100, shared=False)
    assert far.seconds > apart.seconds  # over the network


def test_processes_of_a_cpu_share_its_cores() -> None:
    cpu = Device.load("cpu").with_figures(
        "test", "2026-11-26", fp32_tflops=0.2, bf16_tflops=0.4, memory_gb_per_s=10, memory_gib=16,
        link_gb_per_s=1e9, latency_us=0, pass_ms=0,
    ).with_cores(2)  # fmt: skip
    small = Shape(layers=8, hidden=512, ffn=1408, heads=8, kv_heads=2, head_size=64, vocab=6400, tied=True)
    job = train_job(shape=small, precision="fp32")
    work = replace(WORK, prompts=32, pairs=32.0)
    one, two, four = (update(replace(job, layout=Layout(dp=dp)), work, cpu) for dp in (1, 2, 4))
    assert [one.devices, two.devices, four.devices] == [1, 2, 2]
    assert two.seconds == pytest.approx(one.seconds / 2, rel=0.1)
    assert four.seconds == pytest.approx(two.seconds, rel=0.2)


def test_calls_are_cheap_enough_for_a_search() -> None:
    plan = jobs()
    calls: dict[str, Callable[[], Any]] = {
        "sampling": lambda: sampling(engine_job_of, WORK, H100),
        "forward": lambda: forward(reference, WORK, H100),
        "update": lambda: update(plan.train, WORK, H100),
        "push": lambda: push(plan.train, engine_job_of, H100, shared=False),
    }
    assert plan.engine is not None
    assert plan.reference is not None
    engine_job_of, reference = plan.engine, plan.reference
    for name, call in calls.items():
        call()
        assert min(timeit.repeat(call, number=200, repeat=5)) / 200 < 100e-6, name  # usually 25
