"""The part of weight_sync.py without models: workers that hold weights of a shape, and engines that only receive.

All between them is the product: driver, worker classes, transports, calls. Left out are the export of a trainer's
shards and what vLLM does with weights. An engine reads a few bytes of each tensor, so that it has really got it, or
copies what comes into memory of its own: a process of several copies its share of each bucket.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import zmq
from torch import Tensor

from benchmarks.random_world import Shape
from rlxf.platform import get_platform
from rlxf.sync.checksums import Checksums
from rlxf.sync.plan import Bucket, TensorSpec, plan_buckets
from rlxf.sync.transports.transport import Address, Message, Receiver, ReceiverPlace, Transport
from workers.actor import ActorWorker
from workers.engine import RolloutWorker

_READ = 64  # bytes of each tensor
_START_MS = 120_000  # longest wait for the other end of a socket, milliseconds


def specs_of(shape: Shape, dtype: str) -> list[TensorSpec]:
    """The tensors of a Llama with a tied head, as Hugging Face names them."""
    hidden, ffn, kv = shape.hidden, shape.ffn, shape.kv_heads * shape.hidden // shape.heads
    layer = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    found = [TensorSpec("model.embed_tokens.weight", (shape.vocab, hidden), dtype)]
    for index in range(shape.layers):
        found += [TensorSpec(f"model.layers.{index}.{name}.weight", size, dtype) for name, size in layer.items()]
    return [*found, TensorSpec("model.norm.weight", (hidden,), dtype)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The tensors that are sent."""

    shape: Shape
    bucket_mb: int

    def plan(self) -> tuple[Bucket, ...]:
        return plan_buckets(specs_of(self.shape, "bfloat16"), self.bucket_mb * 2**20)


