"""The actor's processes, and the actor as the driver sees it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rlxf.assembly.roles import build_actor
from rlxf.core.types import Batch, Metrics, Pairs, PairValues, Sequences
from rlxf.sync.plan import Bucket
from rlxf.sync.saved import saved_tensors
from rlxf.sync.transports.transport import Address, Message, Sender, Transport

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

    def open_sender(self, transport: Transport, keeps: bool) -> Address:
        """This rank's end of the transport through which all buckets travel from now on; where it can be found."""
        earlier, self.sender = self.sender, None  # closed once, also if the new one cannot be made
        if earlier is not None:
            earlier.close()
        self.sender = transport.sender(self.room.sync_plan(), self.rank, keeps=keeps)
        return self.sender.address

    def send_bucket(self, index: int) -> tuple[None, Message]:
        """Nothing, for those who wait; and the message, for the engines."""
        assert self.sender is not None  # connected
        return None, self.sender.send(index, self.room.bucket_tensors(index))

    def send_saved_bucket(self, index: int, checkpoint: Path) -> tuple[None, Message]:
        """``send_bucket`` with the weights that a checkpoint holds for the engines; rank 0 reads them."""
        assert self.sender is not None  # connected
        bucket = self.room.sync_plan()[index]
        return None, self.sender.send(index, saved_tensors(checkpoint, bucket) if self.rank == 0 else ())

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


class RemoteActor:
    """The actor on its worker processes."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group

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

    def machine(self) -> str:
        """Of rank 0, which sends the buckets."""
        name: str = self._group.call("machine")
        return name

    def open_sender(self, transport: Transport, keeps: bool) -> Address:
        """A new sender in every rank; the address of rank 0's."""
        return self._group.call("open_sender", transport, keeps)

    def send_bucket(self, index: int) -> tuple[list[Pending], Message]:
        """What to wait for, and a reference to the message, whose bytes do not pass through here."""
        return self._export("send_bucket", index)

    def send_saved_bucket(self, index: int, checkpoint: Path) -> tuple[list[Pending], Message]:
        """The same of the weights that a checkpoint holds for the engines."""
        return self._export("send_saved_bucket", index, checkpoint)

    def export_copy(self, index: int) -> Any:
        """A reference to the bytes of bucket ``index``, which are there: they do not pass through here either."""
        calls, payload = self._export("export_copy", index)
        self._group.waiter.gather(calls)
        return payload

    def _export(self, method: str, *args: Any) -> tuple[list[Pending], Any]:
        """What to wait for, and a reference to what rank 0 gives."""
        members = self._group.members
        found = [getattr(member.handle, method).options(num_returns=2).remote(*args) for member in members]
        calls = [Pending(done, member.name, method) for member, (done, _) in zip(members, found, strict=True)]
        return calls, found[0][1]

    def save_hf(self, folder: Path) -> None:
        self._group.call("save_hf", folder)

    def save_checkpoint(self, folder: Path, background: bool = False) -> None:
        self._group.call("save_checkpoint", folder, background)

    def checkpoint_written(self, wait: bool) -> bool:
        written: bool = self._group.call("checkpoint_written", wait)
        return written

    def load_checkpoint(self, folder: Path) -> None:
        self._group.call("load_checkpoint", folder)
