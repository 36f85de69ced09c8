"""The rollout engine's protocol, what it is asked for, and what every engine shares."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rlxf.config.schema import RolloutConfig
from rlxf.core.errors import SyncError
from rlxf.core.types import PromptBatch, Rollouts, Sequences, Tokens
from rlxf.platform.memory import PhaseMemory
from rlxf.sync.checksums import Checksums
from rlxf.sync.plan import Bucket
from rlxf.sync.transports.transport import Address, Message, Transport


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """What an engine is started with."""

    model: str  # folder; of a megatron checkpoint only config and tokenizer are read
    stale: bool = False  # it samples only after a push, not from what it loads
    tokenizer: str  # folder
    dtype: Literal["float32", "bfloat16", "float16"]
    max_length: int  # prompt + completion, tokens
    eos_tokens: tuple[str, ...] | None = None  # that end a completion besides the model's own
    prompts_per_call: int | None = None  # None: all at once
    num_devices: int = 1  # that share the model
    colocated: bool = False  # other roles use the same devices
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    trust_remote_code: bool = False


Purpose = Literal["train", "eval", "greedy", "initial"]
"""What completions are for: training, an evaluation's samples and greedy answers, the initial policy's baseline."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How to sample. Temperature 0 is greedy."""

    num_samples: int  # completions per prompt
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1 or 0: off
    min_p: float = 0.0  # 0: off
    repetition_penalty: float = 1.0  # 1: off
    stop: tuple[str, ...] = ()  # texts that end a completion (rlxf/models/stop_strings.py)
    structured_outputs: Mapping[str, Any] | None = None  # as the recipe has them; one entry
    seed: int = 0  # the run's seed
    purpose: Purpose = "train"
    step: int = 0  # complete driver steps before an evaluation; 0 in training, where positions tell the steps apart


def sample_seed(sampling: Sampling, *, position: int, prompt_id: int, sample_index: int) -> int:
    """The seed of one completion, in [0, 2**63): no two completions of a run share it.

    Args:
        sampling: its seed, purpose and step count.
        position: of the prompt (``PromptBatch.positions``): a row that occurs twice in a step has two of them.
        prompt_id: row of the data.
        sample_index: 0..K-1.

    It depends on nothing else: not on the worker, the batch, the layout or the weights that sample.
    """
    key = f"{sampling.seed}/{sampling.purpose}/{sampling.step}/{position}/{prompt_id}/{sample_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeResult:
    """What an engine sampled greedily after a probe prompt, with its own log-probs."""

    completion: list[int]
    logps: list[float]  # raw log-probs of ``completion``, one each
    policy_version: int


class Session(Protocol):
    """Prompts that an engine samples, handed back one by one.

    An engine has one session at a time. Another session, ``generate``, ``probe`` and ``begin_update`` close it, and so
    does an error in it: what was under way is dropped, and ``add`` and ``advance`` raise SyncError from then on.
    """

    @property
    def num_slots(self) -> int | None:
        """Completions that the engine decodes at the same time at most. None: all that wait when it begins a call."""
        ...

    def add(self, prompts: PromptBatch) -> None:
        """More prompts, also while others are under way. Their completions are those of ``generate``."""
        ...

    def advance(self) -> Rollouts | None:
        """Sample until at least one prompt has all of its ``num_samples`` completions.

        Returns:
            Those prompts, in the order in which they were added, with their completions (row ``p * K + k``);
            ``ended_s`` counts from the session's begin. None: nothing is under way.
        """
        ...

    def close(self) -> None:
        """Drop what is under way; the engine does nothing more for it. It may be called again."""
        ...


