"""Pushing the actor's weights into the rollout engines, and checking that they arrived."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from torch import Tensor

from rlxf.config.schema import SyncConfig
from rlxf.core.errors import SyncError, WorkerLost
from rlxf.core.types import Metrics, Sequences, Tokens
from rlxf.platform import Platform, get_platform
from rlxf.platform.memory import PhaseMemory, largest
from rlxf.platform.visible import visible_device
from rlxf.sync.plan import Bucket
from rlxf.sync.probe import EngineAnswer, Probe, check_answers
from rlxf.sync.saved import save_buckets, saved_tensors
from rlxf.sync.transports import TRANSPORTS
from rlxf.sync.transports.transport import Address, Exports, Receiver, ReceiverPlace, Sender, SenderPlace, Transport
from rlxf.sync.turns import NoTurns, Turns

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class WeightSource(Protocol):
    """The actor, or a proxy of it: gives the weights of a push, and the log-probs that the probe compares."""

    def sync_plan(self) -> tuple[Bucket, ...]: ...

    def token_logps(self, sequences: Sequences) -> Tensor:
        """[sum completion tokens] float32 under the newest weights."""
        ...


class WeightSink(Protocol):
    """All rollout engines of a run, connected with its actor by a transport."""

    @property
    def transport(self) -> str:
        """The name of that through which weights travel."""
        ...

    def holds_start(self) -> bool:
        """Whether every engine may sample from the files that it loaded, and the actor has loaded the same ones."""
        ...

    def keep_start(self) -> None:
        """The actor's weights are those that the engines hold, though they were not pushed: ``pushed`` gives them."""
        ...

    def begin_update(self, *, check: bool = False) -> None:
        """``check``: compare a checksum of each tensor where it is sent with one where it is received."""
        ...

    def send(self, index: int, bucket: Bucket) -> None:
        """Bucket ``index`` of the plan from the actor into every engine; it may still be under way on return."""
        ...

    def send_saved(self, index: int, bucket: Bucket, checkpoint: Path) -> None:
        """The same with what ``save_pushed`` wrote into a checkpoint in place of the actor's weights."""
        ...

    def end_update(self, version: int) -> None:
        """Every engine has all buckets, and samples from them.

        Raises:
            SyncError: an engine received something else than was sent.
        """
        ...

    def pushed(self, index: int, bucket: Bucket) -> Tensor:
        """[bucket.num_bytes] uint8: bucket ``index`` as it was sent last. The actor is not asked: it may be at work.

        Only of a run that looks ahead, which keeps one copy until the next push.
        """
        ...

    def probe(self, prompt: Tokens, num_tokens: int) -> list[EngineAnswer]:
        """The answer of each engine."""
        ...

    @property
    def renewed(self) -> bool:
        """Whether a new engine took the place of another since the last push."""
        ...

    def recover(self, lost: WorkerLost) -> None:
        """Engines in place of lost ones, so that a push can be repeated.

        Raises:
            WorkerLost: ``lost``, if that cannot be.
        """
        ...


class Engine(Protocol):
    """One rollout engine, as far as weights are concerned."""

    def sleep(self) -> None: ...

    def wake_weights(self) -> None: ...

    def wake_cache(self) -> None: ...

    @property
    def memory(self) -> PhaseMemory:
        """The peaks of its phases."""
        ...

    def begin_update(self) -> None: ...

    def load_bucket(self, bucket: Bucket, payload: Tensor) -> None: ...

    def end_update(self, version: int) -> None: ...

    def probe(self, prompt: Tokens, num_tokens: int) -> EngineAnswer: ...


