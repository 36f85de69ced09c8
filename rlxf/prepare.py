"""What the driver needs before it can run: the data of a recipe, and the members of its run put together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlxf.assemble import policy_folder, policy_tokenizer
from rlxf.clock import Clock
from rlxf.config.schema import RunConfig
from rlxf.data.preferences import PreferenceFile
from rlxf.data.prompts import PromptSource, eval_prompts
from rlxf.evaluate import Evaluation, Rooms, no_evaluation
from rlxf.models.tokenizer import eos_token_ids
from rlxf.platform.base import Platform
from rlxf.record import RolloutRecorder, SampleRecorder
from rlxf.report import RunReport
from rlxf.rollout.replay import ReplayEngine
from rlxf.run import Actor, Evaluate, Online, PairSource, Reference, Rollout, Run, State, Sync
from rlxf.run_folder import Recorders, RunFolder
from rlxf.score.recorded import RecordedScorer, has_scores
from rlxf.score.scorer import Scorer
from rlxf.stop import Stop
from rlxf.sync.probe import make_probe
from rlxf.sync.push import SyncReport, WeightSink, WeightSource, WeightSync
from rlxf.types import PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def needs_scorer(config: RunConfig) -> bool:
    """Whether a reward model or function has to score: not offline, and not when the replayed file holds scores."""
    recorded = config.rollout.replay_path if config.engine == "replay" else None
    return not config.offline and not (recorded and has_scores(recorded))


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """What a run reads, opened and checked; needs no model."""

    tokenizer: PreTrainedTokenizerBase
    training: PromptSource | ReplayEngine | PreferenceFile
    evaluation: PromptBatch | None


def load_data(config: RunConfig) -> Data:
    """Tokenizer, prompts or pairs, and evaluation prompts if this run evaluates.

    Raises:
        DataError: a file is missing or wrong.
    """
    tokenizer = policy_tokenizer(config)
    if config.offline:
        return Data(tokenizer=tokenizer, training=PreferenceFile(config, tokenizer), evaluation=None)
    if config.engine == "replay":
        return Data(tokenizer=tokenizer, training=ReplayEngine(config), evaluation=None)
    evaluation = eval_prompts(config, tokenizer) if config.training.eval_interval else None
    return Data(tokenizer=tokenizer, training=PromptSource(config, tokenizer), evaluation=evaluation)


class SyncedActor(Actor, WeightSource, Protocol):
    """The actor, or what stands for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    """The roles that a run's recipe asks for, in this process or behind proxies."""

    actor: SyncedActor
    reference: Reference
    scorer: Scorer | None = None  # None: offline, or the replayed scores are used
    rollout: Rollout | None = None  # None: offline or replay
    sink: WeightSink | None = None  # the rollout engines, as far as weights are concerned


class NoSync:
    """For a run without a rollout engine."""

    def push(self, version: int) -> SyncReport:
        return SyncReport(version=version, num_bytes=0, seconds=0.0, probe_difference=None)


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
) -> Run:
    """The run that the driver trains."""
    return Run(
        config=config,
        source=_source(config, run_dir, data, roles),
        reference=roles.reference,
        actor=roles.actor,
        sync=_sync(config, data, roles, platform),
        evaluate=_evaluation(config, data, roles),
        report=report,
        folder=RunFolder(config, run_dir, roles.actor),
        clock=clock,
        stop=stop,
        state=State(),
    )


def _source(config: RunConfig, run_dir: Path, data: Data, roles: Roles) -> Online | PairSource:
    if isinstance(data.training, PreferenceFile):
        return data.training
    rollout = data.training if isinstance(data.training, ReplayEngine) else roles.rollout
    scorer = roles.scorer or RecordedScorer(str(config.rollout.replay_path))
    assert rollout is not None  # a run that samples has an engine
    log = config.log
    recorder = Recorders(
        RolloutRecorder(run_dir / "rollouts.jsonl") if log.rollouts else None,
        SampleRecorder(run_dir / "samples.jsonl", data.tokenizer) if log.samples_interval else None,
        log.samples_interval,
    )
    eos_ids = _eos_ids(config, data)
    return Online(prompts=data.training, rollout=rollout, scorer=scorer, eos_ids=eos_ids, recorder=recorder)


def _eos_ids(config: RunConfig, data: Data) -> tuple[int, ...]:
    return eos_token_ids(policy_folder(config), data.tokenizer)


def _sync(config: RunConfig, data: Data, roles: Roles, platform: Platform) -> Sync:
    if roles.sink is None:
        return NoSync()
    assert isinstance(data.training, PromptSource)  # a run that has engines samples from prompts
    probe = make_probe(config, platform, data.training.next_batch(0).prompts)
    return WeightSync(roles.actor, roles.sink, config.sync, probe)


def _evaluation(config: RunConfig, data: Data, roles: Roles) -> Evaluate:
    if data.evaluation is None or roles.rollout is None or roles.scorer is None:
        return no_evaluation
    rooms = Rooms(rollout=roles.rollout, scorer=roles.scorer, actor=roles.actor, reference=roles.reference)
    eos_ids = _eos_ids(config, data)
    return Evaluation(config, data.evaluation, rooms, tokenizer=data.tokenizer, eos_ids=eos_ids)
