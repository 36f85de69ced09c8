"""Weights from actor processes to engine processes: every bucket whole and in time, however it travels."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from rlxf.core.clock import Clock
from rlxf.core.errors import SyncError, WorkerLost
from rlxf.core.stop import Stop
from rlxf.sync.checksums import Checksums, checksums, compare
from rlxf.sync.plan import Bucket, TensorSpec, plan_buckets
from rlxf.sync.transports import TRANSPORTS, Transport, Where
from rlxf.sync.transports.shared_memory import this_machine
from rlxf.sync.transports.transport import Address, Message, Receiver, ReceiverPlace
from tests.device_twin import VISIBLE, TwinPlatform
from workers.actor import ActorWorker, RemoteActor
from workers.engine import RolloutWorker
from workers.group import Member, WorkerGroup
from workers.remote import Waiter
from workers.rollout import RemoteEngines

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]

PLAN = plan_buckets([TensorSpec(f"model.layers.{i}.weight", (300 + i,), "float32") for i in range(5)], 1)
BROKEN, DEAD = 100, 200  # numbers of updates


def byte_of(update: int, index: int) -> int:
    """What bucket ``index`` is filled with in a certain update."""
    return (update * 10 + index) % 256


class Policy:
    """Gives a bucket's tensors as soon as it is asked to."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.update = 0

    def sync_plan(self) -> tuple[Bucket, ...]:
        return PLAN

    layout = SimpleNamespace(device=torch.device("cpu"))

    def begin_push(self) -> None: ...

    def bucket_tensors(self, index: int, *, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        self.update += index == 0
        if self.rank and not everywhere:  # has no whole tensors
            return
        if self.update == DEAD and index == 3 and self.rank == 0:
            os._exit(1)
        (spec,) = PLAN[index].tensors
        tensor = torch.empty(spec.num_bytes, dtype=torch.uint8).fill_(byte_of(self.update, index))
        yield spec.name, tensor.view(torch.float32).view(spec.shape)


class Engine:
    """Takes its time with a bucket and writes down what was in it, at first and at last.

    It has two processes' worth of receivers if told to, as one whose model two devices share.
    """

    def __init__(self, delay_s: float, where: str | None, processes: int = 1) -> None:
        self.delay_s = delay_s
        self.where, self.processes = where, processes
        self.updates: list[list[Any]] = []
        self.receivers: list[Receiver] = []
        self.dies = False

    def open_receivers(self, transport: Transport, address: Address, first: int, host: str) -> None:
        for receiver in self.receivers:
            receiver.close()

        def receiver(number: int) -> Receiver:
            place = ReceiverPlace(number=first + number, platform=TwinPlatform(), where=self.where, host=host)
            return transport.receiver(address, place)

        with ThreadPoolExecutor() as pool:  # those of a group wait for each other
            self.receivers = list(pool.map(receiver, range(self.processes)))

    def receive(self, bucket: Bucket, message: Message, *, check: bool = False) -> list[Checksums]:
        if self.dies and PLAN.index(bucket) == 2:
            os._exit(1)
        with ThreadPoolExecutor() as pool:
            payloads = list(pool.map(lambda receiver: receiver.receive(bucket, message), self.receivers))
        for payload in payloads:
            self.load_bucket(bucket, payload)
        return [checksums(bucket, payload) for payload in payloads] if check else []

    def begin_update(self) -> None:
        self.updates.append([])

    def load_bucket(self, bucket: Bucket, payload: Tensor) -> None:
        if len(self.updates[-1]) == 2 and payload[0] == byte_of(BROKEN, 2):
            raise SyncError("vLLM did not take the weights")
        content = payload[: bucket.tensors[0].num_bytes]  # without what fills the bucket up
        before = content.unique().tolist()
        time.sleep(self.delay_s)
        self.updates[-1].append((len(payload) - bucket.num_bytes, before, content.unique().tolist()))

    def end_update(self, version: int) -> None:
        self.updates[-1].append(version)


class ActorOfFive(ActorWorker):
    def build(self, *_: Any) -> None:
        os.environ[VISIBLE] = str(self.rank)  # every rank has a device of its own
        self.room, self.platform = Policy(self.rank), TwinPlatform()  # type: ignore[assignment]

    def jump(self, update: int) -> None:
        self.room.update = update  # type: ignore[attr-defined]


class SlowRollout(RolloutWorker):
    processes = 1

    def build(self, *_: Any) -> None:
        os.environ[VISIBLE] = str(self.rank)  # that of the actor's rank of this number
        delay_s = 0.02 * (1 + self.rank)
        self.room = Engine(delay_s, str(self.rank), self.processes)  # type: ignore[assignment]

    def die(self) -> None:
        self.room.dies = True  # type: ignore[attr-defined]

    def updates(self) -> list[list[Any]]:
        return self.room.updates  # type: ignore[attr-defined, no-any-return]


class WideRollout(SlowRollout):
    processes = 2


class World:
    """Two ranks of an actor and two engines that are not equally fast; or one of two processes (``wide``)."""

    def __init__(self, transport: Transport, *, wide: bool = False) -> None:
        waiter = Waiter(Clock(), Stop(), 120.0)
        self.transport = transport
        self.actors = _group(ActorOfFive, "train", 2, waiter)
        self.engines = _group(WideRollout if wide else SlowRollout, "infer", 1 if wide else 2, waiter)
        self.actor = RemoteActor(self.actors, message_s=10.0)
        self.sink = RemoteEngines(self.engines, self.actor, devices=2 if wide else 1)
        self.sink.connect(transport)

    def push(self, version: int, *, check: bool = False) -> None:
        """As ``WeightSync`` does it."""
        self.sink.begin_update(check=check)
        for index, bucket in enumerate(PLAN):
            self.sink.send(index, bucket)
        self.sink.end_update(version)

    def seen(self) -> list[list[list[Any]]]:
        return self.engines.waiter.gather(self.engines.send("updates"))


def _group(worker: type, role: str, size: int, waiter: Waiter) -> WorkerGroup:
    kind = ray.remote(worker).options(num_cpus=0)
    group = WorkerGroup([Member(kind.remote(i, size), f"{role} rank {i}", "10.0.0.1") for i in range(size)], waiter)
    group.call("build")
    return group


@pytest.fixture(params=["shared_memory", "ipc", "collective", pytest.param("object_store", marks=pytest.mark.slow)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    name, _, wide = request.param.partition(" ")
    world = World(TRANSPORTS[name], wide=bool(wide))
    yield world
    for member in (*world.actors.members, *world.engines.members):
        ray.kill(member.handle)


def whole(update: int) -> list[Any]:
    return [(0, [byte_of(update, i)], [byte_of(update, i)]) for i in range(len(PLAN))]


def test_every_engine_reads_every_bucket_before_it_is_overwritten(world: World) -> None:
    for version in (1, 2, 3):
        world.push(version)
    assert world.seen() == [[[*whole(version), version] for version in (1, 2, 3)]] * 2


@pytest.mark.parametrize("world", ["shared_memory"], indirect=True)
def test_a_push_after_connecting_again_is_the_same(world: World) -> None:
    assert world.actor.where("cpu") == (Where(this_machine()),) * 2
    world.push(1)
    for transport in ("object_store", "collective", "shared_memory", "ipc", "collective", "shared_memory"):
        world.sink.connect(TRANSPORTS[transport])
        world.push(2)
    assert [[updates[i][:-1] for i in range(7)] for updates in world.seen()] == [[whole(i) for i in range(1, 8)]] * 2


@pytest.mark.parametrize("world", ["shared_memory wide", "collective wide"], indirect=True)
def test_every_process_of_an_engine_receives_by_itself(world: World) -> None:
    world.push(1, check=True)
    ((update,),) = world.seen()
    assert update == [entry for entry in whole(1) for _ in range(2)] + [1]


@pytest.mark.parametrize("world", ["shared_memory"], indirect=True)
def test_names_and_shapes_travel_once_per_connection(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    put, stored = ray.put, list[object]()

    def counted(value: object) -> Any:
        stored.append(value)
        return put(value)

    monkeypatch.setattr(ray, "put", counted)
    world.push(1)
    world.push(2)
    assert not any(isinstance(value, Bucket) for value in stored)
    world.sink.connect(world.transport)
    assert [value for value in stored if isinstance(value, Bucket)] == list(PLAN)


def test_a_tensor_that_arrives_changed_is_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.push(1, check=True)
    monkeypatch.setattr("workers.rollout.compare", partial(_compare_changed, "model.layers.3.weight"))
    with pytest.raises(SyncError, match=r"infer rank 0 .* 1 of 1 tensors of a bucket differ.*model.layers.3.weight"):
        world.push(2, check=True)


def _compare_changed(name: str, sent: Checksums, received: Checksums, who: str) -> None:
    """As if a byte of one tensor had changed on its way."""
    compare(sent, {key: value ^ (key == name) for key, value in received.items()}, who)


@pytest.mark.parametrize("world", ["collective"], indirect=True)
def test_a_receiver_that_dies_ends_a_broadcast_by_name_and_a_new_connection_works(world: World) -> None:
    world.push(1)
    world.engines.waiter.gather([world.engines.one(1, "die")])
    begin = time.monotonic()
    with pytest.raises(WorkerLost, match=r"lost infer rank 1 on node .* during receive"):
        world.push(2)
    assert time.monotonic() - begin < 10.0  # the deadline of a message
    fresh = _group(SlowRollout, "infer", 1, world.engines.waiter)
    world.engines = WorkerGroup([world.engines.members[0], *fresh.members], world.engines.waiter)
    world.sink = RemoteEngines(world.engines, world.actor)
    world.sink.connect(world.transport)
    world.push(3, check=True)
    assert [updates[-1][-1] for updates in world.seen()] == [3, 3]


@pytest.mark.parametrize("world", ["shared_memory"], indirect=True)
def test_an_engine_that_takes_the_place_of_another_is_connected(world: World) -> None:
    """Its process knows of no memory that the one before it had opened."""
    world.push(1)
    replaced = world.engines.members[1]
    ray.kill(replaced.handle)
    fresh = _group(SlowRollout, "infer", 1, world.engines.waiter)
    engines = WorkerGroup([world.engines.members[0], *fresh.members], world.engines.waiter)
    sink = RemoteEngines(engines, world.actor)
    sink.connect(world.transport)
    world.engines, world.sink = engines, sink
    world.push(2)
    assert world.seen() == [[[*whole(1), 1], [*whole(2), 2]], [[*whole(2), 2]]]


def test_a_push_that_an_engine_refused_can_be_repeated(world: World) -> None:
    world.actors.call("jump", BROKEN - 1)
    with pytest.raises(SyncError, match="did not take the weights"):
        world.push(7)
    world.push(8)
    for updates in world.seen():
        assert updates[0][-1] != 7
        assert updates[-1] == [*whole(BROKEN + 1), 8]


def test_an_actor_that_dies_is_the_one_that_is_named(world: World) -> None:
    world.actors.call("jump", DEAD - 1)
    with pytest.raises(WorkerLost, match=r"lost train rank 0 on node .* during send_bucket"):
        world.push(7)
