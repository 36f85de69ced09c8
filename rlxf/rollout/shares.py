"""One batch of prompts over several engines, their results as one, and the results of some of its prompts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlxf.core.errors import ShapeError
from rlxf.core.tensors import take
from rlxf.core.types import PromptBatch, Rollouts, Sequences, Tokens, select_rows


def split_evenly(prompts: PromptBatch, parts: int) -> list[PromptBatch]:
    """Contiguous shares whose sizes differ by at most one; fewer than ``parts`` when there are fewer prompts."""
    count = min(parts, len(prompts))
    bounds = [len(prompts) * i // count for i in range(count + 1)]
    return [prompts.slice(start, stop) for start, stop in pairwise(bounds)]


def join(prompts: PromptBatch, parts: Sequence[Rollouts]) -> Rollouts:
    """The rollouts of ``prompts``: those of the first prompt, then those of the second, each in the order of samples.

    ``ended_s`` and ``engine`` are kept if all parts have them.

    Args:
        prompts: no two of them have the same position.
        parts: hold each prompt once, in any order; a prompt is known by its position.

    Raises:
        ShapeError: a prompt is missing, there twice, or none of ``prompts``; or two have the same position.
    """
    joined = _joined(prompts, _places(prompts, parts), parts)
    return _rows_of(joined, torch.from_numpy(np.lexsort((joined.sample_index.numpy(), joined.prompt_index.numpy()))))


def one_after_the_other(parts: Sequence[Rollouts]) -> Rollouts:
    """The prompts of several rollouts, part by part, and their completions, in the order that they have there."""
    batches = [part.prompts for part in parts]
    prompts = PromptBatch(
        prompts=Tokens(
            tokens=torch.cat([batch.prompts.tokens for batch in batches]),
            lengths=torch.cat([batch.prompts.lengths for batch in batches]),
        ),
        row_ids=torch.cat([batch.row_ids for batch in batches]),
        positions=torch.cat([batch.positions for batch in batches]),
        texts=tuple(text for batch in batches for text in batch.texts),
        columns={name: [value for batch in batches for value in batch.columns[name]] for name in batches[0].columns},
    )
    return _joined(prompts, torch.from_numpy(_answered(parts)), parts)


def _joined(prompts: PromptBatch, prompt_index: Tensor, parts: Sequence[Rollouts]) -> Rollouts:
    return Rollouts(
        prompts=prompts,
        sequences=Sequences.concat([part.sequences for part in parts]),
        prompt_index=prompt_index,
        sample_index=torch.cat([part.sample_index for part in parts]),
        engine_logps=torch.cat([part.engine_logps for part in parts]),
        policy_version=torch.cat([part.policy_version for part in parts]),
        ended_s=_of_all([part.ended_s for part in parts]),
        engine=_of_all([part.engine for part in parts]),
    )


def part_of(rollouts: Rollouts, rows: Sequence[int]) -> Rollouts:
    """The completions of some prompts of a step, as if nothing else had been sampled.

    Args:
        rollouts: of the whole step.
        rows: of ``rollouts.prompts``, each at most once; they become prompts 0, 1, ... of the result.
    """
    place = np.full(len(rollouts.prompts), -1)
    place[np.array(rows, dtype=np.int64)] = np.arange(len(rows))
    new_index = place[rollouts.prompt_index.numpy()]  # [B]
    kept = np.flatnonzero(new_index >= 0)
    kept = kept[np.lexsort((rollouts.sample_index.numpy()[kept], new_index[kept]))]
    found = _rows_of(rollouts, torch.from_numpy(kept))
    prompts = rollouts.prompts.select(rows)
    return replace(found, prompts=prompts, prompt_index=torch.from_numpy(new_index[kept]))


def _places(prompts: PromptBatch, parts: Sequence[Rollouts]) -> Tensor:
    """[B] row of ``prompts`` that each completion of the parts, one after the other, answers."""
    given, wanted = np.concatenate([part.prompts.positions.numpy() for part in parts]), prompts.positions.numpy()
    order = wanted.argsort(kind="stable")
    known = wanted[order]
    if not np.array_equal(np.sort(given), known) or not (np.diff(known) > 0).all():
        raise ShapeError(
            f"expected the completions of {len(prompts)} prompts at positions of their own, each prompt from one "
            f"engine; got those of {len(given)} prompts at {len(set(given.tolist()) & set(known.tolist()))} of "
            f"{len(set(known.tolist()))} positions"
        )
    row_of = order[np.searchsorted(known, given)]  # of each prompt of the parts
    return torch.from_numpy(row_of[_answered(parts)])


def _answered(parts: Sequence[Rollouts]) -> NDArray[np.int64]:
    """[B]: of each completion of the parts its prompt, as a row of the prompts of all parts."""
    before = np.cumsum([0, *(len(part.prompts) for part in parts)])[:-1]  # prompts in the parts before each one
    return np.concatenate([first + part.prompt_index.numpy() for first, part in zip(before, parts, strict=True)])


def _of_all(values: Sequence[Tensor | None]) -> Tensor | None:
    found = [each for each in values if each is not None]
    return torch.cat(found) if len(found) == len(values) else None


def _rows_of(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    """These completions ([n] int64), in that order, with all prompts."""
    if np.array_equal(rows.numpy(), np.arange(len(rollouts))):
        return rollouts
    sequences = rollouts.sequences
    return replace(
        rollouts,
        sequences=sequences.select(rows),
        prompt_index=take(rollouts.prompt_index, rows),
        sample_index=take(rollouts.sample_index, rows),
        engine_logps=select_rows(rollouts.engine_logps, sequences.completion_lengths, rows),
        policy_version=take(rollouts.policy_version, rows),
        ended_s=None if rollouts.ended_s is None else take(rollouts.ended_s, rows),
        engine=None if rollouts.engine is None else take(rollouts.engine, rows),
    )
