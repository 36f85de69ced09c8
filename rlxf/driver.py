"""The loop of a run. It knows no Ray and no device: every member of ``Run`` is a protocol or a plain object."""

from __future__ import annotations

from rlxf.core.errors import TrainingError
from rlxf.core.types import Examples, Metrics, Pairs
from rlxf.loop.rescue import save_last_step
from rlxf.loop.run import AFTER_UPDATE, WITHOUT_UPDATE, Online, Run
from rlxf.loop.settle import save, settle
from rlxf.observe.formulas import data_metrics, num_tokens, pair_metrics, rollout_metrics, version_lag
from rlxf.pair.strategies import make_pairs
from rlxf.score.penalty import with_scores


def train(run: Run) -> None:
    """prompts -> rollout -> score -> pair -> reference -> update -> sync, once per step.

    Whatever ends it early, the last complete step is saved if the actor still holds it.
    """
    state = run.state
    try:
        begin(run)
        while state.step < run.config.training.train_iters:
            run.clock.start(state.step)
            with run.stop.abandonable():
                data, metrics = collect(run)
            if len(data):
                learn(run, data, metrics)
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
    with run.stop.abandonable():
        pushed = run.sync.push(state.policy_version)
    if "push" in state.owed:
        state.metrics |= pushed.metrics()
        state.settled("push")
    if state.owed:
        run.clock.start(state.step - 1)
        settle(run)
    with run.stop.abandonable():
        run.report.evaluated(state.step, {} if state.step else run.evaluate(0))
    state.count_failures()


def collect(run: Run) -> tuple[Pairs | Examples, Metrics]:
    """What this step trains on: pairs made from samples; offline, what the data set already holds."""
    step, source = run.state.step, run.source
    if not isinstance(source, Online):
        return source.next_batch(step), data_metrics(source, step)
    with run.clock("gen"):
        prompts = source.prompts.next_batch(step)  # P prompts
        rollouts = source.rollout.generate(prompts, run.training_sampling())  # B = P * K completions
    with run.clock("adv"):
        penalty = run.config.actor_rollout.missing_eos_penalty
        raw_scores = source.scorer.score(rollouts)
        scored = with_scores(rollouts, raw_scores, eos_ids=source.eos_ids, missing_eos_penalty=penalty)
        # Before the reference: a dropped pair costs neither a reference nor a training pass.
        pairing = make_pairs(scored, min_score_margin=run.config.algorithm.min_score_margin)
    source.recorder.write(step + 1, scored, pairing)
    metrics = rollout_metrics(scored, run.clock.seconds["gen"]) | pair_metrics(pairing)
    return pairing.pairs, data_metrics(source, step) | metrics


def learn(run: Run, data: Pairs | Examples, metrics: Metrics) -> None:
    """One update on the step's data: all its mini-batches and passes. Then the step is complete."""
    state = run.state
    with run.stop.abandonable():
        batch = run.with_reference(data)
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
