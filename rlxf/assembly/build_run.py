"""The members of a run put together: what the driver needs before it can train."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from rlxf.assembly.data import Data
from rlxf.assembly.judge import build_judge
from rlxf.assembly.rewards import make_rewards
from rlxf.assembly.roles import policy_folder
from rlxf.assembly.speed import start_speed
from rlxf.checkpointing.resume import Resume, initial_policy
from rlxf.checkpointing.rows import save_rows
from rlxf.checkpointing.run_folder import RunFolder
from rlxf.checkpointing.waiting import next_to_sample, save_waiting
from rlxf.config.changes import SHAPE_FROM
from rlxf.config.schema import RunConfig
from rlxf.core.clock import Clock
from rlxf.core.errors import CheckpointError
from rlxf.core.model_folder import megatron_checkpoint
from rlxf.core.read_position import READ_AT, TRAINED_AT
from rlxf.core.stop import Stop
from rlxf.core.types import Pairs, PromptBatch, Tokens
from rlxf.data.examples import ExampleFile
from rlxf.data.preferences import PreferenceFile
from rlxf.data.prompts import PromptFile
from rlxf.evaluate import EvalBackends, Evaluation, EvaluationSettings, OfflineEvaluation, no_evaluation
from rlxf.judge import Judge
from rlxf.judge.judged import Judging
from rlxf.loop.collected import Collected
from rlxf.loop.later import Later
from rlxf.loop.run import Actor, Evaluate, FileSource, MemoryUse, Online, Reference, Rollout, Run, State, Sync
from rlxf.models.stop_strings import StopStrings
from rlxf.models.tokenizer import eos_token_ids
from rlxf.observe.record import Recorders, RolloutRecorder, SampleRecorder
from rlxf.observe.report import ReportSettings, RunReport
from rlxf.platform.base import Platform
from rlxf.reference.cached import CachedReference, cache_folder
from rlxf.rollout.lengths import SeenLengths
from rlxf.rollout.one_engine import OneEngine
from rlxf.rollout.replay import ReplayEngine
from rlxf.schedule.lanes import Lanes, OneAfterTheOther
from rlxf.score.combine import RunningScales
from rlxf.score.penalty import Shaping
from rlxf.score.scorer import ModelScorer
from rlxf.score.sources import Unscaled
from rlxf.score.texts import TextSource
from rlxf.sync.probe import Probe, make_probe
from rlxf.sync.push import SyncReport, WeightSink, WeightSource, WeightSync
from rlxf.sync.refresh import MovableReference, ReferenceUpdater, Weights, no_refresh
from rlxf.sync.turns import Sleeper, Trainer, Turns

log = logging.getLogger(__name__)


class SyncedActor(Actor, WeightSource, Weights, Trainer, Protocol):
    """The actor, or what stands for it."""


class Engines(WeightSink, Sleeper, Protocol):
    """The rollout engines, or what stands for them, as far as weights and memory are concerned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """The roles that a run's recipe asks for, in this process or behind proxies."""

    actor: SyncedActor
    reference: Reference
    models: Mapping[str, ModelScorer] = field(default_factory=dict)  # reward models, by the name of their source
    readers: Mapping[str, TextSource] = field(default_factory=dict)  # what scores texts, by name
    judge: Judge | None = None  # one that is a Python function
    rollout: Rollout | None = None  # None: offline or replay
    sink: Engines | None = None  # the rollout engines, as far as weights are concerned


class NoSync:
    """For a run without a rollout engine."""

    takes_turns = False

    def push(self, version: int) -> SyncReport:
        return SyncReport(version=version, num_bytes=0, seconds=0.0, probe_difference=None)

    def sampled(self) -> None:
        """Nothing sleeps."""

    def before_update(self) -> None:
        """The actor has its devices to itself."""

    def save_pushed(self, checkpoint: Path) -> None:
        """There are none."""

    def push_saved(self, checkpoint: Path, version: int) -> None:
        """There is no engine to push them into."""