class _Held:
    """An actor that holds random bf16 tensors, in one piece of memory, and no optimizer."""

    layout = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, source: Source) -> None:
        self._plan = source.plan()
        memory = torch.empty(sum(bucket.num_bytes for bucket in self._plan), dtype=torch.uint8)
        memory.view(torch.bfloat16).uniform_(-1, 1)
        self._pieces = memory.split([bucket.num_bytes for bucket in self._plan])
        self._other = torch.zeros(max(map(len, self._pieces)), dtype=torch.uint8)

    def sync_plan(self) -> tuple[Bucket, ...]:
        return self._plan

    def begin_push(self) -> None:
        """It has nothing to prepare."""

    def bucket_tensors(self, index: int, *, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        yield from self._plan[index].views(self._pieces[index])

    def copy_once(self) -> None:
        """All bytes, bucket by bucket, into the same memory; any transport uses memory again, too."""
        for piece in self._pieces:
            self._other[: len(piece)].copy_(piece)


class SourceWorker(ActorWorker):
    """The trainer's end."""

    def build(self, source: Source) -> None:  # type: ignore[override]
        torch.set_num_threads(1)
        self.room, self.platform = _Held(source), get_platform("cpu")  # type: ignore[assignment]

    def copy_once(self) -> float:
        """Seconds of one plain copy of all bytes, inside this process."""
        begin = time.perf_counter()
        self.room.copy_once()  # type: ignore[attr-defined]
        return time.perf_counter() - begin

    def few_bytes(self) -> int:
        """What an engine's ``seen`` grows by in a push."""
        held: Any = self.room
        views = (view for index in range(len(held.sync_plan())) for _, view in held.bucket_tensors(index))
        return sum(int(view.flatten().view(torch.uint8)[:_READ].sum()) for view in views)


class _End:
    """One process of an engine, as a receiver."""

    def __init__(self, number: int, processes: int) -> None:
        self._number, self._processes = number, processes
        self._receiver: Receiver | None = None
        self._own: Tensor | None = None  # room for its share of the largest bucket, once it is asked to copy
        self.seen = 0  # a checksum of what it has read

    def close(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
        self._receiver = self._own = None

    def open(self, transport: Transport, address: Address, first: int, host: str) -> None:
        self.close()
        place = ReceiverPlace(number=first + self._number, platform=get_platform("cpu"), host=host)
        self._receiver = transport.receiver(address, place)

    def receive(self, bucket: Bucket, message: Message, copies: bool) -> None:
        assert self._receiver is not None  # open
        payload = self._receiver.receive(bucket, message)
        if copies:
            share = payload.chunk(self._processes)[self._number]
            if self._own is None or len(self._own) < len(share):
                self._own = torch.zeros(len(share), dtype=torch.uint8)
            self._own[: len(share)].copy_(share)
        for spec in bucket.tensors:
            self.seen += int(payload[spec.offset : spec.offset + min(_READ, spec.num_bytes)].sum())

    def count(self) -> int:
        return self.seen


class _Engine:
    """An engine without a model. Of one process: this one. Of several: processes of its own, called through pipes.

    Arrays go to them through ZeroMQ, uncopied by pickle, as vLLM sends what its own channel has no room for.
    """

    def __init__(self, processes: int) -> None:
        self.copies = False
        self._alone = _End(0, 1) if processes == 1 else None
        self._others: list[_Other] = [_Other(number, processes) for number in range(processes if processes > 1 else 0)]

    def _call(self, method: str, *args: Any) -> list[Any]:
        if self._alone is not None:
            return [getattr(self._alone, method)(*args)]
        for other in self._others:
            other.send(method, args)
        answers = [other.calls.recv() for other in self._others]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def open_receivers(self, transport: Transport, address: Address, first: int, host: str) -> None:
        self._call("open", transport, address, first, host)

    def begin_update(self) -> None:
        """Nothing to prepare."""

    def receive(self, bucket: Bucket, message: Message, *, check: bool = False) -> list[Checksums]:
        self._call("receive", bucket, message, self.copies)
        return []

    def end_update(self, version: int) -> None:
        """Nothing to finish."""

    def disconnect(self) -> None:
        """Give memory back."""
        self._call("close")

    def seen(self) -> list[int]:
        """A checksum of all that each process has read so far."""
        return self._call("count")


class _Array:
    """In place of an array that comes the other way."""


class _Other:
    """A process of an engine, as the engine sees it. It ends with the engine."""

    def __init__(self, number: int, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.calls, theirs = context.Pipe()
        self._arrays = zmq.Context.instance().socket(zmq.PAIR)
        address = f"ipc://{tempfile.mkdtemp(prefix='rlxf')}/arrays"
        self._arrays.setsockopt(zmq.RCVTIMEO, _START_MS)
        self._arrays.bind(address)
        context.Process(target=_serve, args=(theirs, address, number, processes), daemon=True).start()
        theirs.close()
        self._arrays.recv()  # it is connected
        Path(address.removeprefix("ipc://")).unlink()
        Path(address.removeprefix("ipc://")).parent.rmdir()

    def send(self, method: str, args: tuple[Any, ...]) -> None:
        arrays = [arg for arg in args if isinstance(arg, np.ndarray)]
        self.calls.send((method, tuple(_Array() if isinstance(arg, np.ndarray) else arg for arg in args)))
        for array in arrays:
            self._arrays.send(array, copy=False)


def _serve(calls: Connection, address: str, number: int, processes: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    arrays = zmq.Context.instance().socket(zmq.PAIR)
    arrays.setsockopt(zmq.RCVTIMEO, _START_MS)  # the engine may be gone
    arrays.connect(address)
    end = _End(number, processes)
    arrays.send(b"")

    def whole(arg: Any) -> Any:
        return np.frombuffer(arrays.recv(copy=False), dtype=np.uint8) if isinstance(arg, _Array) else arg

    while True:
        try:
            method, args = calls.recv()
            args = [whole(arg) for arg in args]
        except (EOFError, ConnectionError, zmq.Again):
            return
        try:
            answer = getattr(end, method)(*args)
        except Exception as error:  # noqa: BLE001  handed to the engine
            answer = error
        calls.send(answer)


class ReceivingWorker(RolloutWorker):
    """The engine's end; ``processes`` of them are one engine."""

    def build(self, processes: int) -> None:  # type: ignore[override]
        torch.set_num_threads(1)
        self.room = _Engine(processes)  # type: ignore[assignment]

    def disconnect(self) -> None:
        self.room.disconnect()  # type: ignore[attr-defined]

    def set_copies(self, copies: bool) -> None:
        self.room.copies = copies  # type: ignore[attr-defined]

    def seen(self) -> Sequence[int]:
        found: Sequence[int] = self.room.seen()  # type: ignore[attr-defined]
        return found
