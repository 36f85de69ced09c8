"""The end of a run that fails or is stopped: saves its last complete step, and reports what was saved."""

from __future__ import annotations

import logging

from rlxf.core.errors import RlxfError, StageTimeout, StopRequested, WorkerLost
from rlxf.loop.run import Run
from rlxf.loop.settle import last_numbers

log = logging.getLogger(__name__)


def save_last_step(run: Run, error: Exception) -> None:
    """Save the last complete step if the actor still holds it; the outcome becomes a note of ``error``.

    The actor is whole when no optimizer step of the current driver step has been made, or all of them. Never raises: a
    second failure is reported beside the first.
    """
    state = run.state
    if isinstance(error, RlxfError):
        error.complete_steps = state.step
        if run.stop.requested and isinstance(error, WorkerLost | StageTimeout):
            error.exit_code = run.stop.exit_code  # a signal to every process of a job ends its workers, too
    was_cut = isinstance(error, StopRequested) and run.stop.grace_expired()
    run.lanes.close()  # what later steps have under way is dropped
    _do_later(run)
    if not state.step:  # nothing is complete that could be lost
        return
    with run.stop.uninterruptible():  # the stage was limited, the save takes as long as it takes
        _report_row(run)
        answers, reason = _standing(run, error, was_cut)
        run.folder.finish(ask_actor=answers)
        if not reason:
            try:
                run.folder.save_checkpoint(state)
                run.folder.wait()
            except Exception as second:  # the first error is the one to raise
                log.debug("the last complete step could not be saved", exc_info=second)
                reason = f"step {state.step} could not be saved: {second}"
        error.add_note(_outcome(run, reason))


def _outcome(run: Run, reason: str) -> str:
    """What was saved, as a line for the user."""
    newest = run.folder.newest()
    if not reason:
        return f"saved: {run.state.step} of {run.config.training.train_iters} steps, {newest}"
    return f"not saved: {reason}; " + (f"the newest checkpoint is {newest}" if newest else "there is no checkpoint")


def _standing(run: Run, error: Exception, was_cut: bool) -> tuple[bool, str]:
    """Whether the actor answers, and why it does not hold the last complete step; empty if it does.

    ``was_cut``: a stop signal cut a stage that took longer than the grace period.
    """
    state = run.state
    where = f"step {state.step + 1}"
    if was_cut and state.updating:
        reason = f"the update of {where} took longer than training.stop_grace_s = {run.stop.grace_s:g} and was stopped"
        return False, reason
    if state.updating or was_cut or isinstance(error, StageTimeout | WorkerLost):
        try:
            untouched = run.actor.is_untouched()
        except Exception as second:  # a lost or hung actor, whose state nobody can read
            log.debug("the actor does not answer", exc_info=second)
            return False, f"the actor is lost or does not answer ({where})"
        if state.updating and not untouched:
            return True, f"{where} failed after its first optimizer step, so the weights belong to no complete step"
    if not run.refresh.whole:
        return (
            True,
            f"the move of the reference after step {state.step} did not finish, so a part of its weights is old",
        )
    return True, ""


def _do_later(run: Run) -> None:
    """What the driver has put off; also of the step that failed, which its message may name."""
    try:
        run.later.do()
    except Exception as second:  # the disk of the run folder may be what is full
        log.debug("what was put off could not be done", exc_info=second)


def _report_row(run: Run) -> None:
    """The numbers of a step that is complete, also if it still owes something: a resumed run replaces the row."""
    if "row" in run.state.owed:
        try:
            run.report.stepped(run.state.step, run.state.metrics | last_numbers(run))
        except Exception as second:  # the disk of the run folder may be what is full
            log.debug("the last row could not be written", exc_info=second)
