"""The rollout engines' processes, and all engines as the driver sees them."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.assembly.roles import build_engine
from rlxf.core.errors import WorkerLost
from rlxf.core.types import PromptBatch, Rollouts, Tokens
from rlxf.rollout.engine import ProbeResult, RolloutEngine, Sampling
from rlxf.rollout.shares import join, split_evenly
from rlxf.sync.plan import Bucket
from rlxf.sync.probe import EngineAnswer
from rlxf.sync.saved import saved_tensors
from rlxf.sync.transports.shared_memory import this_machine
from rlxf.sync.transports.transport import Address, Message, Receiver, Transport

from .actor import RemoteActor
from .group import WorkerGroup
from .remote import Answer, Pending
from .worker import Worker


class RolloutWorker(Worker):
    """One rollout engine; alone in its process."""

    make = staticmethod(build_engine)
    # An engine that takes the place of another samples only after it got weights.
    make_again = staticmethod(partial(build_engine, stale=True))
    room: RolloutEngine
    receiver: Receiver | None = None  # of buckets, once it is connected with the actor

    @property
    def engine(self) -> RolloutEngine:
        return self.room

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        return self.engine.generate(prompts, sampling)

    def _phase_of(self, method: str, args: tuple[Any, ...]) -> str:
        """An evaluation has more prompts than a step, and other lengths."""
        purposes = [arg.purpose for arg in args if isinstance(arg, Sampling)]
        return f"{method} ({purposes[0]})" if purposes and purposes[0] != "train" else method

    def begin_update(self) -> None:
        self.engine.begin_update()

    def open_receiver(self, transport: Transport, address: Address) -> None:
        self.receiver = transport.receiver(address)

    def load_bucket(self, bucket: Bucket, message: Message) -> None:
        """``message``: what the actor's sender gave."""
        assert self.receiver is not None  # connected
        self.engine.load_bucket(bucket, self.receiver.receive(bucket, message))

    def load_copy(self, bucket: Bucket, payload: Any) -> None:
        """``load_bucket`` without a transport; ``payload``: an array of the bucket's bytes."""
        self.engine.load_bucket(bucket, torch.from_numpy(payload))

    def end_update(self, version: int) -> None:
        self.engine.end_update(version)

    def probe(self, prompt: Tokens, num_tokens: int) -> ProbeResult:
        return self.engine.probe(prompt, num_tokens)


