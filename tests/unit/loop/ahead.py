"""Runs that sample ahead of training, on small real objects: what ends them in between, and what they have done."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlxf.config.schema import RunConfig
from rlxf.core.errors import RlxfError, TrainingError
from rlxf.core.stop import Stop
from rlxf.core.types import Metrics, ReferencedPairs, Rollouts
from rlxf.driver import train
from rlxf.loop.due import evaluation_is_due
from rlxf.loop.run import State
from rlxf.pair import PAIRINGS, PairingSettings
from rlxf.schedule import InThreads, Lanes, OneAfterTheOther
from rlxf.score.penalty import Shaping, with_scores
from tests.unit.small_run import (
    EOS,
    SmallActor,
    SmallEngine,
    SmallPrompts,
    SmallReference,
    SmallRun,
    TokenCounter,
    one_source,
    resume_small,
    small_config,
    small_run,
)

SIZE = 4  # prompts in a step
NUM_STEPS = 8
EMPTY = frozenset({1, 4})  # steps whose prompts all tie
LANES: dict[str, Callable[[Stop], Lanes]] = {"in turn": lambda stop: OneAfterTheOther(), "threads": InThreads}


def ahead_config(num_ahead: int, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "rollout__lookahead": num_ahead,
        "training__train_iters": NUM_STEPS,
        "training__global_batch_size": SIZE,
        "training__eval_interval": 2,
        "training__save_interval": 3,
        "actor_rollout__n_samples_per_prompt": 3,
    }
    return small_config(**settings | changes)


class Trace(list[str]):
    """What a run has done, in order; may break it or stop it at any place, and makes threads meet in other orders.

    Args:
        at: the event, and how many of its kind came before.
        happens: what happens there.
        jitter: seed of pauses of up to 1 ms before everything; 0: none.
    """

    def __init__(
        self, at: tuple[str, int] | None = None, happens: Callable[[], None] = lambda: None, *, jitter: int = 0
    ) -> None:
        super().__init__()
        self._at, self._happens = at, happens
        self._random = random.Random(jitter) if jitter else None

    def append(self, name: str) -> None:
        if self._random is not None:
            time.sleep(self._random.random() * 0.001)
        super().append(name)
        if (name, self.count(name) - 1) == self._at:
            self._happens()


def break_down() -> None:
    raise TrainingError("broken down")


class SomeStepsScore(TokenCounter):
    """The prompts of some steps all tie. Of every second step one completion has no score because a call failed."""

    def __init__(self, trace: list[str], state: State, empty: frozenset[int] = EMPTY) -> None:
        super().__init__(trace)
        self._state, self._empty = state, empty

    def score(self, rollouts: Rollouts) -> Tensor:
        scores = super().score(rollouts)
        step = int(rollouts.prompts.row_ids[0]) // SIZE
        if step % 2 and step * SIZE in rollouts.prompts.row_ids:
            self._state.all_failed_scores += 1
        return scores * (step not in self._empty)


class Boundaries:
    """An evaluation that requires what is promised of boundaries, and measures the engine's weights."""

    small: SmallRun

    def __call__(self, step: int) -> Metrics:
        run, engine, actor = self.small.run, self.small.engine, self.small.actor
        if not evaluation_is_due(run.config.training, step):
            return {}
        self.small.trace.append("evaluation")
        assert not engine.busy
        assert torch.equal(engine.logits, actor.logits)  # W(step), in both
        assert engine.version == run.state.policy_version
        for waiting in run.steps:  # the scorer and the reference have nothing to do
            if waiting.step >= step:
                assert waiting.data is not None
                referred = waiting.batch is not None or not len(waiting.data)
                assert referred or run.config.reference_is_base  # which is asked when its turn has come
        return {"eval/weights": float(engine.logits.square().sum())}


def start(
    config: RunConfig,
    *,
    lanes: str = "in turn",
    trace: Trace | None = None,
    ended: SmallRun | None = None,
    shown: int = 0,
    **others: Any,
) -> SmallRun:
    """A run that is ready; with ``ended`` one that goes on where that one ended.

    ``shown``: pairs of each step that people are shown.
    """
    trace = Trace() if trace is None else trace
    evaluate = Boundaries()
    arguments = {"trace": trace, "lanes": LANES[lanes], "evaluate": evaluate, **others}
    small = resume_small(ended, config, **arguments) if ended else small_run(config, **arguments)
    evaluate.small = small
    source = replace(small.run.source, rewards=one_source(SomeStepsScore(trace, small.run.state), small.run.state))  # type: ignore[type-var]
    small.run = replace(small.run, source=source)
    small.recorder.num_shown = shown
    small.folder.during_save = lambda: trace.append("save")
    return small


