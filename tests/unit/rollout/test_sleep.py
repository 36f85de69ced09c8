"""Engines that sleep: what is free while they do, what they sample afterwards, and a device that has no room."""

from __future__ import annotations

import subprocess
import sys
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlxf.assembly.roles import engine_settings
from rlxf.core.errors import SyncError
from rlxf.platform import PLATFORMS, get_platform
from rlxf.platform.cpu import CpuPlatform
from rlxf.platform.memory import PhaseMemory
from rlxf.rollout import HfEngine, VllmEngine
from rlxf.rollout.engine import EngineSettings, EngineState, Sampling, WeightState
from rlxf.rollout.one_engine import OneEngine
from rlxf.rollout.session import OpenSession
from rlxf.rollout.vllm import _prepare_sleep
from rlxf.rollout.vllm_sleep import map_memory, map_once
from rlxf.rollout.waking import is_out_of_memory
from tests.rollout_world import HfActor, load_model, prompt_batch, random_prompts, run_config
from tests.tiny_models import randomize, save_causal_lm

RANDOM = Sampling(num_samples=3, max_new_tokens=12, seed=5)
BATCH = prompt_batch(random_prompts((1, 4, 9, 30)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama."""
    return save_causal_lm(tmp_path_factory.mktemp("sleep"), tied=True, seed=1)


def hf_engine(folder: Path, linear: Any = "mkl") -> HfEngine:
    return HfEngine(engine_settings(run_config(folder)), get_platform("cpu", cpu_linear=linear))


def push(actor: HfActor, engine: Any, version: int) -> None:
    engine.begin_update()
    for index, bucket in enumerate(actor.sync_plan()):
        engine.load_bucket(bucket, actor.packed_bucket(index))
    engine.end_update(version)


def sampled(engine: Any) -> tuple[list[list[int]], bytes]:
    rollouts = engine.generate(BATCH, RANDOM)
    return rollouts.sequences.rows(), rollouts.engine_logps.numpy().tobytes()


@pytest.mark.parametrize(("kind", "linear"), [("llama", "onednn"), ("qwen2", "mkl"), ("qwen3", "onednn")])
def test_after_a_sleep_an_engine_samples_what_one_that_never_slept_does(
    tmp_path: Path, kind: str, linear: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied Llama, an untied Qwen2 (biases), an untied Qwen3 (norms of queries and keys)."""
    folder = save_causal_lm(tmp_path, kind, tied=kind == "llama", seed=1)
    monkeypatch.setattr("rlxf.platform.linear.MIN_WEIGHT_ELEMENTS", 1)
    resting, working = hf_engine(folder, linear), hf_engine(folder, linear)
    actor = HfActor(load_model(folder))
    for version in (1, 2):
        randomize(actor.model, version)
        resting.sleep()
        resting.wake_weights()
        for engine in (resting, working):
            push(actor, engine, version)
        resting.wake_cache()
        assert sampled(resting) == sampled(working)


def test_asleep_no_weight_takes_memory_and_every_buffer_is_kept(folder: Path) -> None:
    engine = hf_engine(folder)
    model = engine._decoder._body
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before  # the angles' frequencies
    engine.sleep()
    assert sum(parameter.untyped_storage().nbytes() for parameter in engine._parameters.values()) == 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_a_sleeping_engine_refuses_its_session_and_every_sample(folder: Path) -> None:
    engine = hf_engine(folder)
    session = engine.session(RANDOM)
    session.add(BATCH)
    engine.sleep()
    with pytest.raises(SyncError, match="this session of the rollout engine is closed"):
        session.advance()
    for call in (lambda: engine.generate(BATCH, RANDOM), lambda: engine.session(RANDOM), engine.begin_update):
        with pytest.raises(SyncError, match="is asleep"):
            call()
    engine.wake_weights()
    with pytest.raises(SyncError, match="has room for weights, but none since it slept"):
        engine.generate(BATCH, RANDOM)


def test_a_refused_sleep_leaves_the_session_open(folder: Path) -> None:
    engine = hf_engine(folder)
    engine.begin_update()
    with pytest.raises(SyncError, match="in an update"):
        engine.sleep()
    assert all(parameter.numel() for parameter in engine._parameters.values())


_RESIDENT = """
import gc, sys, torch
from pathlib import Path
from rlxf.assembly.roles import engine_settings
from rlxf.platform import get_platform
from rlxf.rollout import HfEngine
from rlxf.rollout.engine import Sampling
from tests.rollout_world import prompt_batch, run_config
from tests.tiny_models import save_causal_lm

torch.set_num_threads(1)
folder = save_causal_lm(Path(sys.argv[1]), hidden_size=512, intermediate_size=1536, num_hidden_layers=6)
for linear in ("mkl", "onednn"):
    engine = HfEngine(engine_settings(run_config(folder)), get_platform("cpu", cpu_linear=linear))
    engine.generate(prompt_batch([[5, 6, 7]] * 8), Sampling(num_samples=2, max_new_tokens=8))
    weights = sum(parameter.untyped_storage().nbytes() for parameter in engine._parameters.values())
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    before = resident()
    engine.sleep()
    print(weights, before - resident())
    del engine
    gc.collect()
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own count")
def test_resident_memory_falls_by_the_weights_and_by_their_copies(tmp_path: Path) -> None:
    """In a process of its own, since only there the heap is known."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _RESIDENT, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for line, times in zip(done.stdout.splitlines(), (1, 2), strict=True):
        weights, freed = map(int, line.split())
        assert weights > 50e6
        assert freed >= 0.8 * times * weights, (weights, freed)


# Running out of memory


class Device(CpuPlatform):
    """A device whose calls are recorded; 30 of its 80 GiB are free."""

    vllm_sleep_level = 2

    def __init__(self) -> None:
        super().__init__("mkl")
        self.calls: list[str] = []
        self.peaks = iter(range(2**30, 2**40, 2**30))

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")

    def reset_peak_memory(self) -> None:
        self.calls.append("reset_peak_memory")

    def max_memory_allocated(self) -> int:
        return next(self.peaks)

    def total_memory(self) -> int:
        return 80 * 2**30

    def free_memory(self) -> int:
        return 30 * 2**30


class SleepingLlm:
    """What vLLM's executor does with its two tags, and how often it runs out of memory in a wake."""

    def __init__(self, device: Device, *, fails: int = 0, error: Exception | None = None) -> None:
        self.device, self.fails, self.asleep = device, fails, set[str]()
        self.error = error or RuntimeError("CUDA Error: out of memory at csrc/cumem_allocator.cpp:119")
        self.llm_engine = self

    def sleep(self, level: int = 1) -> None:
        self.device.calls.append(f"sleep {level}")
        self.asleep = {"weights", "kv_cache"}

    def wake_up(self, tags: list[str]) -> bool:
        self.device.calls.append(f"wake {tags}")
        if set(tags) <= self.asleep:
            self.asleep -= set(tags)
        return not self.asleep

    def is_sleeping(self) -> bool:
        return bool(self.asleep)

    def collective_rpc(self, method: Any, args: tuple[str, str] = ("", "")) -> list[str | None]:
        """Of two workers the second one has no memory."""
        if method is not map_memory:
            return [None, None]
        assert args[1] == self.device.name
        self.device.calls.append(f"map {args[0]}")
        if not self.fails:
            return [None, None]
        self.fails -= 1
        if not is_out_of_memory(self.error):
            raise self.error
        return [None, str(self.error)]

    def reset_prefix_cache(self) -> bool:
        return True


def vllm_engine(level: int | None = 2, **llm: Any) -> tuple[VllmEngine, list[str]]:
    """A vLLM engine around a stand-in for vLLM."""
    engine, device = object.__new__(VllmEngine), Device()
    engine._state, engine._open, engine._llm = WeightState(), OpenSession(), SleepingLlm(device, **llm)
    engine._platform, engine.memory, engine._sleep_level = device, PhaseMemory(device), level
    return engine, device.calls


def round_trip(engine: Any) -> None:
    engine.sleep()
    engine.wake_weights()
    engine.begin_update()
    engine.end_update(3)
    engine.wake_cache()


WAKES = ["map weights", "wake ['weights']", "map kv_cache", "wake ['kv_cache']"]


def vllm_calls(calls: list[str]) -> list[str]:
    return [call for call in calls if call != "reset_peak_memory"]


def test_vllm_sleeps_at_the_platforms_level_and_wakes_tag_by_tag() -> None:
    engine, calls = vllm_engine(level=1)
    round_trip(engine)
    assert vllm_calls(calls) == ["sleep 1", "empty_cache", *WAKES]
    assert list(engine.memory.peaks) == ["sample", "asleep", "push"]
    engine._state.require_ready()


def test_a_vllm_that_cannot_sleep_keeps_the_order_alone() -> None:
    engine, calls = vllm_engine(level=None)
    round_trip(engine)
    assert vllm_calls(calls) == ["empty_cache"]
    engine._state.require_ready()
    engine.sleep()
    with pytest.raises(SyncError, match="wake its weights and push"):
        engine.wake_cache()


class Workers:
    """Of a vLLM: what is run in them."""

    def __init__(self) -> None:
        self.ran: list[Any] = []

    def collective_rpc(self, method: Any, args: tuple[str, ...]) -> None:
        self.ran.append((method, *args))


def test_each_platform_sleeps_at_its_level_if_the_device_is_shared_and_vllm_was_built_for_it() -> None:
    alone = EngineSettings(model="m", tokenizer="m", dtype="float32", max_length=8)
    levels, ran = {}, {}
    for name, kind in PLATFORMS.items():
        workers, platform = Workers(), kind()
        assert _prepare_sleep(workers, alone, platform) is None
        assert workers.ran == []
        levels[name] = _prepare_sleep(workers, replace(alone, colocated=True), platform)
        ran[name] = workers.ran
        for colocated in (False, True):
            asked = platform.vllm_arguments(colocated=colocated).get("enable_sleep_mode", False)
            assert asked == (colocated and levels[name] is not None)
    assert levels == {"cpu": None, "cuda": 2, "npu": 1}
    names = {
        "cuda": "vllm.device_allocator.cumem:CuMemAllocator",
        "npu": "vllm_ascend.device_allocator.camem:CaMemAllocator",
    }
    assert ran == {"cpu": [], **{name: [(map_once, allocator)] for name, allocator in names.items()}}


@dataclass
class Forgets:
    """What an allocator of vLLM 0.23 knows of an allocation."""

    tag: str


@dataclass
class Knows(Forgets):
    """And one of 0.32."""

    is_asleep: bool = False


@pytest.mark.parametrize("known", [Forgets, Knows])
def test_a_wake_after_one_that_failed_maps_only_the_rest(known: type[Forgets], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, int]] = []
    module: Any = types.ModuleType("an_allocator")
    module.Allocator = type("Allocator", (), {"__module__": "an_allocator"})
    module.AllocationData = known
    module.create_and_map = create = lambda handle: done.append(("map", handle[2]))
    module.unmap_and_release = lambda handle: done.append(("free", handle[2]))
    monkeypatch.setitem(sys.modules, "an_allocator", module)
    map_once(object(), "an_allocator:Allocator")
    if known is Knows:
        assert module.create_and_map is create
        return
    for address in (1, 1, 2):  # the second time goes on after the first
        module.create_and_map((0, 8, address, 0))
    for address in (1, 2):
        module.unmap_and_release((0, 8, address, 0))
    module.create_and_map((0, 8, 1, 0))
    assert done == [("map", 1), ("map", 2), ("free", 1), ("free", 2), ("map", 1)]


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA Error: out of memory at x:1"), RuntimeError("no device")])
def test_a_worker_tells_that_it_has_no_memory_and_raises_all_else(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[list[str]] = []

    class Allocator:
        @staticmethod
        def get_instance() -> Any:
            return Allocator

        @staticmethod
        def wake_up(tags: list[str]) -> None:
            woken.append(tags)
            if error is not None:
                raise error

    module: Any = types.ModuleType("an_allocator")
    module.Allocator = Allocator
    monkeypatch.setitem(sys.modules, "an_allocator", module)
    monkeypatch.setattr(Device, "vllm_allocator", "an_allocator:Allocator")
    monkeypatch.setitem(PLATFORMS, "recorded", Device)
    if error is not None and "memory" not in str(error):
        with pytest.raises(RuntimeError, match="no device"):
            map_memory(object(), "weights", "recorded")
    else:
        assert map_memory(object(), "weights", "recorded") == (None if error is None else str(error))
    assert woken == [["weights"]]


def test_one_engine_in_place_of_all_passes_the_order_on(folder: Path) -> None:
    engine = hf_engine(folder)
    engines = OneEngine(engine)
    engines.sleep()
    engines.wake_weights()
    push(HfActor(load_model(folder)), engine, 1)
    engines.wake_cache()
    assert sampled(engines) == sampled(engine)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), None], ids=["torch", "vllm"]
)
def test_a_wake_without_memory_is_tried_once_more(error: Exception | None) -> None:
    engine, calls = vllm_engine(fails=1, error=error)
    round_trip(engine)
    assert vllm_calls(calls) == ["sleep 2", "empty_cache", "map weights", "empty_cache", *WAKES]


