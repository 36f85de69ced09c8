"""Sums of several sources' scores: scales, weights, missing scores, and moments that a resumed run continues."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlxf.score.combine import Moments, RunningScales, Term, combine, unscaled

NAN = math.nan
numbers = st.floats(-1e3, 1e3, width=32)
scores = st.one_of(numbers, st.just(NAN))


@st.composite
def tables(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    return torch.tensor([[draw(scores) for _ in range(columns)] for _ in range(rows)])


@st.composite
def terms_of(draw: st.DrawFn, count: int) -> list[Term]:
    scales = st.sampled_from(["none", "batch", "rank", "running"])
    return [
        Term(name=str(i), weight=draw(numbers), scale=draw(scales), leave_out=draw(st.booleans()))  # type: ignore[arg-type]
        for i in range(count)
    ]


def same(first: Tensor, second: Tensor, **tolerance: Any) -> None:
    torch.testing.assert_close(first, second, equal_nan=True, **tolerance)


def test_one_source_passes_to_the_bit() -> None:
    table = torch.tensor([[0.1], [NAN], [1e-30]])
    assert torch.equal(combine(table, [Term(name="a")], {}).nan_to_num(9), table[:, 0].nan_to_num(9))


def test_a_missing_score_drops_the_completion_or_is_left_out() -> None:
    table = torch.tensor([[1.0, 2.0], [NAN, 2.0], [1.0, NAN], [NAN, NAN]])
    drops = combine(table, [Term(name="a"), Term(name="b", weight=0.5, leave_out=True)], {})
    same(drops, torch.tensor([2.0, NAN, 1.0, NAN]))
    left_out = combine(table, [Term(name="a", leave_out=True), Term(name="b", weight=0.5, leave_out=True)], {})
    same(left_out, torch.tensor([2.0, 1.0, 1.0, NAN]))  # nothing at all is missing, and no zero


def test_scales() -> None:
    table = torch.tensor([[1.0], [3.0], [3.0], [NAN], [5.0]])
    same(combine(table, [Term(name="a", scale="rank")], {}), torch.tensor([0.0, 0.5, 0.5, NAN, 1.0]))
    deviation = math.sqrt(8 / 3)
    batch = combine(table, [Term(name="a", weight=2, scale="batch")], {})
    same(batch, torch.tensor([-4.0, 0.0, 0.0, NAN, 4.0]) / deviation)
    running = combine(table, [Term(name="a", scale="running")], {"a": Moments(10, 1.0, 36.0)})
    same(running, torch.tensor([0.0, 1.0, 1.0, NAN, 2.0]))
    constant = torch.tensor([[2.0], [2.0]])
    for scale in ("batch", "running"):
        same(combine(constant, [Term(name="a", scale=scale)], {}), torch.zeros(2))  # type: ignore[arg-type]


@given(st.data())
def test_the_order_of_rows_changes_nothing(data: st.DataObject) -> None:
    table = data.draw(tables())
    terms = data.draw(terms_of(table.shape[1]))
    order = torch.tensor(data.draw(st.permutations(range(len(table)))))
    running = {"0": Moments(3, 0.5, 2.0)}
    same(combine(table[order], terms, running), combine(table, terms, running)[order], atol=1e-3, rtol=1e-4)


@given(st.lists(st.lists(scores, min_size=1, max_size=6), min_size=1, max_size=5))
def test_running_moments_are_those_of_all_scores_so_far(steps: list[list[float]]) -> None:
    moments = Moments()
    for step in steps:
        moments = moments.with_scores(torch.tensor(step))
    known = [score for step in steps for score in step if not math.isnan(score)]
    assert moments.count == len(known)
    if len(known) > 1:
        every = torch.tensor(known, dtype=torch.float64)
        assert moments.mean == pytest.approx(float(every.mean()), abs=1e-3)
        assert moments.deviation == pytest.approx(float(every.std()), abs=1e-3)


def test_running_scales_go_on_where_the_state_says() -> None:
    terms = [Term(name="a", scale="running"), Term(name="b")]
    steps = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(1))
    whole = RunningScales(terms, {})
    expected, states = [], []
    for table in steps:
        sums, state = whole.add(table)
        expected.append(sums)
        states.append(state)
    resumed = RunningScales(terms, states[1])
    for table, sums in zip(steps[2:], expected[2:], strict=True):
        assert torch.equal(resumed.add(table)[0], sums)
    assert list(states[0]) == ["a"]  # nothing is kept of the others


def test_a_step_is_not_scaled_by_its_own_scores_but_the_first() -> None:
    scales = RunningScales([Term(name="a", scale="running")], {})
    first, _ = scales.add(torch.tensor([[0.0], [2.0]]))
    same(first, torch.tensor([-1.0, 1.0]) / math.sqrt(2))
    second, _ = scales.add(torch.tensor([[1.0], [1001.0]]))
    same(second, torch.tensor([0.0, 1000.0]) / math.sqrt(2))


def test_an_evaluation_does_not_scale() -> None:
    terms = [Term(name="a", weight=2, scale="running", leave_out=True), Term(name="b", scale="rank")]
    assert unscaled(terms) == [Term(name="a", weight=2, leave_out=True), Term(name="b")]
