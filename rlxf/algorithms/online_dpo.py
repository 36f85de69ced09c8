"""Online DPO: the policy answers prompts, the answers are scored, and the scores make pairs."""

from __future__ import annotations

from rlxf.algorithms.algorithm import reference_stage, with_reference
from rlxf.core.errors import SyncError
from rlxf.core.types import Batch, Examples, Pairs, Rollouts
from rlxf.loop.collected import Collected
from rlxf.loop.run import Online, Reference, Run
from rlxf.observe.formulas import data_metrics, pair_metrics, rollout_metrics
from rlxf.pair import PAIRINGS
from rlxf.schedule.lookahead import Stage
from rlxf.score.penalty import with_scores


class OnlineDpo:
    """prompts -> rollout -> score -> pair -> reference."""

    def stages(self, run: Run) -> tuple[Stage[Collected], ...]:
        return (
            Stage(
                name="gen",
                lane=run.lane("infer"),
                is_done=lambda item: item.rollouts is not None,
                work=lambda item: _sample(run, item),
            ),
            Stage(
                name="adv",
                lane=run.lane("reward"),
                is_done=lambda item: item.data is not None,
                work=lambda item: _score_and_pair(run, item),
            ),
            reference_stage(run, self),
        )

    def record(self, run: Run, collected: Collected) -> None:
        assert collected.scored is not None
        assert collected.pairing is not None
        _online(run).recorder.write(collected.step + 1, collected.scored, collected.pairing)

    def batch(self, data: Pairs | Examples, reference: Reference) -> Batch:
        assert isinstance(data, Pairs)
        return with_reference(data, reference)


def _online(run: Run) -> Online:
    assert isinstance(run.source, Online)  # assembly starts the engines of this stage
    return run.source


def _sample(run: Run, collected: Collected) -> None:
    """``rollouts``: B = P * K completions, all of them by the weights that the schedule says."""
    source = _online(run)
    with run.working(collected, "gen"):
        prompts = source.prompts.next_batch(collected.step)  # P prompts
        collected.metrics = data_metrics(source, collected.step)
        rollouts = source.rollout.generate(prompts, run.training_sampling())
    if run.config.engine != "replay":  # which has the versions of another run
        _require_version(rollouts, collected)
    collected.rollouts = rollouts


def _require_version(rollouts: Rollouts, collected: Collected) -> None:
    others = set(rollouts.policy_version.tolist()) - {collected.version}
    if others:
        raise SyncError(
            f"step {collected.step + 1}: completions were sampled by policy version {sorted(others)}, but version "
            f"{collected.version} was pushed into the engines; a weight push did not arrive in all of them"
        )


def _score_and_pair(run: Run, collected: Collected) -> None:
    """``raw_scores`` [B] unless they are known, then N <= P pairs."""
    source, config, rollouts = _online(run), run.config, collected.rollouts
    assert rollouts is not None  # the stage before
    with run.working(collected, "adv"):
        if collected.raw_scores is None:
            before = run.state.all_failed_scores
            raw_scores = source.scorer.score(rollouts)
            collected.failed = run.state.all_failed_scores - before
            collected.raw_scores = raw_scores
        scored = with_scores(
            rollouts,
            collected.raw_scores,
            eos_ids=source.eos_ids,
            missing_eos_penalty=config.actor_rollout.missing_eos_penalty,
            stopped=source.stopped,
        )
        pairing = PAIRINGS[config.algorithm.pairing](scored, min_score_margin=config.algorithm.min_score_margin)
    collected.metrics |= rollout_metrics(scored, collected.seconds["gen"]) | pair_metrics(pairing)
    collected.scored, collected.pairing, collected.data = scored, pairing, pairing.pairs
