"""Held-out pairs or examples under the loss that a run minimises: the evaluation of runs that sample nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from rlxf.algorithms import ALGORITHMS, with_beta
from rlxf.config.schema import TrainingConfig
from rlxf.core.types import Batch, Examples, Metrics, Pairs
from rlxf.loop.due import evaluation_is_due
from rlxf.loop.run import Reference
from rlxf.update.objective import MOMENTS

# These are no means over a batch, so they are not averaged over batches.
_EXTREMES = {"min_reward": min, "max_reward": max}
# Means over pairs of a value that is 1 (true) or 0 (false).
_SHARES = ("accuracy", "rewards/accuracies")


class Evaluates(Protocol):
    """A model that reports its metrics on a batch."""

    def evaluate(self, batch: Batch) -> Metrics:
        """Means over the batch's pairs (``Examples``: counted tokens), without gradient; among them ``moments``."""
        ...


class OfflineEvaluation:
    """``eval/*`` every ``training.eval_interval`` steps, before the first and after the last one.

    Args:
        config: says when it evaluates.
        batches: what is held out, the same in every evaluation.
        actor: the model that is trained.
        reference: gives DPO's pairs their reference log-probs; the other stages do not ask it.
        beta: gives the beta of the next step; None: the loss has only one.
    """

    def __init__(
        self,
        config: TrainingConfig,
        batches: Sequence[Pairs | Examples],
        actor: Evaluates,
        reference: Reference,
        *,
        beta: Callable[[], float] | None = None,
    ) -> None:
        self._training = config
        self._batches = batches
        self._actor = actor
        self._reference = reference
        self._beta = beta
        self._algorithm = ALGORITHMS[config.stage]

    def __call__(self, step: int) -> Metrics:
        """The actor's own metrics over all batches, with ``eval/`` before their names; empty if none are due.

        All pairs (sft: all counted tokens) have the same weight in a mean, however large the batches are. ``_se``
        behind a name
        is the standard error of loss and accuracies.
        """
        if not evaluation_is_due(self._training, step):
            return {}
        found = [(self._measure(batch), _weight(batch)) for batch in self._batches]
        names = dict.fromkeys(name for metrics, _ in found for name in metrics)
        metrics = {name: _over_batches(name, found) for name in names}
        errors = _standard_errors(metrics, sum(weight for _, weight in found))
        kept = {name: value for name, value in metrics.items() if not name.startswith(MOMENTS)}
        return {f"eval/{name}": value for name, value in (kept | errors).items()}

    def _measure(self, batch: Pairs | Examples) -> Metrics:
        found = self._algorithm.batch(batch, self._reference)
        return self._actor.evaluate(found if self._beta is None else with_beta(found, self._beta()))


def _weight(batch: Pairs | Examples) -> int:
    return int(batch.counted.sum()) if isinstance(batch, Examples) else len(batch)


def _over_batches(name: str, found: Sequence[tuple[Metrics, int]]) -> float:
    values = [(metrics[name], weight) for metrics, weight in found if name in metrics and weight]
    if not values:
        return math.nan
    if name in _EXTREMES:
        return _EXTREMES[name](value for value, _ in values)
    return math.fsum(value * weight for value, weight in values) / sum(weight for _, weight in values)


def _standard_errors(metrics: Metrics, weight: int) -> Metrics:
    """Of the loss, whose items are pairs or whole examples (their tokens are not independent), and of shares of pairs.

    The loss is a ratio of two sums over items, x = losses and w = what counts in each; its error is the root of
    n / (n - 1) sum (x - loss w)^2, over the sum of w.
    """
    moments = {name.removeprefix(MOMENTS): value for name, value in metrics.items() if name.startswith(MOMENTS)}
    errors: Metrics = {}
    if moments and "loss" in metrics:
        loss, items = metrics["loss"], moments["items"] * weight
        squares = moments["squares"] - 2 * loss * moments["products"] + loss**2 * moments["counts"]
        errors["loss_se"] = math.sqrt(max(squares, 0.0) / weight * items / (items - 1)) if items > 1 else math.nan
    for name in _SHARES:
        if name in metrics:
            share = metrics[name]
            errors[f"{name}_se"] = math.sqrt(share * (1 - share) / (weight - 1)) if weight > 1 else math.nan
    return errors
