"""Scored completions of validation prompts, compared with those of the initial policy and of the last evaluation."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlxf.config.schema import EvalConfig, TrainingConfig
from rlxf.core.jsonl import Row
from rlxf.core.types import Metrics, PromptBatch, ScoredRollouts, Sequences
from rlxf.evaluate.answers import Scores, mean, measured, standard_error, wins
from rlxf.evaluate.reference_answers import reference_answers
from rlxf.evaluate.user import call_metrics, load_metrics
from rlxf.judge.both_orders import Counts
from rlxf.judge.judged import Judging
from rlxf.judge.judged import wins as judged_wins
from rlxf.loop.due import evaluation_is_due
from rlxf.loop.run import Actor, Reference, Rollout
from rlxf.models.stop_strings import StopStrings
from rlxf.observe.answers import distinct
from rlxf.observe.tokens import answer
from rlxf.rollout.engine import Purpose, Sampling
from rlxf.score.penalty import Shaping, with_scores
from rlxf.score.scorer import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalBackends:
    """The members of a run that an evaluation uses."""

    rollout: Rollout
    scorer: Scorer | None  # None: a judge alone compares
    actor: Actor
    reference: Reference
    judge: Judging | None = None  # None: win rates are those of the scores


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSettings:
    """When and how an evaluation samples."""

    config: EvalConfig
    training: TrainingConfig  # when it is due, and the run's seed
    max_new_tokens: int
    shaping: Shaping  # what is subtracted from a score
    eos_ids: tuple[int, ...]  # what ends a completion
    stop: tuple[str, ...] = ()  # texts that end it, too
    structured_outputs: Mapping[str, Any] | None = None  # form of completions
    num_shown: int = 0  # answers that people are shown


@dataclass(frozen=True, slots=True)
class Samples:
    """One completion per evaluation prompt, as the rooms have it."""

    scored: ScoredRollouts
    texts: list[str]

    @property
    def scores(self) -> Tensor:
        return self.scored.scores  # [num_prompts] float32


class Evaluation:
    """``eval/*`` every ``training.eval_interval`` steps, before the first and after the last one.

    One sample per prompt at temperature 1, whose seeds depend on run, step and prompt and are never those of training;
    and, with ``eval.greedy``, the most probable completion, which depends on nothing but the weights.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        prompts: PromptBatch,
        rooms: EvalBackends,
        *,
        tokenizer: PreTrainedTokenizerBase,
        show: Callable[[int, list[Row]], None] | None = None,
    ) -> None:
        """``show``: gets the answers to the first ``log.eval_answers`` prompts of each evaluation, for people."""
        self._settings = settings
        self._show = show
        self._config, self._training = settings.config, settings.training
        self._prompts = prompts
        self._rooms = rooms
        self._tokenizer = tokenizer
        answers = reference_answers(settings.config, prompts) if rooms.judge is not None else None
        nothing = torch.full((len(prompts),), math.nan)
        self._reference = None if answers is None else Scores(nothing, nothing, answers, answers)
        self._stopped = StopStrings(tokenizer, settings.stop).completed if settings.stop else None
        self._user_metrics = load_metrics(settings.config.metrics) if settings.config.metrics else None
        self._baseline: Scores | None = None  # the initial policy's
        self._initial_texts: list[str] = []  # and its completions
        self._previous: Scores | None = None  # the last evaluation's; at first the initial policy's

    def restore(self, found: dict[str, Any] | None, *, push_initial: Callable[[], object] = lambda: None) -> None:
        """Load what ``describe_baseline`` of the resumed run returned; the actor still holds the initial policy.

        If it does not answer this run's prompts (another ``eval`` section, or no evaluations so far), the initial
        policy is sampled now.

        Args:
            found: of the checkpoint.
            push_initial: puts the initial policy into the engines; called only if it is sampled.
        """
        if found is None or found["prompts"] != self._prompts_digest():
            log.warning("the checkpoint has no evaluation of these prompts: the initial policy is sampled again")
            push_initial()
            self._start(self._greedy(0))
            return
        self._baseline, self._initial_texts = Scores.read(found), found["texts"]
        judged = self._rooms.judge is not None
        if self._config.greedy and (self._baseline.greedy is None or (judged and self._baseline.greedy_texts is None)):
            log.warning("the checkpoint has no greedy answers: the initial policy answers again")
            push_initial()
            greedy = self._greedy(0)
            texts = greedy.texts if greedy is not None and judged else None
            self._baseline = Scores(self._baseline.sampled, _scores(greedy), self._baseline.texts, texts)
        previous = found.get("previous")
        self._previous = Scores.read(previous) if previous else self._baseline

    def describe_baseline(self) -> dict[str, Any] | None:
        """Initial and last answers as JSON data, for ``restore``; None before the first evaluation."""
        if self._baseline is None or self._previous is None:
            return None
        previous = None if self._previous is self._baseline else self._previous.describe()
        initial = {**self._baseline.describe(), "texts": self._initial_texts}
        return {"prompts": self._prompts_digest(), **initial, "previous": previous}

    def _prompts_digest(self) -> str:
        return hashlib.sha256(json.dumps(self._prompts.prompts.rows()).encode()).hexdigest()

    def __call__(self, step: int) -> Metrics:
        """Evaluate after ``step`` complete steps, if one is due; the first call is at step 0, or after ``restore``.

        ``training.eval_only`` leaves out the win rates of the policy against itself.
        """
        if not evaluation_is_due(self._training, step):
            return {}
        alone = self._training.eval_only
        greedy = self._greedy(step)
        others = {"win_rate": self._baseline}  # None at the first evaluation
        if self._baseline is None and (not alone or self._user_metrics is not None):
            self._start(greedy)  # the weights are the same
        if not alone:
            others = {"win_rate": self._baseline, "win_rate_previous": self._previous}
        samples = self._sample("eval", step)
        logps, reference_logps = self._logps(samples.scored.rollouts.sequences)
        metrics = {
            **self._rewards(samples, ""),
            **self._win_rates(samples, greedy, others),
            **_kl(logps, reference_logps),
            **_lengths(samples, ""),
            "eval/distinct": distinct(samples.scored.rollouts.sequences),
        }
        if greedy is not None:
            metrics |= {**self._rewards(greedy, "greedy_"), **_lengths(greedy, "greedy_")}
        metrics |= self._from_user(samples.texts, self._initial_texts)
        if self._show is not None:
            self._show(step, self._shown(samples, logps, reference_logps))
        self._previous = self._answers(samples, greedy)  # last: this one is complete
        return metrics

    def _start(self, greedy: Samples | None) -> None:
        """Keep the initial policy's completions."""
        samples = self._sample("initial", 0)
        self._baseline = self._previous = self._answers(samples, greedy)
        self._initial_texts = samples.texts

    def _answers(self, samples: Samples, greedy: Samples | None) -> Scores:
        if self._rooms.judge is None:
            return Scores(samples.scores, _scores(greedy))
        return Scores(samples.scores, _scores(greedy), samples.texts, None if greedy is None else greedy.texts)

    def _greedy(self, step: int) -> Samples | None:
        return self._sample("greedy", step) if self._config.greedy else None

    def _sample(self, purpose: Purpose, step: int) -> Samples:
        settings = self._settings
        sampling = Sampling(
            num_samples=1,
            max_new_tokens=settings.max_new_tokens,
            temperature=0.0 if purpose == "greedy" else 1.0,
            stop=settings.stop,
            structured_outputs=settings.structured_outputs,
            seed=self._training.seed,
            purpose=purpose,
            step=step,
        )
        rollouts = self._rooms.rollout.generate(self._prompts, sampling)
        scorer = self._rooms.scorer
        raw_scores = scorer.score(rollouts) if scorer is not None else torch.full((len(rollouts),), math.nan)
        scored = with_scores(
            rollouts, raw_scores, eos_ids=settings.eos_ids, shaping=settings.shaping, stopped=self._stopped
        )
        texts = self._tokenizer.batch_decode(rollouts.sequences.completion_rows(), skip_special_tokens=True)
        return Samples(scored, texts)

    def _rewards(self, samples: Samples, prefix: str) -> Metrics:
        return _rewards(samples, prefix) if self._rooms.scorer is not None else {}

    def _win_rates(self, sampled: Samples, greedy: Samples | None, others: Mapping[str, Scores | None]) -> Metrics:
        """Win rates by the judge, or by the scores without one, against those of ``others`` that exist."""
        judge = self._rooms.judge
        if judge is None:
            return _win_rates(sampled, greedy, others)
        metrics: Metrics = {}
        counts = Counts()
        for name, other in {**others, "win_rate_reference": self._reference}.items():
            if other is None:
                continue
            sides = {name: (sampled.texts, other.texts)}
            if greedy is not None:
                sides[f"greedy_{name}"] = greedy.texts, other.greedy_texts
            for side, (ours, theirs) in sides.items():
                if theirs is not None:
                    found = judge.answers(self._prompts, ours, theirs)
                    counts.add(found.counts)
                    metrics |= measured(side, judged_wins(found.probability))
        return metrics | judge.metrics(counts, prefix="eval/judge/")

    def _logps(self, sequences: Sequences) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Per completion [tokens] float32 log-probs of the policy, and of the reference."""
        lengths = sequences.completion_lengths.tolist()
        both = self._rooms.actor.token_logps(sequences), self._rooms.reference.token_logps(sequences)
        return torch.split(both[0], lengths), torch.split(both[1], lengths)

    def _shown(self, samples: Samples, logps: Sequence[Tensor], reference_logps: Sequence[Tensor]) -> list[Row]:
        """Rows for ``eval.jsonl``: the answers to the first prompts, which are the same in every evaluation."""
        scored, rows = samples.scored, []
        tokens = scored.rollouts.sequences.completion_rows()
        for row in range(min(self._settings.num_shown, len(tokens))):
            score = float(scored.scores[row])
            rows.append(
                {
                    "prompt": self._prompts.texts[int(scored.rollouts.prompt_index[row])],
                    "text": samples.texts[row],
                    "score": score if math.isfinite(score) else None,
                    "length": len(tokens[row]),
                    "eos": bool(scored.contains_eos[row]),
                    **answer(self._tokenizer, tokens[row], logps[row].tolist(), reference_logps[row].tolist()),
                }
            )
        return rows

    def _from_user(self, texts: list[str], initial_texts: list[str]) -> Metrics:
        if self._user_metrics is None:
            return {}
        path = str(self._config.metrics)
        return call_metrics(self._user_metrics, path, list(self._prompts.texts), texts, initial_texts)


def _scores(samples: Samples | None) -> Tensor | None:
    return None if samples is None else samples.scores


def _rewards(samples: Samples, prefix: str) -> Metrics:
    """Mean scores after the penalties and before them, missing ones left out."""
    scored = samples.scored
    metrics: Metrics = {}
    for name, scores in (("reward", scored.scores), ("raw_reward", scored.raw_scores)):
        metrics |= measured(f"{prefix}{name}", scores[scores.isfinite()].double())
    return metrics


def _win_rates(sampled: Samples, greedy: Samples | None, others: Mapping[str, Scores | None]) -> Metrics:
    """Win rates against those of ``others`` that exist, by name."""
    metrics: Metrics = {}
    for name, other in others.items():
        if other is not None:
            metrics |= measured(name, wins(sampled.scores, other.sampled))
        if other is not None and greedy is not None and other.greedy is not None:
            metrics |= measured(f"greedy_{name}", wins(greedy.scores, other.greedy))
    return metrics


def _kl(logps: Sequence[Tensor], reference_logps: Sequence[Tensor]) -> Metrics:
    """Mean over completions of the summed log-ratio: an estimate of the KL of whole completions, nats."""
    ratios = [(own - other).double() for own, other in zip(logps, reference_logps, strict=True)]
    sums = torch.stack([ratio.sum() for ratio in ratios])
    return {"eval/kl": float(torch.cat(ratios).sum()) / len(sums), "eval/kl_se": standard_error(sums)}


def _lengths(samples: Samples, prefix: str) -> Metrics:
    return {
        f"eval/{prefix}length": mean(samples.scored.rollouts.sequences.completion_lengths.double()),
        f"eval/{prefix}eos_rate": mean(samples.scored.contains_eos.double()),
    }
