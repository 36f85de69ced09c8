"""The rollout engines' processes, and all engines as the driver sees them."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.assembly.roles import build_engine
from rlxf.core.errors import WorkerLost
from rlxf.core.types import PromptBatch, Rollouts, Tokens
from rlxf.rollout.chunks import Gathered
from rlxf.rollout.dispatch import Dispatch
from rlxf.rollout.engine import ProbeResult, RolloutEngine, Sampling, Session
from rlxf.rollout.shares import join, split_evenly
from rlxf.sync.plan import Bucket
from rlxf.sync.probe import EngineAnswer
from rlxf.sync.saved import saved_tensors
from rlxf.sync.transports.shared_memory import this_machine
from rlxf.sync.transports.transport import Address, Message, Receiver, Transport

from .actor import RemoteActor
from .group import WorkerGroup
from .remote import Answer, Pending
from .sampling import Share, sample_queue, sample_shares
from .worker import Worker


class RolloutWorker(Worker):
    """One rollout engine; alone in its process."""

    make = staticmethod(build_engine)
    # An engine that takes the place of another samples only after it got weights.
    make_again = staticmethod(partial(build_engine, stale=True))
    room: RolloutEngine
    receiver: Receiver | None = None  # of buckets, once it is connected with the actor
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
        self._slots: tuple[int | None] | None = None  # of an engine; not asked yet

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

    @property
    def group(self) -> WorkerGroup:
        return self._group

    @property
    def loading(self) -> dict[int, Pending]:
        return self._loading

    @property
    def num_engines(self) -> int:
        return len(self._group.members)

    def num_slots(self, sampling: Sampling) -> int | None:
        """Completions that one engine decodes at the same time at most; None: all that it gets.

        One is asked, once: all are of one kind. If it is lost, another one; whoever samples next deals with the loss.
        """
        for engine in range(self.num_engines):
            if self._slots is None and engine not in self._loading:
                answer = self._group.waiter.first([self._group.one(engine, "num_slots", sampling)])
                self._slots = None if answer.lost is not None else (answer.value,)
        return None if self._slots is None else self._slots[0]

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        """Contiguous shares of the prompts, one per engine; the results in prompt order.

        Raises:
            WorkerLost: two engines were lost over the same share, or one twice before it had finished any.
        """
        shares = [Share(share) for share in split_evenly(prompts, self.num_engines)]
        return join(prompts, list(sample_shares(self, shares, sampling)))

    def sample(self, prompts: PromptBatch, sampling: Sampling, dispatch: Dispatch) -> Iterator[Rollouts]:
        """All completions of some prompts at a time, as the engines make them.

        Raises:
            WorkerLost: two engines were lost over the same prompts, or one twice before it had finished any.
        """
        if dispatch.shares is None:
            slots = self.num_slots(sampling)
            room = len(prompts) if slots is None else max(slots // sampling.num_samples, 1)
            return sample_queue(self, prompts, dispatch.order, sampling, room=room)
        sizes = dispatch.sizes()
        shares = [Share(prompts.select(rows), each) for rows, each in zip(dispatch.shares, sizes, strict=True)]
        return sample_shares(self, shares, sampling)

    def start_again(self, engines: Iterable[int], lost: WorkerLost, *, hopeless: bool) -> None:
        """Begin to start these engines again; ``hopeless``: another one would be lost in the same way."""
        engines = list(engines)
        if self._group.starts is None or hopeless or self._unproven & set(engines):
            raise lost
        calls = self._group.starts.start_again(self._group, engines, lost)
        self._loading |= dict(zip(engines, calls, strict=True))
        self._unproven |= set(engines)
        self._renewed = True

    def take_loaded(self, engine: int, answer: Answer) -> None:
        """An engine that was started again has loaded, and gets the weights from which the others sample."""
        if answer.lost is not None:  # twice, before it had finished anything
            raise answer.lost
        del self._loading[engine]
        self._fill(engine)

    def prove(self, engines: Iterable[int]) -> None:
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
        self.start_again(gone, lost, hopeless=self._push_lost)
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
        self.prove(range(len(self._group.members)))

    def pushed(self, index: int, bucket: Bucket) -> Tensor:
        assert self._own_end is not None  # connected so by a run that looks ahead
        (message,) = self._group.waiter.gather([Pending(self._kept[index], "the trainer", "send_bucket")])
        return self._own_end.receive(bucket, message)

    def probe(self, prompt: Tokens, num_tokens: int) -> list[EngineAnswer]:
        return self._group.waiter.gather(self._group.send("probe", prompt, num_tokens))
