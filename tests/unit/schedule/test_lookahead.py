"""Which stage of which step runs when, on a clock that nobody waits for: the promised order, and no time lost."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from tests.unit.schedule.virtual import STAGES, Box, Item, Times, VirtualRun, given_times, ideal_end

PACE = 1.001  # times the ideal schedule of the same times; 1.06 is promised
AHEAD = (0, 1, 2, 4)


def require_order(done: VirtualRun) -> None:
    """What is promised of every run, and of what an earlier process left to it."""
    times, first, lanes, given = done.times, done.first, done.lanes, done.given
    whole = list(range(first, len(times)))
    pushes, evaluations, updates = lanes.of("push"), lanes.of("evaluate"), lanes.of("update")
    assert [push.step for push in pushes] == [*whole, len(times)]
    assert [item.step for item in done.trained] == [box.step for box in updates] == whole

    # Every stage does what was not done, in order and one at a time; nothing of steps behind the last one.
    for name in STAGES:
        boxes = lanes.of(name)
        assert [box.step for box in boxes] == [
            step for step in whole if step not in given or name not in given[step].done
        ]
        assert all(box.end <= after.begin for box, after in pairwise(boxes))
    for step in whole:
        way = [box for name in (*STAGES, "update") for box in lanes.of(name) if box.step == step]
        assert all(box.end <= after.begin for box, after in pairwise(way))

    # By the weights of the formula; a step that waited by those that its first process says.
    formula = {step: max(first, step - done.num_ahead) for step in whole} | {
        step: item.boundary for step, item in given.items()
    }
    assert {box.step: box.pushed for box in lanes.of("sample")} == {
        box.step: formula[box.step] for box in lanes.of("sample")
    }
    assert [item.boundary for item in done.trained] == [formula[step] for step in whole]
    assert [box.pushed for box in updates] == whole
    if not given and done.num_ahead:
        assert updates[0].begin >= max(box.end for box in lanes.of("sample") if box.step < first + done.num_ahead)

    for box in [*pushes, *evaluations, *lanes.of("push saved")]:
        require_apart(box, lanes.of("sample") + updates)
    for box in evaluations:  # need reward model and reference, too
        require_apart(box, lanes.of("score") + lanes.of("refer"))
    if times.late:
        for box in lanes.of("refer"):
            require_apart(box, updates)
        assert all(box.pushed == box.step for box in lanes.of("refer"))
    assert not lanes.under_way


def require_apart(box: Box, others: list[Box]) -> None:
    assert not [other for other in others if box.meets(other)]


def require_pace(done: VirtualRun) -> None:
    ideal = ideal_end(done.times, done.num_ahead)
    assert ideal <= done.lanes.now * (1 + 1e-9)  # else the ideal is none
    assert done.lanes.now <= PACE * ideal


@pytest.mark.parametrize("num_ahead", AHEAD)
@pytest.mark.parametrize("num_engines", [1, 4, 64])
@pytest.mark.parametrize("kind", ["fixed", "lognormal", "uneven"])
def test_no_time_is_lost_against_the_ideal_schedule(kind: str, num_engines: int, num_ahead: int) -> None:
    """Whichever stage is the slowest, and however long a push takes."""
    for slow in ("", "sample", "score", "refer", "update"):
        for late, push in ((False, 0.05), (False, 0.3), (True, 0.05)):
            times = given_times(kind, num_engines, 50, slow=slow, every=10, late=late, push=push)
            done = VirtualRun(times, num_ahead).run()
            require_order(done)
            require_pace(done)


@pytest.mark.parametrize("num_ahead", AHEAD)
def test_a_thousand_steps_of_sixty_four_engines_cost_next_to_nothing_to_schedule(num_ahead: int) -> None:
    times = given_times("lognormal", 64, 1000, every=100)
    begin = time.process_time()
    done = VirtualRun(times, num_ahead).run()
    assert time.process_time() - begin < 3.0
    require_pace(done)
    assert [item.boundary for item in done.trained] == [max(0, step - num_ahead) for step in range(1000)]


def test_a_step_ahead_hides_the_shorter_of_sampling_and_update() -> None:
    """More of them even out steps whose lengths vary: the pace is no longer that of the longer one of each step."""
    columns = {name: [0.0] * 100 for name in ("score", "refer")}
    equal = Times(sample=[1.0] * 100, update=[0.8] * 100, push=0.0, **columns)
    varying = Times(sample=[1.0] * 100, update=[0.2, 1.6] * 50, push=0.0, **columns)
    for times, num_ahead, pace in ((equal, 0, 1.8), (equal, 1, 1.0), (varying, 0, 1.9), (varying, 1, 1.3)):
        assert VirtualRun(times, num_ahead).run().lanes.now / 100 == pytest.approx(pace, rel=0.02)


def test_three_steps_worked_out_by_hand() -> None:
    times = Times(sample=[2.0] * 3, score=[0.5] * 3, refer=[0.5] * 3, update=[1.5] * 3, push=0.25)
    lanes = VirtualRun(times, 1).run().lanes
    assert {name: [box.begin for box in lanes.of(name)] for name in ("push", *STAGES, "update")} == {
        "push": [0.0, 4.75, 7.0, 9.5],
        "sample": [0.25, 2.25, 5.0],
        "score": [2.25, 4.25, 7.0],
        "refer": [2.75, 4.75, 7.5],
        "update": [3.25, 5.25, 8.0],
    }


def random_times(seed: int) -> tuple[Times, random.Random]:
    """Whole seconds, zero among them, so that much ends at the same time."""
    rng = random.Random(seed)
    num_steps = rng.randint(1, 12)
    columns = {name: [float(rng.randint(0, 4)) for _ in range(num_steps)] for name in (*STAGES, "update")}
    settings = {"push": float(rng.randint(0, 2)), "every": rng.randint(0, 3), "late": rng.random() < 0.3}
    return Times(**columns, **settings, evaluate=float(rng.randint(0, 3))), rng


@pytest.mark.parametrize("num_ahead", [0, 1, 2, 4, 8])
def test_the_order_and_the_pace_are_kept_whatever_stages_take(num_ahead: int) -> None:
    for seed in range(150):
        times, rng = random_times(seed)
        for early in (False, True):
            done = VirtualRun(times, num_ahead, early=early).run()
            require_order(done)
            require_pace(done)
        first = rng.randrange(len(times))
        require_order(VirtualRun(times, num_ahead, first=first).run())  # as after more train_iters, with none waiting


@pytest.mark.parametrize("num_ahead", [0, 1, 2, 4])
@pytest.mark.parametrize(
    "sharing",
    ["score refer", "sample score", "sample score refer", "update refer", "update score refer", "sample update refer"],
)
def test_roles_that_share_devices_take_turns(sharing: str, num_ahead: int) -> None:
    """``Timeline`` refuses two things at a time on a lane. Trainer and engines share one only without lookahead."""
    for seed in range(40):
        times = replace(random_times(seed)[0], sharing=frozenset(sharing.split()))
        if not (num_ahead and {"sample", "update"} <= times.sharing):
            require_order(VirtualRun(times, num_ahead).run())


@pytest.mark.parametrize(
    ("sharing", "seconds", "pace"),
    [  # 3.58 and 2.62 if the first stage went first
        ("score refer", (0.9, 1.6, 1.5, 1.4), 3.14),
        ("sample score refer", (1.0, 0.6, 0.7, 1.2), 2.32),
    ],
)
def test_on_a_shared_lane_the_older_step_goes_first(
    sharing: str, seconds: tuple[float, float, float, float], pace: float
) -> None:
    """Else its update would wait for work that nobody needs yet: for the sampling or the score of a later step."""
    count = 60
    columns = {name: [value] * count for name, value in zip((*STAGES, "update"), seconds, strict=True)}
    done = VirtualRun(Times(**columns, push=0.1, sharing=frozenset(sharing.split())), 1).run()  # type: ignore[arg-type]
    require_order(done)
    assert done.lanes.now / count == pytest.approx(pace, rel=0.02)
    boxes = sorted(done.lanes.of("score") + done.lanes.of("refer"), key=lambda box: box.begin)
    assert [box.step for box in boxes] == [step for step in range(count) for _ in range(2)]


def left_by(num_ahead: int, num_steps: int, boundary: int, rng: random.Random) -> list[Item]:
    """What a process with these steps may leave when it ends after ``boundary`` complete steps: some sampled, some
    scored, some referred; the last one, perhaps, still being sampled by weights that the trainer no longer has."""
    last = min(boundary + num_ahead, num_steps)
    items = [Item(step, max(0, step - num_ahead), set(STAGES[: rng.randint(1, 3)])) for step in range(boundary, last)]
    for item, after in zip(items[::-1], items[::-1][1:], strict=False):  # in order: a later step is never further
        after.done |= item.done
    if items and rng.random() < 0.5 and items[-1].boundary < boundary:
        items[-1].done.clear()
    return items


@pytest.mark.parametrize("now", AHEAD)
@pytest.mark.parametrize("then", [1, 2, 4])
def test_a_resumed_run_trains_on_what_waits_and_samples_the_rest_by_the_formula(then: int, now: int) -> None:
    """Also with another number of steps ahead: larger, smaller or none. Then the formula begins at the resumed step."""
    for seed in range(60):
        times, rng = random_times(seed)
        boundary = rng.randrange(len(times))
        waiting = left_by(then, len(times), boundary, rng)
        require_order(VirtualRun(times, now, first=boundary, waiting=waiting).run())


def test_a_resumed_run_samples_no_step_again_but_the_one_that_was_cut() -> None:
    times = given_times("fixed", 1, 8)
    waiting = [Item(3, 1, set(STAGES)), Item(4, 2, {"sample", "score"}), Item(5, 2, {"sample"}), Item(6, 2)]
    done = VirtualRun(times, 4, first=3, waiting=waiting).run()
    require_order(done)
    assert [(box.step, box.pushed) for box in done.lanes.of("sample")] == [(6, 2), (7, 3)]
    assert [box.step for box in done.lanes.of("score")] == [5, 6, 7]
    assert [box.step for box in done.lanes.of("refer")] == [4, 5, 6, 7]
    (saved,) = done.lanes.of("push saved")
    assert saved.end <= done.lanes.of("sample")[0].begin


@pytest.mark.parametrize("is_sampled", [True, False])
def test_a_resumed_run_of_fewer_steps_leaves_those_behind_its_end(is_sampled: bool) -> None:
    times = given_times("fixed", 1, 4)
    waiting = [Item(2, 0, {"sample"}), Item(3, 1, {"sample"}), Item(4, 1, {"sample"} if is_sampled else set())]
    done = VirtualRun(times, 2, first=2, waiting=waiting).run()
    assert done.lanes.of("sample") == done.lanes.of("push saved") == []
    assert [box.step for box in done.lanes.of("refer")] == [2, 3]
    assert not done.steps or done.steps[-1].step < 4
