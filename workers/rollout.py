"""The rollout engines' processes, and all engines as the driver sees them."""

from __future__ import annotations

import warnings
from collections import deque
from pathlib import Path

from torch import Tensor

from rlxf.assembly.roles import build_engine
from rlxf.core.types import PromptBatch, Rollouts, Tokens
from rlxf.rollout.engine import ProbeResult, RolloutEngine, Sampling
from rlxf.rollout.shares import join, split_evenly
from rlxf.sync.plan import Bucket
from rlxf.sync.probe import EngineAnswer
from rlxf.sync.transports.shared_memory import this_machine
from rlxf.sync.transports.transport import Address, Message, Receiver, Transport

from .actor import RemoteActor
from .group import WorkerGroup
from .remote import Pending
from .worker import Worker


class RolloutWorker(Worker):
    """One rollout engine; alone in its process."""

    make = staticmethod(build_engine)
    room: RolloutEngine
    receiver: Receiver | None = None  # of buckets, once it is connected with the actor

    @property
    def engine(self) -> RolloutEngine:
        return self.room

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        return self.engine.generate(prompts, sampling)

    def begin_update(self) -> None:
        self.engine.begin_update()

    def open_receiver(self, transport: Transport, address: Address) -> None:
        self.receiver = transport.receiver(address)

    def load_bucket(self, bucket: Bucket, message: Message) -> None:
        """``message``: what the actor's sender gave."""
        assert self.receiver is not None  # connected
        self.engine.load_bucket(bucket, self.receiver.receive(bucket, message))

    def end_update(self, version: int) -> None:
        self.engine.end_update(version)

    def probe(self, prompt: Tokens, num_tokens: int) -> ProbeResult:
        return self.engine.probe(prompt, num_tokens)


class RemoteEngines:
    """Every rollout engine of a run: prompts are shared out among them, weights go to all of them.

    An update is a chain of calls, which every worker runs in the order in which they were made, so nobody waits for
    each of them. But a transport uses the memory of a bucket again: before that, the engines must have loaded it.
    """

    def __init__(self, group: WorkerGroup, actor: RemoteActor) -> None:
        self._group = group
        self._actor = actor
        self._window = 1
        self._begun: list[Pending] = []  # calls that no bucket waits for yet
        self._under_way: deque[list[Pending]] = deque()  # the calls of each bucket
        self._own_end: Receiver | None = None  # of a run that keeps what was pushed
        self._kept: dict[int, Message] = {}  # the messages of the last push, or references to them

    def machines(self, *, keeps: bool = False) -> set[str]:
        """Where the actor's first rank and the engines are; and this process, if it has to read what was pushed."""
        here = {this_machine()} if keeps else set[str]()
        return here | {self._actor.machine(), *self._group.waiter.gather(self._group.send("machine"))}

    def connect(self, transport: Transport, *, keeps: bool = False) -> None:
        """Let buckets travel through ``transport``. Again after a process took the place of another.

        ``keeps``: ``pushed`` can read a bucket until it is sent anew.
        """
        address = transport.connect(self._actor, self, keeps=keeps)
        if keeps:  # it is read-only here, and only read
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._own_end = transport.receiver(address) if keeps else None
        self._kept.clear()
        self._window = transport.window

    def open_receivers(self, transport: Transport, address: Address) -> None:
        self._group.call("open_receiver", transport, address)

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        """Contiguous shares of the prompts, one per engine; the results in prompt order."""
        shares = split_evenly(prompts, len(self._group.members))
        calls = [
            Pending(member.handle.generate.remote(share, sampling), member.name, "generate")
            for member, share in zip(self._group.members, shares, strict=False)
        ]
        return join(prompts, self._group.waiter.gather(calls))

    def begin_update(self) -> None:
        self._under_way.clear()  # of an update that broke off
        self._begun = self._group.send("begin_update")

    def send(self, index: int, bucket: Bucket) -> None:
        self._send(index, bucket, *self._actor.send_bucket(index))

    def send_saved(self, index: int, bucket: Bucket, checkpoint: Path) -> None:
        self._send(index, bucket, *self._actor.send_saved_bucket(index, checkpoint))

    def _send(self, index: int, bucket: Bucket, sent: list[Pending], message: Message) -> None:
        if self._own_end is not None:
            self._kept[index] = message
        self._under_way.append([*self._begun, *sent, *self._group.send("load_bucket", bucket, message)])
        self._begun = []
        if len(self._under_way) == self._window:
            self._group.waiter.gather(self._under_way.popleft())

    def end_update(self, version: int) -> None:
        rest = [call for calls in self._under_way for call in calls]
        self._under_way.clear()
        self._group.waiter.gather([*rest, *self._group.send("end_update", version)])

    def pushed(self, index: int, bucket: Bucket) -> Tensor:
        assert self._own_end is not None  # connected so by a run that looks ahead
        (message,) = self._group.waiter.gather([Pending(self._kept[index], "the trainer", "send_bucket")])
        return self._own_end.receive(bucket, message)

    def probe(self, prompt: Tokens, num_tokens: int) -> list[EngineAnswer]:
        return self._group.waiter.gather(self._group.send("probe", prompt, num_tokens))
