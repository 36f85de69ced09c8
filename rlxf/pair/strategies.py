"""From scored or judged completions to preference pairs. Pure functions: no device, no model.

Each strategy chooses among the candidates; what follows is the same for all: a pair stays if its margin is large enough
and its lengths are near enough, at most so many of a prompt, and each prompt's weights sum to 1.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from rlxf.core.errors import ShapeError
from rlxf.core.tensors import join_slices, take
from rlxf.core.types import Comparisons, OnlinePairs, PairingResult, Rollouts, ScoredRollouts, Sequences, select_rows
from rlxf.pair.candidates import Candidates, Extremes, Verdicts, extremes, scored_pairs, verdicts_of
from rlxf.pair.judged import best_against_worst
from rlxf.pair.pairing import PairingSettings


def best_worst(
    scored: ScoredRollouts, settings: PairingSettings, comparisons: Comparisons | None = None
) -> PairingResult:
    """Best against worst completion of each prompt.

    Among equal scores the smallest sample index counts. ``rlxf/pair/judged.py`` says what best and worst are by a
    judge's verdicts.
    """
    if comparisons is not None:
        verdicts = verdicts_of(scored.rollouts, comparisons)
        return _judged(scored, settings, verdicts, best_against_worst(scored.rollouts, verdicts))
    found = extremes(scored)
    return _scored(scored, settings, found, found.candidates())


def all_pairs(
    scored: ScoredRollouts, settings: PairingSettings, comparisons: Comparisons | None = None
) -> PairingResult:
    """Every two completions of a prompt, the better one chosen; with a judge every two that it compared."""
    if comparisons is not None:
        verdicts = verdicts_of(scored.rollouts, comparisons)
        return _judged(scored, settings, verdicts, verdicts.candidates())
    return _scored(scored, settings, extremes(scored), scored_pairs(scored))


def random_pair(
    scored: ScoredRollouts, settings: PairingSettings, comparisons: Comparisons | None = None
) -> PairingResult:
    """One of the pairs that ``all_pairs`` would keep of each prompt, each as likely as the others.

    Which one depends on the seed, the step, the prompt's position in the run and the sample indices only.
    """
    if comparisons is not None:
        verdicts = verdicts_of(scored.rollouts, comparisons)
        return _judged(scored, settings, verdicts, verdicts.candidates(), draw=True)
    return _scored(scored, settings, extremes(scored), scored_pairs(scored), draw=True)


def threshold_pairs(
    scored: ScoredRollouts, settings: PairingSettings, comparisons: Comparisons | None = None
) -> PairingResult:
    """Every completion with a score above the threshold against every one of the prompt with a score not above it."""
    if comparisons is not None or settings.threshold is None:
        raise ShapeError("pairing by a threshold needs scores and settings.threshold")  # the recipe's check comes first
    found = scored_pairs(scored)
    above, below = scored.scores[found.chosen] > settings.threshold, scored.scores[found.rejected] <= settings.threshold
    return _scored(scored, settings, extremes(scored), found.where(above & below))


def _scored(
    scored: ScoredRollouts, settings: PairingSettings, found: Extremes, candidates: Candidates, *, draw: bool = False
) -> PairingResult:
    ties, missing, num_prompts = found.num_ties, found.num_missing, len(scored.rollouts.prompts)
    return _result(scored, settings, candidates, ties=ties, missing=missing, num_asked=num_prompts, draw=draw)


def _judged(
    scored: ScoredRollouts, settings: PairingSettings, verdicts: Verdicts, candidates: Candidates, *, draw: bool = False
) -> PairingResult:
    ties, missing = int((verdicts.margin == 0).sum()), int(verdicts.margin.isnan().sum())
    return _result(scored, settings, candidates, ties=ties, missing=missing, num_asked=len(verdicts.low), draw=draw)


def _result(
    scored: ScoredRollouts,
    settings: PairingSettings,
    candidates: Candidates,
    *,
    ties: int,
    missing: int,
    num_asked: int,
    draw: bool,
) -> PairingResult:
    rollouts, num_prompts = scored.rollouts, len(scored.rollouts.prompts)
    wide = candidates.margin.numpy() > np.float32(settings.min_score_margin)  # false for NaN
    kept = candidates.where(torch.from_numpy(wide))
    too_different = None
    if settings.max_length_ratio is not None:
        before, kept = len(kept), _near_lengths(rollouts, kept, settings.max_length_ratio)
        too_different = before - len(kept)
    if draw:
        kept = _drawn(rollouts, kept, settings)
    if settings.max_pairs_per_prompt is not None:
        kept = _widest(rollouts, kept, settings.max_pairs_per_prompt)
    pairs = _pairs(rollouts, kept)
    return PairingResult(
        pairs=pairs,
        dropped=num_prompts - len(set(pairs.prompt_index.tolist())),
        ties=ties,
        missing=missing,
        num_asked=num_asked,
        num_prompts=num_prompts,
        too_different=too_different,
    )


def _near_lengths(rollouts: Rollouts, candidates: Candidates, ratio: float) -> Candidates:
    lengths = rollouts.sequences.completion_lengths.double()
    chosen, rejected = lengths[candidates.chosen], lengths[candidates.rejected]
    return candidates.where(torch.maximum(chosen, rejected) <= ratio * torch.minimum(chosen, rejected))


def _widest(rollouts: Rollouts, candidates: Candidates, limit: int) -> Candidates:
    """Of each prompt the pairs with the largest margins; of equal ones those of the smallest sample indices."""
    prompt, sample = rollouts.prompt_index[candidates.chosen], rollouts.sample_index
    keys = (sample[candidates.rejected], sample[candidates.chosen], -candidates.margin, prompt)  # the last counts most
    order = torch.from_numpy(np.lexsort([key.numpy() for key in keys]))
    counts = prompt.bincount(minlength=len(rollouts.prompts))
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[prompt[order]]  # in its prompt
    return candidates.where(order[place < limit].sort().values)


def _drawn(rollouts: Rollouts, candidates: Candidates, settings: PairingSettings) -> Candidates:
    """One pair of each prompt: the one with the smallest hash, so that no generator's order matters."""
    positions = rollouts.prompts.positions[rollouts.prompt_index[candidates.chosen]].tolist()
    samples = torch.stack([rollouts.sample_index[side] for side in (candidates.chosen, candidates.rejected)], dim=1)
    prompts = rollouts.prompt_index[candidates.chosen].tolist()
    least: dict[int, tuple[bytes, int]] = {}
    for place, (prompt, position, pair) in enumerate(zip(prompts, positions, samples.tolist(), strict=True)):
        key = f"{settings.seed} {settings.step} {position} {min(pair)} {max(pair)}".encode()
        drawn = (hashlib.blake2b(key, digest_size=16).digest(), place)
        least[prompt] = min(drawn, least.get(prompt, drawn))
    return candidates.where(torch.tensor(sorted(place for _, place in least.values()), dtype=torch.int64))


