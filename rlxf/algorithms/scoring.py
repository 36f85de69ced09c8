"""Scores, verdicts and pairs of one step, a chunk of its prompts at a time. Without chunks the step is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rlxf.config.schema import AlgorithmConfig
from rlxf.core.errors import ScoreError
from rlxf.core.pairs import PairedRows, PairingResult
from rlxf.core.tensors import join_slices
from rlxf.core.types import Comparisons, Metrics, Rollouts, ScoredRollouts
from rlxf.judge.both_orders import Counts
from rlxf.loop.collected import Collected, PairedChunk, pair_names
from rlxf.loop.run import Online, Run
from rlxf.observe.answers import judge_agreement
from rlxf.observe.formulas import pair_metrics, rollout_metrics
from rlxf.pair import PAIRINGS, PairingSettings
from rlxf.rollout.chunks import Chunk
from rlxf.score.combine import Term, combine
from rlxf.score.penalty import Shaping, with_scores
from rlxf.score.sources import Scores


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


class Scoring:
    """One step on its way from completions to pairs.

    ``ask`` takes each chunk, and puts its pairs into ``Collected.paired`` if they depend on nothing else. ``finish``
    puts the step together in the order of its prompts, with the numbers that one chunk of all prompts has.

    Args:
        run: the run.
        source: its source.
        collected: the step. Scores, and what a judge said of it, may be known.
    """

    def __init__(self, run: Run, source: Online, collected: Collected) -> None:
        self._run, self._source, self._collected = run, source, collected
        self._failed_before = run.state.all_failed_scores
        self._scores: list[tuple[tuple[int, ...], Scores]] = []  # of each chunk, by the rows of its prompts
        self._verdicts: list[tuple[tuple[int, ...], Comparisons]] = []
        self._counts: Counts | None = None
        self._asks_for_scores = collected.raw_scores is None
        self._asks_judge = source.judge is not None and collected.comparisons is None
        self._in_chunks = run.config.streams
        late = any(term.needs_whole_step for term in source.rewards.terms)
        self._pairs_early = self._in_chunks and self._asks_for_scores and not late
        self._paired: set[tuple[int, ...]] = set()  # chunks whose pairs are known

    def ask(self, chunk: Chunk) -> None:
        """Scores and verdicts of a chunk, and its pairs if they depend on nothing else."""
        comparisons = None
        if self._asks_for_scores:
            self._scores.append((chunk.rows, self._score(chunk.rollouts)))
        if not self._in_chunks:
            self._settle_scores()  # now: they stay known if the judge fails
        if self._asks_judge:
            comparisons = self._judged(chunk.rollouts)
            self._verdicts.append((chunk.rows, comparisons))
        if self._pairs_early:
            sums = combine(self._scores[-1][1].table, self._source.rewards.terms, {})
            _, found = self._paired_by(chunk.rollouts, sums, comparisons)
            self._put(chunk.rows, found.rows, pair_names(found.rows, chunk.rows))
            self._paired.add(chunk.rows)

    def _score(self, rollouts: Rollouts) -> Scores:
        rewards = self._source.rewards
        return rewards.score(rollouts, where=_in_chunk) if self._in_chunks else rewards.score(rollouts)

    def finish(self) -> None:
        """The step's pairs; all chunks have been asked about."""
        run, source, collected, rollouts = self._run, self._source, self._collected, self._collected.rollouts
        assert rollouts is not None  # the stage before has ended
        if self._in_chunks:
            self._settle_scores()
        if self._asks_judge:
            self._gather_verdicts(rollouts)
        collected.failed += run.state.all_failed_scores - self._failed_before
        assert collected.raw_scores is not None
        judged = collected.comparisons if source.judge is not None else None
        scored, pairing = self._paired_by(rollouts, collected.raw_scores, judged)
        if not run.config.replays_scores:  # what each source said is not recorded
            named = _by_name(source.rewards.terms, collected.table)
            scored = replace(scored, sources=named, extra=collected.extra)
        has_scores = bool(source.rewards.terms)
        metrics = rollout_metrics(scored, collected.seconds["gen"], has_scores=has_scores)
        agreement = judge_agreement(judged, scored.scores) if judged is not None and has_scores else {}
        collected.metrics |= metrics | pair_metrics(pairing) | agreement
        for rows in collected.chunks if self._in_chunks else ():
            if rows not in self._paired:
                mine = pairing.rows.where(torch.isin(pairing.rows.prompt_index, torch.tensor(rows)))
                self._put(rows, mine, pair_names(mine))
        collected.scored, collected.pairing, collected.data = scored, pairing, pairing.pairs

    def _put(self, rows: tuple[int, ...], found: PairedRows, names: Tensor) -> None:
        self._collected.paired.put(PairedChunk(rows=rows, found=found, names=names))

    def _paired_by(
        self, rollouts: Rollouts, raw_scores: Tensor, comparisons: Comparisons | None
    ) -> tuple[ScoredRollouts, PairingResult]:
        source, config = self._source, self._run.config
        shaping = Shaping.of(config.actor_rollout, max_new_tokens=config.max_new_tokens)
        scored = with_scores(rollouts, raw_scores, eos_ids=source.eos_ids, shaping=shaping, stopped=source.stopped)
        settings = pairing_settings(config.algorithm, seed=config.training.seed, step=self._collected.step)
        return scored, PAIRINGS[config.algorithm.pairing](scored, settings, comparisons)

    def _judged(self, rollouts: Rollouts) -> Comparisons:
        """What a judge says of a chunk's completions."""
        source = self._source
        assert source.judge is not None
        assert source.tokenizer is not None  # who has a judge has it
        texts = source.tokenizer.batch_decode(rollouts.sequences.completion_rows(), skip_special_tokens=True)
        try:
            found, counts = source.judge(rollouts, texts)
        except ScoreError as error:
            source.rewards.tolerate(len(rollouts), str(error), error)
            none = torch.zeros(0, dtype=torch.int64)
            return Comparisons(first=none, second=none, probability=torch.zeros(0))
        self._counts = self._counts or Counts()
        self._counts.add(counts)
        return found

    def _settle_scores(self) -> None:
        """``raw_scores`` [B] unless they are known, and ``table``."""
        collected, source = self._collected, self._source
        assert collected.rollouts is not None
        known = collected.raw_scores
        if known is None:
            self._gather_scores(collected.rollouts)
        if collected.table is not None and collected.table.shape[1] == len(source.rewards.terms):
            # Steps come here in their order: a running scale has seen all before this one.
            sums, collected.running = source.scales.add(collected.table)
            collected.raw_scores = known if known is not None else sums

    def _gather_scores(self, rollouts: Rollouts) -> None:
        """``table`` [B, S], ``extra`` and the metrics that reward functions logged."""
        collected = self._collected
        where = CompletionRows(rollouts)
        parts = [(where.of(prompts), scores) for prompts, scores in self._scores]
        if not self._in_chunks:
            found = parts[0][1]
            collected.table, collected.extra = found.table, found.extra
            collected.metrics |= found.metrics
            return
        rewards = self._source.rewards
        table = torch.full((len(rollouts), len(rewards.terms)), torch.nan)
        for rows, found in parts:
            table.numpy()[rows.numpy()] = found.table.numpy()
            for name, values in found.extra.items():
                column = collected.extra.setdefault(name, [None] * len(rollouts))
                for row, value in zip(rows.tolist(), values, strict=True):
                    column[row] = value
        if not all(map(_in_chunk, rewards.terms)):
            whole = rewards.score(rollouts, where=lambda term: term.whole_step)
            asked = torch.tensor([term.whole_step for term in rewards.terms])
            table = torch.where(asked, whole.table, table)
            collected.extra |= whole.extra
            collected.metrics |= whole.metrics
        collected.table = table
        collected.metrics |= _means([(len(rows), found.metrics) for rows, found in parts])

    def _gather_verdicts(self, rollouts: Rollouts) -> None:
        """``comparisons`` of rows of the step, and ``judge/*``."""
        first, second, probability, where = [], [], [], CompletionRows(rollouts)
        for prompts, found in self._verdicts:
            rows = where.of(prompts)
            first.append(rows[found.first])
            second.append(rows[found.second])
            probability.append(found.probability)
        self._collected.comparisons = Comparisons(
            first=torch.cat(first), second=torch.cat(second), probability=torch.cat(probability)
        )
        if self._counts is not None:
            assert self._source.judge is not None
            self._collected.metrics |= self._source.judge.metrics(self._counts)


