"""Devices in place of those of lost nodes, without a cluster."""

from __future__ import annotations

import itertools
import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlxf.config.load import load_config
from rlxf.core.errors import RunInterrupted, StageTimeout, StopRequested
from rlxf.core.events import NAME, recorded_events
from rlxf.placement.plan import NodeResources, Plan, make_plan
from tests.unit.config.recipes import recipe
from workers import pools as module
from workers.pools import Pools, Slot, _bundles, _fit

A, B, C = "10.0.0.1 (aaaaaa)", "10.0.0.2 (bbbbbb)", "10.0.0.3 (cccccc)"


class Group:
    numbers = itertools.count()

    def __init__(self, bundles: list[dict[str, float]], nodes: list[str]) -> None:
        number = str(next(self.numbers))
        self.id = SimpleNamespace(hex=lambda: number)
        self.bundles, self.nodes = bundles, nodes

    def ready(self) -> Group:
        return self


class World:
    """Nodes with free devices; ``each_rest``: what happens every second of a wait."""

    def __init__(self, free: dict[str, float]) -> None:
        self.free = free
        self.now = 0.0
        self.each_rest: Callable[[], None] = lambda: None
        self.placement: list[Exception | None] = []  # how the next claims end
        self.removed: list[Group] = []
        self.silent: set[str] = set()  # nodes that Ray counts as alive, and that do not answer

    def pools(self, node_wait_s: float = 600.0) -> Pools:
        pools = object.__new__(Pools)  # without the claim of the start
        pools._plan = SimpleNamespace(resource="NPU")  # type: ignore[assignment]
        pools._waiter = self  # type: ignore[assignment]
        pools._node_wait_s, pools._moved, pools._sizes, pools._groups = node_wait_s, {}, {}, {}
        pools._units = {}
        return pools

    def slots(self, pools: Pools, *bundles: tuple[str, float], sharing: int = 1) -> list[Slot]:
        """One slot for each bundle and role that shares it; the bundles are one placement group."""
        group: Any = Group([{"NPU": size} for _, size in bundles], [node for node, _ in bundles])
        found = [
            Slot(group, index, "NPU", size / sharing, node)
            for index, (node, size) in enumerate(bundles)
            for _ in range(sharing)
        ]
        pools._sizes.update({slot.place: bundles[slot.bundle][1] for slot in found})
        return found

    def rest(self, seconds: float) -> None:
        self.now += seconds
        self.each_rest()

    def gather(self, calls: Sequence[Any], timeout_s: float) -> None:
        if self.placement and (error := self.placement.pop(0)) is not None:
            self.now += timeout_s if isinstance(error, StageTimeout) else 0.0
            raise error

    def claim(
        self, bundles: list[dict[str, float]], strategy: str, bundle_label_selector: list[dict[str, str]]
    ) -> Group:
        """Each bundle goes to the node that it names."""
        nodes = [selector["ray.io/node-id"] for selector in bundle_label_selector]
        for node, bundle in zip(nodes, bundles, strict=True):
            assert self.free[node] >= bundle["NPU"]
            self.free[node] -= bundle["NPU"]
        return Group(bundles, nodes)

    def remove(self, group: Group) -> None:
        self.removed.append(group)
        for node, bundle in zip(group.nodes, group.bundles, strict=True):
            self.free[node] += bundle["NPU"]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    found = World({A: 0.0, B: 0.0})
    monkeypatch.setattr(
        module, "cluster_nodes", lambda: [NodeResources(name=n, free={"NPU": f}) for n, f in found.free.items()]
    )
    monkeypatch.setattr(module, "answering_nodes", lambda: {n: n for n in found.free if n not in found.silent})
    monkeypatch.setattr(module, "placement_group", found.claim)
    monkeypatch.setattr(module, "remove_placement_group", found.remove)
    monkeypatch.setattr(module.ray, "nodes", lambda: [{"NodeID": node} for node in found.free])
    monkeypatch.setattr(module, "_name", lambda node: node["NodeID"])
    monkeypatch.setattr(module.time, "monotonic", lambda: found.now)
    return found


def test_slots_of_living_nodes_stay(world: World) -> None:
    pools = world.pools()
    slots = world.slots(pools, (A, 1.0), (B, 1.0))
    assert pools.living(slots) == slots


def test_a_slot_of_a_lost_node_moves_to_one_with_room(world: World) -> None:
    pools = world.pools()
    slots = world.slots(pools, (A, 1.0), (B, 1.0))
    del world.free[B]
    world.free |= {A: 1.0}
    here, moved = pools.living(slots)
    assert here == slots[0]
    assert (moved.node, moved.amount, moved.place != slots[1].place) == (A, 1.0, True)
    assert pools.living(slots) == [here, moved]  # claimed once