class RemoteEngines:
    """Every rollout engine of a run: prompts are shared out among them, weights go to all of them.

    An update is a chain of calls, which every worker runs in the order in which they were made, so nobody waits for
    each of them. But a transport uses the memory of a bucket again: before that, the engines must have loaded it.

    An engine that is lost while it samples is started again, and gets the weights from which the others sample.
    Meanwhile its prompts go to an engine that has nothing else to do. One that is lost otherwise comes back with the
    next push.

    Args:
        group: the engines.
        actor: sends them its weights.
        choose: the transport for where actor and engines are now; asked whenever a process took the place of another.
        keeps: ``pushed`` can read a bucket until it is sent anew.
    """

    def __init__(
        self,
        group: WorkerGroup,
        actor: RemoteActor,
        *,
        choose: Callable[[RemoteEngines], Transport] | None = None,
        keeps: bool = False,
    ) -> None:
        self._group = group
        self._actor = actor
        self._choose = choose
        self._keeps = keeps
        self._window = 1
        self._begun: list[Pending] = []  # calls that no bucket waits for yet
        self._under_way: deque[list[Pending]] = deque()  # the calls of each bucket
        self._own_end: Receiver | None = None  # of a run that keeps what was pushed
        self._kept: dict[int, Message] = {}  # the messages of the last push, or references to them
        self._plan: tuple[Bucket, ...] = ()
        self._version = 0  # of the last push
        self._saved: Path | None = None  # the checkpoint that its weights were read from; None: they were the actor's
        # Engines that were started again:
        self._loading: dict[int, Pending] = {}  # those that load their model
        self._unproven: set[int] = set()  # those that have done nothing since
        self._renewed = False  # since the last push: the transport does not reach all of them
        self._push_lost = False  # an engine was lost in the push that is under way

    def machines(self) -> set[str]:
        """Where the actor's first rank and the engines are; and this process, if it has to read what was pushed."""
        here = {this_machine()} if self._keeps else set[str]()
        return here | {self._actor.machine(), *self._group.waiter.gather(self._group.send("machine"))}

    def connect(self, transport: Transport | None = None, *, keeps: bool | None = None) -> Transport:
        """Let buckets travel through ``transport``, or through the one that ``choose`` gives.

        Again after a process took the place of another. ``keeps``: see the class.
        """
        self._keeps = self._keeps if keeps is None else keeps
        if transport is None:
            assert self._choose is not None
            transport = self._choose(self)
        address = transport.connect(self._actor, self, keeps=self._keeps)
        if self._keeps:  # it is read-only here, and only read
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._own_end = transport.receiver(address) if self._keeps else None
        self._kept.clear()
        self._window = transport.window
        self._plan = self._actor.sync_plan()
        self._renewed = False
        return transport

    def open_receivers(self, transport: Transport, address: Address) -> None:
        self._group.call("open_receiver", transport, address)

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        """Contiguous shares of the prompts, one per engine; the results in prompt order.

        Raises:
            WorkerLost: two engines were lost over the same share, or one twice before it had finished any.
        """
        shares = split_evenly(prompts, len(self._group.members))
        return join(prompts, self._sample(shares, sampling))

    def _sample(self, shares: list[PromptBatch], sampling: Sampling) -> list[Rollouts]:
        found: dict[int, Rollouts] = {}
        todo = deque(range(len(shares)))
        free = deque(engine for engine in range(len(self._group.members)) if engine not in self._loading)
        at_work: dict[Any, tuple[int, int, Pending]] = {}  # by the call's reference: engine and share
        losses: set[int] = set()  # shares over which an engine was lost
        while len(found) < len(shares):
            while todo and free:
                engine, share = free.popleft(), todo.popleft()
                call = self._group.one(engine, "generate", shares[share], sampling)
                at_work[call.ref] = engine, share, call
            loading = {call.ref: engine for engine, call in self._loading.items()}
            answer = self._group.waiter.first([*(call for _, _, call in at_work.values()), *self._loading.values()])
            if answer.call.ref in loading:
                engine = loading[answer.call.ref]
                self._take_loaded(engine, answer)
                self._fill(engine)
                free.append(engine)
                continue
            engine, share, _ = at_work.pop(answer.call.ref)
            if answer.lost is None:
                found[share] = answer.value
                free.append(engine)
                self._prove([engine])
            else:
                self._start_again([engine], answer.lost, hopeless=share in losses)
                losses.add(share)
                todo.append(share)
        return [found[share] for share in range(len(shares))]

    def _start_again(self, engines: Iterable[int], lost: WorkerLost, *, hopeless: bool) -> None:
        """Begin to start these engines again; ``hopeless``: another one would be lost in the same way."""
        engines = list(engines)
        if self._group.starts is None or hopeless or self._unproven & set(engines):
            raise lost
        calls = self._group.starts.start_again(self._group, engines, lost)
        self._loading |= dict(zip(engines, calls, strict=True))
        self._unproven |= set(engines)
        self._renewed = True

    def _take_loaded(self, engine: int, answer: Answer) -> None:
        if answer.lost is not None:  # twice, before it had finished anything
            raise answer.lost
        del self._loading[engine]

    def _prove(self, engines: Iterable[int]) -> None:
        """These engines have done a piece of work."""
        engines = list(engines)
        if self._unproven & set(engines) and self._group.starts is not None:
            self._group.starts.is_back(self._group, engines)
        self._unproven -= set(engines)

    def _fill(self, engine: int) -> None:
        """The weights from which the other engines sample, into one that was started again.

        They are the copy of a run that looks ahead, or what a checkpoint holds for the engines, if that was pushed
        last; else the actor's, which has no newer ones while engines sample.
        """
        calls = [self._group.one(engine, "begin_update")]
        for index, bucket in enumerate(self._plan):
            calls.append(self._group.one(engine, "load_copy", bucket, self._copy(index, bucket)))
            if len(calls) > self._window:  # else the object store would hold the whole model
                self._group.waiter.gather([calls.pop(0)])
        self._group.waiter.gather([*calls, self._group.one(engine, "end_update", self._version)])

    def _copy(self, index: int, bucket: Bucket) -> Any:
        """What ``load_copy`` takes of a bucket, as it was pushed last."""
        if self._keeps:
            return self.pushed(index, bucket).numpy()
        if self._saved is None:
            return self._actor.export_copy(index)
        payload = torch.empty(bucket.num_bytes, dtype=torch.uint8)
        bucket.fill(payload, saved_tensors(self._saved, bucket))
        return payload.numpy()

    @property
    def renewed(self) -> bool:
        """Whether an engine was started again since the last push: the next one is probed."""
        return self._renewed

    def recover(self, lost: WorkerLost) -> None:
        """After a push that failed, or a probe: engines in place of those that are lost, so that it can be repeated.

        Raises:
            WorkerLost: ``lost``, if it is none of them, or if one was lost again.
        """
        gone = self._group.starts.gone(self._group) if self._group.starts is not None else []
        gone = [engine for engine in gone if engine not in self._loading]
        if not gone:
            raise lost
        self._start_again(gone, lost, hopeless=self._push_lost)
        self._push_lost = True

    def begin_again(self) -> None:
        """The actor's processes are new ones."""
        self._under_way.clear()
        self._begun, self._push_lost, self._renewed = [], False, True

    def _make_whole(self) -> None:
        """All engines are there, and a transport reaches them."""
        if self._loading and self._group.starts is not None:
            self._group.starts.wait_for_loading(list(self._loading.values()))
            self._loading.clear()
        if self._renewed:
            self.connect()

    def begin_update(self) -> None:
        self._under_way.clear()  # of an update that broke off
        self._make_whole()
        self._begun = self._group.send("begin_update")

    def send(self, index: int, bucket: Bucket) -> None:
        self._saved = None
        self._send(index, bucket, *self._actor.send_bucket(index))

    def send_saved(self, index: int, bucket: Bucket, checkpoint: Path) -> None:
        self._saved = checkpoint
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
        self._version, self._push_lost = version, False
        self._prove(range(len(self._group.members)))

    def pushed(self, index: int, bucket: Bucket) -> Tensor:
        assert self._own_end is not None  # connected so by a run that looks ahead
        (message,) = self._group.waiter.gather([Pending(self._kept[index], "the trainer", "send_bucket")])
        return self._own_end.receive(bucket, message)

    def probe(self, prompt: Tokens, num_tokens: int) -> list[EngineAnswer]:
        return self._group.waiter.gather(self._group.send("probe", prompt, num_tokens))
