"""The actor's processes, and the actor as the driver sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from torch import Tensor

from rlxf.assembly.roles import build_actor
from rlxf.core.model_folder import Files
from rlxf.core.types import Batch, Metrics, Pairs, PairValues, Sequences
from rlxf.platform.memory import largest
from rlxf.platform.visible import visible_device
from rlxf.sync.checksums import Checksums, checksums
from rlxf.sync.plan import Bucket
from rlxf.sync.saved import saved_tensors
from rlxf.sync.transports import Where
from rlxf.sync.transports.transport import Address, Message, Sender, SenderPlace, Transport

from .group import WorkerGroup
from .remote import Pending
from .worker import Worker

if TYPE_CHECKING:
    from rlxf.update.actor import MegatronActor


ANSWER_S = 10.0  # how long an actor that has nothing to do may take to answer


class ActorWorker(Worker):
    """One rank of the actor."""

    make = staticmethod(build_actor)
    room: MegatronActor
    sender: Sender | None = None  # of buckets, once it is connected with the engines
    everywhere = False  # whether every rank sends

    def _phase_of(self, method: str, args: tuple[Any, ...]) -> str:
        """To write a checkpoint takes longer than to begin to, or to ask whether it is written."""
        waits = {"checkpoint_written": True, "save_checkpoint": False}  # the value of its flag with which it waits
        return f"{method} (waits)" if method in waits and args[-1] is waits[method] else method

    def prepare(self, batch: Batch, step: int) -> None:
        self.room.prepare(batch, step)

    def update(self, batch: Batch, step: int) -> Metrics | None:
        return self.answer(self.room.update(batch, step))

    def is_untouched(self) -> bool | None:
        return self.answer(self.room.is_untouched())

    def evaluate(self, batch: Batch) -> Metrics | None:
        return self.answer(self.room.evaluate(batch))

    def token_logps(self, sequences: Sequences) -> Tensor | None:
        return self.answer(self.room.token_logps(sequences))

    def base_token_logps(self, sequences: Sequences) -> Tensor | None:
        return self.answer(self.room.base_token_logps(sequences))

    def base_logps(self, pairs: Pairs) -> PairValues | None:
        return self.answer(self.room.base_logps(pairs))

    def sync_plan(self) -> tuple[Bucket, ...] | None:
        return self.answer(self.room.sync_plan())

    def open_sender(self, transport: Transport, num_receivers: int, keeps: bool, timeout_s: float) -> Address:
        """This rank's end of the transport through which all buckets travel from now on; where it can be found."""
        earlier, self.sender = self.sender, None  # closed once, also if the new one cannot be made
        if earlier is not None:
            earlier.close()
        place = SenderPlace(
            rank=self.rank,
            platform=self.platform,
            device=self.room.layout.device,
            where=visible_device(self.platform, 0),
            host=ray.util.get_node_ip_address(),
            num_receivers=num_receivers,
            timeout_s=timeout_s,
        )
        self.sender = transport.sender(self.room.sync_plan(), place, keeps=keeps)
        self.everywhere = transport.everywhere
        return self.sender.address

    def join_receivers(self) -> None:
        assert self.sender is not None  # open
        self.sender.join()

    def keep_pushed(self) -> None:
        self.room.keep_pushed()

    def send_bucket(self, index: int, check: bool) -> tuple[Checksums | None, Message]:
        """Checksums for those who wait, if asked for; and the message, for the engines."""
        if index == 0:
            self.room.begin_push()
        return self._send(index, self.room.bucket_tensors(index, everywhere=self.everywhere), check)

    def send_saved_bucket(self, index: int, checkpoint: Path, check: bool) -> tuple[Checksums | None, Message]:
        """``send_bucket`` with the weights that a checkpoint holds for the engines."""
        reads = self.rank == 0 or self.everywhere
        bucket = self.room.sync_plan()[index]
        return self._send(index, saved_tensors(checkpoint, bucket) if reads else iter(()), check)

    def _send(self, index: int, tensors: Iterator[tuple[str, Tensor]], check: bool) -> tuple[Checksums | None, Message]:
        assert self.sender is not None  # connected
        message = self.sender.send(index, tensors)
        asked = check and self.rank == 0
        return checksums(self.room.sync_plan()[index], self.sender.sent(index)) if asked else None, message

    def offload(self) -> None:
        self.room.offload()

    def restore(self) -> None:
        self.room.restore()

    def free_cache(self) -> None:
        self.room.free_cache()

    def memory_peaks(self) -> dict[str, int]:
        return self.room.memory_peaks()

    def pushed_copy(self, index: int) -> tuple[None, Any]:
        """``export_copy`` of the weights that were pushed last."""
        return None, self.answer(self.room.pushed_copy(index).numpy())

    def export_copy(self, index: int) -> tuple[None, Any]:
        """Nothing, for those who wait; and the bytes of bucket ``index``, for the reference."""
        return None, self.answer(self.room.export_copy(index).numpy())

    def save_hf(self, folder: Path) -> None:
        self.require_driver()
        self.room.save_hf(folder)

    def save_checkpoint(self, folder: Path, background: bool) -> None:
        self.require_driver()
        self.room.save_checkpoint(folder, background)

    def checkpoint_written(self, wait: bool) -> bool | None:
        return self.answer(self.room.checkpoint_written(wait))

    def load_checkpoint(self, folder: Path) -> None:
        self.room.load_checkpoint(folder)