def test_a_node_that_does_not_answer_is_lost_whatever_ray_counts(world: World) -> None:
    pools = world.pools()
    slots = world.slots(pools, (B, 1.0))
    world.free |= {A: 1.0, B: 1.0}
    world.silent.add(B)
    assert [slot.node for slot in pools.living(slots)] == [A]


def test_roles_that_share_a_bundle_move_together(world: World) -> None:
    pools = world.pools()
    first, second, third = world.slots(pools, (B, 1.0), sharing=3)
    del world.free[B]
    world.free |= {A: 1.0}
    (moved,) = pools.living([first])
    assert world.free[A] == 0.0  # nothing is left for another claim
    assert [slot.place for slot in pools.living([second, third])] == [moved.place] * 2
    assert moved.amount == pytest.approx(1 / 3)


def test_the_bundles_of_one_engine_move_to_one_node(world: World) -> None:
    """An engine of two devices, two trainer ranks on them, and another rank: whoever asks first."""
    pools = world.pools()
    slots = world.slots(pools, (B, 1.0), (B, 1.0), (B, 1.0), sharing=2)
    engine = replace(slots[0], others=(1,))
    pools._note(engine, 1.0)
    del world.free[B]
    world.free |= {A: 1.0, C: 2.0}
    ranks = pools.living([slots[5], slots[1]])  # without the second device of the engine
    assert [slot.node for slot in ranks] == [A, C]  # the pair is placed first, where both find room
    assert world.free == {A: 0.0, C: 0.0}
    (moved,) = pools.living([engine])
    (second,) = pools.living([slots[3]])
    assert (moved.node, moved.place, len(moved.others)) == (C, ranks[1].place, 1)
    assert (second.node, second.place) == (C, (moved.place[0], moved.others[0]))
    del world.free[C]
    world.free |= {A: 1.0, B: 2.0}  # and once more, asked by what was known at the start and by what is now
    again = pools.living([engine])
    assert again == pools.living([moved])
    assert [slot.place for slot in pools.living([slots[1], slots[3]])] == [
        (again[0].place[0], bundle) for bundle in (again[0].bundle, *again[0].others)
    ]
    assert world.free == {A: 1.0, B: 0.0}


def test_a_slot_may_move_more_than_once(world: World) -> None:
    pools = world.pools()
    slots = world.slots(pools, (B, 1.0), (B, 1.0))
    del world.free[B]
    world.free |= {C: 2.0}
    moved = pools.living(slots)
    assert [slot.node for slot in moved] == [C, C]
    del world.free[C]
    world.free |= {A: 2.0}
    for asked in (slots, moved):  # whoever asks may not know of the first move
        assert [slot.node for slot in pools.living(asked)] == [A, A]
    assert world.free[A] == 0.0


def test_too_few_devices_are_waited_for_and_then_end_the_run(world: World, tmp_path: Path) -> None:
    pools = world.pools(node_wait_s=30.0)
    slots = world.slots(pools, (B, 2.0), (B, 1.0), (B, 1.0))
    del world.free[B]
    world.free |= {A: 1.0, C: 1.0}
    with recorded_events(tmp_path), pytest.raises(RunInterrupted) as interrupted:
        pools.living(slots)
    assert str(interrupted.value) == (
        f"need 4 NPU, have 2 after node {B} died, and resilience.node_wait_s = 30 s are over; start a node in its "
        "place, or raise resilience.node_wait_s"
    )
    assert interrupted.value.exit_code == 75
    assert 30.0 < world.now <= 31.0
    (row,) = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert (row["event"], row["who"]) == ("node lost", f"node {B}")
    assert row["message"].startswith(f"need 4 NPU, have 2 after node {B} died; waiting up to 30 s for devices")


def test_a_run_that_does_not_wait_ends_at_once(world: World) -> None:
    pools = world.pools(node_wait_s=0.0)
    slots = world.slots(pools, (B, 1.0))
    del world.free[B]
    with pytest.raises(RunInterrupted, match="need 1 NPU, have 0 after node"):
        pools.living(slots)
    assert world.now <= 1.0


def test_a_node_that_joins_is_taken(world: World) -> None:
    pools = world.pools()
    slots = world.slots(pools, (B, 2.0))
    del world.free[B]

    def join() -> None:
        if world.now >= 20.0:
            world.free.setdefault(C, 2.0)

    world.each_rest = join
    (moved,) = pools.living(slots)
    assert (moved.node, world.now) == (C, 20.0)


def test_devices_that_another_job_takes_are_waited_for_again(world: World) -> None:
    pools = world.pools()
    slots = world.slots(pools, (B, 1.0))
    del world.free[B]
    world.free |= {A: 1.0}
    world.placement = [StageTimeout("not placed"), None]
    (moved,) = pools.living(slots)
    assert (moved.node, len(world.removed)) == (A, 1)