class RolloutEngine(Protocol):
    """Samples completions from the newest weights that it was given.

    An update is ``begin_update``, every bucket of the plan, ``end_update``. Any failure in between leaves the engine
    stale (``EngineState``): sampling then raises SyncError until a whole update has ended.

    An engine that shares its device sleeps while others compute: ``sleep``, ``wake_weights``, an update,
    ``wake_cache``. Another order raises SyncError (``WeightState``). One that can free nothing keeps the order as well.
    """

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        """``num_samples`` completions of each prompt, row ``p * K + k``; an EOS that was sampled is included.

        ``ended_s`` counts from this call's begin, where the engine can tell.
        """
        ...

    def session(self, sampling: Sampling) -> Session:
        """Begin to sample prompts that are added and handed back one by one; it closes the session before it."""
        ...

    @property
    def memory(self) -> PhaseMemory:
        """The peaks of its phases: ``load``, ``sample``, ``asleep`` and ``push``."""
        ...

    def begin_update(self) -> None: ...

    def open_receivers(self, transport: Transport, address: Address, first: int, host: str) -> None:
        """Connect every process of this engine with the actor, in place of an earlier connection.

        Args:
            transport: the way.
            address: where the actor's senders are.
            first: the number of this engine's first process among all receivers.
            host: the address of this machine.
        """
        ...

    def receive(self, bucket: Bucket, message: Message, *, check: bool = False) -> list[Checksums]:
        """Take one bucket as the transport brings it.

        Returns:
            The checksums of what each process of the engine received, if asked for (``check``); else nothing.
        """
        ...

    def load_bucket(self, bucket: Bucket, payload: Tensor) -> None:
        """Take one bucket of HF-named weights. ``payload``: [bucket.num_bytes] uint8, not to be kept."""
        ...

    def end_update(self, version: int) -> None:
        """Sample from the loaded weights from now on. Nothing of the old ones may survive (head, prefix cache)."""
        ...

    def sleep(self) -> None:
        """Close the session; cache and weights leave the device."""
        ...

    def wake_weights(self) -> None:
        """Make room for weights. A whole update has to follow; the cache is still away.

        Raises:
            SyncError: the device has not enough memory; the engine is asleep as before.
        """
        ...

    def wake_cache(self) -> None:
        """Make room for the cache, after the update: the engine may sample again. Raises as ``wake_weights`` does."""
        ...

    def probe(self, prompt: Tokens, num_tokens: int) -> ProbeResult:
        """Greedy continuation of one prompt, going through the prefix cache as any other request does.

        Whatever the recipe's lengths, an engine has room for two of its cache blocks, if the model has enough
        positions.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One sampled row, as an engine hands it to ``pack_rollouts``."""

    tokens: list[int]  # the EOS included when it was sampled
    logps: list[float]  # raw log-probs, one per token
    ended_s: float | None = None  # seconds until its last token; None: not measured


class EngineState(Enum):
    """Whether an engine may sample."""

    ASLEEP = "asleep"  # its weights are not on the device
    WEIGHTS_AWAKE = "weights awake"  # there is room for weights, and still none for the cache
    STALE = "stale"  # it has only loaded a folder, or is in an update: a whole push has to end first
    READY = "ready"


def _nothing() -> None:
    return None


