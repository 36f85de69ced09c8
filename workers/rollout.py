"""The rollout engines' processes, and all engines as the driver sees them."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from rlxf.assembly.roles import build_engine
from rlxf.core.types import PromptBatch, Rollouts, Tokens
from rlxf.rollout.engine import ProbeResult, RolloutEngine, Sampling
from rlxf.rollout.shares import join, split_evenly
from rlxf.sync.plan import Bucket
from rlxf.sync.probe import EngineAnswer
from rlxf.sync.transport import MAX_SLOTS, Address, SharedBuckets
from workers.actor import RemoteActor
from workers.group import WorkerGroup
from workers.remote import Pending
from workers.worker import Worker


class RolloutWorker(Worker):
    """One rollout engine; alone in its process."""

    make = staticmethod(build_engine)
    room: RolloutEngine
    shared: SharedBuckets | None = None  # where the actor writes buckets; None: they travel by value

    @property
    def engine(self) -> RolloutEngine:
        return self.room

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        return self.engine.generate(prompts, sampling)

    def begin_update(self) -> None:
        self.engine.begin_update()

    def open_buckets(self, address: Address) -> None:
        self.shared = SharedBuckets.open(address)

    def load_bucket(self, bucket: Bucket, payload: Any) -> None:
        """``payload``: the bucket's number, or an array of its bytes."""
        if self.shared is None:
            self.engine.load_bucket(bucket, torch.from_numpy(payload))
        else:
            self.engine.load_bucket(bucket, self.shared.slot(payload, bucket.num_bytes))

    def end_update(self, version: int) -> None:
        self.engine.end_update(version)

    def probe(self, prompt: Tokens, num_tokens: int) -> ProbeResult:
        return self.engine.probe(prompt, num_tokens)


class RemoteEngines:
    """Every rollout engine of a run: prompts are shared out among them, weights go to all of them.

    An update is a chain of calls, which every worker runs in the order in which they were made, so nobody waits for
    each of them. But the memory of a bucket is used again by the next but one: before that is exported, the engines
    must have loaded it.
    """

    def __init__(self, group: WorkerGroup, actor: RemoteActor) -> None:
        self._group = group
        self._actor = actor
        self._begun: list[Pending] = []  # calls that no bucket waits for yet
        self._under_way: deque[list[Pending]] = deque()  # the calls of each bucket

    def share_memory(self) -> bool:
        """Let buckets travel through memory shared with the actor, if that is possible; whether it is."""
        machines = {self._actor.machine(), *self._group.waiter.gather(self._group.send("machine"))}
        if len(machines) > 1:
            return False
        self._group.call("open_buckets", self._actor.share_buckets())
        return True

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        """Contiguous shares of the prompts, one per engine; the results in prompt order."""
        shares = split_evenly(prompts, len(self._group.members))
        calls = [
            Pending(member.handle.generate.remote(share, sampling), member.name, "generate")
            for member, share in zip(self._group.members, shares, strict=False)
        ]
        return join(prompts, self._group.waiter.gather(calls))

    def begin_update(self) -> None:
        self._actor.exports.clear()  # of an update that broke off
        self._under_way.clear()
        self._begun = self._group.send("begin_update")

    def load_bucket(self, bucket: Bucket, payload: Any) -> None:
        """``payload``: a reference to what ``RolloutWorker.load_bucket`` takes."""
        calls = [*self._begun, *self._actor.exports, *self._group.send("load_bucket", bucket, payload)]
        self._begun, self._actor.exports = [], []
        self._under_way.append(calls)
        if len(self._under_way) == MAX_SLOTS:
            self._group.waiter.gather(self._under_way.popleft())

    def end_update(self, version: int) -> None:
        rest = [call for calls in self._under_way for call in calls]
        self._under_way.clear()
        self._group.waiter.gather([*rest, *self._group.send("end_update", version)])

    def probe(self, prompt: Tokens, num_tokens: int) -> list[EngineAnswer]:
        return self._group.waiter.gather(self._group.send("probe", prompt, num_tokens))
