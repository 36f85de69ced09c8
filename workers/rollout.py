"""All rollout engines as the driver sees them."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from rlxf.core.errors import SyncError, WorkerLost
from rlxf.core.types import PromptBatch, Rollouts, Tokens
from rlxf.platform import get_platform
from rlxf.platform.memory import largest
from rlxf.rollout.dispatch import Dispatch
from rlxf.rollout.engine import Sampling
from rlxf.rollout.shares import join, split_evenly
from rlxf.sync.checksums import compare
from rlxf.sync.plan import Bucket
from rlxf.sync.probe import EngineAnswer
from rlxf.sync.saved import saved_tensors
from rlxf.sync.transports import TRANSPORTS
from rlxf.sync.transports.shared_memory import this_machine
from rlxf.sync.transports.transport import Address, Message, Receiver, ReceiverPlace, Transport

from .actor import RemoteActor, Sent
from .group import WorkerGroup
from .remote import Answer, Pending
from .sampling import Share, sample_queue, sample_shares
from .sleeping import Sleepers


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """The calls of one bucket."""

    begun: list[Pending]  # what the engines do before it
    sent: list[Pending]
    received: list[Pending]


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
        devices: of each engine; every one has a process that receives.
        asleep: they are now.
    """

    def __init__(
        self,
        group: WorkerGroup,
        actor: RemoteActor,
        *,
        choose: Callable[[], Transport] | None = None,
        keeps: bool = False,
        devices: int = 1,
        asleep: bool = False,
    ) -> None:
        self._group = group
        self._actor = actor
        self._choose = choose
        self._keeps = keeps
        self._devices = devices
        self._transport: Transport = TRANSPORTS["object_store"]  # until it is connected
        self._check = False  # whether this push compares checksums
        self._begun: list[Pending] = []  # calls that no bucket waits for yet
        self._under_way: deque[_UnderWay] = deque()  # the calls of each bucket
        self._own_end: Receiver | None = None  # of a run that keeps what was pushed
        self._kept: dict[int, Message] = {}  # the messages of the last push, or references to them
        self._plan: tuple[Bucket, ...] = ()
        self._specs: tuple[Any, ...] = ()  # references to its buckets, which each call of a push names: sent once
        self._version = 0  # of the last push
        self._saved: Path | None = None  # the checkpoint that its weights were read from; None: they were the actor's
        # Engines that were started again:
        self._loading: dict[int, Pending] = {}  # those that load their model
        self._unproven: set[int] = set()  # those that have done nothing since
        self._renewed = False  # since the last push: the transport does not reach all of them
        self._push_lost = False  # an engine was lost in the push that is under way
        self._as_loaded = True  # no push has begun: engines hold what they loaded
        self._sleepers = Sleepers(group, asleep=asleep)
        self._slots: tuple[int | None] | None = None  # of an engine; not asked yet

    def connect(self, transport: Transport | None = None, *, keeps: bool | None = None) -> Transport:
        """Let buckets travel through ``transport``, or through the one that ``choose`` gives.

        Again after a process took the place of another. ``keeps``: see the class.
        """
        self._keeps = self._keeps if keeps is None else keeps
        if transport is None:
            assert self._choose is not None
            transport = self._choose()
        self._transport = transport
        here = self._keeps and transport.keeps_what_was_sent and self._reaches(transport)
        if self._keeps and not here:
            self._actor.keep_pushed()
        address = transport.connect(self._actor, self, keeps=here)
        if here:  # it is read-only here, and only read
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._own_end = transport.receiver(address, ReceiverPlace(platform=get_platform("cpu"))) if here else None
        self._kept.clear()
        self._plan = self._actor.sync_plan()
        self._specs = tuple(ray.put(bucket) for bucket in self._plan)
        self._renewed = False
        return transport

    def _reaches(self, transport: Transport) -> bool:
        """Whether this process can read what the actor sent."""
        return transport.name != "shared_memory" or self._actor.where("cpu")[0].machine == this_machine()

    @property
    def transport(self) -> str:
        """The name of that through which weights travel."""
        return self._transport.name

    @property
    def num_receivers(self) -> int:
        return self._devices * self.num_engines

    def open_receivers(self, transport: Transport, address: Address) -> None:
        joins = self._actor.join_receivers()
        address = ray.put(address)
        calls = [
            self._group.one(engine, "open_receivers", transport, address, engine * self._devices)
            for engine in range(self.num_engines)
        ]
        self._group.waiter.gather([*joins, *calls])

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
        self._sleepers.are_new(engines)
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
            if len(calls) > self._transport.window:  # else the object store would hold the whole model
                self._group.waiter.gather([calls.pop(0)])
        self._group.waiter.gather([*calls, self._group.one(engine, "end_update", self._version)])

    def _copy(self, index: int, bucket: Bucket) -> Any:
        """What ``load_copy`` takes of a bucket, as it was pushed last."""
        if self._keeps:
            return self.pushed(index, bucket).numpy()
        return self._actor.export_copy(index) if self._saved is None else self._read_saved(bucket).numpy()

    def _read_saved(self, bucket: Bucket) -> Tensor:
        """[bucket.num_bytes] uint8 of the checkpoint that the last push was read from."""
        assert self._saved is not None
        payload = torch.empty(bucket.num_bytes, dtype=torch.uint8)
        bucket.fill(payload, saved_tensors(self._saved, bucket))
        return payload

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
        self._make_loaded()
        if self._renewed:
            self.connect()

    def _make_loaded(self) -> None:
        if self._loading and self._group.starts is not None:
            self._group.starts.wait_for_loading(list(self._loading.values()))
            self._loading.clear()

    def sleep(self) -> None:
        """All that are awake. One that is lost in it has sampled already: another one takes its place, and sleeps."""
        lost = self._sleepers.sleep(set(range(self.num_engines)) - set(self._loading))
        if lost:
            self.start_again(lost, next(iter(lost.values())), hopeless=False)
            self._make_loaded()
            self._group.waiter.gather([self._group.one(engine, "sleep") for engine in lost])
            self._sleepers.asleep |= set(lost)

    def wake_weights(self) -> None:
        self._sleepers.wake_weights()

    def wake_cache(self) -> None:
        self._sleepers.wake_cache()

    def memory_peaks(self) -> dict[str, int]:
        return largest(self._group.ask("memory_peaks"))

    def make_room(self, lost: WorkerLost) -> None:
        """All engines are asleep, as before the trainer loads on their devices; those that cannot are new ones."""
        self._under_way.clear()
        if self._sleepers.half and self._group.starts is not None:
            calls = self._group.starts.start_again(self._group, sorted(self._sleepers.half), lost)
            self._group.starts.wait_for_loading(calls)
            self._sleepers.half = set()
        self._make_loaded()
        self.sleep()

    def holds_start(self) -> bool:
        # A trainer that begins anew is at version 0 again, and the engines are not. And an engine that takes the place
        # of another samples only after a push.
        if not self._as_loaded or self._loading or self._unproven:
            return False
        files = [*self._actor.start_files(), *self._group.ask("start_files")]
        return files[0] is not None and all(other == files[0] for other in files)

    def keep_start(self) -> None:
        self._make_whole()
        if self._own_end is None:  # the actor keeps a copy itself, from its first update on
            return
        for index in range(len(self._plan)):
            sent = self._actor.send_bucket(index, check=False)
            self._kept[index] = sent.message
            self._group.waiter.gather(sent.calls)

    def begin_update(self, *, check: bool = False) -> None:
        self._check = check
        self._under_way.clear()  # of an update that broke off
        self._as_loaded = False
        self._make_whole()
        self._begun = self._group.send("begin_update")

    def send(self, index: int, bucket: Bucket) -> None:
        self._saved = None
        self._send(index, self._actor.send_bucket(index, check=self._check))

    def send_saved(self, index: int, bucket: Bucket, checkpoint: Path) -> None:
        self._saved = checkpoint
        self._send(index, self._actor.send_saved_bucket(index, checkpoint, check=self._check))

    def _send(self, index: int, sent: Sent) -> None:
        if self._own_end is not None:
            self._kept[index] = sent.message
        others = [call.ref for call in sent.calls[1:]] if self._transport.everywhere else []
        received = self._group.send("receive", self._specs[index], sent.message, self._check, *others)
        self._under_way.append(_UnderWay(self._begun, sent.calls, received))
        self._begun = []
        if len(self._under_way) == self._transport.window:
            self._finish(self._under_way.popleft())

    def _finish(self, *buckets: _UnderWay, then: Sequence[Pending] = ()) -> None:
        """Wait for the calls of these buckets, and for others after them; compare checksums if this push does."""
        calls = [call for bucket in buckets for call in (*bucket.begun, *bucket.sent, *bucket.received)]
        try:
            answers = self._group.waiter.gather([*calls, *then])
        except SyncError as error:  # perhaps because a process is lost that has to do with another bucket
            others = [call for bucket in self._under_way for call in (*bucket.sent, *bucket.received)]
            raise self._group.waiter.cause(error, others) from error
        if not self._check:
            return
        by_call = dict(zip((call.ref for call in calls), answers, strict=False))
        for bucket in buckets:
            for call in bucket.received:
                for number, received in enumerate(by_call[call.ref]):
                    who = call.worker if self._devices == 1 else f"process {number} of {call.worker}"
                    compare(by_call[bucket.sent[0].ref], received, who)

    def end_update(self, version: int) -> None:
        rest = list(self._under_way)
        self._under_way.clear()
        self._finish(*rest, then=self._group.send("end_update", version))
        self._version, self._push_lost = version, False
        self.prove(range(len(self._group.members)))

    def pushed(self, index: int, bucket: Bucket) -> Tensor:
        if self._own_end is not None:
            (message,) = self._group.waiter.gather([Pending(self._kept[index], "the trainer", "send_bucket")])
            return self._own_end.receive(bucket, message)
        if self._saved is not None:
            return self._read_saved(bucket)
        (payload,) = self._group.waiter.gather([Pending(self._actor.pushed_copy(index), "the trainer", "pushed_copy")])
        return torch.from_numpy(payload)

    def probe(self, prompt: Tokens, num_tokens: int) -> list[EngineAnswer]:
        return self._group.waiter.gather(self._group.send("probe", prompt, num_tokens))