class WeightState:
    """Which weights an engine holds, and whether it may sample from them. The one place that knows the order.

    ::

        READY or STALE --sleep--> ASLEEP --wake_weights--> WEIGHTS_AWAKE --begin, end, wake_cache--> READY
        READY or STALE --begin, end--> READY

    After every wake the weights are void until a whole push has ended, also where they came back.

    Args:
        state: at the start. ``READY``: what the engine has loaded is what it samples from, as version 0.
    """

    def __init__(self, state: EngineState = EngineState.READY) -> None:
        self.version = 0
        self.state = state
        self._receives = False  # between begin and end
        self._broken = False
        self._whole = False  # a push has ended since the weights woke

    def sleep(self, free: Callable[[], None] = _nothing) -> None:
        """``free`` gives the memory back. The engine counts as asleep from its begin on, also if it fails.

        Raises:
            SyncError: the engine is asleep or half awake, or an update is under way.
        """
        if self.state is EngineState.ASLEEP:
            raise SyncError("the rollout engine is asleep already; wake it and push all buckets before it sleeps again")
        if self.state is EngineState.WEIGHTS_AWAKE:
            raise SyncError(
                "the rollout engine is half awake, with room for weights and no cache; push all buckets and wake its "
                "cache before it sleeps again"
            )
        if self._receives:
            raise SyncError("the rollout engine is in an update and cannot sleep; push all buckets before")
        self.state, self._whole = EngineState.ASLEEP, False
        free()

    def wake_weights(self, allocate: Callable[[], None] = _nothing) -> None:
        """``allocate`` makes room for the weights. If it fails, the engine stays asleep.

        Raises:
            SyncError: the engine is not asleep.
        """
        if self.state is not EngineState.ASLEEP:
            raise SyncError(
                f"the rollout engine is {self.state.value}, not asleep: its weights cannot wake twice, since the "
                "second time would take memory that is in use; let it sleep first"
            )
        allocate()
        self.state, self._receives, self._whole = EngineState.WEIGHTS_AWAKE, False, False

    def wake_cache(self, allocate: Callable[[], None] = _nothing) -> None:
        """``allocate`` makes room for the cache. If it fails, the engine stays without one.

        Raises:
            SyncError: no whole push has ended since the weights woke, or the cache is not away.
        """
        if self.state is EngineState.ASLEEP:
            raise SyncError(
                "the rollout engine is asleep; wake its weights and push all buckets before its cache wakes"
            )
        if self.state is not EngineState.WEIGHTS_AWAKE:
            raise SyncError(f"the rollout engine is {self.state.value} and has its cache; only a sleeping one can wake")
        if not self._whole:
            raise SyncError(
                "the rollout engine has room for weights, but no whole push has ended since it woke; push all buckets "
                "before its cache wakes"
            )
        allocate()
        self.state = EngineState.READY

    def begin(self) -> None:
        """An update begins, in place of one that is under way.

        Raises:
            SyncError: the engine is asleep.
        """
        if self.state is EngineState.ASLEEP:
            raise SyncError("the rollout engine is asleep and has no room for weights; wake it before a push")
        if self.state is not EngineState.WEIGHTS_AWAKE:
            self.state = EngineState.STALE
        self._receives, self._broken, self._whole = True, False, False

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Wraps each later call of an update. After a call that failed, only a new ``begin`` is accepted.

        That matters because a sender that does not wait for each bucket sends the others, and the end, after a failure.
        """
        if not self._receives:
            raise SyncError("a rollout engine got weights outside of an update; call begin_update first")
        if self._broken:
            raise SyncError("a call of this weight update failed before; call begin_update and push all buckets again")
        self._broken = True
        yield
        self._broken = False

    def end(self, version: int) -> None:
        """Call it last in an update: any exception before it leaves the engine stale.

        Raises:
            SyncError: no update is under way.
        """
        if not self._receives:
            raise SyncError("an update of a rollout engine ended that had not begun; call begin_update first")
        self.version = version
        self._receives, self._whole = False, True
        if self.state is not EngineState.WEIGHTS_AWAKE:
            self.state = EngineState.READY

    def require_ready(self) -> None:
        """Before every sample.

        Raises:
            SyncError: the engine is not ready; the message says what is missing.
        """
        if self.state is EngineState.READY:
            return
        if self.state is EngineState.ASLEEP:
            raise SyncError("the rollout engine is asleep, without weights; wake it and push all buckets first")
        if self._receives:
            raise SyncError(
                f"the rollout engine holds a mixture of version {self.version} and newer weights, because an update "
                "began and did not end; push all buckets again before sampling"
            )
        if self._whole:
            raise SyncError(
                f"the rollout engine holds the weights of version {self.version}, but its cache is away; wake the "
                "cache before sampling"
            )
        if self.state is EngineState.WEIGHTS_AWAKE:
            raise SyncError(
                "the rollout engine has room for weights, but none since it slept; push all buckets and wake its cache "
                "before sampling"
            )
        raise SyncError(
            "the rollout engine holds only what it has loaded from a folder, which is not what it is to sample "
            "from; push all buckets before sampling"
        )


def sample_requests(
    prompts: PromptBatch, sampling: Sampling, prompts_per_call: int | None
) -> Iterator[list[tuple[list[int], int]]]:
    """Prompt ids and seed of every completion, in the row order of ``pack_rollouts``; a list per call of the engine.

    One request per sample: its seed must not depend on its siblings. ``prompts_per_call`` None: all in one call.
    """
    requests = [
        (row, sample_seed(sampling, position=position, prompt_id=prompt_id, sample_index=k))
        for row, position, prompt_id in zip(
            prompts.prompts.rows(), prompts.positions.tolist(), prompts.row_ids.tolist(), strict=True
        )
        for k in range(sampling.num_samples)
    ]
    size = (prompts_per_call or max(len(prompts), 1)) * sampling.num_samples
    for start in range(0, len(requests), size):
        yield requests[start : start + size]


def pack_rollouts(
    prompts: PromptBatch, num_samples: int, completions: Sequence[Completion], policy_version: int
) -> Rollouts:
    """``completions`` (row ``p * num_samples + k``) with the prompts that they answer."""
    rows = [row for row in prompts.prompts.rows() for _ in range(num_samples)]
    ended_s = [completion.ended_s for completion in completions if completion.ended_s is not None]
    return Rollouts(
        prompts=prompts,
        sequences=Sequences.from_rows(rows, [completion.tokens for completion in completions]),
        prompt_index=torch.arange(len(prompts)).repeat_interleave(num_samples),
        sample_index=torch.arange(num_samples).repeat(len(prompts)),
        engine_logps=torch.tensor([logp for completion in completions for logp in completion.logps]),
        policy_version=torch.full((len(completions),), policy_version),
        ended_s=torch.tensor(ended_s, dtype=torch.float32) if len(ended_s) == len(completions) else None,
    )
