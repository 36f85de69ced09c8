"""The loop of a run. It knows no Ray and no device: every member of ``Run`` is a protocol or a plain object."""

from __future__ import annotations

from functools import partial

from rlxf.algorithms import ALGORITHMS, Algorithm, with_beta
from rlxf.core.errors import TrainingError
from rlxf.core.types import Metrics
from rlxf.loop.collected import Collected
from rlxf.loop.rescue import save_last_step
from rlxf.loop.run import AFTER_UPDATE, WITHOUT_UPDATE, WITHOUT_UPDATE_ASLEEP, Run, Schedule
from rlxf.loop.settle import evaluate, published, save, settle
from rlxf.observe.formulas import num_tokens, version_lag, without_drift_of_others
from rlxf.schedule import Lookahead


def train(run: Run) -> None:
    """prompts -> rollout -> score -> pair -> reference -> update -> sync, once per step.

    With ``rollout.lookahead = k`` the engines sample step ``s + k`` while step ``s`` is trained on (``rlxf/schedule``).
    Whatever ends the run early, the last complete step is saved if the actor still holds it.
    """
    state, algorithm = run.state, ALGORITHMS[run.config.training.stage]
    schedule = look_ahead(run, algorithm)
    try:
        begin(run, schedule)
        while state.step < run.config.training.train_iters:
            run.clock.start(state.step)
            run.stop.check()
            run.report.require_health()
            with run.clock.waiting():
                collected = schedule.take(state.step)  # prompts to pairs with their reference; offline, from a file
            run.later.add(partial(algorithm.record, run, collected))
            if collected.batch is not None:
                learn(run, schedule, collected)
            else:
                skip(run, collected)
            algorithm.complete(run, collected)
            schedule.sampled()
            settle(run, schedule)
        save(run, schedule, last=True)
        run.report.finished(run.folder.save_policy())
    except Exception as error:
        save_last_step(run, error)
        raise


def look_ahead(run: Run, algorithm: Algorithm) -> Schedule:
    """The run's schedule, with the steps that a resumed run has collected already."""

    def make(step: int, boundary: int) -> Collected:
        assert boundary == max(run.state.began, step - ahead)  # what `rollout.lookahead` promises
        return Collected(step=step, sampled_at=boundary, version=run.state.policy_version)

    ahead, num_steps = run.config.rollout.lookahead, run.config.training.train_iters
    return Lookahead(
        algorithm.stages(run), run.lanes, make,
        num_ahead=ahead, num_steps=num_steps, steps=run.steps, meanwhile=run.later.do,
    )  # fmt: skip


def begin(run: Run, schedule: Schedule) -> None:
    """The actor's weights in every engine, what a resumed run's last step still owes, and the first evaluation."""
    state = run.state
    with run.stop.interruptible():
        sample_again(run, schedule)
        pushed = run.sync.push(state.policy_version)
    if "push" in state.owed:
        state.metrics |= pushed.metrics()
        state.settled("push")
    if state.owed:
        run.clock.start(state.step - 1)
        settle(run, schedule)
    with run.stop.interruptible():
        run.report.evaluated(state.step, {} if state.step else evaluate(run))


def sample_again(run: Run, schedule: Schedule) -> None:
    """What was being sampled when the resumed run ended, although newer weights were trained: by the same weights."""
    cut = schedule.unsampled()
    if cut:
        assert run.resumed is not None  # nothing else leaves such steps
        run.sync.push_saved(run.resumed, cut[0].version)
        schedule.sampled()


def learn(run: Run, schedule: Schedule, collected: Collected) -> None:
    """One update on the step's data: all its mini-batches and passes. Then the step is complete."""
    state, data = run.state, collected.data
    assert data is not None
    assert collected.batch is not None
    batch = with_beta(collected.batch, run.config.actor_rollout.beta_after(state.epoch))

    def update() -> Metrics:
        published(run)
        state.updating = True
        with run.clock("update_actor", version=state.policy_version):
            run.sync.before_update()
            return run.actor.update(batch, collected.step)

    run.stop.check()
    metrics = collected.metrics | version_lag(data, state.policy_version)
    metrics |= schedule.beside(run.lane("train"), update)
    state.updating = False
    state.policy_version += 1
    state.empty_steps = 0
    state.num_tokens += num_tokens(data) * run.config.actor_rollout.ppo_epochs
    state.complete(collected, without_drift_of_others(metrics), AFTER_UPDATE)
    run.clock.add(collected.seconds)


def skip(run: Run, collected: Collected) -> None:
    """A step without a single pair: no optimizer step; too many in a row end the run before they are counted."""
    state, limit = run.state, run.config.algorithm.max_empty_steps
    if state.empty_steps + 1 >= limit:
        raise TrainingError(
            f"step {state.step + 1}: {limit} steps in a row gave no pair: the scores of every prompt are tied, missing "
            "or closer than algorithm.min_score_margin, or lengths differ too much (algorithm.max_length_ratio); see "
            f"the scores in rollouts.jsonl (log.rollouts=true), or raise algorithm.max_empty_steps = {limit}"
        )
    state.empty_steps += 1
    state.complete(collected, collected.metrics, WITHOUT_UPDATE_ASLEEP if run.sync.takes_turns else WITHOUT_UPDATE)
    run.clock.add(collected.seconds)
