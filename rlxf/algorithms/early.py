"""The first mini-batch of an update, as soon as all its pairs are known: the rest of the step may still be sampled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from rlxf.core.pairs import PairedRows
from rlxf.core.types import PairValues, ReferencedPairs
from rlxf.loop.collected import PairedChunk
from rlxf.rollout.shares import one_after_the_other


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ReferredChunk(PairedChunk):
    """The pairs of a chunk with what the reference says of them."""

    reference: PairValues


class FirstPairs:
    """Collects the chunks of a step until its first ``size`` pairs are known, in the order of the prompts.

    Args:
        size: pairs of the first mini-batch.
        num_samples: completions of each prompt.
    """

    def __init__(self, size: int, num_samples: int) -> None:
        self._size, self._num_samples = size, num_samples
        self._chunks: list[ReferredChunk] = []
        self._counts: dict[int, int] = {}  # pairs of each prompt that is known
        self._next, self._known = 0, 0  # first prompt that is not known, and pairs of those before it

    def add(self, chunk: ReferredChunk) -> ReferencedPairs | None:
        """The mini-batch, once: when this chunk makes it whole."""
        if self._known >= self._size:
            return None
        self._chunks.append(chunk)
        found = Counter(chunk.names.numpy()[:, 0].tolist())
        self._counts |= {row: found[row] for row in chunk.rows}
        while self._next in self._counts and self._known < self._size:
            self._known += self._counts[self._next]
            self._next += 1
        return self._batch() if self._known >= self._size else None

    def _batch(self) -> ReferencedPairs:
        chunks = [chunk for chunk in self._chunks if len(chunk.found)]
        names = torch.cat([chunk.names for chunk in chunks])
        # A stable sort: pairs of one prompt come from one chunk, and have their order there.
        first = names[:, 0].argsort(stable=True)[: self._size]
        counts = names[:, 0].bincount()  # of each prompt, also of pairs that the mini-batch has no room for
        names = names[first]
        rows = names[:, :1] * self._num_samples + names[:, 1:]  # of the step's completions
        pairs = replace(
            _joined([chunk.found for chunk in chunks]).where(first).whole(),
            prompt_index=names[:, 0],
            chosen_rows=rows[:, 0],
            rejected_rows=rows[:, 1],
            weight=1 / counts[names[:, 0]].float(),
        )
        reference = PairValues(
            chosen=torch.cat([chunk.reference.chosen for chunk in chunks])[first],
            rejected=torch.cat([chunk.reference.rejected for chunk in chunks])[first],
        )
        return ReferencedPairs(pairs=pairs, reference=reference)


def _joined(parts: Sequence[PairedRows]) -> PairedRows:
    """The pairs of several chunks, one after the other, as rows of all their rollouts."""
    known = {id(part.rollouts): part.rollouts for part in parts}  # chunks may be cut from the same ones
    begins = dict(zip(known, accumulate(map(len, known.values()), initial=0), strict=False))
    return PairedRows(
        rollouts=one_after_the_other(list(known.values())),
        chosen=torch.cat([begins[id(part.rollouts)] + part.chosen for part in parts]),
        rejected=torch.cat([begins[id(part.rollouts)] + part.rejected for part in parts]),
        margin=torch.cat([part.margin for part in parts]),
    )
