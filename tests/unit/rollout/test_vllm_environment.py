"""What the vLLM engine checks before and after vLLM starts; needs no vLLM."""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from rlxf.config.schema import RolloutConfig
from rlxf.core.errors import ConfigError
from rlxf.platform import PLATFORMS, get_platform
from rlxf.rollout.engine import EngineSettings
from rlxf.rollout.vllm import _arguments, _check_block_size, prepare_environment

EXPECTED = get_platform("cpu").rollout_environment(1, 2)


@pytest.fixture(autouse=True)
def bare_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No vLLM, and none of its variables; whatever a test sets is undone."""
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    for name in EXPECTED:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_plain_process_gets_every_variable() -> None:
    prepare_environment(EXPECTED)
    assert {name: os.environ[name] for name in EXPECTED} == EXPECTED


def test_a_variable_of_vllms_own_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "40")
    with pytest.raises(ConfigError, match="VLLM_CPU_KVCACHE_SPACE=40: this recipe needs 2; unset it"):
        prepare_environment(EXPECTED)


def test_an_engine_that_sleeps_refuses_segments_that_its_allocator_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "PYTORCH_NPU_ALLOC_CONF"
    expected = {name: PLATFORMS["npu"]().rollout_environment(1, 1, colocated=True)[name]}
    monkeypatch.setenv(name, "max_split_size_mb:128")
    prepare_environment(expected)
    assert os.environ[name] == "max_split_size_mb:128"
    monkeypatch.setenv(name, "expandable_segments:True")
    with pytest.raises(ConfigError, match=r"ALLOC_CONF=expandable_segments:True: .* needs expandable_segments:False"):
        prepare_environment(expected)


def test_a_default_gives_way_to_another_variable_in_the_engines_process_too(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "HCCL_HOST_SOCKET_PORT_RANGE"
    expected = {name: PLATFORMS["npu"]().rollout_environment(1, 1)[name]}
    monkeypatch.setenv(name, "")
    monkeypatch.delenv(name)
    monkeypatch.setenv("HCCL_IF_BASE_PORT", "50000")
    prepare_environment(expected)
    assert name not in os.environ
    monkeypatch.delenv("HCCL_IF_BASE_PORT")
    prepare_environment(expected)
    assert os.environ[name] == "auto"


def test_threads_and_log_level_are_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    prepare_environment(EXPECTED)
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_variables_that_come_after_vllm_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    with pytest.raises(ConfigError, match=r"imported before .*VLLM_ENABLE_V1_MULTIPROCESSING.* were set"):
        prepare_environment(EXPECTED)


@pytest.mark.parametrize(("found", "fits"), [(16, True), (128, True), (256, False)])
def test_a_cache_block_that_a_probe_would_fit_into_is_refused(found: int, fits: bool) -> None:
    cache = SimpleNamespace(cache_config=SimpleNamespace(block_size=found))
    llm = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=cache))
    if fits:
        _check_block_size(llm, 128)
        return
    with pytest.raises(ConfigError, match="256 tokens per cache block, the platform says 128"):
        _check_block_size(llm, 128)


@pytest.mark.parametrize(("device", "unset"), [("cpu", 256), ("npu", None), ("cuda", None)])
def test_the_recipe_decides_how_many_sequences_are_decoded_and_else_the_device(device: str, unset: int | None) -> None:
    """None: vLLM's own default for the device."""
    platform = PLATFORMS[device]()
    for said, expected in ((None, unset), (64, 64)):
        settings = EngineSettings(
            model="m", tokenizer="m", dtype="float32", max_length=8, rollout=RolloutConfig(max_num_seqs=said)
        )
        assert _arguments(settings, platform).get("max_num_seqs") == expected
