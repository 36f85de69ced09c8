"""From scored or judged completions to preference pairs. Pure functions: no device, no model.

Each strategy chooses among the candidates; what follows is the same for all: a pair stays if its margin is large enough
and its lengths are near enough, at most so many of a prompt, and each prompt's weights sum to 1.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from rlxf.core.errors import ShapeError
from rlxf.core.pairs import PairedRows, PairingResult
from rlxf.core.types import Comparisons, ScoredRollouts
from rlxf.pair.candidates import Extremes, Verdicts, extremes, scored_pairs, verdicts_of
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
    return _scored(scored, settings, found, found.candidates(scored.rollouts))


def all_pairs(
    scored: ScoredRollouts, settings: PairingSettings, comparisons: Comparisons | None = None
) -> PairingResult:
    """Every two completions of a prompt, the better one chosen; with a judge every two that it compared."""
    if comparisons is not None:
        verdicts = verdicts_of(scored.rollouts, comparisons)
        return _judged(scored, settings, verdicts, verdicts.candidates(scored.rollouts))
    return _scored(scored, settings, extremes(scored), scored_pairs(scored))


def random_pair(
    scored: ScoredRollouts, settings: PairingSettings, comparisons: Comparisons | None = None
) -> PairingResult:
    """One of the pairs that ``all_pairs`` would keep of each prompt, each as likely as the others.

    Which one depends on the seed, the step, the prompt's position in the run and the sample indices only.
    """
    if comparisons is not None:
        verdicts = verdicts_of(scored.rollouts, comparisons)
        return _judged(scored, settings, verdicts, verdicts.candidates(scored.rollouts), draw=True)
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
    scored: ScoredRollouts, settings: PairingSettings, found: Extremes, candidates: PairedRows, *, draw: bool = False
) -> PairingResult:
    ties, missing, num_prompts = found.num_ties, found.num_missing, len(scored.rollouts.prompts)
    return _result(scored, settings, candidates, ties=ties, missing=missing, num_asked=num_prompts, draw=draw)


def _judged(
    scored: ScoredRollouts, settings: PairingSettings, verdicts: Verdicts, candidates: PairedRows, *, draw: bool = False
) -> PairingResult:
    ties, missing = int((verdicts.margin == 0).sum()), int(verdicts.margin.isnan().sum())
    return _result(scored, settings, candidates, ties=ties, missing=missing, num_asked=len(verdicts.low), draw=draw)


def _result(
    scored: ScoredRollouts,
    settings: PairingSettings,
    candidates: PairedRows,
    *,
    ties: int,
    missing: int,
    num_asked: int,
    draw: bool,
) -> PairingResult:
    wide = candidates.margin.numpy() > np.float32(settings.min_score_margin)  # false for NaN
    kept = candidates.where(torch.from_numpy(wide))
    too_different = None
    if settings.max_length_ratio is not None:
        before, kept = len(kept), _near_lengths(kept, settings.max_length_ratio)
        too_different = before - len(kept)
    if draw:
        kept = _drawn(kept, settings)
    if settings.max_pairs_per_prompt is not None:
        kept = _widest(kept, settings.max_pairs_per_prompt)
    return PairingResult(rows=kept, ties=ties, missing=missing, num_asked=num_asked, too_different=too_different)


def _near_lengths(candidates: PairedRows, ratio: float) -> PairedRows:
    lengths = candidates.rollouts.sequences.completion_lengths.double()
    chosen, rejected = lengths[candidates.chosen], lengths[candidates.rejected]
    return candidates.where(torch.maximum(chosen, rejected) <= ratio * torch.minimum(chosen, rejected))


def _widest(candidates: PairedRows, limit: int) -> PairedRows:
    """Of each prompt the pairs with the largest margins; of equal ones those of the smallest sample indices."""
    prompt, sample = candidates.prompt_index, candidates.rollouts.sample_index
    keys = (sample[candidates.rejected], sample[candidates.chosen], -candidates.margin, prompt)  # the last counts most
    order = torch.from_numpy(np.lexsort([key.numpy() for key in keys]))
    counts = prompt.bincount(minlength=len(candidates.rollouts.prompts))
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[prompt[order]]  # in its prompt
    return candidates.where(order[place < limit].sort().values)


def _drawn(candidates: PairedRows, settings: PairingSettings) -> PairedRows:
    """One pair of each prompt: the one with the smallest hash, so that no generator's order matters."""
    rollouts, prompt_index = candidates.rollouts, candidates.prompt_index
    positions = rollouts.prompts.positions[prompt_index].tolist()
    samples = torch.stack([rollouts.sample_index[side] for side in (candidates.chosen, candidates.rejected)], dim=1)
    prompts = prompt_index.tolist()
    least: dict[int, tuple[bytes, int]] = {}
    for place, (prompt, position, pair) in enumerate(zip(prompts, positions, samples.tolist(), strict=True)):
        key = f"{settings.seed} {settings.step} {position} {min(pair)} {max(pair)}".encode()
        drawn = (hashlib.blake2b(key, digest_size=16).digest(), place)
        least[prompt] = min(drawn, least.get(prompt, drawn))
    return candidates.where(torch.tensor(sorted(place for _, place in least.values()), dtype=torch.int64))
