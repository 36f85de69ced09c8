"""The first mini-batch, made of chunks in any order, is what the whole step's first mini-batch is."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.algorithms.early import FirstPairs, ReferredChunk
from rlxf.core.pairs import PairedRows
from rlxf.core.types import PairValues, ScoredRollouts
from rlxf.loop.collected import pair_names
from rlxf.pair import PAIRINGS, PairingSettings
from rlxf.rollout.shares import part_of
from rlxf.update.batches import digest
from tests.pair_world import paired, random_scored, with_flat

P, K = 9, 3


def pair(pairing: str, scored: ScoredRollouts, margin: float = 0.0) -> PairedRows:
    return PAIRINGS[pairing](scored, PairingSettings(min_score_margin=margin)).rows  # type: ignore[index]


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 12),
    chunk=st.integers(1, 5),
    pairing=st.sampled_from(["best_worst", "all"]),
    margin=st.sampled_from([0.0, 1.0]),  # with 1.0 some prompts have no pair
    seed=st.integers(0, 99),
)
def test_it_is_the_first_mini_batch_of_the_whole_step(
    size: int, chunk: int, pairing: str, margin: float, seed: int
) -> None:
    whole = paired(P, K, pairing, seed, min_score_margin=margin)
    scored = random_scored(P, K, seed)
    reference = dict(
        zip(
            map(tuple, pair_names(pair(pairing, scored, margin)).tolist()),
            zip(whole.reference.chosen.tolist(), whole.reference.rejected.tolist(), strict=True),
            strict=True,
        )
    )
    order = random.Random(seed).sample(range(P), P)
    first, found = FirstPairs(size, K), []
    for start in range(0, P, chunk):
        rows = tuple(order[start : start + chunk])
        part = part_of(scored.rollouts, rows)
        flat = torch.cat([scored.scores.view(P, K)[row] for row in rows])
        made = pair(pairing, with_flat(part, flat), margin)
        names = pair_names(made, rows)
        sides = torch.tensor([reference[tuple(name)] for name in names.tolist()]).view(-1, 2)
        values = PairValues(chosen=sides[:, 0], rejected=sides[:, 1])
        batch = first.add(ReferredChunk(rows=rows, found=made, names=names, reference=values))
        if batch is not None:
            found.append(batch)
    if len(whole) < size:
        assert not found
        return
    (batch,) = found
    expected = whole.select(torch.arange(size))
    assert digest(batch) == digest(expected)


def test_it_does_not_wait_for_later_prompts() -> None:
    scored, first = random_scored(P, K), FirstPairs(2, K)
    for row in (4, 1, 0):
        part = part_of(scored.rollouts, [row])
        made = pair("best_worst", with_flat(part, scored.scores.view(P, K)[row]))
        zeros = PairValues(chosen=torch.zeros(1), rejected=torch.zeros(1))
        names = pair_names(made, [row])
        batch = first.add(ReferredChunk(rows=(row,), found=made, names=names, reference=zeros))
        assert (batch is None) == (row != 0)
    assert batch is not None
    assert batch.pairs.prompt_index.tolist() == [0, 1]  # type: ignore[union-attr]