def build_run(
    config: RunConfig,
    run_dir: Path,
    data: Data,
    roles: Roles,
    *,
    platform: Platform,
    report: RunReport,
    clock: Clock,
    stop: Stop,
    lanes: Lanes,
    memory: MemoryUse,
    resume: Resume | None = None,
) -> Run:
    """The run that the driver trains; with ``resume`` its actor and state are those of the checkpoint."""
    state = resume.state if resume else State()
    steps, lengths = deque(resume.waiting if resume else ()), _lengths(resume)
    reference = _reference(config, data, roles, stop, platform)
    judging = build_judge(config, run_dir, models=roles.models, function=roles.judge)
    evaluation = _evaluation(config, data, roles, reference, state, platform, stop, judging, report)
    refresh, sync = _refresh(config, roles), _sync(config, data, roles, platform)

    def describe(state: State) -> dict[str, Any]:
        next_step = next_to_sample(state.step, left_over(steps, state, config))
        return {
            "prompt_ids": data.training.row_ids(next_step - 1),
            "stream": None if isinstance(data.training, ReplayEngine) else data.training.stream(next_step),
            "report": report.describe(),
            "baseline": evaluation.describe_baseline() if isinstance(evaluation, Evaluation) else None,
            "initial_policy": initial_policy(config),
            SHAPE_FROM[0]: SHAPE_FROM[1],
            **({READ_AT: TRAINED_AT} if config.objective == "reward" else {}),
        }

    def also(checkpoint: Path, state: State) -> None:
        if refresh:
            refresh.save(checkpoint)
        kept = left_over(steps, state, config)
        save_waiting(checkpoint, kept)
        if any(step.rollouts is None for step in kept):
            sync.save_pushed(checkpoint)
        lengths.save(checkpoint)
        save_rows(checkpoint, report.unwritten())

    folder = RunFolder(
        config, run_dir, roles.actor, describe=describe, saved=report.saved, also=also,
        resumed=resume.folder if resume else None,
    )  # fmt: skip
    if resume is not None:
        with stop.interruptible():
            _restore(resume, data, roles, sync, evaluation, refresh)
        if not config.training.eval_only:
            folder.prune(resume.state.step)
    source = _source(config, run_dir, data, roles, platform, state, clock, stop, resume, judging, lengths)
    if isinstance(source, Online):
        report.keep(source.recorder.files)
    return Run(
        config=config,
        source=source,
        reference=reference,
        actor=roles.actor,
        sync=sync,
        refresh=refresh or no_refresh,
        evaluate=evaluation or no_evaluation,
        report=report,
        folder=folder,
        clock=clock,
        stop=stop,
        state=state,
        lanes=lanes,
        memory=memory,
        speed=start_speed(config, run_dir, platform, state.num_tokens),
        steps=steps,
        resumed=resume.folder if resume else None,
        later=Later(at_once=isinstance(lanes, OneAfterTheOther)),
    )


def left_over(steps: Iterable[Collected], state: State, config: RunConfig) -> list[Collected]:
    """What a checkpoint keeps of the steps ahead: those that are sampled, and those that the actor's weights, which
    are newer, cannot sample again as they were to be sampled.

    Without lookahead a step that broke off is begun again.
    """
    ahead = [step for step in steps if step.step >= state.step and (config.rollout.lookahead or step.lag)]
    return [step for step in ahead if step.rollouts is not None or step.sampled_at < state.step]


def _refresh(config: RunConfig, roles: Roles) -> ReferenceUpdater | None:
    if not config.ref.ref_update_interval:
        return None
    # A run whose reference moves has one with weights of its own: the recipe was checked.
    return ReferenceUpdater(roles.actor, cast(MovableReference, roles.reference), config.ref)


def _reference(config: RunConfig, data: Data, roles: Roles, stop: Stop, platform: Platform) -> Reference:
    """The reference; with ``ref.precompute_ref_log_probs`` one that knows all pairs of the data already."""
    if not config.ref.precompute_ref_log_probs or config.training.eval_only:
        return roles.reference
    assert isinstance(data.training, PreferenceFile)
    root = Path(config.ref.cache) if config.ref.cache else Path.home() / ".cache" / "rlxf" / "ref_logps"
    alpha = config.actor_rollout.ld_alpha
    folder = cache_folder(root, Path(str(config.ref.load)), config.ref.precision, platform.name, alpha)
    cached = CachedReference(roles.reference, folder)
    with stop.interruptible():
        count = cached.fill(_one_pass(data.training))
    log.info("reference log-probabilities of %d pairs computed; %s holds all of them", count, folder)
    return cached