def _in_chunk(term: Term) -> bool:
    """Whether a source is asked chunk by chunk."""
    return not term.whole_step


class CompletionRows:
    """Where the completions of a step's prompts are."""

    def __init__(self, rollouts: Rollouts) -> None:
        prompts = rollouts.prompt_index.numpy()
        self._order = torch.from_numpy(prompts.argsort(kind="stable"))
        self._counts = np.bincount(prompts, minlength=len(rollouts.prompts))
        self._begins = self._counts.cumsum() - self._counts

    def of(self, prompts: Sequence[int]) -> Tensor:
        """[n] int64: the rows of some prompts' completions, prompt after prompt."""
        rows = np.array(prompts, dtype=np.int64)
        return join_slices(self._order, self._begins[rows], self._begins[rows] + self._counts[rows])


def _means(parts: Sequence[tuple[int, Metrics]]) -> Metrics:
    """Means over the completions of chunks, of what functions logged in each call."""
    found: Metrics = {}
    for name in {name: None for _, metrics in parts for name in metrics}:
        values = [(count, metrics[name]) for count, metrics in parts if name in metrics]
        found[name] = sum(count * value for count, value in values) / sum(count for count, _ in values)
    return found


def _by_name(terms: Sequence[Term], table: Tensor | None) -> dict[str, Tensor]:
    """[B] scores of each source; none of a step that another list of sources has scored."""
    if table is None or table.shape[1] != len(terms):
        return {}
    return {term.name: column for term, column in zip(terms, table.unbind(1), strict=True)}
