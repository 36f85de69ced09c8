"""The devices of an engine that shares several of them with other roles.

Ray cannot give a process a share of each of several devices. Such an engine takes a share of the first one, and its
environment says which devices are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray

from rlxf.core.errors import PlacementError
from rlxf.platform import Platform

from .pools import Slot
from .remote import Pending, Waiter

ANSWER_S = 120.0  # longest wait for Ray's names of the devices; it may have to start processes for it
_AMOUNT = 0.0001  # of a device, while it is asked for: the least that Ray counts
_KEEP = "RAY_EXPERIMENTAL_NOSET_"  # and the name of the variable: Ray leaves it as the run has set it


def device_environment(
    slot: Slot, platform: Platform, waiter: Waiter, runtime_env: Mapping[str, Any]
) -> dict[str, str]:
    """Environment variables that give a process the devices of all bundles of its slot, in their order.

    Empty if Ray does that by itself, because the process has one bundle, and on devices that have no names (a CPU).

    Args:
        slot: of the process, which is not started yet: its share of the first bundle is free.
        platform: of the devices.
        waiter: waits for the answers.
        runtime_env: Ray's environment of the short tasks that ask.

    Raises:
        PlacementError: Ray does not name one device for each bundle.
    """
    variable = platform.visible_devices_variable
    if not slot.others or variable is None:
        return {}

    def names(resource: str) -> list[str]:  # defined in here it travels by value: nothing need be imported
        return list(ray.get_runtime_context().get_accelerator_ids().get(resource, []))

    calls = []
    for bundle in (slot.bundle, *slot.others):
        options = replace(slot, bundle=bundle, others=(), amount=_AMOUNT).options()
        ref = ray.remote(names).options(runtime_env=dict(runtime_env), **options).remote(slot.resource)
        calls.append(Pending(ref, f"bundle {bundle} on node {slot.node}", "the name of its device"))
    found = waiter.gather(calls, ANSWER_S)
    flat = [name for given in found for name in given]
    if any(len(given) != 1 for given in found) or len(set(flat)) < len(flat):
        raise PlacementError(
            f"an engine of {len(found)} devices on node {slot.node} shares them (resource_pool.colocate): expected one "
            f"device name from Ray for each, got {found}; set resource_pool.resource_name={platform.ray_resource}, or "
            "actor_rollout.inference_tensor_model_parallel_size=1"
        )
    return {variable: ",".join(flat), f"{_KEEP}{variable}": "1"}
