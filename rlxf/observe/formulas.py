"""The metrics of a step that come from rollouts, pairs and data. Names: docs/metrics.md."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rlxf.core.pairs import PairingResult
from rlxf.core.types import Examples, Metrics, OnlinePairs, Pairs, ScoredRollouts
from rlxf.observe.answers import distinct, score_shape


class Source(Protocol):
    """What steps are made of."""

    def epoch(self, step: int) -> float: ...

    @property
    def num_dropped(self) -> int: ...


def data_metrics(source: Source, step: int) -> Metrics:
    """How far the data is used after step ``step`` (0 is the first), and how many of its rows were left out so far."""
    return {"epoch": source.epoch(step), "data/dropped": float(source.num_dropped)}


def rollout_metrics(scored: ScoredRollouts, generate_s: float, *, has_scores: bool = True) -> Metrics:
    """Lengths, scores and EOS over all completions of a step, dropped ones included; missing scores are left out.

    ``has_scores``: False where a judge alone compares.
    """
    sequences = scored.rollouts.sequences
    return {
        **(_score_metrics(scored) if has_scores else {}),
        "val/contain_eos_token": _mean(scored.contains_eos.double()),
        **_spread("response_length", sequences.completion_lengths.double()),
        **_spread("prompt_length", scored.rollouts.prompts.prompts.lengths.double()),
        "rollout/distinct": distinct(sequences),
        "rollout/tokens_per_s": float(sequences.completion_lengths.sum()) / max(generate_s, 1e-9),
    }


def _score_metrics(scored: ScoredRollouts) -> Metrics:
    scores = scored.scores[scored.scores.isfinite()].double()
    return {
        "objective/scores": _mean(scores),
        "objective/scores_margin": _mean(best_minus_worst(scored)),
        "score/missing": float(len(scored) - len(scores)),
        **source_metrics(scored),
        **_spread("reward/score", scores),
        **score_shape(scored),
    }


def source_metrics(scored: ScoredRollouts) -> Metrics:
    """Mean and standard deviation (n - 1) of each source's scores, missing ones left out, and how many are missing."""
    metrics: Metrics = {}
    for name, scores in scored.sources.items():
        known = scores[scores.isfinite()].double()
        metrics[f"rewards/{name}/mean"] = _mean(known)
        metrics[f"rewards/{name}/std"] = float(known.std()) if len(known) > 1 else math.nan
        metrics[f"rewards/{name}/missing"] = float(len(scores) - len(known))
    return metrics


def best_minus_worst(scored: ScoredRollouts) -> Tensor:
    """[prompts with two scores] float64: best minus worst score of each prompt, ties included."""
    scores, prompt = scored.scores.double(), scored.rollouts.prompt_index
    kept = scores.isfinite()
    scores, prompt = scores[kept], prompt[kept]
    size = len(scored.rollouts.prompts)
    best = scores.new_full((size,), -math.inf).scatter_reduce(0, prompt, scores, "amax")
    worst = scores.new_full((size,), math.inf).scatter_reduce(0, prompt, scores, "amin")
    return (best - worst)[prompt.bincount(minlength=size) >= 2]


def pair_metrics(pairing: PairingResult) -> Metrics:
    """How many pairs there are, why others are not, and how far apart the two sides are."""
    lengths = {} if pairing.too_different is None else {"pair/too_different": float(pairing.too_different)}
    difference = pairing.pairs.chosen.completion_lengths - pairing.pairs.rejected.completion_lengths
    return {
        "pair/kept": float(len(pairing.pairs)),
        "pair/dropped": float(pairing.dropped),
        "pair/missing": float(pairing.missing),
        "pair/tie_rate": pairing.ties / max(pairing.num_asked, 1),
        "pair/margin": _mean(pairing.pairs.margin.double()),
        "pair/length_difference": _mean(difference.double()),
        **lengths,
    }


def num_tokens(data: Pairs | Examples) -> int:
    """Tokens that one pass over a step's data trains on, prompts counted on both sides of a pair."""
    if isinstance(data, Examples):
        return int(data.sequences.lengths.sum())
    return int(data.chosen.lengths.sum() + data.rejected.lengths.sum())


def version_lag(pairs: Pairs | Examples, policy_version: int) -> Metrics:
    """How many updates the sampling weights were behind the weights that are about to be trained, mean over pairs."""
    if not isinstance(pairs, OnlinePairs) or not len(pairs):
        return {}
    return {"sync/version_lag": _mean((policy_version - pairs.policy_version).double())}


def without_drift_of_others(metrics: Metrics) -> Metrics:
    """Without ``rollout/logp_diff_*`` where other weights sampled than were trained: these tell of numerical drift."""
    if not metrics.get("sync/version_lag"):
        return metrics
    return {name: value for name, value in metrics.items() if not name.startswith("rollout/logp_diff_")}


def _spread(name: str, values: Tensor) -> Metrics:
    if not values.numel():
        return {}
    return {f"{name}/mean": _mean(values), f"{name}/max": float(values.max()), f"{name}/min": float(values.min())}


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that a run writes."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]  # of text, it would split at U+2028, too
