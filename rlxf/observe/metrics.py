"""One step's numbers: where they are written, and those that come from rollouts and pairs. Names: docs/metrics.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from rlxf.core.jsonl import open_after
from rlxf.core.types import Examples, Metrics, OnlinePairs, Pairs, ScoredRollouts
from rlxf.pair.strategies import PairingResult


class Sink(Protocol):
    """A place that metrics are written to."""

    def write(self, step: int, metrics: Metrics) -> None:
        """``step``: complete driver steps, 0 before the first."""
        ...

    def close(self, *, complete: bool = False) -> None:
        """``complete``: the run has come to its end. May be called twice."""
        ...


class JsonlSink:
    """One object per step, ``step`` first, numbers at full precision; what is not finite becomes null."""

    def __init__(self, path: Path, *, after: int | None = None) -> None:
        """``after``: the step after which a resumed run goes on; its row and those before stay."""
        self._file = open_after(path, after)

    def write(self, step: int, metrics: Metrics) -> None:
        self._file.write((json.dumps({"step": step, **finite_or_null(metrics)}) + "\n").encode())
        self._file.flush()  # line by line: a killed run keeps what it wrote

    def close(self, *, complete: bool = False) -> None:
        self._file.close()


class TensorBoardSink:
    """TensorBoard event files. Imported late: TensorBoard takes a second to import."""

    def __init__(self, folder: Path, *, after: int | None = None) -> None:
        """``after``: the step after which a resumed run goes on; TensorBoard hides what is there of later steps."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=None if after is None else after + 1)

    def write(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, complete: bool = False) -> None:
        self._writer.close()


def from_json(values: Mapping[str, float | None]) -> Metrics:
    """Metrics that were written with ``finite_or_null``; null is NaN again."""
    return {name: math.nan if value is None else value for name, value in values.items()}


def finite_or_null(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has neither NaN nor infinity."""
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


class Source(Protocol):
    """What steps are made of."""

    def epoch(self, step: int) -> float: ...

    @property
    def num_dropped(self) -> int: ...


def data_metrics(source: Source, step: int) -> Metrics:
    """How far the data is used after step ``step`` (0 is the first), and how many of its rows were left out so far."""
    return {"epoch": source.epoch(step), "data/dropped": float(source.num_dropped)}


def rollout_metrics(scored: ScoredRollouts, generate_s: float) -> Metrics:
    """Lengths, scores and EOS over all completions of a step, dropped ones included; missing scores are left out."""
    sequences = scored.rollouts.sequences
    scores = scored.scores[scored.scores.isfinite()].double()
    return {
        "objective/scores": _mean(scores),
        "objective/scores_margin": _mean(best_minus_worst(scored)),
        "score/missing": float(len(scored) - len(scores)),
        "val/contain_eos_token": _mean(scored.contains_eos.double()),
        **_spread("reward/score", scores),
        **_spread("response_length", sequences.completion_lengths.double()),
        **_spread("prompt_length", scored.rollouts.prompts.prompts.lengths.double()),
        "rollout/tokens_per_s": float(sequences.completion_lengths.sum()) / max(generate_s, 1e-9),
    }


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
    """How many prompts gave a pair, and how far apart its two scores are."""
    return {
        "pair/kept": float(len(pairing.pairs)),
        "pair/dropped": float(pairing.dropped),
        "pair/missing": float(pairing.missing),
        "pair/tie_rate": pairing.ties / max(pairing.num_prompts, 1),
        "pair/margin": _mean(pairing.pairs.margin.double()),
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


def _spread(name: str, values: Tensor) -> Metrics:
    if not values.numel():
        return {}
    return {f"{name}/mean": _mean(values), f"{name}/max": float(values.max()), f"{name}/min": float(values.min())}


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else math.nan


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
