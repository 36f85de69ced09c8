"""An evaluation without training: ``training.eval_only``."""

from __future__ import annotations

from pathlib import Path

from rlxf.loop.run import Run


def evaluate_only(run: Run, evaluated: Path) -> None:
    """Evaluate the policy once and report it; nothing is trained or saved.

    Args:
        run: built as for training, at the step of its checkpoint if there is one.
        evaluated: where the policy comes from.
    """
    with run.stop.interruptible():
        run.sync.push(run.state.policy_version)  # the engines need the actor's weights
        metrics = run.evaluate(run.state.step)
    run.report.evaluated(run.state.step, metrics)
    run.report.finished(evaluated)
