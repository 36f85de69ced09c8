"""What every transport must do: the same bytes in every engine, also after connecting again, and nothing left open."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from rlxf.config.schema import SyncConfig
from rlxf.core.errors import SyncError
from rlxf.core.types import Tokens
from rlxf.platform import get_platform
from rlxf.sync.plan import Bucket, TensorSpec, plan_buckets
from rlxf.sync.probe import EngineAnswer
from rlxf.sync.push import LocalSink
from rlxf.sync.transports import TRANSPORTS, Transport, choose_transport

DTYPES = ("float32", "bfloat16", "int8", "float16")


def specs() -> list[TensorSpec]:
    """Of more layers than there is room for, in shapes that fill no bucket."""
    layers = [TensorSpec(f"model.layers.{i}.weight", (i + 3, 7), DTYPES[i % 4]) for i in range(9)]
    return [TensorSpec("model.embed_tokens.weight", (40, 5), "bfloat16"), *layers]


PLAN = plan_buckets(specs(), 1)


class Weights:
    """An actor whose tensors lie on its device as they please: transposed, and in fp32 whatever travels."""

    def __init__(self, seed: int = 0) -> None:
        self.update(seed)

    def update(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.tensors = {
            spec.name: torch.randint(-99, 99, spec.shape[::-1], generator=draw).float().T / 7 for spec in specs()
        }

    def sync_plan(self) -> tuple[Bucket, ...]:
        return PLAN

    def bucket_tensors(self, index: int) -> Iterator[tuple[str, Tensor]]:
        for spec in PLAN[index].tensors:
            yield spec.name, self.tensors[spec.name]

    def wire(self) -> dict[str, Tensor]:
        """What has to arrive."""
        return {spec.name: self.tensors[spec.name].to(getattr(torch, spec.dtype)) for spec in specs()}


@dataclass
class Engine:
    """Copies what it is given, as every engine must; refuses one bucket if told to."""

    refuses: int | None = None
    held: dict[str, Tensor] = field(default_factory=dict)
    loading: dict[str, Tensor] = field(default_factory=dict)
    version: int = 0

    def begin_update(self) -> None:
        self.loading = {}

    def load_bucket(self, bucket: Bucket, payload: Tensor) -> None:
        assert (payload.dtype, payload.shape) == (torch.uint8, (bucket.num_bytes,))
        if self.refuses == PLAN.index(bucket):
            raise SyncError("no room")
        self.loading |= {name: view.clone() for name, view in bucket.views(payload)}

    def end_update(self, version: int) -> None:
        self.held, self.version = self.loading, version

    def probe(self, prompt: Tokens, num_tokens: int) -> EngineAnswer:
        raise AssertionError("nobody asks")


def push(sink: LocalSink, version: int) -> None:
    """As ``WeightSync`` does it."""
    sink.begin_update()
    for index, bucket in enumerate(PLAN):
        sink.send(index, bucket)
    sink.end_update(version)


def equal(engine: Engine, weights: Weights) -> bool:
    expected = weights.wire()
    same = (torch.equal(value, engine.held[name]) for name, value in expected.items())
    return engine.held.keys() == expected.keys() and all(same)


@pytest.fixture(params=sorted(TRANSPORTS))
def transport(request: pytest.FixtureRequest) -> Transport:
    return TRANSPORTS[request.param]


def test_every_engine_gets_every_byte(transport: Transport) -> None:
    assert len(PLAN) == 10  # a bucket per layer
    weights, engines = Weights(), [Engine(), Engine()]
    sink = LocalSink(weights, *engines, transport=transport)
    for version in range(3):
        weights.update(seed=version)
        push(sink, version)
        assert all(equal(engine, weights) and engine.version == version for engine in engines)


def test_a_push_after_connecting_again_is_the_same(transport: Transport) -> None:
    weights, engine = Weights(), Engine()
    sink = LocalSink(weights, engine, transport=transport)
    push(sink, 1)
    for other in (*TRANSPORTS.values(), transport, transport):
        weights.update(seed=2)
        engine.held = {}
        sink.connect(other)
        push(sink, 2)
        assert equal(engine, weights)


def test_a_push_that_failed_is_repeated_as_a_whole(transport: Transport) -> None:
    weights, engine = Weights(), Engine()
    sink = LocalSink(weights, engine, transport=transport)
    push(sink, 1)
    before = dict(engine.held)
    engine.refuses = 4
    weights.update(seed=1)
    with pytest.raises(SyncError):
        push(sink, 2)
    assert engine.held.keys() == before.keys()
    engine.refuses = None
    weights.update(seed=2)  # nothing of the failed push may show
    sink.connect(transport)
    push(sink, 2)
    assert equal(engine, weights)


def test_a_transport_and_its_address_can_be_given_to_any_process(transport: Transport) -> None:
    weights, engine = Weights(), Engine()
    there = pickle.loads(pickle.dumps(transport))
    sender = there.sender(PLAN, 0)
    receiver = there.receiver(pickle.loads(pickle.dumps(sender.address)))
    engine.begin_update()
    for index, bucket in enumerate(PLAN):
        message = pickle.loads(pickle.dumps(sender.send(index, weights.bucket_tensors(index))))
        engine.load_bucket(bucket, receiver.receive(bucket, message))
    engine.end_update(1)
    assert equal(engine, weights)


def test_as_many_buckets_as_the_window_says_are_there_at_a_time(transport: Transport) -> None:
    weights = Weights()
    sender = transport.sender(PLAN, 0)
    receiver = transport.receiver(sender.address)
    there: list[Tensor] = []
    for index, bucket in enumerate(PLAN):
        message = sender.send(index, weights.bucket_tensors(index))
        if transport is not TRANSPORTS["in_process"]:
            message = pickle.loads(pickle.dumps(message))  # as it travels between processes
        there.append(receiver.receive(bucket, message))
        for number in range(max(0, index + 1 - transport.window), index + 1):
            for name, view in PLAN[number].views(there[number]):
                assert torch.equal(view, weights.wire()[name])


def test_the_other_ranks_take_part_and_send_nothing(transport: Transport) -> None:
    asked: list[str] = []

    def shares() -> Iterator[tuple[str, Tensor]]:
        asked.append("first")
        yield from ()
        asked.append("last")

    sender = transport.sender(PLAN, 1)
    assert sender.send(0, shares()) is None
    assert asked == ["first", "last"]
    assert sender.address is None
    sender.close()


def test_connecting_again_and_again_leaves_nothing_open(transport: Transport) -> None:
    sink = LocalSink(Weights(), Engine(), transport=transport)
    sink.connect(transport)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        sink.connect(transport)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_sender_is_closed_once_also_when_the_next_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed twice, it would close whatever has taken its descriptor since."""
    sink = LocalSink(Weights(), Engine(), transport=TRANSPORTS["shared_memory"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", lambda *_: os.open("/nowhere", os.O_RDONLY))
        with pytest.raises(FileNotFoundError):
            sink.connect(TRANSPORTS["shared_memory"])
    taken = os.open(os.devnull, os.O_RDONLY)  # by number the sender's, most likely
    sink.connect(TRANSPORTS["shared_memory"])
    assert os.readlink(f"/proc/self/fd/{taken}") == os.devnull
    os.close(taken)


@pytest.mark.parametrize(
    ("wanted", "host_memory", "machines", "expected"),
    [
        ("auto", True, {"a"}, "shared_memory"),
        ("auto", True, {"a", "b"}, "object_store"),
        ("auto", False, None, "object_store"),
        ("object_store", True, None, "object_store"),
    ],
)
def test_the_recipe_and_the_placement_choose(
    monkeypatch: pytest.MonkeyPatch, wanted: str, host_memory: bool, machines: set[str] | None, expected: str
) -> None:
    def asked() -> set[str]:
        assert machines is not None, "the answer does not matter"
        return machines

    platform = get_platform("cpu")
    monkeypatch.setattr(type(platform), "weights_in_host_memory", host_memory)
    assert choose_transport(SyncConfig(transport=wanted).transport, platform, asked) is TRANSPORTS[expected]  # type: ignore[arg-type]
