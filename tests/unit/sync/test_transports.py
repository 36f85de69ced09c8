"""What every transport must do: the same bytes in every engine, also after connecting again, and nothing left open."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from rlxf.core.errors import SyncError
from rlxf.core.types import Tokens
from rlxf.sync.checksums import checksums, compare
from rlxf.sync.plan import Bucket, TensorSpec, plan_buckets
from rlxf.sync.probe import EngineAnswer
from rlxf.sync.push import LocalSink
from rlxf.sync.transports import TRANSPORTS, Transport
from rlxf.sync.transports.transport import ReceiverPlace, SenderPlace
from tests.device_twin import VISIBLE, TwinPlatform

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

    def bucket_tensors(self, index: int, *, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
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


# A broadcast needs processes: tests/unit/sync/test_collective.py.
LOCAL = [transport for name, transport in TRANSPORTS.items() if name != "collective"]


@pytest.fixture(params=LOCAL, ids=lambda transport: transport.name)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Transport:
    """On a platform that has what the transport needs."""
    monkeypatch.setenv(VISIBLE, "3")
    found: Transport = request.param
    return found


def place(rank: int = 0) -> SenderPlace:
    return SenderPlace(rank=rank, platform=TwinPlatform(), where="3")


HERE = ReceiverPlace(platform=TwinPlatform(), where="3")


class Sink(LocalSink):
    """With the device that the transport needs."""

    def __init__(self, actor: Weights, *engines: Engine, transport: Transport) -> None:
        super().__init__(actor, *engines, platform=TwinPlatform(), transport=transport)


def test_every_engine_gets_every_byte(transport: Transport) -> None:
    assert len(PLAN) == 10  # a bucket per layer
    weights, engines = Weights(), [Engine(), Engine()]
    sink = Sink(weights, *engines, transport=transport)
    for version in range(3):
        weights.update(seed=version)
        push(sink, version)
        assert all(equal(engine, weights) and engine.version == version for engine in engines)


def test_a_push_after_connecting_again_is_the_same(transport: Transport) -> None:
    weights, engine = Weights(), Engine()
    sink = Sink(weights, engine, transport=transport)
    push(sink, 1)
    for other in (*LOCAL, transport, transport):
        weights.update(seed=2)
        engine.held = {}
        sink.connect(other)
        push(sink, 2)
        assert equal(engine, weights)


def test_a_push_that_failed_is_repeated_as_a_whole(transport: Transport) -> None:
    weights, engine = Weights(), Engine()
    sink = Sink(weights, engine, transport=transport)
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
    sender = there.sender(PLAN, place())
    receiver = there.receiver(there.joined([pickle.loads(pickle.dumps(sender.address))]), HERE)
    engine.begin_update()
    for index, bucket in enumerate(PLAN):
        message = pickle.loads(pickle.dumps(sender.send(index, weights.bucket_tensors(index))))
        engine.load_bucket(bucket, receiver.receive(bucket, message))
    engine.end_update(1)
    assert equal(engine, weights)


def test_as_many_buckets_as_the_window_says_are_there_at_a_time(transport: Transport) -> None:
    weights = Weights()
    sender = transport.sender(PLAN, place())
    receiver = transport.receiver(sender.address, HERE)
    there: list[Tensor] = []
    for index, bucket in enumerate(PLAN):
        message = sender.send(index, weights.bucket_tensors(index))
        if transport is not TRANSPORTS["in_process"]:
            message = pickle.loads(pickle.dumps(message))  # as it travels between processes
        there.append(receiver.receive(bucket, message))
        for number in range(max(0, index + 1 - transport.window), index + 1):
            for name, view in PLAN[number].views(there[number]):
                assert torch.equal(view, weights.wire()[name])


@pytest.mark.parametrize("transport", [t for t in LOCAL if not t.everywhere], indirect=True, ids=lambda t: t.name)
def test_the_other_ranks_take_part_and_send_nothing(transport: Transport) -> None:
    asked: list[str] = []

    def shares() -> Iterator[tuple[str, Tensor]]:
        asked.append("first")
        yield from ()
        asked.append("last")

    sender = transport.sender(PLAN, place(rank=1))
    assert sender.send(0, shares()) is None
    assert asked == ["first", "last"]
    assert sender.address is None
    assert sender.sent(0).numel() == 0
    sender.join()
    sender.close()


def test_connecting_again_and_again_leaves_nothing_open(transport: Transport) -> None:
    sink = Sink(Weights(), Engine(), transport=transport)
    sink.connect(transport)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        sink.connect(transport)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_sender_is_closed_once_also_when_the_next_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closed twice, it would close whatever has taken its descriptor since."""
    sink = Sink(Weights(), Engine(), transport=TRANSPORTS["shared_memory"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "memfd_create", lambda *_: os.open("/nowhere", os.O_RDONLY))
        with pytest.raises(FileNotFoundError):
            sink.connect(TRANSPORTS["shared_memory"])
    taken = os.open(os.devnull, os.O_RDONLY)  # by number the sender's, most likely
    sink.connect(TRANSPORTS["shared_memory"])
    assert os.readlink(f"/proc/self/fd/{taken}") == os.devnull
    os.close(taken)


@pytest.mark.parametrize("index", [0, 3, 9])
def test_what_was_sent_can_be_summed_up_where_it_was_packed_and_where_it_arrived(
    transport: Transport, index: int
) -> None:
    weights = Weights(seed=1)
    sender = transport.sender(PLAN, place())
    receiver = transport.receiver(sender.address, HERE)
    received = receiver.receive(PLAN[index], sender.send(index, weights.bucket_tensors(index)))
    assert checksums(PLAN[index], received) == checksums(PLAN[index], sender.sent(index))
    compare(checksums(PLAN[index], sender.sent(index)), checksums(PLAN[index], received), "the engine")


def test_a_handle_is_not_opened_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "3")
    ipc = TRANSPORTS["ipc"]
    sender = ipc.sender(PLAN, place())
    with pytest.raises(SyncError, match=r"the engine is on device 4, where no rank of the actor is \(they are on 3\)"):
        ipc.receiver(sender.address, replace(HERE, where="4"))


def test_every_engine_reads_the_memory_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    ipc, senders = TRANSPORTS["ipc"], []
    for rank, device in enumerate("03"):
        monkeypatch.setenv(VISIBLE, device)
        senders.append(ipc.sender(PLAN, replace(place(rank), where=device)))
    address = ipc.joined([sender.address for sender in senders])
    for rank, device in enumerate("03"):
        monkeypatch.setenv(VISIBLE, device)
        receiver = ipc.receiver(address, replace(HERE, where=device))
        message = senders[rank].send(0, Weights(seed=rank).bucket_tensors(0))
        ((_, view),) = PLAN[0].views(receiver.receive(PLAN[0], message))
        assert torch.equal(view, Weights(seed=rank).wire()["model.embed_tokens.weight"])