@pytest.mark.parametrize("error", [None, RuntimeError("(OOM: Out of Memory, allocation failed)")])
def test_the_second_time_it_is_an_error_with_phases_and_keys(error: Exception | None) -> None:
    engine, calls = vllm_engine(fails=2, error=error)
    engine.sleep()
    with pytest.raises(SyncError, match="no memory for weights") as found:
        engine.wake_weights()
    for words in (
        *("rollout.gpu_memory_utilization", "rollout.max_num_seqs", "resource_pool.colocate"),
        *("sample", "1.00 GiB", "asleep", "2.00 GiB", "30.00 of 80.00 GiB free"),
    ):
        assert words in str(found.value)
    assert calls.count("map weights") == 2
    assert "wake ['weights']" not in calls  # for vLLM they sleep
    assert engine._state.state is EngineState.ASLEEP
    engine.wake_weights()  # other roles may have freed theirs meanwhile
    assert calls[-2:] == ["map weights", "wake ['weights']"]


def test_another_failure_is_not_tried_again() -> None:
    engine, calls = vllm_engine(fails=1, error=RuntimeError("the worker died"))
    engine.sleep()
    with pytest.raises(RuntimeError, match="the worker died"):
        engine.wake_weights()
    assert calls.count("map weights") == 1


def test_a_vllm_that_only_says_that_it_woke_is_noticed() -> None:
    engine, _ = vllm_engine()
    llm: Any = engine._llm
    engine.sleep()
    engine.wake_weights()
    engine.begin_update()
    engine.end_update(3)
    llm.wake_up = lambda tags: False
    with pytest.raises(SyncError, match="vLLM is still asleep"):
        engine.wake_cache()
    assert engine._state.state is EngineState.WEIGHTS_AWAKE


