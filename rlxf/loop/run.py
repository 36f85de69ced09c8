"""What the driver works with: the members of a run, as protocols, and the little state that is its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor

from rlxf.config.kinds import Role
from rlxf.config.schema import RunConfig
from rlxf.core.clock import Clock
from rlxf.core.kept_file import KeptFile
from rlxf.core.pairs import PairingResult
from rlxf.core.stop import Stop
from rlxf.core.types import (
    Batch,
    Comparisons,
    Examples,
    Metrics,
    OnlinePairs,
    Pairs,
    PairValues,
    PromptBatch,
    ReferenceRecord,
    Rollouts,
    ScoredRollouts,
    Sequences,
)
from rlxf.judge.both_orders import Counts
from rlxf.loop.collected import Collected
from rlxf.loop.later import Later
from rlxf.loop.speed import Speed, no_speed
from rlxf.rollout.dispatch import Dispatch
from rlxf.rollout.engine import Sampling
from rlxf.rollout.lengths import SeenLengths
from rlxf.schedule.lanes import Lanes
from rlxf.schedule.lookahead import Lookahead
from rlxf.score.combine import RunningScales
from rlxf.score.sources import Rewards
from rlxf.sync.push import SyncReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptSource(Protocol):
    """Prompts, a step at a time."""

    def next_batch(self, step: int) -> PromptBatch:
        """The prompts of driver step ``step`` (0 is the first), the same whatever was asked before."""
        ...

    def epoch(self, step: int) -> float:
        """Passes over the data at the end of a step."""
        ...

    @property
    def num_dropped(self) -> int:
        """Rows left out so far, each counted once."""
        ...


class FileSource(Protocol):
    """What an offline run trains on, a step at a time: preference pairs (dpo), examples (sft), reward pairs (rm)."""

    def next_batch(self, step: int) -> Pairs | Examples: ...

    def epoch(self, step: int) -> float: ...

    @property
    def num_dropped(self) -> int: ...


class Rollout(Protocol):
    """One rollout engine, or all of them."""

    @property
    def num_engines(self) -> int: ...

    def num_slots(self, sampling: Sampling) -> int | None:
        """Completions that one engine decodes at the same time at most; None: all that it gets."""
        ...

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        """``B = P * K`` completions, those of a prompt side by side and in the order of the prompts."""
        ...

    def sample(self, prompts: PromptBatch, sampling: Sampling, dispatch: Dispatch) -> Iterator[Rollouts]:
        """The same completions, all those of some prompts at a time, in the order in which engines make them."""
        ...


class Judge(Protocol):
    """Compares completions of a prompt."""

    def __call__(self, rollouts: Rollouts, texts: Sequence[str]) -> tuple[Comparisons, Counts]:
        """The judged pairs of ``B`` completions, whose texts are given, and what judging them took."""
        ...

    def metrics(self, counts: Counts) -> Metrics:
        """``judge/*``."""
        ...


class Reference(Protocol):
    """The frozen model."""

    def logps(self, pairs: Pairs) -> PairValues:
        """[N] float32 for each side: log-probabilities in nats, summed over the completion tokens."""
        ...

    def token_logps(self, sequences: Sequences) -> Tensor:
        """[sum of completion tokens] float32: the log-probability of each completion token in nats, row after row."""
        ...


class Actor(Protocol):
    """The model being trained."""

    def prepare(self, batch: Batch, step: int) -> None:
        """Gradients of the first mini-batch of driver step ``step``, whose rows ``batch`` holds; no optimizer step.

        ``update`` goes on from there. It gives the same numbers whether this call was made or not.
        """
        ...

    def update(self, batch: Batch, step: int) -> Metrics:
        """All optimizer steps of driver step ``step`` (0 is the first), and their metrics (docs/metrics.md)."""
        ...

    def evaluate(self, batch: Batch) -> Metrics:
        """What ``update`` would report, without training; means over the batch, and what standard errors need."""
        ...

    def token_logps(self, sequences: Sequences) -> Tensor:
        """[sum of completion tokens] float32: the log-probability of each completion token in nats, row after row."""
        ...

    def save_checkpoint(self, folder: Path, background: bool = False) -> None:
        """``background``: return when the state is copied; ``checkpoint_written`` reports when it is in the folder."""
        ...

    def checkpoint_written(self, wait: bool) -> bool: ...

    def load_checkpoint(self, folder: Path) -> None: ...

    def is_untouched(self) -> bool:
        """Whether the update that failed made no optimizer step: the weights are still those of before it.

        Raises:
            RlxfError: a rank is lost, or does not answer within seconds.
        """
        ...

    def save_hf(self, folder: Path) -> None: ...


class Sync(Protocol):
    """Puts the actor's weights into the rollout engines."""

    @property
    def takes_turns(self) -> bool:
        """Whether engines and actor share devices: engines that have sampled sleep until the next push."""
        ...

    def sampled(self) -> None:
        """All completions of a step are there."""
        ...

    def before_update(self) -> None: ...

    def push(self, version: int) -> SyncReport:
        """From now on the engines sample from the newest weights, which are ``version``."""
        ...

    def save_pushed(self, checkpoint: Path) -> None:
        """Write the weights of the last push, from which the engines still sample, into a checkpoint's folder.

        The actor is not asked: its weights are newer.
        """
        ...

    def push_saved(self, checkpoint: Path, version: int) -> None:
        """From now on the engines sample from what ``save_pushed`` wrote, which are ``version``."""
        ...


class UpdatesReference(Protocol):
    """Moves the reference after the update that made ``version``, if a move is due."""

    @property
    def whole(self) -> bool:
        """Whether all of the reference's weights have made the same moves; false after a move that broke off."""
        ...

    def is_due(self, version: int) -> bool: ...

    def __call__(self, version: int) -> None: ...


class Recorder(Protocol):
    """Writes the policy's completions."""

    @property
    def files(self) -> Sequence[KeptFile]:
        """What it writes to."""
        ...

    def shown(self, step: int, pairs: OnlinePairs) -> OnlinePairs:
        """Those of a step's pairs that people are shown; ``step`` counts from 1."""
        ...

    def write(self, step: int, scored: ScoredRollouts, pairing: PairingResult, reference: ReferenceRecord) -> None: ...


class Evaluate(Protocol):
    """Measures the policy after ``step`` complete steps; empty when no evaluation is due."""

    def __call__(self, step: int) -> Metrics: ...


class Report(Protocol):
    """Tells people and files how the run goes. ``step``: complete driver steps."""

    def evaluated(self, step: int, metrics: Metrics) -> None:
        """The evaluation before the first step, empty if none was due; steps begin now."""
        ...

    def stepped(self, step: int, metrics: Metrics) -> None: ...

    def require_health(self) -> None:
        """Raise UnhealthyRun if a verdict has held that is to end the run."""
        ...

    def saved(self, folder: Path) -> None: ...

    def finished(self, policy: Path) -> None: ...


class MemoryUse(Protocol):
    """``memory/*`` after ``step`` complete steps: what the run's processes use. The driver waits for the answer."""

    def __call__(self, step: int) -> Metrics: ...


# What a complete step may still owe when the run ends, in the order in which it is done.
Owed = Literal["push", "move", "evaluation", "row", "hf"]
AFTER_UPDATE: tuple[Owed, ...] = ("push", "move", "evaluation", "row", "hf")
WITHOUT_UPDATE: tuple[Owed, ...] = ("evaluation", "row", "hf")
WITHOUT_UPDATE_ASLEEP: tuple[Owed, ...] = ("push", *WITHOUT_UPDATE)  # engines that slept have lost their weights


@dataclass(kw_only=True, slots=True)
class State:
    """The driver's own state after the last complete step: what a resumed run needs besides the actor's."""

    step: int = 0  # complete driver steps
    # Samples follow the schedule from this step on: the first one, or that of a resume that changed the schedule.
    began: int = 0
    policy_version: int = 0  # updates of the actor
    empty_steps: int = 0  # steps without a pair, in a row
    num_tokens: int = 0  # trained on so far
    failed_scores: int = 0  # scores that are missing because a call failed
    # Number, mean and sum of squared deviations of each source's scores so far, where its scale is ``running``.
    running: dict[str, list[float]] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)  # of the last complete step
    owed: tuple[Owed, ...] = ()  # by the last complete step: new weights to the engines, move of the reference, ...
    # Of the step under way, never saved:
    updating: bool = False  # the actor's weights are changing, and may be those of no complete step
    # Those of complete steps, and of steps and evaluations that are not complete. Whoever scores adds to it, perhaps in
    # a thread of its own while another step completes.
    all_failed_scores: int = 0

    def __post_init__(self) -> None:
        self.all_failed_scores = max(self.all_failed_scores, self.failed_scores)

    @property
    def reported_step(self) -> int:
        """The last step whose row in the run's files is final."""
        return self.step - 1 if "row" in self.owed else self.step

    @property
    def epoch(self) -> float:
        """Passes over the data that the complete steps have made."""
        return self.metrics.get("epoch", 0.0)

    @property
    def failing_scores(self) -> int:
        """Failed scores of what is not complete, which a resumed run asks for again."""
        return self.all_failed_scores - self.failed_scores

    def count_failures(self, count: int) -> None:
        """``count`` failed scores are of what is complete now, and will not be asked for again."""
        self.failed_scores += count

    def complete(self, collected: Collected, metrics: Metrics, owed: tuple[Owed, ...]) -> None:
        """One more step is complete."""
        self.count_failures(collected.failed)
        self.running = collected.running
        self.step, self.metrics, self.owed = self.step + 1, metrics, owed

    def settled(self, item: Owed) -> None:
        """``item`` is no longer owed."""
        self.owed = tuple(other for other in self.owed if other != item)


UNSAVED = frozenset({"updating", "all_failed_scores"})
Schedule = Lookahead[Collected]


class Folder(Protocol):
    """What a run leaves on disk."""

    def save_checkpoint(self, state: State) -> None:
        """Save the complete steps, unless they are; with ``training.async_save`` written until ``wait`` returns."""
        ...

    def save_due(self, state: State) -> None:
        """The same in the middle of a run, which samples while it is published, and goes on if the disk takes none."""
        ...

    def is_time_to_save(self, state: State) -> bool:
        """Whether ``training.save_every_minutes`` have passed since the last checkpoint."""
        ...

    def save_in_time(self, state: State) -> None:
        """Save the complete steps if ``training.save_every_minutes`` have passed; the next checkpoint replaces it."""
        ...

    def newest(self) -> Path | None:
        """The newest checkpoint that is complete."""
        ...

    def finish(self, *, ask_actor: bool) -> None:
        """For a run that failed: publish the checkpoint that is being written if it is whole, or drop it.

        ``ask_actor``: the actor answers, and can finish writing.
        """
        ...

    def save_hf(self, step: int) -> None: ...

    def poll(self) -> None:
        """Finish a checkpoint that has been written in the background, if there is one."""
        ...

    @property
    def is_publishing(self) -> bool:
        """Whether a checkpoint that the actor has written has no name yet, and the next update must wait for it."""
        ...

    def published(self) -> None:
        """Return when no checkpoint ``is_publishing``."""
        ...

    def wait(self) -> None:
        """Return when no checkpoint is being written."""
        ...

    def save_policy(self) -> Path: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Online:
    """The source of an online run: what pairs are made of."""

    prompts: PromptSource
    rollout: Rollout
    rewards: Rewards
    scales: RunningScales  # of the sources, step by step
    judge: Judge | None = None  # compares completions; then it decides about pairs, and not their scores
    tokenizer: PreTrainedTokenizerBase | None = None  # the policy's, for a judge
    eos_ids: tuple[int, ...]
    recorder: Recorder
    lengths: SeenLengths  # of answers so far, also of steps that are sampled and not complete
    complete_lengths: SeenLengths  # of complete steps
    # [B] bool: which completions end with a stop string; None: the recipe has none
    stopped: Callable[[Sequences], Tensor] | None = None

    def epoch(self, step: int) -> float:
        return self.prompts.epoch(step)

    @property
    def num_dropped(self) -> int:
        return self.prompts.num_dropped


@dataclass(frozen=True, slots=True)
class _Asked:
    """The reference, as far as one step asks it: its answer is part of the step, and is asked for once."""

    run: Run
    collected: Collected

    def logps(self, pairs: Pairs) -> PairValues:
        known, referred = self.collected.reference, self.run.digest(pairs)
        if known is None or referred != self.collected.referred:  # a resumed run may pair what waited in another way
            with self.run.working(self.collected, "ref"):
                known = self.run.reference.logps(pairs)
            self.collected.reference, self.collected.referred = known, referred
        return known

    def token_logps(self, sequences: Sequences) -> Tensor:
        with self.run.working(self.collected, "ref"):
            return self.run.reference.token_logps(sequences)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything that ``train`` needs."""

    config: RunConfig
    source: Online | FileSource
    reference: Reference
    actor: Actor
    sync: Sync
    refresh: UpdatesReference
    evaluate: Evaluate
    report: Report
    folder: Folder
    clock: Clock
    stop: Stop
    state: State
    lanes: Lanes  # who does the work of a stage
    memory: MemoryUse
    steps: deque[Collected]  # sampled, or being sampled, and not trained on yet; of a resumed run those that waited
    speed: Speed = no_speed
    resumed: Path | None = None  # the checkpoint that the run goes on from
    later: Later = field(default_factory=Later)  # what the driver does while it waits
    turn: AbstractContextManager[Any] = field(init=False)  # of reference and reward model, if they share devices

    def __post_init__(self) -> None:
        object.__setattr__(self, "turn", Lock() if self._turn_by_turn else nullcontext())

    def reference_for(self, collected: Collected) -> Reference:
        """The reference; what it is asked counts as the step's stage ``ref``."""
        return _Asked(self, collected)

    def digest(self, pairs: Pairs) -> str:
        """Of pairs, and of what else the reference's answer about them depends on."""
        alpha = self.config.actor_rollout.ld_alpha
        return pairs.digest() if alpha is None else f"{pairs.digest()} ld_alpha {alpha!r}"

    def lane(self, role: Role) -> str:
        """Who does a role's work: roles that share devices take turns."""
        return "shared devices" if role in self.config.sharing and not self._turn_by_turn else role

    def check(self) -> None:
        """Raise StopRequested when nobody needs any more what this thread waits for."""
        with self.stop.interruptible():
            if self.stop.must_give_up():
                raise self.stop.error("stopped while waiting for another stage")

    def streams(self, role: Role) -> bool:
        """Whether a role works on chunks of a step while others are sampled.

        One that shares devices with the trainer or the engines would hold them up while it waits for the next chunk.
        Reference and reward model, with devices of their own together, take turns chunk by chunk.
        """
        return self.config.streams and (role not in self.config.sharing or self._turn_by_turn)

    @property
    def _turn_by_turn(self) -> bool:
        return self.config.streams and self.config.sharing == {"ref", "reward"}

    @contextmanager
    def working(self, collected: Collected, stage: str) -> Iterator[None]:
        """A stage of a step at work: it counts as the step's time, and may be dropped when the user stops the run."""
        clock = self.clock(stage, step=collected.step, version=collected.version, seconds=collected.seconds)
        turn = self.turn if stage in ("adv", "ref") else nullcontext()
        with turn, self.stop.interruptible(), clock:
            yield

    def training_sampling(self) -> Sampling:
        """The recipe's sampling, the same in every step: the prompts' positions give each completion its seed."""
        actor, rollout = self.config.actor_rollout, self.config.rollout
        return Sampling(
            num_samples=actor.n_samples_per_prompt,
            max_new_tokens=self.config.max_new_tokens,
            temperature=rollout.temperature if actor.do_sample else 0.0,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            repetition_penalty=rollout.repetition_penalty,
            stop=rollout.stop,
            structured_outputs=rollout.structured_outputs,
            seed=self.config.training.seed,
        )
