"""Who was at work when: idle shares and waits, on a clock that the test moves."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pytest

from rlxf.core.clock import Clock, Span

ALL = ("train", "infer", "ref", "reward")


class Hands:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.at = 100.0

    def __call__(self) -> float:
        return self.at


class Work:
    """A clock of a run, and stages that take given seconds."""

    def __init__(self, roles: Sequence[str] = ALL) -> None:
        self.hands = Hands()
        self.clock = Clock(roles, now=self.hands)
        self.clock.start(0)

    def rest(self, seconds: float) -> None:
        self.hands.at += seconds

    def do(self, stage: str, seconds: float) -> None:
        with self.clock(stage):
            self.rest(seconds)

    def row(self) -> dict[str, float]:
        return {name: round(value, 9) for name, value in self.clock.timings().items()}


def idle(row: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("timing/idle_"): value for name, value in row.items() if "idle" in name}


def test_a_pool_is_idle_for_the_share_of_the_step_in_which_no_stage_of_it_runs() -> None:
    work = Work()
    for stage, seconds in {"gen": 4.0, "adv": 1.0, "ref": 2.0, "update_actor": 2.5, "sync": 0.5}.items():
        work.do(stage, seconds)
    assert idle(work.row()) == {"train": 0.7, "infer": 0.55, "ref": 0.8, "reward": 0.9}


def test_a_step_lasts_from_row_to_row_and_what_follows_a_row_is_of_the_next() -> None:
    work = Work()
    work.do("update_actor", 1.0)
    work.row()
    work.do("save", 3.0)
    work.clock.start(1)
    work.do("gen", 1.0)
    assert idle(work.row()) == {"train": 0.25, "infer": 0.75, "ref": 1.0, "reward": 1.0}
    work.do("gen", 1.0)
    assert idle(work.row())["infer"] == 0.0


def test_loading_before_the_first_step_is_no_idle_time() -> None:
    hands = Hands()
    clock = Clock(("infer",), now=hands)
    hands.at += 1000
    clock.start(0)
    with clock("gen"):
        hands.at += 1
    assert clock.timings()["timing/idle_infer"] == 0.0


def test_everybody_takes_part_in_an_evaluation() -> None:
    work = Work()
    work.do("eval", 2.0)
    work.rest(2.0)
    assert set(idle(work.row()).values()) == {0.5}


def test_only_roles_that_the_run_has_are_reported() -> None:
    work = Work(("train",))
    for stage in ("gen", "adv", "ref", "update_actor", "eval"):
        work.do(stage, 1.0)
    row = work.row()
    assert idle(row) == {"train": 0.4}  # the actor is the reference, and takes part in the evaluation
    assert not [name for name in row if name.startswith("pipeline/")]  # nobody samples
    assert not idle(Work(()).row())


def test_stages_of_a_pool_that_overlap_count_once() -> None:
    work = Work()
    with work.clock("update_actor"):
        work.rest(1.0)
        with work.clock("sync"):
            work.rest(1.0)
        work.rest(1.0)
    work.rest(1.0)
    assert idle(work.row())["train"] == 0.25


def test_work_that_goes_on_over_a_row_is_shared_between_the_steps() -> None:
    work = Work()
    with work.clock("ref"):
        work.rest(1.0)
        assert idle(work.row())["ref"] == 0.0
        work.rest(1.0)
    work.rest(1.0)
    assert idle(work.row())["ref"] == 0.5


def test_pools_work_beside_each_other_in_threads() -> None:
    """Sampling runs from 0 to 3, the update from 1 to 5, of six seconds."""
    work, began, sampled = Work(), threading.Event(), threading.Event()

    def update() -> None:
        with work.clock("update_actor"):
            began.set()
            assert sampled.wait(10)
            work.rest(2.0)

    thread = threading.Thread(target=update)
    with work.clock("gen"):
        work.rest(1.0)
        thread.start()
        assert began.wait(10)
        work.rest(2.0)
    sampled.set()
    thread.join()
    work.rest(1.0)
    row = work.row()
    assert (row["timing/idle_infer"], row["timing/idle_train"]) == (0.5, pytest.approx(1 / 3))
    assert row["timing/idle_reward"] == 1.0


class Turns(Hands):
    """Sees whether two threads change the record at the same time."""

    inside, most = 0, 0

    def __call__(self) -> float:
        self.inside += 1
        self.most = max(self.most, self.inside)
        time.sleep(0.002)
        self.inside -= 1
        return self.at


def test_threads_change_the_record_one_after_the_other() -> None:
    turns = Turns()
    clock = Clock(ALL, now=turns)
    clock.start(0)

    def work() -> None:
        for _ in range(5):
            with clock("gen"), clock("sync"):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert turns.most == 1
    turns.at += 4
    with clock("gen"):
        turns.at += 1
    assert clock.timings()["timing/idle_infer"] == pytest.approx(0.8)  # nothing is left under way


def test_the_trainer_waits_while_its_step_is_collected() -> None:
    work = Work()
    with work.clock.waiting():
        work.do("gen", 3.0)
        work.do("adv", 0.5)
    work.do("update_actor", 2.0)
    assert work.row()["pipeline/wait_rollout_s"] == 3.5
    assert work.row()["pipeline/wait_rollout_s"] == 0.0


def test_the_trainers_own_passes_as_the_reference_are_no_wait() -> None:
    work = Work(("train", "infer", "reward"))
    with work.clock.waiting():
        work.do("gen", 3.0)
        work.do("ref", 1.0)
    assert work.row()["pipeline/wait_rollout_s"] == 3.0


def test_the_engines_wait_from_the_end_of_their_sampling_until_the_push_begins() -> None:
    work = Work()
    work.do("gen", 3.0)
    work.do("adv", 0.5)
    work.do("update_actor", 2.0)
    work.do("sync", 1.0)
    work.do("eval", 5.0)
    assert work.row()["pipeline/wait_train_s"] == 2.5
    assert work.row()["pipeline/wait_train_s"] == 0.0  # nothing was sampled


def test_sampling_on_is_no_wait_and_a_step_without_an_update_is_one_until_its_row() -> None:
    work = Work()
    work.do("gen", 1.0)
    work.rest(0.25)
    work.do("gen", 1.0)
    work.do("adv", 0.5)
    assert work.row()["pipeline/wait_train_s"] == 0.5
    work.do("gen", 1.0)
    with work.clock("gen"):
        work.rest(1.0)
        assert work.row()["pipeline/wait_train_s"] == 0.0  # a run that ends in the middle


class Seen:
    def __init__(self) -> None:
        self.stages: list[tuple[Span, tuple[str, ...]]] = []
        self.calls: list[tuple[str, Span]] = []

    def stage(self, span: Span, roles: Sequence[str]) -> None:
        self.stages.append((span, tuple(roles)))

    def call(self, worker: str, span: Span) -> None:
        self.calls.append((worker, span))


def test_an_observer_sees_stages_and_calls_with_step_and_version() -> None:
    hands, seen = Hands(), Seen()
    clock = Clock(("train", "infer"), seen, now=hands)
    clock.called("infer rank 1", 90.0)
    clock.start(4)
    with clock("gen", step=5, version=3):
        hands.at += 2
        clock.called("infer rank 0", 101.0)
    with clock("adv"):
        hands.at += 1
    assert seen.calls == [
        ("infer rank 1", Span("start", 0, None, 90.0, 100.0)),
        ("infer rank 0", Span("gen", 6, 3, 101.0, 102.0)),
    ]
    assert seen.stages == [
        (Span("gen", 6, 3, 100.0, 102.0), ("infer",)),
        (Span("adv", 5, None, 102.0, 103.0), ()),
    ]


def test_a_stage_that_fails_is_seen_and_ends() -> None:
    hands, seen = Hands(), Seen()
    clock = Clock(("train",), seen, now=hands)
    clock.start(0)

    def fail() -> None:
        with clock("update_actor"):
            hands.at += 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    hands.at += 1
    assert clock.timings()["timing/idle_train"] == 0.5
    assert [span.stage for span, _ in seen.stages] == ["update_actor"]