def _pairs(rollouts: Rollouts, kept: Candidates) -> OnlinePairs:
    chosen_rows, rejected_rows = kept.chosen, kept.rejected
    chosen, rejected = rollouts.sequences.select(chosen_rows), rollouts.sequences.select(rejected_rows)
    if not _same_prompts(chosen, rejected):
        raise ShapeError("two completions of one prompt row do not start with the same prompt tokens")
    lengths = rollouts.sequences.completion_lengths
    prompt_index = take(rollouts.prompt_index, chosen_rows)
    prompts = prompt_index.numpy()
    counts = np.bincount(prompts, minlength=len(rollouts.prompts)).astype(np.float32)  # pairs of each prompt
    versions = np.minimum(*(take(rollouts.policy_version, rows).numpy() for rows in (chosen_rows, rejected_rows)))
    return OnlinePairs(
        chosen=chosen,
        rejected=rejected,
        row_ids=take(rollouts.prompts.row_ids, prompt_index),
        margin=kept.margin,
        policy_version=torch.from_numpy(versions),
        chosen_engine_logps=select_rows(rollouts.engine_logps, lengths, chosen_rows),
        rejected_engine_logps=select_rows(rollouts.engine_logps, lengths, rejected_rows),
        prompt_index=prompt_index,
        chosen_rows=chosen_rows,
        rejected_rows=rejected_rows,
        weight=torch.from_numpy(1 / counts[prompts]),
    )


def _same_prompts(one: Sequences, other: Sequences) -> bool:
    return torch.equal(one.prompt_lengths, other.prompt_lengths) and torch.equal(
        _prompt_tokens(one), _prompt_tokens(other)
    )


def _prompt_tokens(sequences: Sequences) -> Tensor:
    """[sum of prompt_lengths] int32."""
    lengths = sequences.lengths.numpy()
    begins = lengths.cumsum() - lengths
    return join_slices(sequences.tokens, begins, begins + sequences.prompt_lengths.numpy())
