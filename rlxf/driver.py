"""The loop of a run. It knows no Ray and no device: every member of ``Run`` is a protocol or a plain object."""

from __future__ import annotations

from rlxf.errors import StopRequested, TrainingError
from rlxf.metrics import num_tokens, pair_metrics, rollout_metrics, version_lag
from rlxf.pair.strategies import make_pairs
from rlxf.run import Online, Run
from rlxf.score.penalty import with_scores
from rlxf.types import Examples, Metrics, Pairs


def train(run: Run) -> None:
    """prompts -> rollout -> score -> pair -> reference -> update -> sync, once per step."""
    state = run.state
    try:
        with run.stop.abandonable():
            run.sync.push(state.policy_version)  # rollout starts from the actor's weights
        begin(run)
        while state.step < run.config.training.train_iters:
            run.clock.start(state.step)
            with run.stop.abandonable():
                data, metrics = collect(run)
            metrics |= learn(run, data) if len(data) else skip(run)
            state.step += 1
            metrics |= {"epoch": run.source.epoch(state.step - 1), "data/dropped": float(run.source.num_dropped)}
            metrics["num_tokens"] = float(state.num_tokens)
            state.metrics, state.unevaluated = metrics | run.clock.timings(), True
            finish_step(run)
        save(run, wait=True)
        run.report.finished(run.folder.save_policy())
    except StopRequested:
        if not run.stop.overdue():  # else a stage was cut, and the actor's state is not that of a whole step
            save(run, wait=True)
        raise
    except TrainingError:
        run.folder.wait()  # of the steps before
        raise


def begin(run: Run) -> None:
    """The evaluation before the first step; a resumed run finishes the one that a stop cut off."""
    if run.state.unevaluated:
        finish_step(run)
    with run.stop.abandonable():
        run.report.evaluated(run.state.step, {} if run.state.step else run.evaluate(0))


def collect(run: Run) -> tuple[Pairs | Examples, Metrics]:
    """What this step trains on: pairs made from samples; offline, what the data set already holds."""
    step, source = run.state.step, run.source
    if not isinstance(source, Online):
        return source.next_batch(step), {}
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
    return pairing.pairs, rollout_metrics(scored, run.clock.seconds["gen"]) | pair_metrics(pairing)


def learn(run: Run, data: Pairs | Examples) -> Metrics:
    """One update on the step's data, and the new weights in every rollout engine."""
    state = run.state
    with run.stop.abandonable():
        batch = run.with_reference(data)
    metrics = version_lag(data, state.policy_version)
    with run.clock("update_actor"):
        metrics |= run.actor.update(batch, state.step)  # all mini-batches and passes
    state.policy_version += 1
    state.empty_steps = 0
    state.num_tokens += num_tokens(data) * run.config.actor_rollout.ppo_epochs
    with run.clock("sync"):
        metrics |= run.sync.push(state.policy_version).metrics()
        run.refresh(state.policy_version)
    return metrics


def skip(run: Run) -> Metrics:
    """A step without a single pair: no optimizer step; too many in a row end the run."""
    state, limit = run.state, run.config.algorithm.max_empty_steps
    state.empty_steps += 1
    if state.empty_steps >= limit:
        raise TrainingError(
            f"step {state.step + 1}: {state.empty_steps} steps in a row gave no pair: the scores of every prompt are "
            "tied, missing or closer than algorithm.min_score_margin; look at the scores in "
            f"rollouts.jsonl (log.rollouts=true), or raise algorithm.max_empty_steps = {limit}"
        )
    return {}


def finish_step(run: Run) -> None:
    """What a complete step leaves: its numbers, and an evaluation, checkpoint and Hugging Face folder if one is due."""
    state, training = run.state, run.config.training
    try:
        with run.stop.abandonable():
            state.metrics |= run.evaluate(state.step)
        state.unevaluated = False
    finally:
        run.report.stepped(state.step, state.metrics)
    if training.save_hf_interval and state.step % training.save_hf_interval == 0:
        run.folder.save_hf(state.step)
    if training.save_interval and state.step % training.save_interval == 0:
        save(run)
    run.folder.poll()


def save(run: Run, *, wait: bool = False) -> None:
    """A checkpoint of the steps that are complete, unless there is one."""
    with run.stop.patient():
        if run.state.step > run.state.saved_step:
            run.state.saved_step = run.state.step
            run.folder.save_checkpoint(run.state)
        if wait:
            run.folder.wait()
