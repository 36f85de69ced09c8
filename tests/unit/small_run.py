"""A whole run of small real objects: a bigram policy that samples, is scored by a rule and learns by DPO. No Ray."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.assembly.build_run import left_over
from rlxf.checkpointing.waiting import load_waiting, save_waiting
from rlxf.config.schema import RunConfig
from rlxf.core.clock import Clock
from rlxf.core.pairs import PairingResult
from rlxf.core.stop import Stop
from rlxf.core.types import (
    Metrics,
    OnlinePairs,
    Pairs,
    PairValues,
    PromptBatch,
    ReferencedPairs,
    ReferenceRecord,
    Rollouts,
    ScoredRollouts,
    Sequences,
    Tokens,
)
from rlxf.evaluate import no_evaluation
from rlxf.loop.collected import Collected
from rlxf.loop.later import Later
from rlxf.loop.run import UNSAVED, Evaluate, FileSource, Online, PromptSource, Run, State
from rlxf.rollout.lengths import SeenLengths
from rlxf.rollout.one_engine import OneEngine
from rlxf.schedule import Lanes, OneAfterTheOther
from rlxf.score.combine import RunningScales, Term
from rlxf.score.sources import Rewards, TokenTerm
from rlxf.sync.push import SyncReport
from rlxf.sync.refresh import no_refresh
from rlxf.update.losses import LossSettings, WeightedLoss
from tests.unit.small_engine import EOS, VOCAB, SmallEngine, Trace

LOSS = WeightedLoss(names=("sigmoid",), weights=(1.0,), settings=LossSettings(beta=1.0))
LIKED = 3
NO_TOKENIZER: Any = None  # nothing here reads texts


def small_config(**changes: Any) -> RunConfig:
    """A recipe for these rooms. ``changes``: ``section__key=value``."""
    raw: dict[str, Any] = {
        "runtime": "local",
        "training": {"stage": "ray_online_dpo", "global_batch_size": 8, "train_iters": 4, "seed": 7},
        "model": {},
        "actor_rollout": {
            "model": "bigram",
            "seq_length": 12,
            "max_prompt_length": 4,
            "lr": 0.5,
            "n_samples_per_prompt": 4,
        },
        "ref": {"model": "bigram"},
        "reward": {},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        raw.setdefault(section, {})[name] = value
    return RunConfig.model_validate(raw)


class Bigram:
    """Next token from the last one: [VOCAB, VOCAB] logits."""

    def __init__(self) -> None:
        self.logits = torch.zeros(VOCAB, VOCAB)

    def token_logps(self, sequences: Sequences) -> Tensor:
        return self.with_gradient(sequences).detach()

    def with_gradient(self, sequences: Sequences) -> Tensor:
        table = self.logits.log_softmax(-1)
        parts = [
            table[row[start - 1 : -1], row[start:]]
            for row, start in zip(sequences.rows(), sequences.prompt_lengths.tolist(), strict=True)
        ]
        return torch.cat(parts)

    def logps(self, pairs: Pairs) -> PairValues:
        sides = []
        for side in (pairs.chosen, pairs.rejected):
            sums = [part.sum() for part in self.with_gradient(side).split(side.completion_lengths.tolist())]
            sides.append(torch.stack(sums))
        return PairValues(chosen=sides[0], rejected=sides[1])


@dataclass
class SmallReference(Bigram):
    trace: Trace
    num_pairs: int = 0
    num_shown: int = 0  # steps of which people are shown something

    def __post_init__(self) -> None:
        super().__init__()

    def logps(self, pairs: Pairs) -> PairValues:
        self.trace.append("reference")
        self.num_pairs += len(pairs)
        return super().logps(pairs)

    def token_logps(self, sequences: Sequences) -> Tensor:
        self.num_shown += 1
        return super().token_logps(sequences)


class SmallActor(Bigram):
    """One gradient step of sigmoid DPO per update."""

    def __init__(self, config: RunConfig, trace: Trace) -> None:
        super().__init__()
        self.logits.requires_grad_(True)
        self._config = config.actor_rollout
        self._trace = trace
        self.num_pairs = 0
        self.during_update: Callable[[], None] = lambda: None
        self.untouched: Callable[[], bool] = lambda: True  # whether a failed update made no optimizer step

    def prepare(self, batch: ReferencedPairs, step: int) -> None:
        self._trace.append("prepare")

    def update(self, batch: ReferencedPairs, step: int) -> Metrics:
        self._trace.append("update")
        self.during_update()
        self.num_pairs += len(batch)
        lengths = torch.ones(2 * len(batch))
        losses = LOSS(self.logps(batch.pairs), batch.reference, lengths, 1.0)
        (gradient,) = torch.autograd.grad(losses.mean(), self.logits)
        with torch.no_grad():
            self.logits -= self._config.lr * gradient
        return {"loss": float(losses.detach().mean())}

    def is_untouched(self) -> bool:
        return self.untouched()

    def save_checkpoint(self, folder: Path, background: bool = False) -> None:
        self._copy = (folder / "logits.pt", self.logits.detach().clone())
        if not background:
            self.checkpoint_written(wait=True)

    def checkpoint_written(self, wait: bool) -> bool:
        """In the background it takes until somebody waits."""
        if wait:
            torch.save(self._copy[1], self._copy[0])
        return wait

    def load_checkpoint(self, folder: Path) -> None:
        with torch.no_grad():
            self.logits.copy_(torch.load(folder / "logits.pt", weights_only=True))

    def save_hf(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        torch.save(self.logits, folder / "logits.pt")


class SmallSync:
    """Copies the actor's weights into the engine."""

    def __init__(self, actor: SmallActor, engine: SmallEngine, trace: Trace, *, deliver: Callable[[int], bool]) -> None:
        self._actor = actor
        self._engine = engine
        self._trace = trace
        self._deliver = deliver  # which versions arrive at the engine
        self.versions: list[int] = []

    takes_turns = False

    def sampled(self) -> None:
        """The engine has a device of its own."""

    def before_update(self) -> None:
        """As does the actor."""

    def push(self, version: int) -> SyncReport:
        self._trace.append("sync")
        assert not self._engine.busy, "a push while the engine samples"
        self.versions.append(version)
        if self._deliver(version):
            self._engine.logits = self._actor.logits.detach().clone()
            self._engine.version = version
        return SyncReport(version=version, num_bytes=VOCAB * VOCAB * 4, seconds=0.0, probe_difference=None)

    def save_pushed(self, checkpoint: Path) -> None:
        torch.save(self._engine.logits, checkpoint / "pushed.pt")

    def push_saved(self, checkpoint: Path, version: int) -> None:
        self._trace.append("push saved")
        assert not self._engine.busy
        self._engine.logits = torch.load(checkpoint / "pushed.pt", weights_only=True)
        self._engine.version = version


