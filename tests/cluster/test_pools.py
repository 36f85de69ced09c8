"""Claiming devices on two nodes of two each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from rlxf.clock import Clock
from rlxf.config.schema import RunConfig
from rlxf.errors import PlacementError
from rlxf.plan import make_plan
from rlxf.stop import Stop
from tests.cluster.conftest import TwoNodes
from workers.pools import Pools, cluster_nodes
from workers.remote import Pending, Waiter

pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True, scope="module")
def connection(two_nodes: TwoNodes) -> Iterator[None]:
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
    return Waiter(Clock(), Stop(), 30.0)


class Where:
    """A worker that says where it is and which devices it was given."""

    def node(self) -> str:
        return str(ray.get_runtime_context().get_node_id())

    def devices(self) -> list[str]:
        return [str(i) for i in ray.get_runtime_context().get_accelerator_ids()["NPU"]]


def ask(pools: Pools, wanted: RunConfig, role: Any, method: str) -> list[Any]:
    plan = make_plan(wanted).role(role)
    assert plan is not None
    handles = [ray.remote(Where).options(**slot.options()).remote() for slot in pools.slots(plan)]
    calls = [Pending(getattr(handle, method).remote(), role, method) for handle in handles]
    answers = waiter().gather(calls)
    for handle in handles:
        ray.kill(handle)
    return answers


def free() -> list[float]:
    return [node.free.get("NPU", 0.0) for node in cluster_nodes()]


def wait_until_free(expected: list[float]) -> None:
    deadline = time.monotonic() + 20
    while sorted(free()) != expected and time.monotonic() < deadline:
        time.sleep(0.2)
    assert sorted(free()) == expected


def test_roles_are_spread_over_both_nodes_and_given_back() -> None:
    wanted = config({"actor_rollout": [2], "ref": [1], "reward": [1]})
    pools = Pools(make_plan(wanted), waiter())
    nodes = {role: ask(pools, wanted, role, "node") for role in ("train", "infer", "ref", "reward")}
    assert nodes["train"] == nodes["infer"]  # one entry of a list is one node
    assert nodes["ref"] == nodes["reward"] != nodes["train"]
    assert free() == [0.0, 0.0]
    pools.release()
    wait_until_free([2.0, 2.0])


def test_an_entry_of_a_list_is_whole_on_a_node() -> None:
    wanted = config({"actor_rollout": [2, 1], "ref": [1]}, num_gpus_for_train=2, num_gpus_for_infer=1)
    wanted = wanted.model_copy(update={"reward": wanted.reward.model_copy(update={"load": None})})
    pools = Pools(make_plan(wanted), waiter())
    train, infer = (ask(pools, wanted, role, "node") for role in ("train", "infer"))
    assert train[0] == train[1] != infer[0]
    pools.release()
    wait_until_free([2.0, 2.0])


def test_colocated_roles_share_devices_rank_by_rank() -> None:
    sharing = {"actor_rollout": [2], "ref": [2], "reward": [1], "colocate": ["train", "infer", "ref", "reward"]}
    wanted = config(sharing, num_gpus_for_train=2, num_gpus_for_infer=2)
    plan = make_plan(wanted)
    assert plan.num_devices == 2
    pools = Pools(plan, waiter())
    handles = {
        role.role: [ray.remote(Where).options(**slot.options()).remote() for slot in pools.slots(role)]
        for role in plan.roles
    }
    given = {
        role: [ids for (ids,) in waiter().gather([Pending(h.devices.remote(), role, "devices") for h in ranks])]
        for role, ranks in handles.items()
    }
    assert len(set(given["train"])) == 2  # two ranks of a role never share a device
    assert given["train"] == given["infer"] == given["ref"]
    assert given["reward"] == given["train"][:1]
    for handle in (handle for ranks in handles.values() for handle in ranks):
        ray.kill(handle)
    pools.release()
    wait_until_free([2.0, 2.0])


def test_an_engine_of_two_devices_is_one_process_that_owns_both() -> None:
    wanted = config(
        {"actor_rollout": [1, 2], "ref": [1]},
        num_gpus_for_train=1,
        num_gpus_for_infer=2,
        inference_tensor_model_parallel_size=2,
    )
    wanted = wanted.model_copy(update={"reward": wanted.reward.model_copy(update={"load": None})})
    pools = Pools(make_plan(wanted), waiter())
    (devices,) = ask(pools, wanted, "infer", "devices")
    assert len(set(devices)) == 2
    pools.release()
    wait_until_free([2.0, 2.0])


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
    other = Pools(make_plan(config({"actor_rollout": [2], "ref": [1], "reward": [1]})), waiter())
    begin = time.monotonic()
    with pytest.raises(PlacementError, match="other jobs hold the rest"):
        Pools(make_plan(config({"actor_rollout": [2]})), waiter())
    assert time.monotonic() - begin < 10
    other.release()
    wait_until_free([2.0, 2.0])