def test_devices_that_another_job_takes_for_too_long_end_the_run(world: World) -> None:
    pools = world.pools(node_wait_s=5.0)
    slots = world.slots(pools, (B, 1.0))
    del world.free[B]
    world.free |= {A: 1.0}
    world.placement = [StageTimeout("not placed")]
    with pytest.raises(
        RunInterrupted, match=r"need 1 NPU, have 1 after .*, which another job took at this moment; start"
    ):
        pools.living(slots)
    assert world.free[A] == 1.0


def test_a_claim_that_breaks_off_keeps_no_devices(world: World) -> None:
    pools = world.pools()
    slots = world.slots(pools, (B, 1.0))
    del world.free[B]
    world.free |= {A: 1.0}
    world.placement = [StopRequested("stopped")]
    with pytest.raises(StopRequested):
        pools.living(slots)
    assert pools.living(slots)[0].node == A  # whoever tries next


@pytest.mark.parametrize(
    ("sizes", "free", "fits"),
    [
        ([], [], True),
        ([1], [], False),
        ([2, 1, 1], [2, 2], True),
        ([2, 2], [3, 1], False),  # four in all, but an entry needs one node
        ([1, 2], [1, 2], True),  # the small one must not take the large place
        ([4], [2, 2], False),
        ([3, 2, 2], [4, 3], True),
    ],
)
def test_each_bundle_needs_room_on_one_node(sizes: list[float], free: list[float], fits: bool) -> None:
    found = _fit(sizes, {str(index): amount for index, amount in enumerate(free)})
    assert (found is not None) is fits
    for node, amount in enumerate(free if found else ()):
        assert sum(size for size, place in zip(sizes, found or (), strict=True) if place == str(node)) <= amount


def plan_of(pool: dict[str, Any], **actor: int) -> Plan:
    return make_plan(load_config(recipe(training={"device": "npu"}, actor_rollout=actor, resource_pool=pool)))


TWO = {"inference_tensor_model_parallel_size": 2}
ALL = ["train", "infer", "ref", "reward"]


@pytest.mark.parametrize(
    ("pool", "actor", "bundles"),
    [
        ({"actor_rollout": [1, 2]}, {"num_gpus_for_infer": 2, **TWO}, [(0,), (1, 2)]),  # as without colocation
        (
            {"actor_rollout": [4], "colocate": ALL},
            {"num_gpus_for_train": 4, "num_gpus_for_infer": 4, **TWO},
            [(0,), (1,), (2,), (3,)],
        ),
        # The second engine shares nothing, so Ray can give it both of its devices.
        (
            {"actor_rollout": [4], "colocate": ["train", "infer"]},
            {"num_gpus_for_train": 2, "num_gpus_for_infer": 4, **TWO},
            [(0,), (1,), (2, 3)],
        ),
        ({"actor_rollout": [3], "colocate": ["infer", "ref"]}, {"num_gpus_for_infer": 2, **TWO}, [(0,), (1,), (2,)]),
    ],
)
def test_a_device_that_is_shared_is_a_bundle_of_its_own(
    pool: dict[str, Any], actor: dict[str, int], bundles: list[tuple[int, ...]]
) -> None:
    plan = plan_of(pool, **actor)
    assert _bundles(plan, plan.group("actor_rollout")) == bundles


def test_an_engine_takes_a_share_of_its_first_device_and_knows_the_others(world: World) -> None:
    plan = plan_of(
        {"actor_rollout": [4], "ref": [2], "colocate": ["train", "infer", "ref"]},
        **{"num_gpus_for_train": 4, "num_gpus_for_infer": 4, **TWO},
    )
    pools, group = world.pools(), Group([{"NPU": 1.0}] * 4, [A] * 4)
    pools._plan, pools._nodes = plan, {("actor_rollout", 0): A}
    pools._groups = {"actor_rollout": group}  # type: ignore[dict-item]
    slots = {role.role: pools.slots(role) for role in plan.roles if role.group == "actor_rollout"}
    assert [(slot.bundle, slot.others, slot.amount) for slot in slots["infer"]] == [(0, (1,), 0.3333), (2, (3,), 0.5)]
    assert [(slot.bundle, slot.others) for slot in slots["train"]] == [(0, ()), (1, ()), (2, ()), (3, ())]
    assert [slot.amount for slot in slots["train"]] == [0.3333, 0.3333, 0.5, 0.5]
    assert set(pools._sizes.values()) == {1.0}


def test_a_node_answers_if_its_raylet_takes_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as raylet, socket.create_server(("127.0.0.1", 0)) as ended:
        ports = {name: place.getsockname()[1] for name, place in (("up", raylet), ("down", ended))}
        ended.close()
        nodes = [
            {"NodeID": name * 6, "NodeManagerAddress": "127.0.0.1", "NodeManagerPort": port, "Alive": True}
            for name, port in ports.items()
        ]
        monkeypatch.setattr(module.ray, "nodes", lambda: [*nodes, {**nodes[0], "NodeID": "dead", "Alive": False}])
        assert list(module.answering_nodes().values()) == ["upupupupupup"]
