"""What follows a complete step: new weights in the engines, evaluation, numbers, and a checkpoint if one is due."""

from __future__ import annotations

from rlxf.loop.run import Run


def settle(run: Run) -> None:
    """What the complete step still owes, in order; then a checkpoint if one is due."""
    state, training = run.state, run.config.training
    if "push" in state.owed:
        with run.clock("sync"):
            state.metrics |= run.sync.push(state.policy_version).metrics()
        state.settled("push")
    if "move" in state.owed:
        with run.clock("sync"):
            run.refresh(state.policy_version)
        state.settled("move")
    if "evaluation" in state.owed:
        with run.stop.interruptible(), run.clock("eval"):
            state.metrics |= run.evaluate(state.step)
        state.count_failures()
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
        save(run)
    else:
        with run.clock("save"), run.stop.uninterruptible():
            run.folder.save_in_time(state)
    run.folder.poll()


def save(run: Run, *, wait: bool = False) -> None:
    """A checkpoint of the steps that are complete, unless there is one."""
    with run.clock("save"), run.stop.uninterruptible():
        run.folder.save_checkpoint(run.state)
        if wait:
            run.folder.wait()
