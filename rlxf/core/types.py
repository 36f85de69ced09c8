"""What travels between rooms: frozen dataclasses of flat tensors.

When data gains a meaning it gains a new type:
``PromptBatch -> Rollouts -> ScoredRollouts -> Pairs -> ReferencedPairs``.
Token rows are flat on the wire (tokens plus lengths); only an engine pads. Shapes: ``P`` prompts, ``K`` completions per
prompt, ``B = P * K`` completions, ``N`` pairs. Chosen and rejected are two fields: meaning is never row order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from rlxf.core.errors import ShapeError
from rlxf.core.tensors import join_slices, take, to_device

Messages = list[dict[str, str]]
Text = str | Messages  # a plain prompt, or chat messages with "role" and "content"


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ShapeError(message)


def _require_total(tokens: Tensor, lengths: Tensor) -> None:
    total = int(lengths.numpy().sum())
    _require(total == tokens.numel(), f"lengths sum to {total}, but tokens has {tokens.numel()} entries")


def select_rows(values: Tensor, lengths: Tensor, index: Tensor) -> Tensor:
    """The values of some rows, one after the other.

    Args:
        values: [sum of lengths] row after row.
        lengths: [rows] int64.
        index: [n] int64, rows in the order of the result.
    """
    sizes, rows = lengths.numpy(), index.numpy()
    ends = sizes.cumsum()
    return join_slices(values, (ends - sizes)[rows], ends[rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Rows of token ids, flat: row ``i`` is ``tokens[offsets[i]:offsets[i + 1]]``.

    The rows ``[5, 6]`` and ``[7]``: ``tokens = [5, 6, 7]``, ``lengths = [2, 1]``.
    """

    tokens: Tensor  # [sum_L] int32, row after row
    lengths: Tensor  # [rows] int64

    def __post_init__(self) -> None:
        _require_total(self.tokens, self.lengths)

    def __len__(self) -> int:
        return self.lengths.numel()

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]]) -> Self:
        flat = [token for row in rows for token in row]
        return cls(
            tokens=torch.tensor(flat, dtype=torch.int32),
            lengths=torch.tensor([len(row) for row in rows], dtype=torch.int64),
        )

    def rows(self) -> list[list[int]]:
        """The rows as Python lists, for tokenizers, engines and files."""
        return [row.tolist() for row in torch.split(self.tokens, self.lengths.tolist())]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """``B`` token sequences, each a prompt followed by its completion (the EOS included when it was sampled).

    Prompt ``[5, 6]`` with completion ``[9, 2]``, and prompt ``[7]`` with completion ``[8]``:
    ``tokens = [5, 6, 9, 2, 7, 8]``, ``lengths = [4, 2]``, ``prompt_lengths = [2, 1]``.
    """

    tokens: Tensor  # [sum_L] int32, row after row
    lengths: Tensor  # [B] int64, prompt + completion
    prompt_lengths: Tensor  # [B] int64, at least 1

    def __post_init__(self) -> None:
        _require_total(self.tokens, self.lengths)
        lengths, prompts = self.lengths.numpy(), self.prompt_lengths.numpy()
        _require(lengths.shape == prompts.shape, f"{lengths.size} lengths but {prompts.size} prompt lengths")
        _require(bool((prompts <= lengths).all()), "a prompt is longer than its sequence")

    def __len__(self) -> int:
        return self.lengths.numel()

    @property
    def completion_lengths(self) -> Tensor:
        return torch.from_numpy(self.lengths.numpy() - self.prompt_lengths.numpy())  # [B] int64

    @classmethod
    def from_rows(cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> Self:
        _require(len(prompts) == len(completions), f"{len(prompts)} prompts but {len(completions)} completions")
        flat = [token for p, c in zip(prompts, completions, strict=True) for token in (*p, *c)]
        return cls(
            tokens=torch.tensor(flat, dtype=torch.int32),
            lengths=torch.tensor(
                [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)], dtype=torch.int64
            ),
            prompt_lengths=torch.tensor([len(p) for p in prompts], dtype=torch.int64),
        )

    def rows(self) -> list[list[int]]:
        """Prompt and completion of each sequence as one Python list."""
        return [row.tolist() for row in torch.split(self.tokens, self.lengths.tolist())]

    def prompt_rows(self) -> list[list[int]]:
        return [row[:n] for row, n in zip(self.rows(), self.prompt_lengths.tolist(), strict=True)]

    def completion_rows(self) -> list[list[int]]:
        return [row[n:] for row, n in zip(self.rows(), self.prompt_lengths.tolist(), strict=True)]

    def select(self, index: Tensor) -> Sequences:
        """The rows named by ``index`` ([n] int64), in that order."""
        return Sequences(
            tokens=select_rows(self.tokens, self.lengths, index),
            lengths=take(self.lengths, index),
            prompt_lengths=take(self.prompt_lengths, index),
        )

    @staticmethod
    def concat(parts: Sequence[Sequences]) -> Sequences:
        return Sequences(
            tokens=torch.cat([part.tokens for part in parts]),
            lengths=torch.cat([part.lengths for part in parts]),
            prompt_lengths=torch.cat([part.prompt_lengths for part in parts]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptBatch:
    """``P`` prompts of one driver step, tokenized.

    Rows 12 and 3 of the data in the first step of a run: ``prompts = [[5, 6], [7]]``, ``row_ids = [12, 3]``,
    ``positions = [0, 1]``, ``texts = ("Write a poem.", "Hi")``, ``columns = {"topic": ["verse", None]}``.
    """

    prompts: Tokens  # P rows
    row_ids: Tensor  # [P] int64, row of the data
    # [P] int64, number of each prompt among all prompts of the run: step * global_batch_size + its place in the step. A
    # row that comes again, even within a step, gets new samples by it. Of prompts in file order: the row.
    positions: Tensor
    texts: tuple[Text, ...]  # what the data file held: a string, or chat messages
    columns: dict[str, list[Any]]  # the data file's other columns, each of length P, for reward functions

    def __post_init__(self) -> None:
        rows = len(self.prompts)
        _require(self.row_ids.shape == (rows,), f"{rows} prompts but {self.row_ids.numel()} row ids")
        _require(self.positions.shape == (rows,), f"{rows} prompts but {self.positions.numel()} positions")
        _require(len(self.texts) == rows, f"{rows} prompts but {len(self.texts)} texts")
        for name, values in self.columns.items():
            _require(len(values) == rows, f"{rows} prompts but column {name!r} has {len(values)} values")

    def __len__(self) -> int:
        return len(self.prompts)

    def slice(self, start: int, stop: int) -> PromptBatch:
        rows = self.prompts.rows()[start:stop]
        return PromptBatch(
            prompts=Tokens.from_rows(rows),
            row_ids=self.row_ids[start:stop],
            positions=self.positions[start:stop],
            texts=self.texts[start:stop],
            columns={name: values[start:stop] for name, values in self.columns.items()},
        )

    def select(self, rows: Sequence[int]) -> PromptBatch:
        """These prompts, in that order."""
        index = torch.from_numpy(np.array(rows, dtype=np.int64))
        return PromptBatch(
            prompts=Tokens(
                tokens=select_rows(self.prompts.tokens, self.prompts.lengths, index),
                lengths=take(self.prompts.lengths, index),
            ),
            row_ids=take(self.row_ids, index),
            positions=take(self.positions, index),
            texts=tuple(self.texts[row] for row in rows),
            columns={name: [values[row] for row in rows] for name, values in self.columns.items()},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollouts:
    """``B`` sampled completions of ``P`` prompts. Row ``i`` answers prompt row ``prompt_index[i]``.

    Two completions of one prompt after three updates: ``prompt_index = [0, 0]``, ``sample_index = [0, 1]``,
    ``policy_version = [3, 3]``.
    """

    prompts: PromptBatch
    sequences: Sequences  # B rows
    prompt_index: Tensor  # [B] int64, row of ``prompts``
    sample_index: Tensor  # [B] int64, 0..K-1
    engine_logps: Tensor  # [sum completion tokens] float32, raw log-probs of the sampling engine; NaN where unknown
    policy_version: Tensor  # [B] int64, number of updates in the weights that sampled
    # How it went, for metrics:
    ended_s: Tensor | None = None  # [B] float32, seconds until the completion ended, by its engine; None: not measured
    engine: Tensor | None = None  # [B] int64, number of the engine that sampled it; None: there is one

    def __post_init__(self) -> None:
        rows = len(self.sequences)
        for name in ("prompt_index", "sample_index", "policy_version", "ended_s", "engine"):
            values = getattr(self, name)
            _require(values is None or values.shape == (rows,), f"{rows} completions but {name} has another length")
        total = int(self.sequences.completion_lengths.numpy().sum())
        _require(self.engine_logps.shape == (total,), f"{total} sampled tokens, {self.engine_logps.numel()} log-probs")

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredRollouts:
    """Rollouts with a score for each completion; NaN marks a missing score, which is never chosen nor rejected.

    The second completion has no EOS, and the penalty is 5: ``raw_scores = [1.5, 2.0]``, ``scores = [1.5, -3.0]``,
    ``contains_eos = [True, False]``.
    """

    rollouts: Rollouts
    raw_scores: Tensor  # [B] float32, as the scorer gave them
    scores: Tensor  # [B] float32, after the penalties for a missing EOS and for length
    contains_eos: Tensor  # [B] bool: whether it ended, by an EOS or by a stop string
    sources: dict[str, Tensor] = field(default_factory=dict)  # [B] float32 each, by the name of a source of rewards
    extra: dict[str, list[Any]] = field(default_factory=dict)  # columns that reward functions logged, B values each

    def __post_init__(self) -> None:
        for name in ("raw_scores", "scores", "contains_eos"):
            _require(
                getattr(self, name).shape == (len(self.rollouts),), f"{name} does not have one entry per completion"
            )

    def __len__(self) -> int:
        return len(self.rollouts)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """``N`` preference pairs, from a file or from rollouts. Row ``i`` of both sides answers the same prompt.

    Two pairs: ``chosen.rows() = [[5, 6, 9, 2], [7, 8, 2]]``, ``rejected.rows() = [[5, 6, 4], [7, 3, 2]]``.
    """

    chosen: Sequences
    rejected: Sequences

    def __post_init__(self) -> None:
        _require(len(self.chosen) == len(self.rejected), f"{len(self.chosen)} chosen, {len(self.rejected)} rejected")

    def __len__(self) -> int:
        return len(self.chosen)

    def digest(self) -> str:
        """Of the tokens of both sides: the same for the same pairs in the same order."""
        found = hashlib.sha256()
        for side in (self.chosen, self.rejected):
            for tensor in (side.lengths, side.prompt_lengths, side.tokens):
                found.update(tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def select(self, index: Tensor) -> Pairs:
        return Pairs(chosen=self.chosen.select(index), rejected=self.rejected.select(index))


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutPairs(Pairs):
    """Pairs of completions that were sampled: a prompt may have several, and a completion may be in several.

    Two pairs of one prompt that share the chosen completion: ``prompt_index = [0, 0]``, ``chosen_rows = [2, 2]``,
    ``rejected_rows = [0, 1]``.
    """

    prompt_index: Tensor  # [N] int64, row of the step's prompts
    chosen_rows: Tensor  # [N] int64, row of the step's rollouts: equal rows are one completion
    rejected_rows: Tensor  # [N] int64

    def __post_init__(self) -> None:
        Pairs.__post_init__(self)
        self._require_rows("prompt_index", "chosen_rows", "rejected_rows")

    def _require_rows(self, *names: str) -> None:
        for name in names:
            found = getattr(self, name).numel()
            _require(found == len(self), f"{len(self)} pairs but {name} has {found} entries")

    def select(self, index: Tensor) -> RolloutPairs:
        return RolloutPairs(
            chosen=self.chosen.select(index),
            rejected=self.rejected.select(index),
            prompt_index=take(self.prompt_index, index),
            chosen_rows=take(self.chosen_rows, index),
            rejected_rows=take(self.rejected_rows, index),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlinePairs(RolloutPairs):
    """The same with what an update needs besides: how far apart the sides are, and how they were sampled.

    Two pairs of the prompts of rows 12 and 3: ``row_ids = [12, 3]``, ``margin = [4.5, 0.2]``,
    ``policy_version = [3, 3]``, ``weight = [1, 1]``; two of one prompt: ``weight = [0.5, 0.5]``.
    """

    row_ids: Tensor  # [N] int64
    margin: Tensor  # [N] float32, > 0: score(chosen) - score(rejected), or what a judge's verdict says
    policy_version: Tensor  # [N] int64, number of updates in the weights that sampled
    chosen_engine_logps: Tensor  # [sum chosen completion tokens] float32
    rejected_engine_logps: Tensor  # [sum rejected completion tokens] float32
    weight: Tensor  # [N] float32, share in the loss; the weights of a prompt sum to 1

    def __post_init__(self) -> None:
        RolloutPairs.__post_init__(self)
        self._require_rows("row_ids", "margin", "policy_version", "weight")

    def all_engine_logps(self) -> Tensor:
        """[sum completion tokens] float32: the chosen sides, then the rejected."""
        return torch.cat([self.chosen_engine_logps, self.rejected_engine_logps])

    def select(self, index: Tensor) -> OnlinePairs:
        chosen, rejected = (
            select_rows(logps, side.completion_lengths, index)
            for side, logps in ((self.chosen, self.chosen_engine_logps), (self.rejected, self.rejected_engine_logps))
        )
        plain = RolloutPairs.select(self, index)
        return OnlinePairs(
            chosen=plain.chosen,
            rejected=plain.rejected,
            prompt_index=plain.prompt_index,
            chosen_rows=plain.chosen_rows,
            rejected_rows=plain.rejected_rows,
            row_ids=take(self.row_ids, index),
            margin=take(self.margin, index),
            policy_version=take(self.policy_version, index),
            chosen_engine_logps=chosen,
            rejected_engine_logps=rejected,
            weight=take(self.weight, index),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardPairs(Pairs):
    """Pairs that a reward model is trained on; a side's last token is the one that ends its answer.

    Two pairs, and the data rates only the first: ``margin = [1.0, 0.0]``.
    """

    margin: Tensor  # [N] float32, how much better chosen is by the data; 0 if the data do not say

    def __post_init__(self) -> None:
        Pairs.__post_init__(self)
        _require(self.margin.shape == (len(self),), f"{len(self)} pairs but {self.margin.numel()} margins")

    def select(self, index: Tensor) -> RewardPairs:
        return RewardPairs(
            chosen=self.chosen.select(index), rejected=self.rejected.select(index), margin=self.margin[index]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """``N`` sequences of supervised fine-tuning; ``prompt_lengths`` end before the first token that the loss counts.

    Rows of 3 and 2 completion tokens, the second token of the first row being the user's:
    ``counted = [True, False, True, True, True]``.
    """

    sequences: Sequences
    counted: Tensor  # [sum completion tokens] bool; False: a later turn of the user, or padding of a template

    def __post_init__(self) -> None:
        total = int(self.sequences.completion_lengths.sum())
        _require(self.counted.shape == (total,), f"{total} completion tokens but {self.counted.numel()} marks")

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_counted(self) -> Tensor:
        """[N] int64 tokens of each sequence that the loss counts."""
        parts = torch.split(self.counted, self.sequences.completion_lengths.tolist())
        return torch.stack([part.sum() for part in parts])

    def select(self, index: Tensor) -> Examples:
        counted = select_rows(self.counted, self.sequences.completion_lengths, index)
        return Examples(sequences=self.sequences.select(index), counted=counted)


@dataclass(frozen=True, kw_only=True, slots=True)
class PairValues:
    """One number for each side of ``N`` pairs: log-probabilities summed over the completion tokens, in nats; for a
    reward model its scores.

    Two pairs: ``chosen = [-4.1, -2.0]``, ``rejected = [-6.3, -1.5]``.
    """

    chosen: Tensor  # [N] float32
    rejected: Tensor  # [N] float32

    def __len__(self) -> int:
        return self.chosen.numel()

    def select(self, index: Tensor) -> PairValues:
        return PairValues(chosen=self.chosen[index], rejected=self.rejected[index])

    def to(self, device: torch.device) -> PairValues:
        return PairValues(chosen=to_device(self.chosen, device), rejected=to_device(self.rejected, device))


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferenceRecord:
    """What the reference said of a step, as far as it is recorded for people."""

    tokens: Tensor | None = None  # [sum completion tokens] float32 of the shown pairs, chosen sides first
    pairs: PairValues | None = None  # [N] sums over the completions of the step's pairs; None: weighted, or not known


@dataclass(frozen=True, kw_only=True, slots=True)
class ReferencedPairs:
    """Pairs with the log-probabilities that the frozen reference gives them: what one update needs."""

    pairs: Pairs
    reference: PairValues
    beta: float | None = None  # of the step that they are trained in; None: not known yet

    def __post_init__(self) -> None:
        _require(
            len(self.pairs) == len(self.reference), f"{len(self.pairs)} pairs, {len(self.reference)} reference rows"
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def select(self, index: Tensor) -> ReferencedPairs:
        return replace(self, pairs=self.pairs.select(index), reference=self.reference.select(index))


Batch = ReferencedPairs | Examples | RewardPairs
"""What one driver step trains on, by stage."""

Metrics = dict[str, float]
"""One step's metrics: the names of the table in docs/metrics.md."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparisons:
    """Judged pairs of completions, each pair of one prompt and there once.

    A judge prefers row 1 to row 0, and has no verdict on rows 2 and 3: ``first = [0, 2]``, ``second = [1, 3]``,
    ``probability = [0.1, NaN]``.
    """

    first: Tensor  # [M] int64, rows of the rollouts
    second: Tensor  # [M] int64
    probability: Tensor  # [M] float32 that ``first`` is better, in [0, 1]; 0.5 is a tie, NaN no verdict

    def __post_init__(self) -> None:
        found = (self.first.numel(), self.second.numel(), self.probability.numel())
        _require(len(set(found)) == 1, f"{found[0]} first, {found[1]} second, {found[2]} probabilities")
        outside = (self.probability < 0) | (self.probability > 1)  # false for NaN
        _require(not bool(outside.any()), "a probability is not in [0, 1]")

    def __len__(self) -> int:
        return self.first.numel()
