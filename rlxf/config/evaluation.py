"""Checks of the keys of evaluations, and of those that choose the best checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from rlxf.config.problems import Problem, wrong
from rlxf.config.schema import RunConfig

logger = logging.getLogger(__name__)


def evaluation_problems(config: RunConfig) -> Iterator[Problem]:
    """``eval_only`` needs something to evaluate; the best checkpoint needs a metric at the step of every checkpoint."""
    training = config.training
    if training.eval_only and not config.evaluates:
        yield wrong("training.eval_only", True, f"there is nothing to evaluate: {_missing(config)}", "eval.data_path")
    if training.keep_best:
        yield from _best(config)


def _best(config: RunConfig) -> Iterator[Problem]:
    training, key = config.training, "training.keep_best"
    if not training.keep_latest:
        expected = "expected 0 with training.keep_latest = 0, which keeps every checkpoint; set training.keep_latest"
        yield wrong(key, training.keep_best, expected, "training.keep_latest")
        return
    name, _ = config.best_metric
    evaluated = name.startswith("eval/")
    if evaluated and not (config.evaluates and training.eval_interval):
        expected = "nothing is evaluated in this run; set training.eval_interval, or judge by a metric of every step"
        if training.eval_interval:
            expected = f"nothing is evaluated in this run: {_missing(config)}; or judge by a metric of every step"
        yield wrong("training.keep_best_metric", name, expected, "training.eval_interval", "eval.data_path")
    elif evaluated and training.save_interval % training.eval_interval:
        expected = (
            f"expected a multiple of training.eval_interval = {training.eval_interval}: "
            "training.keep_best judges a checkpoint by its own evaluation"
        )
        yield wrong("training.save_interval", training.save_interval, expected, "training.eval_interval")


def _missing(config: RunConfig) -> str:
    if config.offline:
        return "set eval.data_path, or a second share in actor_rollout.split, for held-out rows"
    return f"no rollout engine samples with rollout.engine = {config.engine}"


def say_what_is_not_evaluated(config: RunConfig) -> None:
    """A warning if evaluations are asked for and nothing can be evaluated."""
    if config.training.eval_interval and not config.evaluates:
        logger.warning("training.eval_interval has no effect: %s", _missing(config))
