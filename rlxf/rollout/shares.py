"""One batch of prompts over several engines, their results as one, and the results of some of its prompts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from rlxf.core.errors import ShapeError
from rlxf.core.types import PromptBatch, Rollouts, Sequences, select_rows


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
    joined = Rollouts(
        prompts=prompts,
        sequences=Sequences.concat([part.sequences for part in parts]),
        prompt_index=_places(prompts, parts),
        sample_index=torch.cat([part.sample_index for part in parts]),
        engine_logps=torch.cat([part.engine_logps for part in parts]),
        policy_version=torch.cat([part.policy_version for part in parts]),
        ended_s=_of_all([part.ended_s for part in parts]),
        engine=_of_all([part.engine for part in parts]),
    )
    return _rows_of(joined, _by_prompt(joined.prompt_index, joined.sample_index))


def part_of(rollouts: Rollouts, rows: Sequence[int]) -> Rollouts:
    """The completions of some prompts of a step, as if nothing else had been sampled.

    Args:
        rollouts: of the whole step.
        rows: of ``rollouts.prompts``, each at most once; they become prompts 0, 1, ... of the result.
    """
    place = torch.full((len(rollouts.prompts),), -1)
    place[torch.tensor(rows, dtype=torch.int64)] = torch.arange(len(rows))
    new_index = place[rollouts.prompt_index]  # [B]
    kept = (new_index >= 0).nonzero()[:, 0]
    kept = kept[_by_prompt(new_index[kept], rollouts.sample_index[kept])]
    found = _rows_of(rollouts, kept)
    return replace(found, prompts=rollouts.prompts.select(rows), prompt_index=new_index[kept])


def _places(prompts: PromptBatch, parts: Sequence[Rollouts]) -> Tensor:
    """[B] row of ``prompts`` that each completion of the parts, one after the other, answers."""
    given = torch.cat([part.prompts.positions for part in parts])
    known, order = prompts.positions.sort()
    if not torch.equal(given.sort().values, known) or not bool((known.diff() > 0).all()):
        raise ShapeError(
            f"expected the completions of {len(prompts)} prompts at positions of their own, each prompt from one "
            f"engine; got those of {len(given)} prompts at {len(set(given.tolist()) & set(known.tolist()))} of "
            f"{len(set(known.tolist()))} positions"
        )
    row_of = order[torch.searchsorted(known, given)]  # of each prompt of the parts
    first = 0
    answered = []
    for part in parts:
        answered.append(row_of[first + part.prompt_index])
        first += len(part.prompts)
    return torch.cat(answered)


def _of_all(values: Sequence[Tensor | None]) -> Tensor | None:
    found = [each for each in values if each is not None]
    return torch.cat(found) if len(found) == len(values) else None


def _by_prompt(prompt_index: Tensor, sample_index: Tensor) -> Tensor:
    """[B] the order of completions by prompt, those of a prompt by sample."""
    by_sample = sample_index.argsort(stable=True)
    return by_sample[prompt_index[by_sample].argsort(stable=True)]


def _rows_of(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    """These completions ([n] int64), in that order, with all prompts."""
    if torch.equal(rows, torch.arange(len(rollouts))):
        return rollouts
    sequences = rollouts.sequences
    return replace(
        rollouts,
        sequences=sequences.select(rows),
        prompt_index=rollouts.prompt_index[rows],
        sample_index=rollouts.sample_index[rows],
        engine_logps=select_rows(rollouts.engine_logps, sequences.completion_lengths, rows),
        policy_version=rollouts.policy_version[rows],
        ended_s=None if rollouts.ended_s is None else rollouts.ended_s[rows],
        engine=None if rollouts.engine is None else rollouts.engine[rows],
    )
