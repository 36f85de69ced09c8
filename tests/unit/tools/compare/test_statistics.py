"""Win rates: ties, intervals, equal lengths, and what swapping the two models does."""

from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.tools.compare.statistics import Floats, WinRate, at_equal_lengths, length_term, wilson, win_rate

SCORES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 90), st.integers(1, 90)), min_size=1)


def rate(
    scores: Floats, others: Floats, lengths: Floats | None = None, others_lengths: Floats | None = None
) -> WinRate:
    ones = np.ones(len(scores))
    mine, theirs = ones if lengths is None else lengths, ones if others_lengths is None else others_lengths
    return win_rate(scores, others, mine, theirs, resamples=200)


@settings(max_examples=200, deadline=None)
@given(SCORES)
def test_swapping_the_models_gives_one_minus_everything(rows: list[tuple[int, int, int, int]]) -> None:
    a, b, length, other = np.array(rows, dtype=np.float64).T
    one, two = rate(a, b, length, other), rate(b, a, other, length)
    assert one.rate == 1 - two.rate  # exactly
    assert two.rate == 1 - one.rate
    assert (one.wins, one.ties, one.losses) == (two.losses, two.ties, two.wins)
    for mine, theirs in ((one.wilson, two.wilson), (one.bootstrap, two.bootstrap)):
        assert mine.low == pytest.approx(1 - theirs.high, abs=1e-12)
        assert mine.high == pytest.approx(1 - theirs.low, abs=1e-12)
    assert one.length_controlled == pytest.approx(1 - two.length_controlled, abs=1e-9)


def test_the_same_scores_are_half() -> None:
    found = rate(np.arange(5.0), np.arange(5.0))
    assert (found.rate, found.length_controlled, found.ties) == (0.5, 0.5, 5)
    assert astuple(found.bootstrap) == (0.5, 0.5)


def test_ties_win_half_and_missing_scores_do_not_count() -> None:
    found = rate(np.array([2.0, 1, 1, math.nan, 5]), np.array([1.0, 1, 2, 0, math.nan]))
    assert (found.wins, found.ties, found.losses, found.compared, found.rate) == (1, 1, 1, 3, 0.5)
    with pytest.raises(ValueError, match="no prompt has a score for both models"):
        rate(np.array([math.nan]), np.array([1.0]))


@pytest.mark.parametrize(
    ("wins", "count", "confidence", "low", "high"),
    [
        (8, 10, 0.95, 0.490162, 0.943318),  # by hand from the formula, z = 1.959964
        (0, 10, 0.95, 0.0, 0.277533),  # z^2 / (n + z^2)
        (10, 10, 0.95, 0.722467, 1.0),
        (50, 100, 0.9, 0.418848, 0.581152),  # 0.5 -+ z / 2 sqrt(n + z^2), z = 1.644854
    ],
)
def test_wilsons_interval(wins: int, count: int, confidence: float, low: float, high: float) -> None:
    found = wilson(wins / count, count, confidence)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


def test_the_intervals_hold_the_true_rate_about_as_often_as_they_say() -> None:
    draw = np.random.default_rng(3)
    held = {"wilson": 0, "bootstrap": 0}
    for _ in range(300):
        found = rate((draw.random(80) < 0.7).astype(np.float64), np.full(80, 0.5))
        held["wilson"] += found.wilson.low <= 0.7 <= found.wilson.high
        held["bootstrap"] += found.bootstrap.low <= 0.7 <= found.bootstrap.high
    assert min(held.values()) >= 0.91 * 300
    assert max(held.values()) <= 0.985 * 300


def test_a_model_that_wins_by_length_alone_is_even_at_equal_lengths() -> None:
    draw = np.random.default_rng(5)
    lengths, others = draw.normal(130, 40, 4000), draw.normal(100, 40, 4000)
    d = length_term(lengths - others)
    outcomes = (draw.random(4000) < 1 / (1 + np.exp(-2.0 * d))).astype(np.float64)
    found = rate(outcomes, np.full(4000, 0.5), lengths, others)
    assert found.rate > 0.6
    assert found.length_controlled == pytest.approx(0.5, abs=0.04)
    assert found.length_controlled_bootstrap.low < 0.5 < found.length_controlled_bootstrap.high


def test_what_a_model_wins_besides_its_length_is_found() -> None:
    draw = np.random.default_rng(6)
    d = length_term(draw.normal(20, 40, 20000))
    outcomes = (draw.random(20000) < 1 / (1 + np.exp(-(0.8 - 1.5 * d)))).astype(np.float64)
    (found,) = at_equal_lengths(outcomes[None], d[None])
    assert found == pytest.approx(1 / (1 + math.exp(-0.8)), abs=0.02)


def test_the_fit_is_where_the_likelihood_has_no_slope() -> None:
    draw = np.random.default_rng(7)
    d, outcomes = length_term(draw.normal(0, 1, 200)), draw.choice([0.0, 0.5, 1.0], 200)
    (fitted,) = at_equal_lengths(outcomes[None], d[None])
    theta = math.log(fitted / (1 - fitted))

    def likelihood(theta: float) -> float:
        """Largest over phi, by a fine grid, with the ridge."""
        phi = np.linspace(-3, 3, 6001)[:, None]
        x = theta + phi * d
        values = (outcomes * x - np.logaddexp(0, x)).sum(1) - 0.005 * (theta**2 + phi[:, 0] ** 2)
        return float(values.max())

    assert likelihood(theta) > max(likelihood(theta - 0.01), likelihood(theta + 0.01))


@pytest.mark.parametrize("winner", [0.0, 1.0])
def test_a_model_that_always_wins_has_a_finite_fit(winner: float) -> None:
    found = rate(np.full(50, winner), np.full(50, 0.5), np.arange(50.0), np.zeros(50))
    assert found.rate == winner
    assert found.length_controlled == pytest.approx(winner, abs=0.01)


def test_equal_lengths_leave_the_win_rate_as_it_is() -> None:
    outcomes = np.array([1.0] * 70 + [0.0] * 30)
    assert rate(outcomes, np.full(100, 0.5)).length_controlled == pytest.approx(0.7, abs=1e-3)


def test_the_same_seed_gives_the_same_intervals() -> None:
    draw = np.random.default_rng(8)
    a, b = draw.random(30), draw.random(30)
    assert rate(a, b) == rate(a, b)
    assert rate(a, b).bootstrap != win_rate(a, b, a, b, seed=2, resamples=200).bootstrap
