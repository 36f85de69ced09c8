"""What a user exports goes before a platform's defaults, but for what a run cannot do without."""

from __future__ import annotations

import pytest

from rlxf.platform import PLATFORMS
from rlxf.platform.environment import differing_exports, with_exports


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("npu", "HCCL_CONNECT_TIMEOUT"),
        ("npu", "PYTORCH_NPU_ALLOC_CONF"),
        ("npu", "TASK_QUEUE_ENABLE"),
        ("npu", "CPU_AFFINITY_CONF"),
        ("npu", "CUDA_DEVICE_MAX_CONNECTIONS"),
        ("cuda", "CUDA_DEVICE_MAX_CONNECTIONS"),
        ("cpu", "OMP_WAIT_POLICY"),
        *((device, "HF_HUB_OFFLINE") for device in PLATFORMS),
    ],
)
def test_an_exported_value_replaces_a_default(device: str, name: str) -> None:
    defaults = PLATFORMS[device]().worker_environment(1)
    assert with_exports(defaults, {name: "mine", "PATH": "/bin"}) == {**defaults, name: "mine"}
    assert differing_exports(defaults, {name: "mine"}) == ([f"{name}=mine (instead of {defaults[name]})"], [])


@pytest.mark.parametrize("device", PLATFORMS)
def test_without_exports_workers_get_the_defaults(device: str) -> None:
    for defaults in (PLATFORMS[device]().worker_environment(2), PLATFORMS[device]().rollout_environment(2, 4)):
        assert with_exports(defaults, {}) == defaults
        assert differing_exports(defaults, {**defaults, "PATH": "/bin"}) == ([], [])  # exported as they are anyway


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("npu", "VLLM_ASCEND_ENABLE_NZ"),  # the loading of weights needs the plain layout
        ("npu", "VLLM_ENABLE_V1_MULTIPROCESSING"),
        ("cuda", "VLLM_ENABLE_V1_MULTIPROCESSING"),
        ("cpu", "VLLM_CPU_KVCACHE_SPACE"),  # rollout.cpu_kv_cache_gib
    ],
)
def test_what_a_run_cannot_do_without_stays_and_is_named(device: str, name: str) -> None:
    defaults = PLATFORMS[device]().rollout_environment(1, 2)
    assert with_exports(defaults, {name: "7"}) == defaults
    assert differing_exports(defaults, {name: "7"}) == ([], [f"{name}=7 (needed: {defaults[name]})"])


def test_the_log_level_of_vllm_is_the_users() -> None:
    defaults = PLATFORMS["npu"]().rollout_environment(1, 2)
    assert with_exports(defaults, {"VLLM_LOGGING_LEVEL": "DEBUG"})["VLLM_LOGGING_LEVEL"] == "DEBUG"
