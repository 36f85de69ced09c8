"""Memory of a device at each instant, an engine's share of it, and known figures of large models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlxf.assembly.roles import engine_settings
from rlxf.config.load import load_config
from rlxf.models.hf_folder import load_hf_config
from rlxf.models.megatron.dist_folder import open_weights
from rlxf.planner.activations import activation_bytes
from rlxf.planner.device import GIB, Device
from rlxf.planner.engine_memory import engine_bytes, engine_weight_bytes, token_bytes
from rlxf.planner.jobs import Jobs, Layout, Lora, Shape, _engine, jobs_of
from rlxf.planner.memory import PlaceMemory, largest_bucket, memory_of, utilization_of
from rlxf.planner.states import StateBytes, state_bytes, trained_state_bytes
from rlxf.platform import get_platform
from rlxf.rollout.hf import HfEngine
from rlxf.rollout.hf_sampling import KeyValueCache
from rlxf.sync.plan import TensorSpec, plan_buckets
from tests.rollout_world import run_config
from tests.tiny_models import save_causal_lm
from tests.unit.config.recipes import compose

LLAMA_8B = Shape(
    layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, head_size=128, vocab=128256, tied=False
)  # Meta-Llama-3-8B
LLAMA_1B = Shape(layers=16, hidden=2048, ffn=8192, heads=32, kv_heads=8, head_size=64, vocab=128256, tied=True)
MIB = 2**20


def _jobs(name: str, *arguments: str) -> Jobs:
    return jobs_of(load_config(compose(name, "dry_run=true", *arguments)))


def _states(shape: Shape, lora: Lora | None = None, **sizes: int) -> StateBytes:
    job = _jobs("online_dpo_trainer_llama3_8b").train
    return trained_state_bytes(replace(job, shape=shape, lora=lora, precision="bf16", layout=Layout(**sizes)))


@pytest.mark.parametrize(
    ("shape", "sizes", "gib"),
    [
        (LLAMA_8B, {"tp": 4}, 33.66),
        (LLAMA_8B, {"tp": 4, "dp": 2}, 22.44),
        (LLAMA_8B, {"tp": 4, "dp": 4}, 16.83),
        (LLAMA_8B, {"tp": 2}, 67.31),
        (LLAMA_8B, {}, 134.62),
        (LLAMA_1B, {}, 20.72),
    ],
)
def test_states_of_large_models(shape: Shape, sizes: dict[str, int], gib: float) -> None:
    # By hand: 18 bytes a parameter, 12 of them shared by the data-parallel ranks.
    assert _states(shape, **sizes).total / GIB == pytest.approx(gib, abs=0.005)


@pytest.mark.parametrize("sizes", [{"tp": 4}, {"tp": 4, "dp": 4}, {"tp": 2, "pp": 2, "dp": 8}, {"pp": 4}])
def test_states_are_those_of_megatrons_own_report(sizes: dict[str, int]) -> None:
    """``theoretical_memory_usage.py`` of Megatron-LM: the most loaded shard times 6 + 12 / dp bytes."""
    layout = Layout(**sizes)
    block = LLAMA_8B.parameters - 2 * LLAMA_8B.head
    shard = (block / layout.pp + LLAMA_8B.head * (2 if layout.pp == 1 else 1)) / layout.tp
    assert _states(LLAMA_8B, **sizes).total == pytest.approx(shard * (6 + 12 / layout.dp), rel=0.03)


@pytest.mark.parametrize("pp", [1, 4])
def test_activations_are_those_of_megatrons_own_report(pp: int) -> None:
    """18 h + 4 f bytes per token and layer (Korthikanti et al. 2022, Table 2), with as many keys as queries.

    Not in ours: masks of dropout, 2 h. Not in theirs: the gate of SwiGLU, 2 f, and queries and keys before the
    rotation, which values keep alive, 4 h.
    """
    shape = replace(LLAMA_8B, kv_heads=32)
    hidden, tokens = shape.hidden, 4096
    layout = Layout(tp=4, pp=pp, sequence_parallel=True)
    found = activation_bytes(shape, layout, "bf16", "none", tokens, passes=8)
    others = ("positions", "head", "stage ends", "gather buffer")
    layers = sum(size for name, size in found.items() if name not in others)
    theirs = tokens * shape.layers * (18 * hidden + 4 * shape.ffn) / 4
    ours = theirs + tokens * shape.layers * (2 * shape.ffn + 2 * hidden) / 4
    assert layers == pytest.approx(ours, rel=0.03)


def test_activations_of_8b() -> None:
    """Fused kernels keep about half of what an operation at a time keeps."""
    one = {
        kind: sum(activation_bytes(LLAMA_8B, Layout(tp=4), "bf16", "none", 3072, kind=kind).values()) / 3072 / MIB
        for kind in ("cuda", "npu", "cpu")
    }
    # By hand, a layer of TP4: norms 16392, linear inputs 16384, attention 2048 + 512 + 3072 + 2048 + 32, gate and up
    # 14336, product 7168; all 61992 bytes. Per token also the final norm, a row of the head and the angles.
    assert one["cuda"] == pytest.approx((32 * 61992 + 8196 + 8212 + 520) / MIB, rel=1e-3)
    assert one["cuda"] < one["npu"] < one["cpu"]
    # With copies in fp32: norms 49160, attention 10272, projection in 2048, gate and up 21504; all 106536 bytes.
    assert one["cpu"] == pytest.approx((32 * 106536 + 24580 + 8212 + 520) / MIB, rel=1e-3)


def test_keys_and_values_of_large_models() -> None:
    assert token_bytes(LLAMA_8B, 1, "bf16") == 128 * 1024
    assert token_bytes(LLAMA_8B, 4, "bf16") == 32 * 1024
    assert token_bytes(LLAMA_8B, 16, "bf16") == 16 * 1024  # two ranks share a head
    assert token_bytes(LLAMA_1B, 1, "bf16") == 32 * 1024


def test_weights_of_a_head_of_one_label() -> None:
    full = state_bytes(LLAMA_8B, Layout(), "bf16").weights
    scores = state_bytes(replace(LLAMA_8B, scores=True), Layout(), "bf16").weights
    assert full - scores == 2 * (LLAMA_8B.head - LLAMA_8B.hidden)


def _named(place: PlaceMemory) -> dict[str, Mapping[str, float]]:
    return {instant.name: instant.parts for bar in place.bars for instant in bar.instants}


def test_who_is_there_when_roles_take_turns() -> None:
    device = Device.load("h100-80")
    (place,) = memory_of(_jobs("online_dpo_trainer_llama3_8b_colocated", "training.device=cuda"), device)
    instants = _named(place)
    assert set(instants) == {"log-probs", "forward", "backward", "optimizer step", "sampling", "push"}
    for name, parts in instants.items():
        assert {"ref weights", "reward weights", "train weights", "push buckets"} <= set(parts)
        trains = name in ("forward", "backward", "optimizer step")
        assert ("train moments" in parts) == ("train gradients" in parts) == trains
        assert ("infer weights" in parts) == (name in ("sampling", "push"))
        assert ("infer cache" in parts) == (name == "sampling")
        assert ("train activations" in parts) == (name in ("forward", "backward"))
    assert instants["sampling"]["contexts"] == 4 * device.context


def test_without_turns_everything_stays() -> None:
    jobs = replace(_jobs("online_dpo_trainer_llama3_8b_colocated", "training.device=cuda"), takes_turns=False)
    instants = _named(memory_of(jobs, Device.load("h100-80"))[0])
    for parts in instants.values():
        assert {"train moments", "train gradients", "infer weights", "infer cache"} <= set(parts)


def test_the_level_of_sleep() -> None:
    jobs = _jobs("online_dpo_trainer_llama3_8b_colocated", "training.device=cuda")
    asleep = {
        kind: {name for name in _named(memory_of(jobs, Device.load(kind))[0])["backward"] if name.startswith("infer")}
        for kind in ("h100-80", "910b-64")
    }
    assert asleep == {"h100-80": {"infer graphs"}, "910b-64": set()}


def test_a_cpu_is_one_memory() -> None:
    device = Device.load("cpu").with_figures("test", "2026-11-26", memory_gib=32.0)
    jobs = _jobs("online_dpo_trainer_tiny")
    one = memory_of(jobs, device)
    three = memory_of(replace(jobs, places=tuple(replace(place, devices=3) for place in jobs.places)), device)
    for place, larger in zip(one, three, strict=True):
        for bar, other in zip(place.bars, larger.bars, strict=True):
            room = bar.worst.parts.get("push buckets", 0)  # all processes have the same
            assert other.worst.total - room == pytest.approx(3 * (bar.worst.total - room))
    assert all(place.utilization is None for place in one)


def test_an_engine_alone_gets_a_fixed_share() -> None:
    device = Device.load("h100-80")
    jobs = _jobs("online_dpo_trainer_llama3_8b_8gpu", "training.device=cuda")
    assert utilization_of(jobs, device) == 0.85
    place = next(place for place in memory_of(jobs, device) if "infer" in place.place.roles)
    engine = sum(size for name, size in _named(place)["sampling"].items() if name.startswith("infer"))
    assert engine == pytest.approx(0.85 * device.memory)


@pytest.mark.parametrize("size", [None, 24.0, 0.5])
def test_an_engine_beside_others_gets_what_they_leave(size: float | None) -> None:
    device = Device.load("h100-80")
    if size is not None:
        device = device.with_figures("test", "2026-11-26", memory_gib=size)
    jobs = _jobs("online_dpo_trainer_llama3_8b_colocated", "training.device=cuda", "rollout.gpu_memory_utilization=0.3")
    assert jobs.engine is not None
    assert utilization_of(jobs, device) == jobs.engine.utilization == 0.3  # the recipe's word counts
    jobs = replace(jobs, engine=replace(jobs.engine, utilization=None))
    share = utilization_of(jobs, device)
    assert share is not None
    (place,) = memory_of(jobs, device)
    sampling = sum(_named(place)["sampling"].values())
    needs = engine_bytes(jobs.engine, jobs.work, device)
    assert share * device.memory >= needs.least
    if size is None:
        assert 0.93 * device.memory < sampling < 0.96 * device.memory
    else:  # nothing can be left for it, and the plan says so
        assert sampling > device.memory
        assert share * device.memory < needs.least + 0.01 * device.memory


def test_no_share_without_a_vllm_engine_of_a_device() -> None:
    jobs = _jobs("online_dpo_trainer_llama3_8b_8gpu", "training.device=cuda")
    device = Device.load("h100-80")
    assert jobs.engine is not None
    assert utilization_of(replace(jobs, engine=None), device) is None
    assert utilization_of(replace(jobs, engine=replace(jobs.engine, kind="hf")), device) is None


def test_a_longer_sequence_needs_more_cache() -> None:
    jobs = _jobs("online_dpo_trainer_llama3_8b_8gpu", "training.device=cuda")
    device = Device.load("h100-80")
    assert jobs.engine is not None
    engine = replace(jobs.engine, max_length=1000, slots=8, engines=1)
    blocks = 8 * 63 * 16  # 63 blocks of 16 tokens hold 1000
    assert engine_bytes(engine, jobs.work, device).cache == blocks * token_bytes(engine.shape, engine.tp, "bf16")
    few = replace(jobs.work, prompts=3, samples=1)
    assert engine_bytes(engine, few, device).cache == blocks / 8 * 3 * token_bytes(engine.shape, engine.tp, "bf16")


@pytest.mark.parametrize("tied", [False, True])
def test_the_largest_bucket_is_that_of_the_plan(tmp_path: Path, tied: bool) -> None:
    folder = save_causal_lm(tmp_path / "model", tied=tied, num_hidden_layers=4)
    weights = open_weights(str(folder), load_hf_config(str(folder)))
    names = sorted(weights.names(), key=lambda name: (not name.startswith("model.embed"), "layers" not in name, name))
    specs = [TensorSpec(name, weights.shape(name), "float32") for name in names]
    shape = Shape(layers=4, hidden=128, ffn=192, heads=4, kv_heads=2, head_size=32, vocab=259, tied=tied)
    for limit in (16 * 2**10, 300 * 2**10, 700 * 2**10, 1500 * 2**10, 2**30):
        plan = plan_buckets(specs, limit)
        assert largest_bucket(shape, 4, limit) == max(bucket.num_bytes for bucket in plan), limit


def test_the_hf_engine_holds_what_the_plan_says(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "model", tied=True)
    config = run_config(folder, engine="hf")
    engine = HfEngine(engine_settings(config), get_platform("cpu"))
    model = config.model["tiny"].model_copy(update={"untie_embeddings_and_output_weights": False})
    job = _engine(config, Shape.of(model, str(folder)))
    assert engine_weight_bytes(job) == sum(parameter.nbytes for parameter in engine._parameters.values())
    cache = KeyValueCache(torch.tensor([5, 24, 3]), 40, engine._decoder)
    held = sum(states.nbytes for layer in cache._states for states in layer)
    assert held == 3 * job.max_length * token_bytes(job.shape, 1, "fp32")
