"""When a run evaluates."""

from __future__ import annotations

from rlxf.config.schema import TrainingConfig


def evaluation_is_due(training: TrainingConfig, step: int) -> bool:
    """Whether an evaluation follows ``step`` complete steps: at the interval, before the first and after the last."""
    if training.eval_only:
        return True
    return training.eval_interval > 0 and (step % training.eval_interval == 0 or step == training.train_iters)
