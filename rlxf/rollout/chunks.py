"""Completions of a step as they come in, and the chunks of prompts that are whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rlxf.core.errors import ShapeError
from rlxf.core.types import PromptBatch, Rollouts
from rlxf.rollout.shares import join, part_of


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Chunk:
    """Prompts of a step that move on together, with all their completions.

    The prompts in rows 5 and 2 of a step: ``rows = (5, 2)``, and ``rollouts.prompt_index`` counts them as 0 and 1.
    """

    rows: tuple[int, ...]  # of the step's prompts
    rollouts: Rollouts


def chunks_of(rollouts: Rollouts, chunks: Sequence[tuple[int, ...]]) -> Iterator[Chunk]:
    """The chunks of a step that is sampled."""
    for rows in chunks:
        yield Chunk(rows=rows, rollouts=_of(rollouts, rows))


class Gathered:
    """The completions of one step, as engines hand them over.

    Args:
        prompts: of the step.
        chunks: rows of the prompts of each chunk; every prompt is in one, or there is none.
        num_samples: completions of each prompt; None: of a recording, whose prompts may have different numbers.
    """

    def __init__(
        self, prompts: PromptBatch, chunks: Sequence[tuple[int, ...]], *, num_samples: int | None = None
    ) -> None:
        self._num_samples = num_samples
        self._prompts, self._chunks = prompts, chunks
        self._row_at = {position: row for row, position in enumerate(prompts.positions.tolist())}
        self._chunk_of = {row: number for number, rows in enumerate(chunks) for row in rows}
        self._missing = [len(rows) for rows in chunks]  # prompts that each chunk waits for
        self._parts: list[Rollouts] = []
        self._found: dict[int, tuple[int, int]] = {}  # of each row that is there: its part, and its row in that

    def add(self, part: Rollouts) -> list[Chunk]:
        """All completions of some prompts are there; the chunks that are whole now, in the order of their numbers.

        Raises:
            ShapeError: some completions of a prompt are missing, or a prompt has come before.
        """
        self._require_all_samples(part)
        whole = []
        for inside, position in enumerate(part.prompts.positions.tolist()):
            row = self._row_at[position]
            if row in self._found:
                raise ShapeError(f"the prompt at position {position} was sampled twice")
            self._found[row] = len(self._parts), inside
            number = self._chunk_of.get(row)
            if number is not None:
                self._missing[number] -= 1
                if not self._missing[number]:
                    whole.append(number)
        self._parts.append(part)
        return [Chunk(rows=self._chunks[number], rollouts=self._rollouts(number)) for number in sorted(whole)]

    def _require_all_samples(self, part: Rollouts) -> None:
        if self._num_samples is None:
            return
        counts = np.bincount(part.prompt_index.numpy(), minlength=len(part.prompts))
        for row in np.flatnonzero(counts != self._num_samples).tolist():
            raise ShapeError(
                f"the prompt at position {int(part.prompts.positions[row])} came with {counts[row]} of its "
                f"{self._num_samples} completions"
            )

    def whole(self) -> Rollouts:
        """All completions, in the order of the prompts; every prompt has come."""
        assert len(self._found) == len(self._prompts)
        return join(self._prompts, self._parts)

    def _rollouts(self, number: int) -> Rollouts:
        rows = self._chunks[number]
        inside: dict[int, list[int]] = {}  # by part
        for row in rows:
            part, place = self._found[row]
            inside.setdefault(part, []).append(place)
        parts = [_of(self._parts[part], tuple(places)) for part, places in inside.items()]
        if len(parts) == 1:  # whose prompts are in the order of the chunk
            return parts[0]
        return join(self._prompts.select(rows), parts)


def _of(rollouts: Rollouts, rows: tuple[int, ...]) -> Rollouts:
    return rollouts if rows == tuple(range(len(rollouts.prompts))) else part_of(rollouts, rows)
