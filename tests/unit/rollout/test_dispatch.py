"""Dealing prompts to engines: every prompt once, even work, the same deal each time."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.rollout.dispatch import Dispatch, Mode, deal

WORK = st.lists(st.one_of(st.integers(0, 20), st.floats(0, 1e6)), max_size=60)
ENGINES = st.integers(1, 9)
CHUNK = st.one_of(st.none(), st.integers(1, 12))
EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True)  # no deadline: a busy core


def planned(work: list[float], engines: int, **options: Any) -> Dispatch:
    return deal(
        work, engines, **{"slots_per_engine": 1, "samples_per_prompt": 2, "chunk": None, "mode": "planned", **options}
    )


def shares_of(dealt: Dispatch) -> tuple[tuple[int, ...], ...]:
    assert dealt.shares is not None
    return dealt.shares


def test_the_longest_prompt_left_goes_to_the_engine_with_the_least_work() -> None:
    """9 | 7 | 6 and then 5 to the third, 4 to the second, 3 to the first: 12, 11, 11; the last 2 to the second."""
    dealt = planned([2, 3, 4, 5, 6, 7, 9], 3)
    assert dealt.order == (6, 5, 4, 3, 2, 1, 0)
    assert shares_of(dealt) == ((6, 1), (5, 2, 0), (4, 3))


def test_the_example_of_the_docstring() -> None:
    dealt = deal([9, 1, 5, 3], 2, slots_per_engine=1, samples_per_prompt=1, chunk=1, mode="planned")
    assert dealt == Dispatch(order=(0, 2, 3, 1), shares=((0,), (2, 3, 1)), chunks=((0,), (2,), (3,), (1,)))


def test_of_equal_prompts_the_first_is_dealt_first_to_the_first_engine() -> None:
    assert shares_of(planned([5.0] * 7, 3)) == ((0, 3, 6), (1, 4), (2, 5))
    assert shares_of(planned([0.0] * 5, 2)) == ((0, 2, 4), (1, 3))  # no work at all is shared out, too
    assert planned([1, 3, 3, 1, 3], 1).order == (1, 2, 4, 0, 3)
    assert planned([1, 2] * 50, 1).order == (*range(1, 100, 2), *range(0, 100, 2))


@given(WORK, ENGINES, CHUNK, st.sampled_from(["planned", "queue"]))
@EXAMPLES
def test_every_prompt_is_in_the_order_in_one_share_and_in_one_chunk(
    work: list[float], engines: int, chunk: int | None, mode: Mode
) -> None:
    dealt = planned(work, engines, chunk=chunk, mode=mode)
    rows = list(range(len(work)))
    assert sorted(dealt.order) == rows
    assert [work[row] for row in dealt.order] == sorted(work, reverse=True)
    assert sorted(row for part in dealt.chunks for row in part) == rows
    assert all(dealt.chunks)
    if mode == "queue":
        assert dealt.shares is None
    else:
        assert len(shares_of(dealt)) == engines
        assert sorted(row for share in shares_of(dealt) for row in share) == rows


@given(WORK, ENGINES)
@EXAMPLES
def test_work_is_as_even_as_its_longest_prompt_allows(work: list[float], engines: int) -> None:
    """An engine was the least busy one when its last prompt came."""
    loads = [sum(work[row] for row in share) for share in shares_of(planned(work, engines))]
    longest, mean = max(work, default=0), sum(work) / engines
    assert max(loads) <= mean + longest * (1 - 1 / engines) + 1e-6 * (1 + mean)
    assert max(loads) - min(loads) <= longest + 1e-6 * (1 + mean)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(2, 3))
@EXAMPLES
def test_the_busiest_engine_has_at_most_a_third_more_than_in_the_best_deal(work: list[int], engines: int) -> None:
    best = {(0,) * engines}
    for each in work:  # every deal there is
        best = {tuple(sorted((*loads[:i], loads[i] + each, *loads[i + 1 :]))) for loads in best for i in range(engines)}
    found = max(sum(work[row] for row in share) for share in shares_of(planned(list(work), engines)))
    assert found <= (4 / 3 - 1 / (3 * engines)) * min(max(loads) for loads in best) + 1e-9


@given(WORK, ENGINES, CHUNK, st.sampled_from(["planned", "queue"]))
@EXAMPLES
def test_the_same_work_is_dealt_in_the_same_way(work: list[float], engines: int, chunk: int | None, mode: Mode) -> None:
    assert planned(work, engines, chunk=chunk, mode=mode) == planned(list(work), engines, chunk=chunk, mode=mode)


@given(WORK, ENGINES)
@EXAMPLES
def test_every_engine_has_a_prompt_if_there_are_enough(work: list[float], engines: int) -> None:
    busy = sum(bool(share) for share in shares_of(planned(work, engines)))
    assert busy == min(engines, len(work))


@given(WORK, ENGINES, st.integers(1, 12))
@EXAMPLES
def test_a_chunk_of_a_planned_step_is_cut_from_one_share_in_its_order(
    work: list[float], engines: int, chunk: int
) -> None:
    dealt = planned(work, engines, chunk=chunk)
    for share in shares_of(dealt):
        mine = [part for part in dealt.chunks if part[0] in share]
        assert [row for part in mine for row in part] == list(share)
        require_even(mine, chunk)


def require_even(chunks: list[tuple[int, ...]], size: int) -> None:
    """As many as come nearest to the size that was asked for, and all of about the same size."""
    counts = [len(part) for part in chunks]
    if counts:
        assert max(counts) - min(counts) <= 1
        assert len(counts) == 1 or abs(len(counts) - sum(counts) / size) <= 0.5
        assert max(counts) < 2 * size or size == 1


def test_the_first_chunk_of_each_engine_comes_before_the_second_of_any() -> None:
    dealt = planned([9, 8, 7, 6, 1], 2, chunk=1)
    assert shares_of(dealt) == ((0, 3, 4), (1, 2))
    assert dealt.chunks == ((0,), (1,), (3,), (2,), (4,))


@given(WORK, ENGINES, st.integers(1, 12))
@EXAMPLES
def test_chunks_of_a_queued_step_are_cut_from_its_order(work: list[float], engines: int, chunk: int) -> None:
    dealt = planned(work, engines, chunk=chunk, mode="queue")
    assert [row for part in dealt.chunks for row in part] == list(dealt.order)
    require_even(list(dealt.chunks), chunk)


@pytest.mark.parametrize("mode", ["planned", "queue"])
def test_without_chunks_the_whole_step_is_scored_in_prompt_order(mode: Mode) -> None:
    assert planned([1, 5, 3], 2, mode=mode).chunks == ((0, 1, 2),)
    assert planned([], 2, mode=mode).chunks == ()


def test_a_share_that_fits_into_the_slots_is_in_prompt_order() -> None:
    work = [1, 5, 3]
    assert shares_of(planned(work, 1, slots_per_engine=6)) == ((0, 1, 2),)  # today's call
    assert shares_of(planned(work, 1, slots_per_engine=5)) == ((1, 2, 0),)
    assert shares_of(planned(work, 1, slots_per_engine=6, chunk=3)) == ((1, 2, 0),)
    assert shares_of(planned([1, 2, 3, 9], 2, slots_per_engine=2)) == ((3,), (2, 1, 0))  # each engine for itself


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_work_that_is_no_number_of_tokens_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="expected the work of each prompt"):
        planned([1.0, wrong], 2)


def test_dealing_to_many_engines_is_fast() -> None:
    work = [float(i * 7919 % 1009) for i in range(4096)]
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        planned(work, 64, chunk=64)
        seconds.append(time.process_time() - begin)
    assert min(seconds) < 0.015  # 3 ms on a quiet core
