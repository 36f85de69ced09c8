"""Completions with scores, and what pairings make of them, for tests of pairs and of training on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlxf.core.pairs import PairingResult
from rlxf.core.types import OnlinePairs, PairValues, ReferencedPairs, Rollouts, ScoredRollouts
from rlxf.pair import PAIRINGS, PairingSettings
from tests.data_world import make_rollouts, prompt_batch, reorder
from tests.settings import random_rows


def scored(scores: list[list[float]], order: list[int] | None = None) -> ScoredRollouts:
    """``scores[p][k]`` of completion k of prompt p. The completion's tokens name both: 10 * p + k, k + 1 times."""
    prompts = prompt_batch([[100 + p] * (p + 1) for p in range(len(scores))])
    rollouts = make_rollouts(prompts, [[[10 * p + k] * (k + 1) for k in range(len(s))] for p, s in enumerate(scores)])
    flat = torch.tensor([score for row in scores for score in row])
    if order is not None:
        rollouts, flat = reorder(rollouts, order), flat[order]
    return with_flat(rollouts, flat)


def with_flat(rollouts: Rollouts, flat: Tensor) -> ScoredRollouts:
    ends = torch.ones(len(rollouts), dtype=torch.bool)
    return ScoredRollouts(rollouts=rollouts, raw_scores=flat, scores=flat, contains_eos=ends)


def picked(result: PairingResult) -> list[tuple[int, int, int]]:
    """Prompt id, chosen sample, rejected sample of each pair, read from the tokens."""
    sides = zip(
        result.pairs.row_ids.tolist(),
        result.pairs.chosen.completion_rows(),
        result.pairs.rejected.completion_rows(),
        strict=True,
    )
    return [(p, chosen[0] - 10 * p, rejected[0] - 10 * p) for p, chosen, rejected in sides]


def random_scored(num_prompts: int, num_samples: int, seed: int = 0) -> ScoredRollouts:
    """Completions of unequal lengths with scores that never tie; the engine's log-probs are random, too."""
    generator = torch.Generator().manual_seed(seed)
    prompts = prompt_batch(random_rows(num_prompts, 2, 12, generator))
    rollouts = make_rollouts(prompts, [random_rows(num_samples, 1, 20, generator) for _ in range(num_prompts)])
    values = {name: getattr(rollouts, name) for name in Rollouts.__dataclass_fields__}
    values["engine_logps"] = -5 * torch.rand(len(rollouts.engine_logps), generator=generator)
    return with_flat(Rollouts(**values), torch.randn(len(rollouts), generator=generator))


def paired(num_prompts: int, num_samples: int, pairing: Any = "all", seed: int = 0, **settings: Any) -> ReferencedPairs:
    """Pairs of ``random_scored``; the made-up reference log-prob of a completion is the same in all of its pairs."""
    given = random_scored(num_prompts, num_samples, seed)
    pairs = PAIRINGS[pairing](given, PairingSettings(**settings)).pairs
    reference = -40 + 5 * torch.randn(len(given), generator=torch.Generator().manual_seed(seed + 1))
    sides = PairValues(chosen=reference[pairs.chosen_rows], rejected=reference[pairs.rejected_rows])
    return ReferencedPairs(pairs=pairs, reference=sides)


def as_strangers(batch: ReferencedPairs) -> ReferencedPairs:
    """The same pairs, as if no two of them were of one prompt or shared a completion."""
    pairs, number = batch.pairs, len(batch)
    assert isinstance(pairs, OnlinePairs)
    values = {name: getattr(pairs, name) for name in OnlinePairs.__dataclass_fields__}
    rows = torch.arange(2 * number)
    values |= {"prompt_index": rows[:number], "chosen_rows": rows[:number], "rejected_rows": rows[number:]}
    return ReferencedPairs(pairs=OnlinePairs(**values), reference=batch.reference)