class SmallPrompts:
    def __init__(self, config: RunConfig, trace: Trace) -> None:
        self._size = config.training.global_batch_size
        self._trace = trace

    def next_batch(self, step: int) -> PromptBatch:
        self._trace.append("prompts")
        ids = torch.arange(step * self._size, (step + 1) * self._size)
        rows = [[2 + i % 2, 2 + i % 4] for i in ids.tolist()]
        return PromptBatch(
            prompts=Tokens.from_rows(rows), row_ids=ids, positions=ids, texts=("?",) * self._size, columns={}
        )

    def epoch(self, step: int) -> float:
        return (step + 1) / 2

    num_dropped = 0


class TokenCounter:
    """Scores a completion by how many liked tokens it holds."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace

    def score(self, rollouts: Rollouts) -> Tensor:
        self._trace.append("score")
        rows = rollouts.sequences.completion_rows()
        return torch.tensor([float(row.count(LIKED)) for row in rows])


class Constant:
    """Likes everything the same: every prompt ties."""

    def score(self, rollouts: Rollouts) -> Tensor:
        return torch.zeros(len(rollouts))


class LastRecord:
    """Keeps what it was told to write."""

    files = ()

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.pairings: list[PairingResult] = []
        self.scored: list[ScoredRollouts] = []
        self.references: list[ReferenceRecord] = []
        self.num_shown = 0  # pairs of every step, whose tokens the reference is asked about

    def shown(self, step: int, pairs: OnlinePairs) -> OnlinePairs:
        return pairs.select(torch.arange(min(len(pairs), self.num_shown)))

    def write(self, step: int, scored: ScoredRollouts, pairing: PairingResult, reference: ReferenceRecord) -> None:
        assert not self.steps or step == self.steps[-1] + 1
        self.references.append(reference)
        self.steps.append(step)
        self.scored.append(scored)
        self.pairings.append(pairing)


@dataclass
class Notes:
    """A report that keeps what it was told."""

    steps: dict[int, Metrics] = field(default_factory=dict)
    evaluations: dict[int, Metrics] = field(default_factory=dict)
    policy: Path | None = None

    def evaluated(self, step: int, metrics: Metrics) -> None:
        self.evaluations[step] = metrics

    def stepped(self, step: int, metrics: Metrics) -> None:
        self.steps[step] = metrics

    def require_health(self) -> None:
        return None

    def saved(self, folder: Path) -> None:
        return None

    def finished(self, policy: Path) -> None:
        self.policy = policy


class SavedSteps:
    """A folder that notes which steps were saved, with which policy version.

    Args:
        step: the last one that is saved already.
        waiting: steps that wait, as far as a checkpoint of a state keeps them.
        root: where checkpoints are written; None: nowhere.
        write: writes one into its folder.
    """

    def __init__(
        self,
        step: int,
        waiting: Callable[[State], list[Collected]],
        root: Path | None,
        write: Callable[[Path, State], None],
    ) -> None:
        self.waiting: list[list[tuple[int, int, bool, bool, bool]]] = []  # step, boundary; sampled, scored, referred
        self.saved: list[tuple[int, int]] = []
        self.states: list[State] = []
        self.hf: list[int] = []
        self.waits = 0
        self.finished: list[bool] = []  # whether the actor was asked, each time that a failed run ended
        self.during_save: Callable[[], None] = lambda: None
        self._step = step
        self._waiting, self._root, self._write = waiting, root, write

    def save_checkpoint(self, state: State) -> None:
        if state.step != self._step:
            self.during_save()
            self._step = state.step
            self.saved.append((state.step, state.policy_version))
            self.states.append(State(**{name: value for name, value in asdict(state).items() if name not in UNSAVED}))
            self.waiting.append([_summary(step) for step in self._waiting(state)])
            if self._root is not None:
                folder = self._root / f"iter_{state.step:07d}"
                folder.mkdir(parents=True)
                self._write(folder, state)

    def save_due(self, state: State) -> None:
        self.save_checkpoint(state)

    def is_time_to_save(self, state: State) -> bool:
        return False

    def save_in_time(self, state: State) -> None:
        return None

    def newest(self) -> Path | None:
        return (self._root or Path()) / f"iter_{self._step:07d}" if self._step else None

    def finish(self, *, ask_actor: bool) -> None:
        self.finished.append(ask_actor)

    def save_hf(self, step: int) -> None:
        self.hf.append(step)

    def poll(self) -> None:
        return None

    is_publishing = False

    def published(self) -> None:
        return None

    def wait(self) -> None:
        self.waits += 1

    def save_policy(self) -> Path:
        return Path("policy")


def _summary(step: Collected) -> tuple[int, int, bool, bool, bool]:
    parts = (step.rollouts, step.raw_scores, step.reference)
    sampled, scored, referred = (part is not None for part in parts)
    return step.step, step.sampled_at, sampled, scored, referred


@dataclass
class SmallRun:
    """The run and its parts, for tests to look at."""

    run: Run
    actor: SmallActor
    reference: SmallReference
    engine: SmallEngine
    sync: SmallSync
    recorder: LastRecord
    notes: Notes
    folder: SavedSteps
    stop: Stop
    trace: Trace


def one_source(scorer: Any, state: State, limit: int = 10**9) -> Rewards:
    """Rewards by one scorer of tokens, named ``one``; ``limit``: of failed scores."""
    source = TokenTerm(term=Term(name="one"), scorer=scorer)
    return Rewards([source], NO_TOKENIZER, state, limit, lambda: f"step {state.step + 1}", Stop())


def small_run(
    config: RunConfig,
    *,
    scorer: Any = None,
    prompts: PromptSource | None = None,
    offline: FileSource | None = None,
    evaluate: Evaluate = no_evaluation,
    deliver: Callable[[int], bool] = lambda version: True,
    state: State | None = None,
    logits: Tensor | None = None,
    lanes: Callable[[Stop], Lanes] = lambda stop: OneAfterTheOther(),
    trace: Trace | None = None,
    root: Path | None = None,
    resumed: Path | None = None,
) -> SmallRun:
    """A run of the rooms above; ``offline`` replaces prompts, engine and scorer, ``state`` and ``logits`` the start.

    With ``root`` its checkpoints are written there; ``resume_small`` goes on from one.
    """
    trace = [] if trace is None else trace
    actor, engine, reference = SmallActor(config, trace), SmallEngine(trace), SmallReference(trace)
    if logits is not None:
        with torch.no_grad():
            actor.logits.copy_(logits)
    sync, recorder = SmallSync(actor, engine, trace, deliver=deliver), LastRecord()
    steps = deque(load_waiting(resumed) if resumed else ())
    lengths = SeenLengths.load(resumed) if resumed else SeenLengths()
    all_lengths = copy.deepcopy(lengths)
    for step in steps:
        if step.rollouts is not None:
            all_lengths.add(step.rollouts)

    def waiting(state: State) -> list[Collected]:
        return left_over(steps, state, config)

    def write(checkpoint: Path, state: State) -> None:
        actor.save_checkpoint(checkpoint)
        save_waiting(checkpoint, waiting(state))
        lengths.save(checkpoint)
        if any(step.rollouts is None for step in waiting(state)):
            sync.save_pushed(checkpoint)

    notes, folder = Notes(), SavedSteps(state.step if state else 0, waiting, root, write)
    stop = Stop()
    chosen = lanes(stop)
    if isinstance(chosen, OneAfterTheOther):  # all of it is in this process and thread
        stop = Stop(interrupt=True)
    state = state or State()
    rewards = scorer if isinstance(scorer, Rewards) else one_source(scorer or TokenCounter(trace), state)
    online = Online(
        prompts=prompts or SmallPrompts(config, trace),
        rollout=OneEngine(engine),
        rewards=rewards,
        scales=RunningScales(rewards.terms, state.running),
        eos_ids=(EOS,),
        recorder=recorder,
        lengths=all_lengths,
        complete_lengths=lengths,
    )
    run = Run(
        config=config,
        source=offline or online,
        reference=reference,
        actor=actor,
        sync=sync,
        refresh=no_refresh,
        evaluate=evaluate,
        report=notes,
        folder=folder,
        clock=Clock(),
        stop=stop,
        state=state,
        lanes=chosen,
        memory=lambda step: {},
        steps=steps,
        resumed=resumed,
        later=Later(at_once=isinstance(chosen, OneAfterTheOther)),
    )
    return SmallRun(run, actor, reference, engine, sync, recorder, notes, folder, stop, trace)


def resume_small(ended: SmallRun, config: RunConfig, **others: Any) -> SmallRun:
    """A run that goes on from the newest checkpoint of one that ended; from the beginning if it has none."""
    if not ended.folder.states:
        return small_run(config, **others)
    state, resumed = replace(ended.folder.states[-1]), ended.folder.newest()
    assert resumed is not None
    small = small_run(config, state=state, resumed=resumed, **others)
    state.all_failed_scores += sum(step.failed for step in small.run.steps)
    ahead, left = config.rollout.lookahead, config.training.train_iters - state.step
    if ahead != ended.run.config.rollout.lookahead or len(small.run.steps) < min(ahead, left):
        state.began = state.step  # as `find_resume` has it
    small.actor.load_checkpoint(resumed)
    return small