class LocalSink:
    """The sink of a run whose actor and engines live in this process.

    Args:
        actor: whose weights are sent.
        engines: that get them.
        platform: of the device that they share; None: a CPU.
        transport: through which they travel.
        loaded_alike: actor and engines have loaded the same files.
    """

    def __init__(
        self,
        actor: Exports,
        *engines: Engine,
        platform: Platform | None = None,
        transport: Transport = TRANSPORTS["in_process"],
        loaded_alike: bool = False,
    ) -> None:
        self._loaded_alike = loaded_alike
        self._asleep = self._half = False
        self._platform = platform or get_platform("cpu")
        self._device = self._platform.set_device(0)
        self._actor = actor
        self._engines = engines
        self._sender: Sender | None = None
        self._receivers: Sequence[Receiver] = ()
        self.connect(transport)

    def connect(self, transport: Transport) -> None:
        """Open both ends of ``transport``, in place of those that are open."""
        self.transport = transport.name
        transport.connect(self, self)  # actor and engines are both here

    def sleep(self) -> None:
        for engine in self._engines:
            engine.sleep()
        self._asleep = True

    def wake_weights(self) -> None:
        if self._asleep:
            for engine in self._engines:
                engine.wake_weights()
            self._asleep, self._half = False, True

    def wake_cache(self) -> None:
        if self._half:
            for engine in self._engines:
                engine.wake_cache()
            self._half = False

    def memory_peaks(self) -> dict[str, int]:
        return largest(engine.memory.peaks for engine in self._engines)

    def holds_start(self) -> bool:
        return self._loaded_alike

    def keep_start(self) -> None:
        """``pushed`` gives nothing here."""

    @property
    def num_receivers(self) -> int:
        return len(self._engines)

    def open_sender(self, transport: Transport, num_receivers: int, keeps: bool) -> Address:
        earlier, self._sender = self._sender, None  # closed once, also if the new one cannot be made
        if earlier is not None:
            earlier.close()
        where = visible_device(self._platform, 0)
        place = SenderPlace(platform=self._platform, device=self._device, where=where, num_receivers=num_receivers)
        self._sender = transport.sender(self._actor.sync_plan(), place, keeps=keeps)
        return self._sender.address

    def open_receivers(self, transport: Transport, address: Address) -> None:
        where = visible_device(self._platform, 0)
        place = ReceiverPlace(platform=self._platform, device=self._device, where=where)
        self._receivers = [transport.receiver(address, place) for _ in self._engines]

    def begin_update(self, *, check: bool = False) -> None:
        # Nothing to check: actor and engines read the same memory of one process.
        for engine in self._engines:
            engine.begin_update()

    def send(self, index: int, bucket: Bucket) -> None:
        self._send(index, bucket, self._actor.bucket_tensors(index))

    def send_saved(self, index: int, bucket: Bucket, checkpoint: Path) -> None:
        self._send(index, bucket, saved_tensors(checkpoint, bucket))

    def _send(self, index: int, bucket: Bucket, tensors: Iterator[tuple[str, Tensor]]) -> None:
        assert self._sender is not None  # connected
        message = self._sender.send(index, tensors)
        for engine, receiver in zip(self._engines, self._receivers, strict=True):
            engine.load_bucket(bucket, receiver.receive(bucket, message))

    def end_update(self, version: int) -> None:
        for engine in self._engines:
            engine.end_update(version)

    def pushed(self, index: int, bucket: Bucket) -> Tensor:
        # Here the engines have always sampled before the actor moves on.
        raise SyncError("runtime=local keeps no copy of the weights that were pushed")

    def probe(self, prompt: Tokens, num_tokens: int) -> list[EngineAnswer]:
        return [engine.probe(prompt, num_tokens) for engine in self._engines]

    @property
    def renewed(self) -> bool:
        """Never: the engines are in this process."""
        return False

    def recover(self, lost: WorkerLost) -> None:
        """The engines are in this process."""
        raise lost


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """What one push did."""

    version: int
    num_bytes: int
    seconds: float  # without the probe
    probe_difference: float | None  # mean difference of log-probs, engine against actor; None: not probed
    planned: bool = True  # false: probed only because a resumed run begins here
    transport: str | None = None  # its name; None: nothing was pushed
    memory: Metrics = field(default_factory=dict)  # peaks of trainer and engines, where they share devices

    def metrics(self) -> Metrics:
        """By the names of docs/metrics.md; but for times the same in a run that was resumed and in one that was not."""
        metrics = {"sync/bytes": float(self.num_bytes)}
        if self.transport is not None:
            metrics["sync/seconds"] = self.seconds
            metrics["sync/gb_per_s"] = self.num_bytes / self.seconds / 1e9 if self.seconds else math.nan
            metrics["sync/transport"] = float(list(TRANSPORTS).index(self.transport))
        metrics |= self.memory
        if self.planned and self.probe_difference is not None:
            metrics["sync/probe_difference"] = self.probe_difference
        return metrics


