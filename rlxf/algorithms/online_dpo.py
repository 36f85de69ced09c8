"""Online DPO: the policy answers prompts, the answers are scored, and the scores make pairs."""

from __future__ import annotations

from rlxf.algorithms.algorithm import with_reference
from rlxf.core.types import Batch, Examples, Metrics, Pairs
from rlxf.loop.run import Online, Reference, Run
from rlxf.observe.formulas import data_metrics, pair_metrics, rollout_metrics
from rlxf.pair import PAIRINGS
from rlxf.score.penalty import with_scores


class OnlineDpo:
    """prompts -> rollout -> score -> pair."""

    def collect(self, run: Run, step: int) -> tuple[Pairs | Examples, Metrics]:
        source, config = run.source, run.config.algorithm
        assert isinstance(source, Online)  # assembly starts the engines of this stage
        with run.clock("gen"):
            prompts = source.prompts.next_batch(step)  # P prompts
            rollouts = source.rollout.generate(prompts, run.training_sampling())  # B = P * K completions
        with run.clock("adv"):
            penalty = run.config.actor_rollout.missing_eos_penalty
            raw_scores = source.scorer.score(rollouts)  # [B]
            scored = with_scores(rollouts, raw_scores, eos_ids=source.eos_ids, missing_eos_penalty=penalty)
            pairing = PAIRINGS[config.pairing](scored, min_score_margin=config.min_score_margin)  # N <= P pairs
        source.recorder.write(step + 1, scored, pairing)
        metrics = rollout_metrics(scored, run.clock.seconds["gen"]) | pair_metrics(pairing)
        return pairing.pairs, data_metrics(source, step) | metrics

    def batch(self, data: Pairs | Examples, reference: Reference) -> Batch:
        assert isinstance(data, Pairs)
        return with_reference(data, reference)
