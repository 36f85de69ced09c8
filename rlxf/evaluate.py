"""Fresh samples on validation prompts, scored and compared with what the initial policy said to the same prompts."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlxf.config.schema import RunConfig
from rlxf.errors import ConfigError, RlxfError
from rlxf.rollout.engine import Sampling
from rlxf.run import Actor, Reference, Rollout
from rlxf.score.penalty import with_scores
from rlxf.score.scorer import Scorer
from rlxf.types import Metrics, PromptBatch, ScoredRollouts, Sequences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

UserMetrics = Callable[[list[Any], list[str], list[str]], dict[str, float]]
_SIGNATURE = "def evaluate(prompts, completions, initial_completions) -> dict[str, float]"
_BASELINE_STEP = -1  # seeds of the initial policy's samples; an evaluation after n steps uses -2 - n


def no_evaluation(step: int) -> Metrics:
    """For runs that evaluate nothing."""
    return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rooms:
    """Who takes part in an evaluation."""

    rollout: Rollout
    scorer: Scorer
    actor: Actor
    reference: Reference


@dataclass(frozen=True, slots=True)
class Samples:
    """One completion per evaluation prompt."""

    scored: ScoredRollouts
    texts: list[str]


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the initial policy said to the evaluation prompts."""

    scores: Tensor  # [num_prompts] float32, NaN where missing
    texts: list[str]


class Evaluation:
    """``eval/*`` every ``training.eval_interval`` steps, before the first and after the last one.

    One sample per prompt at temperature 1. Its seeds depend on run, step and prompt and are never those of training.
    """

    def __init__(
        self,
        config: RunConfig,
        prompts: PromptBatch,
        rooms: Rooms,
        *,
        tokenizer: PreTrainedTokenizerBase,
        eos_ids: tuple[int, ...],
    ) -> None:
        self._config = config
        self._prompts = prompts
        self._rooms = rooms
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._user_metrics = load_metrics(config.eval.metrics) if config.eval.metrics else None
        self._baseline: Baseline | None = None

    def restore(self, found: dict[str, Any] | None) -> None:
        """Take over the ``baseline`` of the run that is resumed; call while engine and actor hold the initial policy.

        If it does not answer this run's prompts (another ``eval`` section, or no evaluations so far), the initial
        policy is sampled now.
        """
        if found is not None and found["prompts"] == self._prompts_digest():
            scores = [math.nan if score is None else score for score in found["scores"]]
            self._baseline = Baseline(torch.tensor(scores, dtype=torch.float32), found["texts"])
            return
        log.warning("the checkpoint has no evaluation of these prompts: the initial policy is sampled again")
        self._baseline = self._sample_baseline()

    def describe_baseline(self) -> dict[str, Any] | None:
        """The baseline as JSON data, for ``restore``; None before the first evaluation."""
        if self._baseline is None:
            return None
        scores = [score if math.isfinite(score) else None for score in self._baseline.scores.tolist()]
        return {"prompts": self._prompts_digest(), "scores": scores, "texts": self._baseline.texts}

    def _prompts_digest(self) -> str:
        return hashlib.sha256(json.dumps(self._prompts.prompts.rows()).encode()).hexdigest()

    def _sample_baseline(self) -> Baseline:
        samples = self._sample(_BASELINE_STEP)
        return Baseline(samples.scored.scores, samples.texts)

    def __call__(self, step: int) -> Metrics:
        """Evaluate after ``step`` complete steps, if one is due; the first call is at step 0, or after ``restore``."""
        training = self._config.training
        if step % training.eval_interval and step != training.train_iters:
            return {}
        if self._baseline is None:
            self._baseline = self._sample_baseline()
        samples = self._sample(_BASELINE_STEP - 1 - step)
        scored = samples.scored
        known = scored.scores[scored.scores.isfinite()].double()
        return {
            "eval/reward": _mean(known),
            "eval/win_rate": win_rate(scored.scores, self._baseline.scores),
            "eval/kl": self._kl(scored.rollouts.sequences),
            "eval/length": _mean(scored.rollouts.sequences.completion_lengths.double()),
            "eval/eos_rate": _mean(scored.contains_eos.double()),
            **self._from_user(samples.texts, self._baseline.texts),
        }

    def _sample(self, step: int) -> Samples:
        config = self._config
        sampling = Sampling(
            num_samples=1, max_new_tokens=config.max_new_tokens, temperature=1.0, seed=config.training.seed, step=step
        )
        rollouts = self._rooms.rollout.generate(self._prompts, sampling)
        penalty = config.actor_rollout.missing_eos_penalty
        raw_scores = self._rooms.scorer.score(rollouts)
        scored = with_scores(rollouts, raw_scores, eos_ids=self._eos_ids, missing_eos_penalty=penalty)
        texts = self._tokenizer.batch_decode(rollouts.sequences.completion_rows(), skip_special_tokens=True)
        return Samples(scored, texts)

    def _kl(self, sequences: Sequences) -> float:
        """Mean over completions of the summed log-ratio: an estimate of the KL of whole completions, nats."""
        difference = self._rooms.actor.token_logps(sequences) - self._rooms.reference.token_logps(sequences)
        return float(difference.double().sum()) / len(sequences)

    def _from_user(self, texts: list[str], initial_texts: list[str]) -> Metrics:
        if self._user_metrics is None:
            return {}
        path = self._config.eval.metrics
        try:
            found = self._user_metrics(list(self._prompts.texts), texts, initial_texts)
            return {f"eval/{name}": float(value) for name, value in found.items()}
        except RlxfError:
            raise  # a stop that the user asked for, among others
        except Exception as error:
            raise ConfigError(f"eval.metrics={path}: `evaluate` failed: {type(error).__name__}: {error}") from error


def win_rate(scores: Tensor, initial: Tensor) -> float:
    """Share of prompts whose score is above the initial policy's; ties count half, missing scores not at all."""
    known = scores.isfinite() & initial.isfinite()
    wins = torch.where(scores == initial, 0.5, (scores > initial).double())
    return _mean(wins[known])


def load_metrics(path: str) -> UserMetrics:
    """``evaluate`` of a Python file.

    Raises:
        ConfigError: there is no such file or function, or the file cannot be run.
    """
    spec = importlib.util.spec_from_file_location("rlxf_eval_metrics", Path(path))
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ConfigError(f"eval.metrics={path}: no such Python file; expected one with `{_SIGNATURE}`")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except RlxfError:
        raise  # a stop that the user asked for, among others
    except Exception as error:
        raise ConfigError(f"eval.metrics={path}: cannot be loaded: {type(error).__name__}: {error}") from error
    function: UserMetrics | None = getattr(module, "evaluate", None)
    if not callable(function):
        raise ConfigError(f"eval.metrics={path}: defines no function `evaluate`; expected `{_SIGNATURE}`")
    return function


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan
