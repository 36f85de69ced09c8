"""Online DPO: the policy answers prompts, the answers are scored, and the scores make pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlxf.algorithms.algorithm import reference_stage, with_reference
from rlxf.config.schema import AlgorithmConfig
from rlxf.core.errors import ScoreError, SyncError
from rlxf.core.types import Batch, Comparisons, Examples, Pairs, Rollouts
from rlxf.loop.collected import Collected
from rlxf.loop.run import Online, Reference, Run
from rlxf.observe.formulas import data_metrics, pair_metrics, rollout_metrics
from rlxf.pair import PAIRINGS, PairingSettings
from rlxf.schedule.lookahead import Stage
from rlxf.score.combine import Term
from rlxf.score.penalty import Shaping, with_scores


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


def pairing_settings(config: AlgorithmConfig, *, seed: int, step: int) -> PairingSettings:
    """What the recipe says of pairs, for one driver step."""
    return PairingSettings(
        min_score_margin=config.min_score_margin,
        max_pairs_per_prompt=config.max_pairs_per_prompt,
        max_length_ratio=config.max_length_ratio,
        threshold=config.score_threshold,
        seed=seed,
        step=step,
    )


def _score_and_pair(run: Run, collected: Collected) -> None:
    """``raw_scores`` [B] unless they are known, then N pairs."""
    source, config, rollouts = _online(run), run.config, collected.rollouts
    assert rollouts is not None  # the stage before
    with run.working(collected, "adv"):
        before = run.state.all_failed_scores
        _score(run, collected, rollouts)
        comparisons = _judged(run, collected, rollouts)
        collected.failed += run.state.all_failed_scores - before
        assert collected.raw_scores is not None
        shaping = Shaping.of(config.actor_rollout, max_new_tokens=config.max_new_tokens)
        scored = with_scores(
            rollouts, collected.raw_scores, eos_ids=source.eos_ids, shaping=shaping, stopped=source.stopped
        )
        if not config.replays_scores:  # what each source said is not recorded
            scored = replace(scored, sources=_by_name(source.rewards.terms, collected.table), extra=collected.extra)
        settings = pairing_settings(config.algorithm, seed=config.training.seed, step=collected.step)
        pairing = PAIRINGS[config.algorithm.pairing](scored, settings, comparisons)
    has_scores = bool(source.rewards.terms)
    metrics = rollout_metrics(scored, collected.seconds["gen"], has_scores=has_scores)
    collected.metrics |= metrics | pair_metrics(pairing)
    collected.scored, collected.pairing, collected.data = scored, pairing, pairing.pairs


def _score(run: Run, collected: Collected, rollouts: Rollouts) -> None:
    """``table`` [B, S] and its sums. Steps come here in their order: a running scale has seen all before this one."""
    source, known = _online(run), collected.raw_scores
    if known is None:
        found = source.rewards.score(rollouts)
        collected.table, collected.extra = found.table, found.extra
        collected.metrics |= found.metrics
    if collected.table is not None and collected.table.shape[1] == len(source.rewards.terms):
        sums, collected.running = source.scales.add(collected.table)
        collected.raw_scores = known if known is not None else sums


def _judged(run: Run, collected: Collected, rollouts: Rollouts) -> Comparisons | None:
    """What a judge says of the step's completions; None without a judge."""
    source = _online(run)
    if source.judge is None:
        return None
    if collected.comparisons is None:
        assert source.tokenizer is not None  # who has a judge has it
        texts = source.tokenizer.batch_decode(rollouts.sequences.completion_rows(), skip_special_tokens=True)
        try:
            collected.comparisons, metrics = source.judge(rollouts, texts)
            collected.metrics |= metrics
        except ScoreError as error:
            source.rewards.tolerate(len(rollouts), str(error), error)
            none = torch.zeros(0, dtype=torch.int64)
            collected.comparisons = Comparisons(first=none, second=none, probability=torch.zeros(0))
    return collected.comparisons


def _by_name(terms: Sequence[Term], table: Tensor | None) -> dict[str, Tensor]:
    """[B] scores of each source; none of a step that another list of sources has scored."""
    if table is None or table.shape[1] != len(terms):
        return {}
    return {term.name: column for term, column in zip(terms, table.unbind(1), strict=True)}