def _one_pass(source: PreferenceFile) -> Iterator[Pairs]:
    """Every pair of the data at least once, a step's at a time."""
    step = 0
    while True:
        yield source.next_batch(step)
        if source.epoch(step) >= 1:
            return
        step += 1


def _restore(
    resume: Resume,
    data: Data,
    roles: Roles,
    sync: Sync,
    evaluation: Evaluate | None,
    refresh: ReferenceUpdater | None,
) -> None:
    if not _same_rows(resume, data.training):
        log.warning("step %d has other rows than %s recorded", resume.next_step, resume.folder)
    if isinstance(evaluation, Evaluation):
        # Before the actor leaves the initial policy.
        evaluation.restore(resume.baseline, push_initial=partial(_push_initial, resume, sync))
    roles.actor.load_checkpoint(resume.folder)
    if refresh is not None:
        refresh.load(resume.folder)


def _push_initial(resume: Resume, sync: Sync) -> None:
    """The initial policy from the actor into the engines, as in the first start.

    What the engines loaded lacks the weights of a megatron checkpoint, an adapter that is loaded, and 4-bit rounding.

    Raises:
        CheckpointError: the recipe starts from another policy than the run did.
    """
    if resume.other_start:
        raise CheckpointError(
            f"{resume.folder}: holds no evaluation of the initial policy on these prompts, and the recipe now starts "
            f"from another policy: {'; '.join(resume.other_start)}; set it back, evaluate the prompts that the run "
            "evaluated, or set training.eval_interval=0"
        )
    sync.push(0)


def _same_rows(resume: Resume, training: PromptFile | ReplayEngine | PreferenceFile | ExampleFile) -> bool:
    """Whether the data's stream is the checkpoint's; then it goes on there without tokenizing what came before."""
    step, rows, stream = resume.next_step, resume.row_ids, resume.stream
    if rows is None:
        return True
    if stream is None or isinstance(training, ReplayEngine):  # of an older revision: every row is looked at again
        return training.row_ids(step - 1) == rows
    return training.go_on(step, rows, stream)


def _source(
    config: RunConfig,
    run_dir: Path,
    data: Data,
    roles: Roles,
    platform: Platform,
    state: State,
    clock: Clock,
    stop: Stop,
    resume: Resume | None,
    judging: Judging | None,
    lengths: SeenLengths,
) -> Online | FileSource:
    if isinstance(data.training, PreferenceFile | ExampleFile):
        return data.training
    rollout = OneEngine(data.training) if isinstance(data.training, ReplayEngine) else roles.rollout
    place = lambda: f"step {clock.step_here + 1}"  # noqa: E731
    rewards = make_rewards(config, roles.models, roles.readers, platform=platform, tally=state, place=place, stop=stop)
    assert rollout is not None  # a run that samples has an engine
    recorder = _recorder(config, run_dir, data, resume)
    return Online(
        prompts=data.training,
        rollout=rollout,
        rewards=rewards,
        scales=RunningScales(rewards.terms, state.running),
        judge=judging,
        tokenizer=data.tokenizer,
        eos_ids=_eos_ids(config, data),
        recorder=recorder,
        lengths=_with_waiting(lengths, resume),
        complete_lengths=lengths,
        stopped=StopStrings(data.tokenizer, config.rollout.stop).completed if config.rollout.stop else None,
    )


def _lengths(resume: Resume | None) -> SeenLengths:
    """Of the answers in complete steps."""
    return SeenLengths() if resume is None else SeenLengths.load(resume.folder)


def _with_waiting(lengths: SeenLengths, resume: Resume | None) -> SeenLengths:
    """The lengths of complete steps, and of those that are sampled and wait."""
    found = copy.deepcopy(lengths)
    for step in resume.waiting if resume else ():
        if step.rollouts is not None:
            found.add(step.rollouts)
    return found


