"""Win rates with confidence intervals, also at equal lengths. Swapping the models gives one minus each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_RIDGE = 0.01  # of the logistic regression: a normal prior of variance 100 on both coefficients
_NEWTON_STEPS = 50


@dataclass(frozen=True, slots=True)
class Interval:
    """The bounds between which a win rate lies at the chosen confidence."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often the first model wins; ties count half."""

    wins: int
    ties: int
    losses: int
    rate: float
    wilson: Interval
    bootstrap: Interval
    length_controlled: float  # at equal lengths
    length_controlled_bootstrap: Interval

    @property
    def compared(self) -> int:
        return self.wins + self.ties + self.losses


def win_rate(
    scores: Floats,
    others: Floats,
    lengths: Floats,
    other_lengths: Floats,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 1,
) -> WinRate:
    """How often ``scores`` are above ``others``, prompt by prompt.

    Args:
        scores: [prompts] of the first model; NaN: none, the prompt does not count.
        others: [prompts] of the second one.
        lengths: [prompts] of the first model's completions, in any unit.
        other_lengths: [prompts] of the second one's.
        confidence: share of repetitions in which the interval holds the true rate, above 0 and below 1.
        resamples: of the prompts, for the bootstrap.
        seed: of the resampling.

    Raises:
        ValueError: no prompt has two scores.
    """
    known = np.isfinite(scores) & np.isfinite(others)
    if not known.any():
        raise ValueError("no prompt has a score for both models, or a verdict of the judge")
    outcomes = np.where(scores == others, 0.5, (scores > others).astype(np.float64))[known]
    differences = length_term(lengths[known] - other_lengths[known])
    wins, ties = int((outcomes == 1).sum()), int((outcomes == 0.5).sum())
    count = len(outcomes)
    rate = _symmetric(2 * wins + ties, 2 * count)
    index = np.random.default_rng(seed).integers(0, count, (resamples, count))
    drawn = outcomes[index]
    return WinRate(
        wins=wins,
        ties=ties,
        losses=count - wins - ties,
        rate=rate,
        wilson=wilson(rate, count, confidence),
        bootstrap=_percentiles(drawn.mean(axis=1), confidence),
        length_controlled=float(at_equal_lengths(outcomes[None], differences[None])[0]),
        length_controlled_bootstrap=_percentiles(at_equal_lengths(drawn, differences[index]), confidence),
    )


def _symmetric(part: int, whole: int) -> float:
    """``part / whole`` as a float that is exactly one minus the float of ``(whole - part) / whole``."""
    larger = 1 - min(part, whole - part) / whole  # a multiple of 2^-53, as is one minus it: both are floats
    return larger if 2 * part > whole else 1 - larger


def wilson(rate: float, count: int, confidence: float) -> Interval:
    """Wilson's score interval of a rate over ``count`` independent prompts (Wilson 1927).

    Ties make the outcomes vary less than wins and losses would, so with ties it is wider than it need be.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    spread = z * math.sqrt(rate * (1 - rate) / count + z**2 / (4 * count**2))
    middle, scale = rate + z**2 / (2 * count), 1 + z**2 / count
    return Interval(max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale))


def length_term(differences: Floats) -> Floats:
    """tanh of the differences over their standard deviation, as AlpacaEval 2 has it; 0 where all are equal."""
    deviation = differences.std()
    if not deviation:  # all equal: their effect cannot be told from that of the models
        return np.zeros_like(differences)
    return np.asarray(np.tanh(differences / deviation))


def at_equal_lengths(outcomes: Floats, differences: Floats) -> Floats:
    """[R] win rates at equal lengths, each fitted to a row of outcomes.

    Logistic regression of an outcome on the difference of the two lengths, ``P(win) = sigmoid(theta + phi * d)``, read
    at ``d = 0``: AlpacaEval 2's length control (Dubois et al. 2024) without its term for the instruction, which
    needs the answers of many models. A weak ridge keeps the coefficients finite where one model always wins.

    Args:
        outcomes: [R, prompts] 1 for a win, 0.5 for a tie, 0 for a loss.
        differences: [R, prompts] of ``length_term``.
    """
    theta, phi = np.zeros(len(outcomes)), np.zeros(len(outcomes))
    for _ in range(_NEWTON_STEPS):
        chance = _sigmoid(theta[:, None] + phi[:, None] * differences)
        error, weight = outcomes - chance, chance * (1 - chance)
        slope = np.stack([error.sum(1) - _RIDGE * theta, (error * differences).sum(1) - _RIDGE * phi], axis=-1)
        crossed = (weight * differences).sum(1)
        first, last = weight.sum(1) + _RIDGE, (weight * differences**2).sum(1) + _RIDGE
        curvature = np.stack([np.stack([first, crossed], -1), np.stack([crossed, last], -1)], axis=-2)
        step = np.linalg.solve(curvature, slope[..., None])[..., 0].clip(-2, 2)  # a whole one may overshoot at first
        theta, phi = theta + step[:, 0], phi + step[:, 1]
        if np.abs(step).max() < 1e-12:
            break
    return _sigmoid(theta)


def _sigmoid(values: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(values / 2)))


def _percentiles(values: Floats, confidence: float) -> Interval:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
