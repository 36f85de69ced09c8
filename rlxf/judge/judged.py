"""Judging a step's completions, and the answers of two policies: what training and evaluations call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlxf.config.kinds import TournamentName
from rlxf.core.types import Comparisons, Metrics, PromptBatch, Rollouts
from rlxf.judge.both_orders import BothOrders, Compared, Counts, Prices
from rlxf.judge.tournament import comparisons


class Judging:
    """A run's judge.

    Args:
        asking: the judge, with its memory.
        tournament: which completions of a prompt are compared.
        prices: of a judge that is a service; None: no calls are counted.
    """

    def __init__(self, asking: BothOrders, *, tournament: TournamentName, prices: Prices | None = None) -> None:
        self._asking = asking
        self._tournament = tournament
        self._prices = prices

    def __call__(self, rollouts: Rollouts, texts: Sequence[str]) -> tuple[Comparisons, Counts]:
        """The judged pairs of a step's completions, or of a chunk's, and what judging them took.

        Args:
            rollouts: B completions.
            texts: [B] the completions as texts, without special tokens.

        Raises:
            ScoreError: the judge cannot answer at all.
        """
        counts, batch = Counts(), rollouts.prompts
        prompt_rows = rollouts.prompt_index.tolist()

        def ask(first: Sequence[int], second: Sequence[int]) -> Tensor:
            prompts = [prompt_rows[row] for row in first]
            found = self._asking.compare(
                [batch.texts[row] for row in prompts],
                [texts[row] for row in first],
                [texts[row] for row in second],
                {name: [values[row] for row in prompts] for name, values in batch.columns.items()},
            )
            counts.add(found.counts)
            return found.probability

        judged = comparisons(rollouts.prompt_index, rollouts.sample_index, ask, self._tournament)
        return judged, counts

    def answers(self, prompts: PromptBatch, first: Sequence[str], second: Sequence[str]) -> Compared:
        """The verdicts on two answers to each prompt."""
        return self._asking.compare(list(prompts.texts), first, second, prompts.columns)

    def metrics(self, counts: Counts, *, prefix: str = "judge/") -> Metrics:
        """What comparisons took, by the names of docs/metrics.md."""
        return counts.metrics(self._prices, prefix=prefix)


def wins(probability: Tensor) -> Tensor:
    """[comparisons with a verdict] float64: 1 where the first answer is better, 0.5 for a tie, else 0."""
    known = probability[probability.isfinite()]
    return torch.where(known == 0.5, 0.5, (known > 0.5).double())