def test_an_hf_engine_without_memory_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, fails = hf_engine(folder), [3]
    engine.sleep()
    new_empty = torch.Tensor.new_empty

    def sometimes(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        fails[0] -= 1
        if fails[0] == 0:
            raise torch.OutOfMemoryError("out of memory")
        return new_empty(tensor, *args)

    monkeypatch.setattr(torch.Tensor, "new_empty", sometimes)
    engine.wake_weights()
    assert fails[0] == 3 - len(engine._parameters) - 1  # those before the failure were not taken twice
    actor = HfActor(load_model(folder))
    push(actor, engine, 1)
    engine.wake_cache()
    assert sampled(engine) == sampled(hf_engine(folder))


def test_peaks_are_the_largest_of_each_phase() -> None:
    device = Device()
    memory = PhaseMemory(device)
    device.peaks = iter([5 * 2**30, 2 * 2**30, 3 * 2**30, 2**29])
    assert [memory.end(phase) for phase in ("sample", "push", "sample", "push")] == [
        *(5 * 2**30, 2 * 2**30, 3 * 2**30, 2**29)
    ]
    assert memory.peaks == {"sample": 5 * 2**30, "push": 2 * 2**30}
    assert device.calls == ["reset_peak_memory"] * 4


def test_an_engine_that_shares_its_device_counts_from_its_load_on(folder: Path) -> None:
    settings = replace(engine_settings(run_config(folder)), colocated=True)
    engine = HfEngine(settings, get_platform("cpu", cpu_linear="mkl"))
    assert list(engine.memory.peaks) == ["load"]
    assert list(hf_engine(folder).memory.peaks) == []
