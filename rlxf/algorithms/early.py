"""The first mini-batch of an update, as soon as all its pairs are known: the rest of the step may still be sampled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch

from rlxf.core.types import OnlinePairs, PairValues, ReferencedPairs, Sequences
from rlxf.loop.collected import PairedChunk


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
        found = Counter(chunk.names[:, 0].tolist())
        self._counts |= {row: found[row] for row in chunk.rows}
        while self._next in self._counts and self._known < self._size:
            self._known += self._counts[self._next]
            self._next += 1
        return self._batch() if self._known >= self._size else None

    def _batch(self) -> ReferencedPairs:
        chunks = [chunk for chunk in self._chunks if len(chunk.pairs)]
        names = torch.cat([chunk.names for chunk in chunks])
        # A stable sort: pairs of one prompt come from one chunk, and have their order there.
        first = names[:, 0].argsort(stable=True)[: self._size]
        names = names[first]
        pairs = _concat([chunk.pairs for chunk in chunks]).select(first)
        rows = names[:, :1] * self._num_samples + names[:, 1:]  # of the step's completions
        pairs = replace(pairs, prompt_index=names[:, 0], chosen_rows=rows[:, 0], rejected_rows=rows[:, 1])
        reference = PairValues(
            chosen=torch.cat([chunk.reference.chosen for chunk in chunks])[first],
            rejected=torch.cat([chunk.reference.rejected for chunk in chunks])[first],
        )
        return ReferencedPairs(pairs=pairs, reference=reference)


def _concat(parts: list[OnlinePairs]) -> OnlinePairs:
    """The pairs of several chunks, one after the other."""

    def joined(name: str) -> torch.Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return OnlinePairs(
        chosen=Sequences.concat([part.chosen for part in parts]),
        rejected=Sequences.concat([part.rejected for part in parts]),
        row_ids=joined("row_ids"),
        margin=joined("margin"),
        policy_version=joined("policy_version"),
        chosen_engine_logps=joined("chosen_engine_logps"),
        rejected_engine_logps=joined("rejected_engine_logps"),
        prompt_index=joined("prompt_index"),
        chosen_rows=joined("chosen_rows"),
        rejected_rows=joined("rejected_rows"),
        weight=joined("weight"),
    )