def _recorder(config: RunConfig, run_dir: Path, data: Data, resume: Resume | None) -> Recorders:
    """Who writes what the policy says; an evaluation alone writes none of it."""
    logs, trains = config.log, not config.training.eval_only
    after = resume.state.step if resume else None
    kept: Mapping[str, bytes] = resume.reported.unwritten if resume else {}

    def where(name: str) -> dict[str, Any]:
        return {"path": run_dir / name, "after": after, "unwritten": kept.get(name, b"")}

    samples = trains and logs.samples_interval > 0
    return Recorders(
        RolloutRecorder(**where("rollouts.jsonl")) if trains and logs.rollouts else None,
        SampleRecorder(tokenizer=data.tokenizer, **where("samples.jsonl")) if samples else None,
        logs.samples_interval,
    )


def _eos_ids(config: RunConfig, data: Data) -> tuple[int, ...]:
    return eos_token_ids(policy_folder(config), data.tokenizer, config.actor_rollout.eos_tokens)


def _sync(config: RunConfig, data: Data, roles: Roles, platform: Platform) -> Sync:
    if roles.sink is None:
        return NoSync()
    assert isinstance(data.training, PromptFile)  # a run that has engines samples from prompts
    probe = build_probe(config, platform, data.training.next_batch(0).prompts)
    filled = megatron_checkpoint(Path(policy_folder(config))) is None
    alike = filled and not config.actor_rollout.lora_r  # an adapter, or 4-bit weights, are not in the folder
    turns = Turns(roles.actor, roles.sink) if config.takes_turns else None
    return WeightSync(roles.actor, roles.sink, config.sync, probe, filled=filled, alike=alike, turns=turns)


def build_probe(config: RunConfig, platform: Platform, prompts: Tokens) -> Probe:
    """What the engines are asked after an update, made of the first ``prompts``."""
    actor = config.actor_rollout
    model = config.model[actor.model]
    return make_probe(
        prompts,
        block=platform.kv_block_size,
        positions=model.max_position_embeddings,
        precision=actor.precision,
        num_layers=model.num_layers,
    )


def _evaluation(
    config: RunConfig,
    data: Data,
    roles: Roles,
    reference: Reference,
    state: State,
    platform: Platform,
    stop: Stop,
    judging: Judging | None,
    report: RunReport,
) -> Evaluate | None:
    if config.offline and data.evaluation:
        assert not isinstance(data.evaluation, PromptBatch)

        def beta() -> float:
            return config.actor_rollout.beta_after(state.epoch)

        return OfflineEvaluation(config.training, data.evaluation, roles.actor, reference, beta=beta)
    if not isinstance(data.evaluation, PromptBatch) or roles.rollout is None or config.replays_scores:
        return None
    place = lambda: f"the evaluation after {state.step} steps"  # noqa: E731
    rewards = make_rewards(config, roles.models, roles.readers, platform=platform, tally=state, place=place, stop=stop)
    rooms = EvalBackends(
        rollout=roles.rollout,
        scorer=Unscaled(rewards) if rewards.terms else None,
        actor=roles.actor,
        reference=roles.reference,
        judge=judging,
    )
    eos_ids = _eos_ids(config, data)
    return Evaluation(
        evaluation_settings(config, eos_ids),
        data.evaluation,
        rooms,
        tokenizer=data.tokenizer,
        show=report.answered if config.log.eval_answers else None,
    )


def report_settings(config: RunConfig) -> ReportSettings:
    """What a run's report must know of it."""
    has_penalty = Shaping.of(config.actor_rollout, max_new_tokens=config.max_new_tokens).changes_scores
    return ReportSettings(
        training=config.training,
        log=config.log,
        has_penalty=has_penalty,
        recipe=config.dump(),
        stop_on=config.health.stop_on,
    )


def evaluation_settings(config: RunConfig, eos_ids: tuple[int, ...]) -> EvaluationSettings:
    """When and how an online run evaluates; ``eos_ids``: what ends a completion."""
    return EvaluationSettings(
        config=config.eval,
        training=config.training,
        max_new_tokens=config.max_new_tokens,
        shaping=Shaping.of(config.actor_rollout, max_new_tokens=config.max_new_tokens),
        eos_ids=eos_ids,
        stop=config.rollout.stop,
        structured_outputs=config.rollout.structured_outputs,
        num_shown=config.log.eval_answers,
    )
