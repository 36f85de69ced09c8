"""What a user exports goes before a platform's defaults, but for what a run cannot do without."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from rlxf.platform import PLATFORMS
from rlxf.platform.environment import differing_exports, with_exports
from rlxf.platform.npu import NpuPlatform
from tests.settings import run_config
from workers.crew import _say_exports


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("npu", "HCCL_CONNECT_TIMEOUT"),
        ("npu", "PYTORCH_NPU_ALLOC_CONF"),
        ("npu", "HCCL_HOST_SOCKET_PORT_RANGE"),
        ("npu", "HCCL_NPU_SOCKET_PORT_RANGE"),
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


@pytest.mark.parametrize(("name", "value"), [("VLLM_LOGGING_LEVEL", "DEBUG"), ("VLLM_NO_USAGE_STATS", "0")])
def test_what_vllm_logs_and_reports_is_the_users_choice(name: str, value: str) -> None:
    defaults = PLATFORMS["npu"]().rollout_environment(1, 2)
    assert with_exports(defaults, {name: value})[name] == value


@pytest.mark.parametrize("role", ["worker_environment", "rollout_environment"])
def test_processes_that_share_an_npu_do_not_share_ports(role: str) -> None:
    npu = NpuPlatform()
    found = npu.worker_environment(1) if role == "worker_environment" else npu.rollout_environment(1, 2)
    assert (found["HCCL_HOST_SOCKET_PORT_RANGE"], found["HCCL_NPU_SOCKET_PORT_RANGE"]) == ("auto", "auto")
    # The range would silence the older variable.
    based = with_exports(found, {"HCCL_IF_BASE_PORT": "50000"})
    assert based == {name: value for name, value in found.items() if name != "HCCL_HOST_SOCKET_PORT_RANGE"}
    assert differing_exports(found, {"HCCL_IF_BASE_PORT": "50000"}) == (
        ["HCCL_IF_BASE_PORT=50000 (instead of HCCL_HOST_SOCKET_PORT_RANGE=auto)"],
        [],
    )
    both = {"HCCL_IF_BASE_PORT": "50000", "HCCL_HOST_SOCKET_PORT_RANGE": "60000-60050"}
    assert with_exports(found, both)["HCCL_HOST_SOCKET_PORT_RANGE"] == "60000-60050"


def test_small_collectives_of_an_engine_run_on_the_vector_cores_unless_the_user_says_otherwise() -> None:
    found = NpuPlatform().rollout_environment(1, 2)
    assert found["HCCL_OP_EXPANSION_MODE"] == "AIV"
    assert with_exports(found, {"HCCL_OP_EXPANSION_MODE": "AI_CPU"})["HCCL_OP_EXPANSION_MODE"] == "AI_CPU"


def test_an_engine_that_sleeps_has_no_expandable_segments() -> None:
    """Its allocator asserts that they are off. Trainers are other processes, and keep them."""
    npu, name = NpuPlatform(), "PYTORCH_NPU_ALLOC_CONF"
    assert npu.worker_environment(1)[name] == "expandable_segments:True"
    assert name not in npu.rollout_environment(1, 2)  # vllm-ascend turns them on for an engine that does not sleep
    sleeps = npu.rollout_environment(1, 2, colocated=True)
    assert sleeps[name] == "expandable_segments:False"
    assert with_exports(sleeps, {name: "max_split_size_mb:128"})[name] == "max_split_size_mb:128"
    exported = {name: "max_split_size_mb:128,expandable_segments:True"}
    assert with_exports(sleeps, exported) == sleeps
    assert differing_exports(sleeps, exported) == ([], [f"{name}={exported[name]} (needed: {sleeps[name]})"])


def test_every_role_reports_by_its_own_defaults(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Trainers use the exported segments, the engine that shares their device cannot."""
    name, value = "PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True,page_size:1g"
    for other in NpuPlatform().worker_environment(1) | NpuPlatform().rollout_environment(1, 1):
        monkeypatch.delenv(other, raising=False)  # what this process was started with
    monkeypatch.setenv(name, value)
    config = run_config(Path("model"))
    pool = config.resource_pool.model_copy(update={"colocate": ("train", "infer")})
    with caplog.at_level(logging.INFO):
        _say_exports(config.model_copy(update={"resource_pool": pool}), ["train", "infer", "ref"], NpuPlatform())
    assert [record.getMessage() for record in caplog.records] == [
        f"the workers use these exported variables: {name}={value} (instead of expandable_segments:True)",
        f"the workers do not use these exported variables: {name}={value} (needed: expandable_segments:False)",
    ]
