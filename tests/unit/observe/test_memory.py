"""Memory of each step's row, and the warning of memory that will run out: for growth only, once, and in time."""

from __future__ import annotations

import logging
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.core.memory import GIB, MIB, Memory
from rlxf.observe.memory import (
    LEAST,
    MOST,
    SHARE,
    WARM_UP,
    MemoryReport,
    Point,
    ProcessMemory,
    driver_memory,
    growth,
    theil_sen,
)

LIMIT = 64 * GIB
STEPS = 400


def process(role: str = "train", machine: str = "a", **changes: object) -> ProcessMemory:
    full = Memory(limit=LIMIT, available=LIMIT // 2)
    made = ProcessMemory(role=role, node=f"node {machine}", machine=machine, identity=role, rss=GIB, memory=full)
    return replace(made, **changes)  # type: ignore[arg-type]


def using(used: float, **changes: object) -> ProcessMemory:
    """A process beside which nothing else uses memory."""
    return process(rss=int(used), memory=Memory(limit=LIMIT, available=int(LIMIT - used)), **changes)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records]


def follow(curve: Callable[[int], float], last_step: int = STEPS, **changes: object) -> MemoryReport:
    """A run of one worker whose memory is ``curve(step)``."""
    step = 0
    report = MemoryReport(lambda: [using(curve(step), **changes)], last_step)
    for step in range(1, last_step + 1):
        report(step)
    return report


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=30))
def test_the_slope_is_the_median_of_all_slopes(values: list[float]) -> None:
    slopes = [(b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(values), 2)]
    assert theil_sen(range(len(values)), values).value == pytest.approx(statistics.median(slopes), abs=1e-6)


def test_the_lower_bound_is_sens() -> None:
    """Eight points, 95 % on both sides: rank (28 - 1.96 * sqrt(65.33)) / 2 = 6.08 of 28 slopes."""
    values = [2.0, 3.0, 1.0, 5.0, 4.0, 8.0, 6.0, 9.0]
    slopes = sorted((b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(values), 2))
    assert theil_sen(range(8), values, sure=1.96).least == slopes[6]


def test_too_few_points_have_no_bound() -> None:
    assert theil_sen([1, 2, 3], [1, 2, 3]).least == float("-inf")


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0, SHARE * LIMIT), min_size=STEPS, max_size=STEPS), st.booleans())
def test_memory_that_stays_in_a_narrow_band_is_never_told(noise: list[float], ordered: bool) -> None:
    curve = sorted(noise) if ordered else noise
    points = [Point(step, 20 * GIB + used, {}) for step, used in enumerate(curve)]
    for end in range(LEAST, STEPS, 40):
        assert growth(points[:end], limit=LIMIT, room=1.0, last_step=10**9) is None


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 15))
def test_wild_noise_around_a_level_is_never_told(seed: int, width: float) -> None:
    draw = random.Random(seed)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("rlxf.observe.memory")
    logger.addHandler(handler)
    try:
        follow(lambda _: (30 + draw.gauss(0, width / 3)) * GIB if width else 30 * GIB)
    finally:
        logger.removeHandler(handler)
    assert not told


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.12, 0.5), st.floats(0, 1))
def test_linear_growth_is_told_once_and_in_time(seed: int, per_step: float, noise: float) -> None:
    draw = random.Random(seed)
    told: list[tuple[int, str]] = []
    step = 0
    handler = logging.Handler()
    handler.emit = lambda record: told.append((step, record.getMessage()))  # type: ignore[method-assign]
    logger = logging.getLogger("rlxf.observe.memory")
    logger.addHandler(handler)
    full = int(44 / per_step)  # the step at which 64 GiB are used
    report = MemoryReport(lambda: [using((20 + per_step * step + draw.uniform(-noise, noise)) * GIB)], STEPS)
    try:
        for step in range(1, min(full, STEPS)):
            report(step)
    finally:
        logger.removeHandler(handler)
    assert len(told) == 1
    # The points that are needed, or a growth of 5 %, of which the first and the last fifth do not count fully; noise
    # that is larger than the growth of many steps hides it for so long.
    assert told[0][0] <= WARM_UP + max(LEAST + 5, (1.6 * SHARE * 64 + 2 * noise) / per_step + 10)