@dataclass(frozen=True, slots=True)
class Sent:
    """A bucket on its way."""

    calls: list[Pending]  # one of each rank, to be waited for; that of rank 0 gives checksums, if they were asked for
    message: Any  # a reference to what rank 0 gives, whose bytes do not pass through here


class RemoteActor:
    """The actor on its worker processes.

    Args:
        group: the ranks.
        message_s: longest time that a bucket may take, seconds.
    """

    def __init__(self, group: WorkerGroup, *, message_s: float = 60.0) -> None:
        self._group = group
        self._message_s = message_s

    def prepare(self, batch: Batch, step: int) -> None:
        self._group.call("prepare", batch, step)

    def update(self, batch: Batch, step: int) -> Metrics:
        metrics: Metrics = self._group.call("update", batch, step)
        return metrics

    def is_untouched(self) -> bool:
        """Of an actor that does not answer within seconds nobody knows: StageTimeout."""
        untouched: bool = self._group.call("is_untouched", timeout_s=ANSWER_S)
        return untouched

    def evaluate(self, batch: Batch) -> Metrics:
        metrics: Metrics = self._group.call("evaluate", batch)
        return metrics

    def token_logps(self, sequences: Sequences) -> Tensor:
        logps: Tensor = self._group.call("token_logps", sequences)
        return logps

    def base_token_logps(self, sequences: Sequences) -> Tensor:
        logps: Tensor = self._group.call("base_token_logps", sequences)
        return logps

    def base_logps(self, pairs: Pairs) -> PairValues:
        logps: PairValues = self._group.call("base_logps", pairs)
        return logps

    def sync_plan(self) -> tuple[Bucket, ...]:
        plan: tuple[Bucket, ...] = self._group.call("sync_plan")
        return plan

    def where(self, device: str) -> tuple[Where, ...]:
        """Of every rank."""
        return tuple(place for places in self._group.ask("where", device) for place in places)

    def open_sender(self, transport: Transport, num_receivers: int, keeps: bool) -> Address:
        """A new sender in every rank; where they are."""
        return transport.joined(self._group.ask("open_sender", transport, num_receivers, keeps, self._message_s))

    def start_files(self) -> list[Files | None]:
        """Of every rank."""
        return self._group.ask("start_files")

    def join_receivers(self) -> list[Pending]:
        """While the receivers are opened."""
        return self._group.send("join_receivers")

    def keep_pushed(self) -> None:
        """From now on ``pushed_copy`` can be asked for."""
        self._group.call("keep_pushed")

    def send_bucket(self, index: int, *, check: bool) -> Sent:
        return self._export("send_bucket", index, check)

    def send_saved_bucket(self, index: int, checkpoint: Path, *, check: bool) -> Sent:
        """The same of the weights that a checkpoint holds for the engines."""
        return self._export("send_saved_bucket", index, checkpoint, check)

    def offload(self) -> None:
        self._group.call("offload")

    def restore(self) -> None:
        self._group.call("restore")

    def free_cache(self) -> None:
        """It returns when every rank has: no rank of a shared device may hold what an engine is about to take."""
        self._group.call("free_cache")

    def memory_peaks(self) -> dict[str, int]:
        return largest(self._group.ask("memory_peaks"))

    def pushed_copy(self, index: int) -> Any:
        """``export_copy`` of the weights that were pushed last. An actor that is at work gives it afterwards."""
        sent = self._export("pushed_copy", index)
        self._group.waiter.gather(sent.calls)
        return sent.message

    def export_copy(self, index: int) -> Any:
        """A reference to the bytes of bucket ``index``, which are there: they do not pass through here either."""
        sent = self._export("export_copy", index)
        self._group.waiter.gather(sent.calls)
        return sent.message

    def _export(self, method: str, *args: Any) -> Sent:
        members = self._group.members
        found = [getattr(member.handle, method).options(num_returns=2).remote(*args) for member in members]
        calls = [Pending(done, member.name, method) for member, (done, _) in zip(members, found, strict=True)]
        return Sent(calls, found[0][1])

    def save_hf(self, folder: Path) -> None:
        self._group.call("save_hf", folder)

    def save_checkpoint(self, folder: Path, background: bool = False) -> None:
        self._group.call("save_checkpoint", folder, background)

    def checkpoint_written(self, wait: bool) -> bool:
        written: bool = self._group.call("checkpoint_written", wait)
        return written

    def load_checkpoint(self, folder: Path) -> None:
        self._group.call("load_checkpoint", folder)
