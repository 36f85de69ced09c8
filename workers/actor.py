"""The actor's processes, and the actor as the driver sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from rlxf.assembly import roles as assemble
from rlxf.config.schema import RunConfig
from rlxf.core.types import Batch, Metrics, PairLogps, Pairs, Sequences
from rlxf.sync.plan import Bucket
from rlxf.sync.transport import Address, SharedBuckets
from workers.group import WorkerGroup
from workers.remote import Pending
from workers.worker import Worker

ANSWER_S = 10.0  # how long an actor that has nothing to do may take to answer


class ActorWorker(Worker):
    """One rank of the actor."""

    shared: SharedBuckets | None = None  # where rank 0 writes buckets; None: they travel by value

    def build(self, config: RunConfig, master: tuple[str, int]) -> None:
        self.room = assemble.build_actor(config, *self.place(config, master))

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

    def base_logps(self, pairs: Pairs) -> PairLogps | None:
        return self.answer(self.room.base_logps(pairs))

    def sync_plan(self) -> tuple[Bucket, ...] | None:
        return self.answer(self.room.sync_plan())

    def share_buckets(self) -> Address | None:
        """Allocate the memory through which all buckets travel from now on; rank 0 returns its address."""
        if self.rank == 0:
            self.shared = SharedBuckets.allocate(self.room.sync_plan())
        return self.shared.address if self.shared is not None else None

    def export_bucket(self, index: int) -> tuple[None, Any]:
        """Nothing, for those who wait; and the payload, for the engines: the bucket's number, or its bytes."""
        if self.shared is None:
            return None, self.answer(self.room.export_bucket(index).numpy())  # an array travels without a copy
        self.room.export_bucket(index, self.shared.slot(index, self.room.sync_plan()[index].num_bytes))
        return None, index

    def export_copy(self, index: int) -> tuple[None, Any]:
        """As ``export_bucket``, and always the bytes."""
        return None, self.answer(self.room.export_copy(index).numpy())

    def save_hf(self, folder: Path) -> None:
        self.room.save_hf(folder)

    def save_checkpoint(self, folder: Path, background: bool) -> None:
        self.room.save_checkpoint(folder, background)

    def checkpoint_written(self, wait: bool) -> bool | None:
        return self.answer(self.room.checkpoint_written(wait))

    def load_checkpoint(self, folder: Path) -> None:
        self.room.load_checkpoint(folder)


class RemoteActor:
    """The actor on its worker processes."""

    def __init__(self, group: WorkerGroup) -> None:
        self._group = group
        self.exports: list[Pending] = []  # started, not yet waited for: the sink does

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

    def base_logps(self, pairs: Pairs) -> PairLogps:
        logps: PairLogps = self._group.call("base_logps", pairs)
        return logps

    def sync_plan(self) -> tuple[Bucket, ...]:
        plan: tuple[Bucket, ...] = self._group.call("sync_plan")
        return plan

    def machine(self) -> str:
        """Of rank 0, which holds the buckets."""
        name: str = self._group.call("machine")
        return name

    def share_buckets(self) -> Address:
        """Let all buckets travel through memory that rank 0 allocates now; where it is."""
        address: Address = self._group.call("share_buckets")
        return address

    def export_bucket(self, index: int) -> Any:
        """A reference to the payload: the bytes go from the actor to the engines without passing through here."""
        calls, payload = self._export("export_bucket", index)
        self.exports += calls
        return payload

    def export_copy(self, index: int) -> Any:
        """A reference to the bytes of bucket ``index``, which are there: they do not pass through here either."""
        calls, payload = self._export("export_copy", index)
        self._group.waiter.gather(calls)
        return payload

    def _export(self, method: str, index: int) -> tuple[list[Pending], Any]:
        """What to wait for, and a reference to rank 0's payload."""
        members = self._group.members
        found = [getattr(member.handle, method).options(num_returns=2).remote(index) for member in members]
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
