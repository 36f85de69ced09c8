"""Claiming devices on two nodes of two each."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from rlxf.config.schema import RunConfig
from rlxf.core.clock import Clock
from rlxf.core.errors import PlacementError
from rlxf.core.stop import Stop
from rlxf.placement.plan import RolePlan, make_plan
from rlxf.platform import PLATFORMS
from tests.cluster.conftest import Cluster
from workers.devices import device_environment
from workers.pools import Pools, cluster_nodes
from workers.remote import Pending, Waiter

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True, scope="module")
def connection(two_nodes: Cluster) -> Iterator[None]:
    ray.init(address=two_nodes.address, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def config(pools: dict[str, Any], **actor: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "training": {"stage": "ray_online_dpo", "device": "cpu"},
            "model": {},
            "actor_rollout": {"model": "m", **actor},
            "ref": {"model": "m"},
            "reward": {"model": "m", "load": "/nowhere"},
            "resource_pool": {"resource_name": "NPU", **pools},
        }
    )


def waiter() -> Waiter:
    return Waiter(Clock(), Stop(), 120.0)


@contextmanager
def claimed(wanted: RunConfig) -> Iterator[Pools]:
    """Devices that are free again afterwards, whatever happens inside."""
    pools = Pools(make_plan(wanted), waiter())
    try:
        yield pools
    finally:
        pools.release()
        wait_until_free([2.0, 2.0])


def role_of(wanted: RunConfig, role: Any) -> RolePlan:
    plan = make_plan(wanted).role(role)
    assert plan is not None
    return plan


def start(pools: Pools, wanted: RunConfig, role: Any, **runtime_env: Any) -> list[Any]:
    """A process in each slot of a role."""

    class Where:  # defined in here it travels by value: the processes need not import this file
        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

        def devices(self) -> list[str]:
            return [str(i) for i in ray.get_runtime_context().get_accelerator_ids()["NPU"]]

        def visible(self) -> str:
            return os.environ["ASCEND_RT_VISIBLE_DEVICES"]

    slots = pools.slots(role_of(wanted, role))
    return [ray.remote(Where).options(runtime_env=runtime_env, **slot.options()).remote() for slot in slots]


def ask(handles: list[Any], method: str) -> list[Any]:
    return waiter().gather([Pending(getattr(handle, method).remote(), "worker", method) for handle in handles])


def free() -> list[float]:
    return [node.free.get("NPU", 0.0) for node in cluster_nodes()]


def wait_until_free(expected: list[float]) -> None:
    deadline = time.monotonic() + 20
    while sorted(free()) != expected and time.monotonic() < deadline:
        time.sleep(0.2)
    assert sorted(free()) == expected


def without_reward_model(wanted: RunConfig) -> RunConfig:
    return wanted.model_copy(update={"reward": wanted.reward.model_copy(update={"load": None})})


def test_roles_are_spread_over_both_nodes_and_given_back() -> None:
    wanted = config({"actor_rollout": [2], "ref": [1], "reward": [1]})
    with claimed(wanted) as pools:
        roles = ("train", "infer", "ref", "reward")
        nodes = {role: ask(start(pools, wanted, role), "node") for role in roles}
        assert nodes["train"] == nodes["infer"]  # one entry of a list is one node
        assert nodes["ref"] == nodes["reward"] != nodes["train"]
        assert free() == [0.0, 0.0]


def test_an_entry_of_a_list_is_whole_on_a_node() -> None:
    wanted = without_reward_model(
        config({"actor_rollout": [2, 1], "ref": [1]}, num_gpus_for_train=2, num_gpus_for_infer=1)
    )
    with claimed(wanted) as pools:
        train, infer = (ask(start(pools, wanted, role), "node") for role in ("train", "infer"))
        assert train[0] == train[1] != infer[0]


def test_colocated_roles_share_devices_rank_by_rank() -> None:
    sharing = {"actor_rollout": [2], "ref": [2], "reward": [1], "colocate": ["train", "infer", "ref", "reward"]}
    wanted = config(sharing, num_gpus_for_train=2, num_gpus_for_infer=2)
    assert make_plan(wanted).num_devices == 2
    with claimed(wanted) as pools:
        handles = {role: start(pools, wanted, role) for role in ("train", "infer", "ref", "reward")}
        given = {role: [ids for (ids,) in ask(ranks, "devices")] for role, ranks in handles.items()}
        assert len(set(given["train"])) == 2  # two ranks of a role never share a device
        assert given["train"] == given["infer"] == given["ref"]
        assert given["reward"] == given["train"][:1]


def test_an_engine_of_two_devices_is_one_process_that_owns_both() -> None:
    wanted = without_reward_model(
        config(
            {"actor_rollout": [1, 2], "ref": [1]},
            num_gpus_for_train=1,
            num_gpus_for_infer=2,
            inference_tensor_model_parallel_size=2,
        )
    )
    with claimed(wanted) as pools:
        (devices,) = ask(start(pools, wanted, "infer"), "devices")
        assert len(set(devices)) == 2


def test_an_engine_of_two_devices_shares_both_with_the_trainer_rank_by_rank() -> None:
    sharing = {"actor_rollout": [2], "ref": [2], "colocate": ["train", "infer"]}
    wanted = without_reward_model(
        config(sharing, num_gpus_for_train=2, num_gpus_for_infer=2, inference_tensor_model_parallel_size=2)
    )
    with claimed(wanted) as pools:
        trainers = start(pools, wanted, "train")
        ranks = [ids for (ids,) in ask(trainers, "devices")]
        assert sorted(ranks) == ["0", "1"]
        (slot,) = pools.slots(role_of(wanted, "infer"))
        given = device_environment(slot, PLATFORMS["npu"](), waiter(), {})  # beside ranks that run already
        assert given["ASCEND_RT_VISIBLE_DEVICES"] == ",".join(ranks)
        (engine,) = start(pools, wanted, "infer", env_vars=given)
        assert ask([engine], "visible") == [",".join(ranks)]  # Ray has not put one device in their place
        assert ask([engine, *trainers], "node") == ask([trainers[0]], "node") * 3
        assert ask(trainers, "visible") == ranks


def test_a_pool_that_is_too_large_fails_in_seconds_with_a_table() -> None:
    begin = time.monotonic()
    with pytest.raises(PlacementError) as caught:
        Pools(make_plan(config({"actor_rollout": [2], "ref": [3]})), waiter())
    assert time.monotonic() - begin < 10
    text = str(caught.value)
    assert "asked 6 NPU" in text
    assert "has 4, free 4" in text
    assert text.count("has 2 NPU, free 2") == 2
    assert free() == [2.0, 2.0]


def test_devices_that_another_job_holds_fail_in_seconds_and_say_so() -> None:
    with claimed(config({"actor_rollout": [2], "ref": [1], "reward": [1]})):
        begin = time.monotonic()
        with pytest.raises(PlacementError, match="other jobs hold the rest"):
            Pools(make_plan(config({"actor_rollout": [2]})), waiter())
        assert time.monotonic() - begin < 10


def test_devices_that_a_job_is_giving_back_are_waited_for() -> None:
    wanted = config({"actor_rollout": [2], "ref": [1], "reward": [1]})
    with claimed(wanted) as before:
        threading.Timer(1.0, before.release).start()
        with claimed(wanted):
            wait_until_free([0.0, 0.0])  # Ray's count comes a little late
