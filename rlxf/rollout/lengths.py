"""How long the answers to each prompt were, so that the next time its sampling is planned: ``lengths.safetensors``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rlxf.core.errors import CheckpointError
from rlxf.core.types import PromptBatch, Rollouts

FILE = "lengths.safetensors"  # in a checkpoint

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Totals:
    """What some rows of the data gave when they were last sampled; ascending, each row once."""

    rows: Integers  # [n]
    tokens: Integers  # [n], of all completions together
    counts: Integers  # [n] completions, at least 1


class SeenLengths:
    """Mean completion tokens of each prompt (row of the data) when it was last sampled.

    Totals are kept as integers, so a mean does not depend on the order in which steps were added. A prompt that comes
    twice in a step counts with all completions of that step. The table has 12 bytes for each row of the data up to the
    largest one that was seen.
    """

    def __init__(self) -> None:
        self._tokens: Integers = np.zeros(0, dtype=np.int64)  # by row of the data
        self._counts: NDArray[np.int32] = np.zeros(0, dtype=np.int32)  # 0: not seen
        self._sums = (0, 0)  # tokens and completions of all rows

    def add(self, rollouts: Rollouts) -> None:
        """Note the completions of a step: they take the place of what its prompts gave before."""
        self._put(_totals(rollouts))

    def work(self, prompts: PromptBatch, num_samples: int) -> list[float]:
        """Tokens that sampling each prompt is expected to cost: its own, and those of ``num_samples`` completions.

        A completion is expected to be as long as the mean of the prompt's newest ones. Of a prompt that was not sampled
        yet, as long as the mean of all that are known, so the prompt's own length makes the difference; while none is
        known, as long as the step's mean prompt.

        Args:
            prompts: of the step that is to be sampled.
            num_samples: completions of each prompt.
        """
        own = prompts.prompts.lengths.numpy().astype(np.float64)
        tokens, counts = self._look_up(prompts.row_ids.numpy())
        expected = np.where(counts > 0, tokens / np.maximum(counts, 1), self._unseen(own))
        return [float(each) for each in own + num_samples * expected]

    def save(self, folder: Path) -> None:
        """Write the rows that were seen into a checkpoint; nothing is written without any."""
        rows = self._counts.nonzero()[0]
        if len(rows):
            save_file({"rows": rows, "tokens": self._tokens[rows], "counts": self._counts[rows]}, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> SeenLengths:
        """What ``save`` wrote; without a row of a checkpoint that has no such file.

        Raises:
            CheckpointError: the file is damaged.
        """
        seen, path = cls(), folder / FILE
        if not path.exists():
            return seen
        try:
            content = load_file(path)
            seen._put(_checked(_Totals(*(content[name].astype(np.int64) for name in ("rows", "tokens", "counts")))))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: the lengths of earlier completions cannot be read ({error}); copy the checkpoint again, or "
                "name another one in training.resume"
            ) from error
        return seen

    def _put(self, new: _Totals) -> None:
        if not len(new.rows):
            return
        self._grow(int(new.rows[-1]) + 1)
        before = self._tokens[new.rows], self._counts[new.rows]
        self._tokens[new.rows], self._counts[new.rows] = new.tokens, new.counts
        gained = int(new.tokens.sum() - before[0].sum()), int(new.counts.sum() - before[1].sum())
        self._sums = self._sums[0] + gained[0], self._sums[1] + gained[1]

    def _grow(self, size: int) -> None:
        if size > len(self._counts):
            more = max(size, 2 * len(self._counts)) - len(self._counts)  # doubled, so that it is seldom copied
            self._tokens = np.concatenate([self._tokens, np.zeros(more, dtype=np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(more, dtype=np.int32)])

    def _look_up(self, rows: Integers) -> tuple[Integers, NDArray[np.int32]]:
        """Tokens and completions of each row; 0 and 0 of one that is not in the table."""
        inside = rows < len(self._counts)
        tokens, counts = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int32)
        tokens[inside], counts[inside] = self._tokens[rows[inside]], self._counts[rows[inside]]
        return tokens, counts

    def _unseen(self, own: NDArray[np.float64]) -> float:
        """What a completion of a prompt that was not sampled yet is expected to have."""
        tokens, counts = self._sums
        if counts:
            return tokens / counts
        return float(own.mean()) if len(own) else 0.0


def _totals(rollouts: Rollouts) -> _Totals:
    rows, place = np.unique(rollouts.prompts.row_ids.numpy()[rollouts.prompt_index.numpy()], return_inverse=True)
    tokens = np.zeros(len(rows), dtype=np.int64)
    np.add.at(tokens, place, rollouts.sequences.completion_lengths.numpy())
    return _Totals(rows, tokens, np.bincount(place, minlength=len(rows)))


def _checked(found: _Totals) -> _Totals:
    same = found.rows.ndim == 1 and found.rows.shape == found.tokens.shape == found.counts.shape
    if not (same and (found.rows >= 0).all() and (np.diff(found.rows) > 0).all() and (found.counts > 0).all()):
        raise ValueError("expected ascending rows of the data, each with its tokens and completions")
    return found
