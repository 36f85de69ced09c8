"""The loop of a run. It knows no Ray and no device: every member of ``Run`` is a protocol or a plain object."""

from __future__ import annotations

from rlxf.errors import StopRequested, TrainingError
from rlxf.metrics import pair_metrics, pair_tokens, rollout_metrics, version_lag
from rlxf.pair.strategies import make_pairs
from rlxf.rollout.engine import Sampling
from rlxf.run import Online, Run
from rlxf.score.penalty import with_scores
from rlxf.types import Metrics, Pairs, ReferencedPairs


def train(run: Run) -> None:
    """prompts -> rollout -> score -> pair -> reference -> update -> sync, once per step."""
    state = run.state
    try:
        with run.stop.abandonable():
            run.sync.push(state.policy_version)  # rollout starts from the actor's weights
            run.report.evaluated(state.step, run.evaluate(state.step))
        while state.step < run.config.training.train_iters:
            run.clock.start(state.step)
            with run.stop.abandonable():
                pairs, metrics = collect_pairs(run)
            metrics |= learn(run, pairs) if len(pairs) else skip(run)
            state.step += 1
            finish_step(run, metrics)
        save(run)
        run.report.finished(run.folder.save_policy())
    except StopRequested:
        if not run.stop.overdue():  # else a stage was cut, and the actor's state is not that of a whole step
            save(run)
        raise


def collect_pairs(run: Run) -> tuple[Pairs, Metrics]:
    """This step's pairs; in offline mode the data set already holds them."""
    step, source = run.state.step, run.source
    if not isinstance(source, Online):
        return source.next_batch(step), {}
    with run.clock("gen"):
        prompts = source.prompts.next_batch(step)  # P prompts
        rollouts = source.rollout.generate(prompts, training_sampling(run))  # B = P * K completions
    with run.clock("adv"):
        penalty = run.config.actor_rollout.missing_eos_penalty
        raw_scores = source.scorer.score(rollouts)
        scored = with_scores(rollouts, raw_scores, eos_ids=source.eos_ids, missing_eos_penalty=penalty)
        # Before the reference: a dropped pair costs neither a reference nor a training pass.
        pairing = make_pairs(scored, min_score_margin=run.config.algorithm.min_score_margin)
    source.recorder.write(step + 1, scored, pairing)
    return pairing.pairs, rollout_metrics(scored, run.clock.seconds["gen"]) | pair_metrics(pairing)


def training_sampling(run: Run) -> Sampling:
    """The recipe's sampling for the current step: its seeds depend on run, step, prompt and sample, nothing else."""
    actor, rollout = run.config.actor_rollout, run.config.rollout
    return Sampling(
        num_samples=actor.n_samples_per_prompt,
        max_new_tokens=run.config.max_new_tokens,
        temperature=rollout.temperature if actor.do_sample else 0.0,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        seed=run.config.training.seed,
        step=run.state.step,
    )


def learn(run: Run, pairs: Pairs) -> Metrics:
    """One update on the step's pairs, and the new weights in every rollout engine."""
    state = run.state
    with run.stop.abandonable(), run.clock("ref"):
        batch = ReferencedPairs(pairs=pairs, reference=run.reference.logps(pairs))
    metrics = version_lag(pairs, state.policy_version)
    with run.clock("update_actor"):
        metrics |= run.actor.update(
            batch, state.step
        )  # all mini-batches and passes; stops at a loss that is not finite
    state.policy_version += 1
    state.empty_steps = 0
    state.num_tokens += pair_tokens(pairs) * run.config.actor_rollout.ppo_epochs
    with run.clock("sync"):
        metrics |= {"sync/bytes": float(run.sync.push(state.policy_version).num_bytes)}
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


def finish_step(run: Run, metrics: Metrics) -> None:
    """Numbers, evaluation and checkpoint of a step that is complete."""
    state = run.state
    metrics |= {"epoch": run.source.epoch(state.step - 1), "num_tokens": float(state.num_tokens)} | run.clock.timings()
    try:
        with run.stop.abandonable():
            metrics |= run.evaluate(state.step)
    finally:
        run.report.stepped(state.step, metrics)
    interval = run.config.training.save_interval
    if interval and state.step % interval == 0:
        save(run)


def save(run: Run) -> None:
    """A checkpoint of the steps that are complete, unless there is one."""
    state = run.state
    if state.step > state.saved_step:
        run.report.saved(run.folder.save_checkpoint(state))
        state.saved_step = state.step
