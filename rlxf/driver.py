"""The loop of a run. It knows no Ray and no device: every member of ``Run`` is a protocol or a plain object."""

from __future__ import annotations

from rlxf.algorithms import ALGORITHMS, Algorithm
from rlxf.core.errors import TrainingError
from rlxf.core.types import Examples, Metrics, Pairs
from rlxf.loop.rescue import save_last_step
from rlxf.loop.run import AFTER_UPDATE, WITHOUT_UPDATE, Run
from rlxf.loop.settle import save, settle
from rlxf.observe.formulas import num_tokens, version_lag


def train(run: Run) -> None:
    """prompts -> rollout -> score -> pair -> reference -> update -> sync, once per step.

    Whatever ends it early, the last complete step is saved if the actor still holds it.
    """
    state, algorithm = run.state, ALGORITHMS[run.config.training.stage]
    try:
        begin(run)
        while state.step < run.config.training.train_iters:
            run.clock.start(state.step)
            with run.stop.interruptible():
                data, metrics = algorithm.collect(run, state.step)  # prompts to pairs; offline, from a file
            if len(data):
                learn(run, algorithm, data, metrics)
            else:
                skip(run, metrics)
            settle(run)
        save(run, wait=True)
        run.report.finished(run.folder.save_policy())
    except Exception as error:
        save_last_step(run, error)
        raise


def begin(run: Run) -> None:
    """The actor's weights in every engine, what a resumed run's last step still owes, and the first evaluation."""
    state = run.state
    with run.stop.interruptible():
        pushed = run.sync.push(state.policy_version)
    if "push" in state.owed:
        state.metrics |= pushed.metrics()
        state.settled("push")
    if state.owed:
        run.clock.start(state.step - 1)
        settle(run)
    with run.stop.interruptible():
        run.report.evaluated(state.step, {} if state.step else run.evaluate(0))
    state.count_failures()


def learn(run: Run, algorithm: Algorithm, data: Pairs | Examples, metrics: Metrics) -> None:
    """One update on the step's data: all its mini-batches and passes. Then the step is complete."""
    state = run.state
    with run.stop.interruptible():
        batch = algorithm.batch(data, run.timed_reference)
    metrics |= version_lag(data, state.policy_version)
    state.updating = True
    with run.clock("update_actor"):
        metrics |= run.actor.update(batch, state.step)
    state.updating = False
    state.policy_version += 1
    state.empty_steps = 0
    state.num_tokens += num_tokens(data) * run.config.actor_rollout.ppo_epochs
    state.count_failures()
    state.step, state.metrics, state.owed = state.step + 1, metrics, AFTER_UPDATE


def skip(run: Run, metrics: Metrics) -> None:
    """A step without a single pair: no optimizer step; too many in a row end the run before they are counted."""
    state, limit = run.state, run.config.algorithm.max_empty_steps
    if state.empty_steps + 1 >= limit:
        raise TrainingError(
            f"step {state.step + 1}: {limit} steps in a row gave no pair: the scores of every prompt are tied, missing "
            "or closer than algorithm.min_score_margin; look at the scores in rollouts.jsonl (log.rollouts=true), or "
            f"raise algorithm.max_empty_steps = {limit}"
        )
    state.empty_steps += 1
    state.count_failures()
    state.step, state.metrics, state.owed = state.step + 1, metrics, WITHOUT_UPDATE
