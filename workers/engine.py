"""The rollout engines' processes."""

from __future__ import annotations

from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import ray
import torch

from rlxf.assembly.roles import build_engine
from rlxf.core.types import PromptBatch, Rollouts, Tokens
from rlxf.rollout.chunks import Gathered
from rlxf.rollout.engine import ProbeResult, RolloutEngine, Sampling, Session
from rlxf.sync.checksums import Checksums
from rlxf.sync.plan import Bucket
from rlxf.sync.transports.transport import Address, Message, Transport

from .worker import Worker


class RolloutWorker(Worker):
    """One rollout engine; alone in its process."""

    make = staticmethod(build_engine)
    # An engine that takes the place of another samples only after it got weights.
    make_again = staticmethod(partial(build_engine, stale=True))
    room: RolloutEngine
    session: Session | None = None  # of prompts that are being sampled
    share: Gathered | None = None  # the completions of those so far, where they are handed over in chunks

    @property
    def engine(self) -> RolloutEngine:
        return self.room

    def num_slots(self, sampling: Sampling) -> int | None:
        return self.engine.session(sampling).num_slots

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        return self.engine.generate(prompts, sampling)

    def start(self, prompts: PromptBatch, sampling: Sampling, sizes: tuple[int, ...]) -> list[Rollouts]:
        """Begin to sample ``prompts``; the first chunks that are whole.

        ``sizes``: prompts of each chunk; (): a prompt is a chunk.
        """
        self.session = self.engine.session(sampling)
        bounds = pairwise(accumulate(sizes, initial=0))
        self.share = Gathered(prompts, [tuple(range(*pair)) for pair in bounds]) if sizes else None
        self.session.add(prompts)
        return self._next_chunks()

    def advance(self, more: PromptBatch | None = None) -> list[Rollouts]:
        """Sample until another chunk of what was begun is whole; none is left if it gives none."""
        assert self.session is not None  # started
        if more is not None:
            self.session.add(more)
        return self._next_chunks()

    def _next_chunks(self) -> list[Rollouts]:
        assert self.session is not None
        while (part := self.session.advance()) is not None:
            whole = [part] if self.share is None else [chunk.rollouts for chunk in self.share.add(part)]
            if whole:
                return whole
        self.share = None  # its completions need memory
        return []

    def _phase_of(self, method: str, args: tuple[Any, ...]) -> str:
        """An evaluation has more prompts than a step, and other lengths."""
        purposes = [arg.purpose for arg in args if isinstance(arg, Sampling)]
        return f"{method} ({purposes[0]})" if purposes and purposes[0] != "train" else method

    def begin_update(self) -> None:
        self.engine.begin_update()

    def open_receivers(self, transport: Transport, address: Address, first: int) -> None:
        """``first``: the number of this engine's first process among all receivers."""
        self.engine.open_receivers(transport, address, first, ray.util.get_node_ip_address())

    def receive(self, bucket: Bucket, message: Message, check: bool, *others: Any) -> list[Checksums]:
        """Load a bucket that the actor has sent.

        Args:
            bucket: of the plan.
            message: what the sender of rank 0 gave.
            check: give checksums of what was received.
            others: answers of the other ranks, where every rank sends: this call begins when they are there.
        """
        return self.engine.receive(bucket, message, check=check)

    def load_copy(self, bucket: Bucket, payload: Any) -> None:
        """``load_bucket`` without a transport; ``payload``: an array of the bucket's bytes."""
        self.engine.load_bucket(bucket, torch.from_numpy(payload))

    def end_update(self, version: int) -> None:
        self.engine.end_update(version)

    def sleep(self) -> None:
        self.engine.sleep()

    def wake_weights(self) -> None:
        self.engine.wake_weights()

    def wake_cache(self) -> None:
        self.engine.wake_cache()

    def memory_peaks(self) -> dict[str, int]:
        return dict(self.engine.memory.peaks)

    def probe(self, prompt: Tokens, num_tokens: int) -> ProbeResult:
        return self.engine.probe(prompt, num_tokens)