def test_the_warning_names_role_pace_and_step(caplog: pytest.LogCaptureFixture) -> None:
    step = 0

    def look() -> list[ProcessMemory]:
        used = 200 * MIB * step
        left = Memory(limit=LIMIT, available=LIMIT // 2 - used)
        return [process("infer", rss=GIB, memory=left), process("train", rss=GIB + used, memory=left)]

    report = MemoryReport(look, last_step=200)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 60):
            report(step)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "the memory of node node a grows by 200 MiB a step, that of train by 200 MiB: 26.92 GiB of 64.00 GiB are left, "
        "and at this pace none at step 164 of 200"
    )
    assert record.__dict__["rlxf_event"] == {"event": "memory", "who": "train", "step": 26}


def test_memory_that_lasts_until_the_end_is_not_told(warnings: Callable[[], list[str]]) -> None:
    follow(lambda step: 20 * GIB + step * 100 * MIB)  # 39 GiB of growth in 400 steps, and 44 are left
    assert not warnings()
    follow(lambda step: 20 * GIB + step * 120 * MIB)
    assert len(warnings()) == 1


@pytest.mark.parametrize(
    "curve",
    [
        lambda step: 20 * GIB + (30 * GIB if step > 100 else 0),  # an evaluation, a larger batch
        lambda step: (20 + 30 * (1 - 0.9**step)) * GIB,  # a cache that fills
        lambda step: (20 + 0.5 * min(step, 20)) * GIB,
        lambda step: ((60 if step > 60 else 20) + random.Random(step).uniform(-1, 1)) * GIB,
    ],
    ids=["jump", "saturation", "corner", "noisy jump"],
)
def test_growth_that_ends_is_not_told(curve: Callable[[int], float], warnings: Callable[[], list[str]]) -> None:
    follow(curve)
    assert not warnings()


def test_growth_that_begins_late_is_told(warnings: Callable[[], list[str]]) -> None:
    follow(lambda step: (20 + 0.2 * max(step - 1000, 0)) * GIB, last_step=1300)
    assert len(warnings()) == 1


def test_slow_growth_is_told_long_before_the_end(warnings: Callable[[], list[str]]) -> None:
    """10 MiB a step, 44 GiB are left: full at step 4500. Growth of 5 % takes 330 steps, more than the newest points."""
    assert MOST * 10 * MIB < SHARE * LIMIT
    follow(lambda step: 20 * GIB + step * 10 * MIB, last_step=5000)
    (text,) = warnings()
    assert "at step 450" in text


def test_a_process_that_is_started_again_begins_a_new_curve(warnings: Callable[[], list[str]]) -> None:
    """Each process has 15 steps, which are too few to tell."""
    step = 0
    report = MemoryReport(lambda: [using((20 + 0.5 * step) * GIB, identity=f"{step // 15}")], STEPS)
    for step in range(80):
        report(step)
    assert not warnings()


def test_steps_that_are_done_again_begin_a_new_curve(warnings: Callable[[], list[str]]) -> None:
    report = MemoryReport(lambda: [using((20 + 0.5 * step) * GIB)], STEPS)
    for step in [*range(1, 20), *range(10, 25)]:
        report(step)
    assert not warnings()


def test_device_memory_of_a_role_is_followed_by_itself(warnings: Callable[[], list[str]]) -> None:
    step = 0

    def look() -> list[ProcessMemory]:
        return [
            process("train", identity="0", device_bytes=20 * GIB, device_total=64 * GIB),
            process("train", identity="1", device_bytes=20 * GIB + step * 200 * MIB, device_total=64 * GIB),
            process("ref", device_bytes=50 * GIB),  # of a device whose size nobody knows
        ]

    report = MemoryReport(look, last_step=STEPS)
    for step in range(1, 100):
        row = report(step)
    assert row["memory/train_device_gib"] == pytest.approx(20 + 99 * 200 / 1024)
    assert row["memory/ref_device_gib"] == 50
    (text,) = warnings()
    assert text.startswith("the device memory of train grows by 200 MiB a step")


def test_the_row_has_the_largest_process_of_a_role_and_the_fullest_node() -> None:
    found = [
        process("driver", rss=GIB),
        process("train", rss=2 * GIB),
        process("train", machine="b", rss=4 * GIB),
        process("infer", machine="b", rss=GIB // 2),
    ]
    assert MemoryReport(lambda: found, STEPS)(1) == {
        "memory/driver_rss_gib": 1.0,
        "memory/train_rss_gib": 4.0,
        "memory/infer_rss_gib": 0.5,
        "memory/node_rss_gib": 4.5,
    }


def test_a_run_in_one_process_has_the_driver_alone() -> None:
    (here,) = driver_memory()
    assert 0 < here.rss < here.memory.limit
    assert here.memory.available <= here.memory.limit
    assert list(MemoryReport(driver_memory, STEPS)(1)) == ["memory/driver_rss_gib"]
