"""What follows a complete step: new weights in the engines, evaluation, numbers, and a checkpoint if one is due."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

from rlxf.core.types import Metrics
from rlxf.loop.due import evaluation_is_due
from rlxf.loop.run import Run, Schedule
from rlxf.sync.push import SyncReport


def settle(run: Run, schedule: Schedule) -> None:
    """What the complete step still owes, in order; then a checkpoint if one is due.

    The engines have nothing to do. Scores and reference of later steps may still be at work; what needs reward model or
    reference, and a checkpoint, wait for them.
    """
    state, training = run.state, run.config.training
    if "push" in state.owed:
        state.metrics |= schedule.beside("sync", partial(_push, run)).metrics()
        state.settled("push")
    if "move" in state.owed:
        if run.refresh.is_due(state.policy_version):
            schedule.drained()
            with run.clock("sync", version=state.policy_version):
                run.refresh(state.policy_version)
        state.settled("move")
    if "evaluation" in state.owed:
        run.clock.add({"eval": 0.0})  # every row has it
        due = evaluation_is_due(training, state.step)
        if due:
            schedule.drained()
        clock = run.clock("eval", version=state.policy_version) if due else nullcontext()
        with run.stop.interruptible(), clock:
            state.metrics |= evaluate(run)
        state.settled("evaluation")
    if "row" in state.owed:
        state.metrics |= last_numbers(run)
        run.report.stepped(state.step, state.metrics)
        state.settled("row")
    if "hf" in state.owed:
        if training.save_hf_interval and state.step % training.save_hf_interval == 0:
            with run.clock("save", version=state.policy_version):
                run.folder.save_hf(state.step)
        state.settled("hf")
    if training.save_interval and state.step % training.save_interval == 0:
        save(run, schedule)
    elif run.folder.is_time_to_save(state):
        schedule.drained()
        run.later.do()
        with run.clock("save", version=state.policy_version), run.stop.uninterruptible():
            run.folder.save_in_time(state)
    run.folder.poll()


def _push(run: Run) -> SyncReport:
    with run.clock("sync", version=run.state.policy_version):
        return run.sync.push(run.state.policy_version)


def last_numbers(run: Run) -> Metrics:
    """What a complete step's row gets when it is written."""
    state = run.state
    found = {"num_tokens": float(state.num_tokens)} | run.clock.timings() | run.memory(state.step)
    return found | run.speed(state.step, state.metrics | found)


def evaluate(run: Run) -> Metrics:
    """The evaluation of the state's step, if one is due; scores that failed in it count for the run."""
    state, before = run.state, run.state.all_failed_scores
    metrics = run.evaluate(state.step)
    if metrics:  # else later steps may be scored meanwhile
        state.count_failures(state.all_failed_scores - before)
    return metrics


def save(run: Run, schedule: Schedule, *, last: bool = False) -> None:
    """A checkpoint of the steps that are complete, unless there is one; the ``last`` is there when this returns."""
    schedule.drained()
    run.later.do()  # a run that goes on from there finds the rows of its steps
    with run.clock("save", version=run.state.policy_version), run.stop.uninterruptible():
        if last:
            run.folder.save_checkpoint(run.state)
            run.folder.wait()
        else:
            run.folder.save_due(run.state)


def published(run: Run) -> None:
    """Return when the checkpoint of the step before has its name: a crash in an update costs no more than its step.

    It had the time of the sampling.
    """
    if run.folder.is_publishing:
        with run.clock("save", version=run.state.policy_version), run.stop.uninterruptible():
            run.folder.published()
