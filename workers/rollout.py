"""The rollout engines' processes, and all engines as the driver sees them."""

from __future__ import annotations

from typing import Any

import torch

from rlxf import assemble
from rlxf.config.schema import RunConfig
from rlxf.rollout.engine import ProbeResult, Sampling
from rlxf.rollout.shares import join, split_evenly
from rlxf.sync.plan import Bucket
from rlxf.sync.probe import EngineAnswer
from rlxf.types import PromptBatch, Rollouts, Tokens
from workers.actor import RemoteActor
from workers.group import WorkerGroup
from workers.remote import Pending
from workers.worker import Worker

MAX_BUCKETS_IN_FLIGHT = 2  # bounds the object store's memory; two overlap one bucket's export with another's load


class RolloutWorker(Worker):
    """One rollout engine; alone in its process."""

    def build(self, config: RunConfig, master: tuple[str, int]) -> None:
        platform, _ = self.place(config, master)
        self.engine = assemble.build_engine(config, platform)

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        return self.engine.generate(prompts, sampling)

    def begin_update(self) -> None:
        self.engine.begin_update()

    def load_bucket(self, bucket: Bucket, payload: Any) -> None:
        self.engine.load_bucket(bucket, torch.from_numpy(payload))

    def end_update(self, version: int) -> None:
        self.engine.end_update(version)

    def probe(self, prompt: Tokens, num_tokens: int) -> ProbeResult:
        return self.engine.probe(prompt, num_tokens)


class RemoteEngines:
    """Every rollout engine of a run: prompts are shared out among them, weights go to all of them.

    An update is a chain of calls that nobody waits for one by one: a worker runs them in order, so one wait at the end
    (and one whenever too many buckets are under way) is enough.
    """

    def __init__(self, group: WorkerGroup, actor: RemoteActor) -> None:
        self._group = group
        self._actor = actor
        self._pending: list[Pending] = []
        self._in_flight = 0

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        """Contiguous shares of the prompts, one per engine; the results in prompt order."""
        shares = split_evenly(prompts, len(self._group.members))
        calls = [
            Pending(member.handle.generate.remote(share, sampling), member.name, "generate")
            for member, share in zip(self._group.members, shares, strict=False)
        ]
        return join(prompts, self._group.waiter.gather(calls))

    def begin_update(self) -> None:
        self._pending = self._group.send("begin_update")

    def load_bucket(self, bucket: Bucket, payload: Any) -> None:
        """``payload``: a reference to the bucket's bytes in the object store."""
        self._pending += self._group.send("load_bucket", bucket, payload)
        self._in_flight += 1
        if self._in_flight >= MAX_BUCKETS_IN_FLIGHT:
            self._wait()

    def end_update(self, version: int) -> None:
        self._pending += self._group.send("end_update", version)
        self._wait()

    def probe(self, prompt: Tokens, num_tokens: int) -> list[EngineAnswer]:
        return self._group.waiter.gather(self._group.send("probe", prompt, num_tokens))

    def _wait(self) -> None:
        pending, self._pending, self._in_flight = self._pending, [], 0
        exports, self._actor.exports = self._actor.exports, []
        self._group.waiter.gather([*exports, *pending])
