"""Who sees the weights when the reference moves: on Ray the driver hands on references, and no bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from rlxf.config.roles import ReferenceConfig
from rlxf.sync.plan import Bucket, TensorSpec, plan_buckets
from rlxf.sync.refresh import ReferenceUpdater
from workers.actor import RemoteActor
from workers.group import Member, WorkerGroup
from workers.reference import RemoteReference
from workers.remote import Pending

PLAN = plan_buckets([TensorSpec(f"model.layers.{i}.weight", (4,), "float32") for i in range(3)], 1)


def new_ref() -> ray.ObjectRef:
    return ray.ObjectRef(os.urandom(28))


@dataclass
class Driver:
    """Waits as the driver does, and notes which results it asked for."""

    plan: tuple[Bucket, ...] = PLAN
    fetched: list[ray.ObjectRef] = field(default_factory=list)

    def gather(self, calls: Sequence[Pending], timeout_s: float | None = None) -> list[Any]:
        self.fetched += [call.ref for call in calls]
        return [self.plan if call.call == "sync_plan" else None for call in calls]


@dataclass
class Call:
    """A method of a worker that answers with references."""

    made: list[tuple[Any, tuple[Any, ...]]]
    num_returns: int = 1

    def options(self, *, num_returns: int) -> Call:
        return Call(self.made, num_returns)

    def remote(self, *args: Any) -> Any:
        refs = tuple(new_ref() for _ in range(self.num_returns))
        self.made.append((refs, args))
        return refs if self.num_returns > 1 else refs[0]


class Handle:
    """A worker."""

    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[Any, tuple[Any, ...]]]] = {}

    def __getattr__(self, method: str) -> Call:
        return Call(self.calls.setdefault(method, []))


def group(driver: Driver, size: int) -> WorkerGroup:
    return WorkerGroup([Member(Handle(), f"rank {i}", "10.0.0.1") for i in range(size)], driver)  # type: ignore[arg-type]


def test_the_driver_hands_on_references_and_fetches_no_payload() -> None:
    driver = Driver()
    actors, references = group(driver, 2), group(driver, 1)
    refresh = ReferenceUpdater(
        RemoteActor(actors), RemoteReference(references),
        ReferenceConfig(model="tiny", ref_update_interval=1, ref_mixup_alpha=0.25),
    )  # fmt: skip
    refresh(1)
    exports = [member.handle.calls["export_copy"] for member in actors.members]
    assert [[args for _, args in calls] for calls in exports] == [[(0,), (1,), (2,)]] * 2  # every rank takes part
    mixes = references.members[0].handle.calls["mix"]
    assert [(args[0], args[2]) for _, args in mixes] == [(bucket, 0.25) for bucket in PLAN]
    payloads = [refs[1] for refs, _ in exports[0]]
    handed_on = [args[1] for _, args in mixes]
    assert all(isinstance(payload, ray.ObjectRef) for payload in handed_on)
    assert handed_on == payloads  # rank 0's
    assert not set(payloads) & set(driver.fetched)
    assert {refs[0] for calls in exports for refs, _ in calls} <= set(driver.fetched)  # who failed is named
