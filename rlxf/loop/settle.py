"""What follows a complete step: new weights in the engines, evaluation, numbers, and a checkpoint if one is due."""

from __future__ import annotations

from rlxf.core.types import Metrics
from rlxf.loop.due import evaluation_is_due
from rlxf.loop.run import Run, Schedule


def settle(run: Run, schedule: Schedule) -> None:
    """What the complete step still owes, in order; then a checkpoint if one is due.

    The engines have nothing to do. Scores and reference of later steps may still be at work; what needs reward model or
    reference, and a checkpoint, wait for them.
    """
    state, training = run.state, run.config.training
    if "push" in state.owed:
        with run.clock("sync"):
            state.metrics |= run.sync.push(state.policy_version).metrics()
        state.settled("push")
    if "move" in state.owed:
        if run.refresh.is_due(state.policy_version):
            schedule.drained()
        with run.clock("sync"):
            run.refresh(state.policy_version)
        state.settled("move")
    if "evaluation" in state.owed:
        if evaluation_is_due(training, state.step):
            schedule.drained()
        with run.stop.interruptible(), run.clock("eval"):
            state.metrics |= evaluate(run)
        state.settled("evaluation")
    if "row" in state.owed:
        state.metrics |= {"num_tokens": float(state.num_tokens)} | run.clock.timings()
        run.report.stepped(state.step, state.metrics)
        state.settled("row")
    if "hf" in state.owed:
        if training.save_hf_interval and state.step % training.save_hf_interval == 0:
            with run.clock("save"):
                run.folder.save_hf(state.step)
        state.settled("hf")
    if training.save_interval and state.step % training.save_interval == 0:
        save(run, schedule)
    elif run.folder.is_time_to_save(state):
        schedule.drained()
        with run.clock("save"), run.stop.uninterruptible():
            run.folder.save_in_time(state)
    run.folder.poll()


def evaluate(run: Run) -> Metrics:
    """The evaluation of the state's step, if one is due; scores that failed in it count for the run."""
    state, failures = run.state, run.state.num_failures
    metrics = run.evaluate(state.step)
    if evaluation_is_due(run.config.training, state.step):  # else these are failures of steps that are being scored
        state.count_failures(state.num_failures - failures)
    return metrics


def save(run: Run, schedule: Schedule, *, wait: bool = False) -> None:
    """A checkpoint of the steps that are complete, unless there is one."""
    schedule.drained()
    with run.clock("save"), run.stop.uninterruptible():
        run.folder.save_checkpoint(run.state)
        if wait:
            run.folder.wait()
