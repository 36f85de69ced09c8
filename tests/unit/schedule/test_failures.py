"""What fails while something else goes on: nothing is cut, nothing is begun again, and the first error is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.schedule.virtual import STAGES, Item, Times, VirtualRun, given_times


class Broken(Exception):
    """What a stage or an update raises."""


def breaks_at(*places: tuple[str, int]) -> Callable[[str, int], None]:
    def check(name: str, step: int) -> None:
        if (name, step) in places:
            raise Broken(f"{name} {step}")

    return check


def run_of(*places: tuple[str, int], num_ahead: int = 1, **changes: float) -> VirtualRun:
    """Steps that sample for 2 s, update for 5 s, and break at the end of the given places."""
    columns = {"sample": [2.0] * 8, "score": [0.5] * 8, "refer": [0.5] * 8, "update": [5.0] * 8}
    columns |= {name: [seconds] * 8 for name, seconds in changes.items() if name in columns}
    times = Times(**columns, push=changes.get("push", 0.25))
    return VirtualRun(times, num_ahead, breaks=breaks_at(*places))


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_fails_beside_an_update_lets_it_end(stage: str) -> None:
    """Step 2 is collected while step 1 is trained on."""
    done = run_of((stage, 2))
    with pytest.raises(Broken, match=f"{stage} 2"):
        done.run()
    assert [item.step for item in done.trained] == [0, 1]  # the update is complete
    assert [push.step for push in done.lanes.of("push")] == [0, 1]  # the driver is told before the boundary
    assert [box.step for box in done.lanes.of(stage)].count(2) == 1  # and it is not tried again


def test_nothing_is_begun_after_a_stage_has_failed() -> None:
    done = run_of(("score", 1), num_ahead=4)
    with pytest.raises(Broken, match="score 1"):
        done.run()
    (failed,) = (box for box in done.lanes.of("score") if box.step == 1)
    assert all(box.begin <= failed.end for box in done.lanes.boxes)


def test_the_first_of_two_failures_is_told() -> None:
    done = run_of(("sample", 2), ("score", 1), num_ahead=2)
    done.times.score[1] = 4.0  # both are under way beside the first update
    with pytest.raises(Broken, match="sample 2"):
        done.run()
    assert [(box.name, box.step) for box in done.lanes.boxes[-3:]] == [("sample", 2), ("score", 1), ("update", 0)]


def test_a_stage_that_fails_beside_a_push_ends_the_run_before_the_next_update() -> None:
    done = run_of(("score", 1), update=2.0, push=1.0)
    done.times.score[1] = 1.5
    with pytest.raises(Broken, match="score 1"):
        done.run()
    assert [box.step for box in done.lanes.of("update")] == [0]
    assert [push.step for push in done.lanes.of("push")] == [0, 1]
    assert [box.step for box in done.lanes.of("score")] == [0, 1]


@pytest.mark.parametrize("num_ahead", [0, 1, 4])
def test_an_update_that_fails_is_told_at_once_and_what_waits_is_left(num_ahead: int) -> None:
    done = run_of(("update", 2), num_ahead=num_ahead)
    with pytest.raises(Broken, match="update 2"):
        done.run()
    assert [item.step for item in done.trained] == [0, 1]
    assert [item.step for item in done.steps] == list(range(2, 3 + num_ahead))
    assert done.lanes.of("update")[-1].end == done.lanes.now


def test_an_update_and_a_stage_that_fail_together_tell_of_the_update() -> None:
    """The trainer's loss is the larger one: whether its weights are whole decides what can be saved."""
    done = run_of(("update", 1), ("sample", 2))
    with pytest.raises(Broken, match="update 1"):
        done.run()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("num_ahead", [0, 1, 2])
def test_a_stage_that_fails_before_the_first_update_fails_the_turn(stage: str, num_ahead: int) -> None:
    done = run_of((stage, 0), num_ahead=num_ahead)
    with pytest.raises(Broken, match=f"{stage} 0"):
        done.run()
    assert done.lanes.of("update") == []
    assert done.steps[0].step == 0  # what was sampled is there to be saved


def test_what_was_not_sampled_when_a_run_fails_is_known() -> None:
    done = run_of(("sample", 3), num_ahead=2)
    with pytest.raises(Broken):
        done.run()
    assert [(item.step, item.boundary) for item in done.schedule.unsampled()] == [(3, 1)]
    assert [item.step for item in done.steps] == [1, 2, 3]


def test_the_trainer_refers_only_for_the_step_whose_turn_has_come() -> None:
    times = given_times("fixed", 1, 6, late=True)
    done = VirtualRun(times, 4)
    lanes = done.lanes
    done.run()
    for refer, update in zip(lanes.of("refer"), lanes.of("update"), strict=True):
        assert refer.pushed == refer.step  # after its boundary, whatever time there was before
        assert refer.end <= update.begin
    waiting = [Item(0, 0, {"sample", "score"}), Item(1, 0, {"sample", "score"})]
    schedule = VirtualRun(times, 1, waiting=waiting).schedule
    schedule.drained()
    assert "refer" not in waiting[0].done  # nobody waits for what cannot be done yet


def test_an_error_of_the_trainer_in_a_late_stage_fails_the_turn() -> None:
    times = given_times("fixed", 1, 6, late=True)
    done = VirtualRun(times, 2, breaks=breaks_at(("refer", 3)))
    with pytest.raises(Broken, match="refer 3"):
        done.run()
    assert [item.step for item in done.trained] == [0, 1, 2]
