"""What a process tells of what it is doing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from rlxf.core import progress as module
from rlxf.core.progress import Progress


class Hands:
    """A clock that is set by hand, seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hands]:
    found = Hands()
    monkeypatch.setattr(module, "time", found)
    return found  # type: ignore[return-value]


def timed(progress: Progress, hands: Hands, name: str, *seconds: float) -> None:
    for duration in seconds:
        with progress.phase(name):
            hands.now += duration


def test_the_first_time_of_a_phase_is_one_of_its_own(hands: Hands) -> None:
    progress = Progress()
    with progress.phase("update"):
        hands.now += 500
        assert progress.look().phase == "first update"
    assert progress.look().medians == {"first update": 500.0}
    with progress.phase("update"):
        assert progress.look().phase == "update"
        hands.now += 2
    assert progress.look().medians == {"first update": 500.0, "update": 2.0}


def test_medians_are_of_the_newest_durations(hands: Hands) -> None:
    progress = Progress()
    timed(progress, hands, "update", 900, 1, 3, 5)
    assert progress.look().medians["update"] == 3.0
    timed(progress, hands, "update", *[10] * 50)
    assert progress.look().medians["update"] == 10.0


def test_a_phase_that_failed_is_still_to_have_its_first_time(hands: Hands) -> None:
    progress = Progress()
    with pytest.raises(ZeroDivisionError), progress.phase("build"):
        _ = 1 / 0
    assert progress.look().phase == ""
    with progress.phase("build"):
        assert progress.look().phase == "first build"


def test_after_a_phase_inside_another_the_outer_one_goes_on() -> None:
    progress = Progress()
    counters = [progress.look().counter]
    with progress.phase("update"):
        counters.append(progress.look().counter)
        with progress.phase("save"):
            assert progress.look().phase == "first save"
            counters.append(progress.look().counter)
        assert progress.look().phase == "first update"
        counters.append(progress.look().counter)
        progress.tick()
        counters.append(progress.look().counter)
    assert progress.look().phase == ""
    counters.append(progress.look().counter)
    assert counters == sorted(set(counters))  # every one of them moved it


def test_other_threads_see_where_a_process_is() -> None:
    progress, entered, leave = Progress(), threading.Event(), threading.Event()

    def work() -> None:
        with progress.phase("update"):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(10)
    assert progress.look().phase == "first update"
    leave.set()
    thread.join(10)
    assert progress.look().phase == ""