class WeightSync:
    """Pushes versions from one source into one sink, and probes the first ones and every so many.

    A push that failed can be repeated: it begins anew in every engine. That is done when an engine is lost in it.

    Args:
        source: the actor.
        sink: the rollout engines, connected with the actor.
        config: which versions are probed.
        probe: what the engines are asked.
        filled: whether the engines hold weights before the first push; those of a megatron checkpoint come with it.
        alike: whether the actor's first weights are those of the folder, so that engines which loaded the same files
            need no push of them.
        turns: of a run whose engines share devices with the actor; None: they do not.
    """

    def __init__(
        self,
        source: WeightSource,
        sink: WeightSink,
        config: SyncConfig,
        probe: Probe,
        *,
        filled: bool = True,
        alike: bool = False,
        turns: Turns | None = None,
    ) -> None:
        self._source = source
        self._sink = sink
        self._config = config
        self._probe = probe
        self._plan = source.sync_plan()
        self._num_updates = 0  # pushes that changed weights: version 0 is what both sides loaded from the same folder
        self._can_sample = filled  # false: empty, or a push broke off
        self._alike = alike  # until the first push
        self._seconds = 0.0  # of the newest push
        self._turns: Turns | NoTurns = turns or NoTurns()
        self.takes_turns = turns is not None

    def push(self, version: int) -> SyncReport:
        """Make every engine sample from the source's newest weights, which are ``version`` from now on.

        Raises:
            SyncError: a probe shows that an engine samples from something else.
        """
        if version == 0 and self._alike and not self.takes_turns and self._sink.holds_start():
            self._sink.keep_start()
            log.info("the engines sample from what they loaded: the trainer started from the same files")
            return SyncReport(version=0, num_bytes=0, seconds=0.0, probe_difference=None)
        difference = self._repeated(partial(self._push, version))
        self._num_updates += version > 0
        return SyncReport(
            version=version,
            num_bytes=sum(bucket.num_bytes for bucket in self._plan),
            seconds=self._seconds,
            probe_difference=difference,
            planned=self._is_planned(version),
            transport=self._sink.transport,
            memory=self._turns.metrics(),
        )

    def sampled(self) -> None:
        """All completions of a step are there. Engines that share devices go to sleep; a push wakes them."""
        self._turns.sampled()

    def before_update(self) -> None:
        """An update follows. Where engines share devices, the actor gets its optimizer back."""
        self._turns.train()

    def _push(self, version: int) -> float | None:
        due = self._is_due(version) or self.takes_turns or (version > 0 and self._sink.renewed)
        if due and self._can_sample and not self._sink.renewed and not self.takes_turns:
            # Fills the prefix cache from the old weights: if the update leaves that there, the probe below shows it.
            self._sink.probe(self._probe.prompt, self._probe.num_tokens)
        self._turns.push(partial(self._send, version, self._sink.send, check=due))
        return self._verify(version) if due else None

    def _repeated(self, work: Callable[[], Result]) -> Result:
        """What ``work`` gives; it is done anew, as a whole, when an engine was lost and another one took its place."""
        while True:
            try:
                return work()
            except WorkerLost as lost:
                self._can_sample = False
                self._sink.recover(lost)

    def save_pushed(self, checkpoint: Path) -> None:
        """Write the weights of the last push into a checkpoint's folder. The actor has newer ones and is not asked."""
        save_buckets(checkpoint, self._plan, lambda index: self._sink.pushed(index, self._plan[index]))

    def push_saved(self, checkpoint: Path, version: int) -> None:
        """Make every engine sample from what ``save_pushed`` wrote, which are ``version``; probed by the next push."""
        self._repeated(partial(self._send, version, partial(self._sink.send_saved, checkpoint=checkpoint)))

    def _send(self, version: int, send: Callable[[int, Bucket], None], *, check: bool = False) -> None:
        begin = time.perf_counter()
        self._can_sample = self._alike = False
        self._sink.begin_update(check=check)
        for index, bucket in enumerate(self._plan):
            send(index, bucket)
        self._sink.end_update(version)
        self._can_sample, self._seconds = True, time.perf_counter() - begin

    def _is_due(self, version: int) -> bool:
        if version == 0:  # both sides still hold the folder that they loaded: nothing to compare
            return False
        return self._num_updates < self._config.verify_first or self._is_planned(version)

    def _is_planned(self, version: int) -> bool:
        interval = self._config.verify_interval
        return version <= self._config.verify_first or (interval > 0 and version % interval == 0)

    def _verify(self, version: int) -> float:
        answers = self._sink.probe(self._probe.prompt, self._probe.num_tokens)
        return check_answers(self._probe, answers, version, self._source.token_logps)