def finish(small: SmallRun) -> SmallRun:
    train(small.run)
    return small


def ends_early(small: SmallRun, error: type[RlxfError] = TrainingError) -> SmallRun:
    with small.stop.installed(), pytest.raises(error):
        train(small.run)
    return small


def numbers(small: SmallRun) -> dict[int, Metrics]:
    """By the complete steps of each row."""
    return {
        step: {name: value for name, value in metrics.items() if not name.startswith(("timing/", "rollout/"))}
        for step, metrics in small.notes.steps.items()
    }


def samples(small: SmallRun) -> dict[int, tuple[list[int], list[int], list[float]]]:
    """Tokens, versions and scores that each step was made of, as they were recorded."""
    return {
        step: (
            scored.rollouts.sequences.tokens.tolist(),
            scored.rollouts.policy_version.tolist(),
            scored.raw_scores.tolist(),
        )
        for step, scored in zip(small.recorder.steps, small.recorder.scored, strict=True)
    }


def references(small: SmallRun) -> dict[int, list[float]]:
    """What the reference says of each token that people are shown, by step, as it was recorded."""
    said = zip(small.recorder.steps, small.recorder.references, strict=True)
    return {step: reference.tokens.tolist() for step, reference in said if reference.tokens is not None}


def require_same(whole: SmallRun, ended: SmallRun, again: SmallRun) -> None:
    """A run that ended early, and the one that went on: together what one is that nothing disturbed."""
    saved = ended.folder.states[-1] if ended.folder.states else State()
    first_rows = {step: row for step, row in numbers(ended).items() if step <= saved.reported_step}
    assert first_rows | numbers(again) == numbers(whole)
    assert {step: row for step, row in samples(ended).items() if step <= saved.step} | samples(again) == samples(whole)
    shown = {step: tokens for step, tokens in references(ended).items() if step <= saved.step}
    assert shown | references(again) == references(whole)
    assert torch.equal(again.actor.logits, whole.actor.logits)
    for name in ("step", "policy_version", "empty_steps", "num_tokens", "failed_scores", "owed"):
        assert getattr(again.run.state, name) == getattr(whole.run.state, name), name


def by_hand(config: RunConfig, *, moves: int = 0) -> tuple[list[float | None], Tensor]:
    """Losses of each step (None: it has no pair) and the last weights, by the definition and nothing else.

    Step s trains on completions of W(max(0, s - k)), against the reference that stood there. ``moves``: the reference
    becomes the policy after each update whose version is a multiple.
    """
    actor, engine, reference, prompts = (
        SmallActor(config, []),
        SmallEngine([]),
        SmallReference([]),
        SmallPrompts(config, []),
    )
    sampling = small_run(config).run.training_sampling()
    scorer = SomeStepsScore([], State())
    weights, versions, references = [actor.logits.detach().clone()], [0], [reference.logits]
    losses: list[float | None] = []
    for step in range(config.training.train_iters):
        boundary = max(0, step - config.rollout.lookahead)
        engine.logits, engine.version = weights[boundary], versions[boundary]
        reference.logits = references[boundary]
        rollouts = engine.generate(prompts.next_batch(step), sampling)
        shaping = Shaping.of(config.actor_rollout, max_new_tokens=config.max_new_tokens)
        scored = with_scores(rollouts, scorer.score(rollouts), eos_ids=(EOS,), shaping=shaping)
        settings = PairingSettings(min_score_margin=config.algorithm.min_score_margin)
        pairs = PAIRINGS[config.algorithm.pairing](scored, settings).pairs
        version, standing = versions[-1], references[-1]
        if len(pairs):
            batch = ReferencedPairs(pairs=pairs, reference=reference.logps(pairs))
            losses.append(actor.update(batch, step)["loss"])
            version += 1
            if moves and version % moves == 0:
                standing = actor.logits.detach().clone()
        else:
            losses.append(None)
        weights.append(actor.logits.detach().clone())
        versions.append(version)
        references.append(standing)
    return losses, actor.logits.detach()
