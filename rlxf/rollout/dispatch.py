"""Which engine samples which prompt of a step, in which order, and which prompts are scored together. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Literal

import numpy as np

Mode = Literal["planned", "queue"]
Rows = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatch:
    """How a step's prompts are sampled; numbers are rows of the step's ``PromptBatch``.

    Four prompts of work 9, 1, 5 and 3 on two engines with a slot each, ``planned``, in chunks of one prompt:
    ``order = (0, 2, 3, 1)``, ``shares = ((0,), (2, 3, 1))``, ``chunks = ((0,), (2,), (3,), (1,))``.
    """

    order: Rows  # all prompts, longest first
    shares: tuple[Rows, ...] | None  # of each engine, as it begins them; None: each takes the next of ``order``
    chunks: tuple[Rows, ...]  # that are scored together: every prompt is in one. Planned: each belongs to one engine

    def sizes(self) -> tuple[Rows, ...]:
        """Prompts in the chunks of each share, one after the other; () of each where the step is one chunk."""
        shares = self.shares or ()
        if len(self.chunks) <= 1:
            return ((),) * len(shares)
        engine_of = {row: engine for engine, share in enumerate(shares) for row in share}
        found: list[list[int]] = [[] for _ in shares]
        for chunk in self.chunks:
            found[engine_of[chunk[0]]].append(len(chunk))
        return tuple(map(tuple, found))


def deal(
    work: Sequence[float],
    num_engines: int,
    *,
    slots_per_engine: int,
    samples_per_prompt: int,
    chunk: int | None,
    mode: Mode,
) -> Dispatch:
    """Deal the prompts of a step to the engines, before any of them is sampled.

    ``planned`` gives the longest prompt that is left to the engine with the least work so far. Of equal prompts the
    first one comes first; of equal engines the one with fewer prompts, then the first one. So every engine has a
    prompt if there are enough; else its share is empty. An engine begins its longest prompts first. Only where no chunk
    is cut and all completions of an engine are decoded at the same time, its share is in prompt order: one engine then
    gets the step's prompts as they are.

    Args:
        work: tokens that sampling each prompt is expected to cost, all its completions together.
        num_engines: at least 1.
        slots_per_engine: completions that an engine decodes at the same time at most.
        samples_per_prompt: completions of each prompt.
        chunk: prompts that are scored together, as near as an engine's share can be divided; None: the whole step, in
            prompt order.
        mode: ``planned``: shares are fixed here; ``queue``: only the order is.

    Raises:
        ValueError: a work is negative or not finite.
    """
    if not all(0 <= each < math.inf for each in work):
        raise ValueError("expected the work of each prompt as a finite number of tokens that is not negative")
    order: Rows = tuple(np.argsort(-np.asarray(work, dtype=np.float64), kind="stable").tolist())
    whole = (tuple(range(len(work))),) if len(work) else ()
    if mode == "queue":
        return Dispatch(order=order, shares=None, chunks=whole if chunk is None else tuple(_cut(order, chunk)))
    shares = _balanced(work, order, num_engines)
    if chunk is None:
        fit = slots_per_engine // samples_per_prompt  # prompts whose completions are decoded at the same time
        shares = [sorted(share) if len(share) <= fit else share for share in shares]
    cut = whole if chunk is None else tuple(_in_turn([list(_cut(share, chunk)) for share in shares]))
    return Dispatch(order=order, shares=tuple(map(tuple, shares)), chunks=cut)


def _balanced(work: Sequence[float], order: Rows, num_engines: int) -> list[list[int]]:
    """The rows of each engine, longest first."""
    shares: list[list[int]] = [[] for _ in range(num_engines)]
    engines = [(0.0, 0, engine) for engine in range(num_engines)]  # work, prompts, number: in order, so a heap
    for row in order:
        total, count, engine = engines[0]
        shares[engine].append(row)
        heapq.heapreplace(engines, (total + work[row], count + 1, engine))
    return shares


def _cut(rows: Sequence[int], size: int) -> Iterator[Rows]:
    """As many chunks as come nearest to ``size`` rows each: no chunk of the few that are left over."""
    count = max(round(len(rows) / size), 1) if len(rows) else 0
    bounds = [len(rows) * number // count for number in range(count + 1)] if count else []
    return (tuple(rows[start:stop]) for start, stop in pairwise(bounds))


def _in_turn(chunks: Sequence[Sequence[Rows]]) -> Iterator[Rows]:
    """The first chunk of each engine, then the second of each: about the order in which they end."""
    for turn in zip_longest(*chunks):
        yield from (rows for rows in turn if rows is not None)
