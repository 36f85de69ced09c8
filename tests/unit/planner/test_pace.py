"""A predicted step takes as long as the real schedule makes one, on a clock that nobody waits for."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from rlxf.planner.jobs import Place
from rlxf.planner.pace import ADV, GEN, REF, SYNC, UPDATE, Stage, pace
from tests.unit.planner.worlds import WORK, jobs, train_job
from tests.unit.schedule.virtual import STAGES, Item, Times, VirtualRun

STEPS = 40
SECONDS = [
    dict(zip((GEN, ADV, REF, UPDATE, SYNC), times, strict=True))
    for times in (
        (1.0, 0.3, 0.2, 1.0, 0.05), (3.0, 0.5, 0.4, 1.0, 0.1), (1.0, 0.5, 0.4, 3.0, 0.1), (1.0, 3.0, 0.4, 1.0, 0.1),
        (1.0, 0.4, 3.0, 1.0, 0.1), (1.0, 1.0, 1.0, 1.0, 1.0), (0.2, 0.1, 0.1, 0.2, 1.5),
    )
]  # fmt: skip


def stages(seconds: dict[str, float]) -> dict[str, Stage]:
    return {name: Stage(name=name, seconds=value, flops=0.0, devices=1) for name, value in seconds.items()}


@dataclass
class StreamedRun(VirtualRun):
    """Stages that take chunks begin beside the one before them, and end one chunk after it at the earliest."""

    chunks: int = 1
    begins: float = 1.0  # share of the sampling after which a chunk is there

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks > 1:
            self.schedule._stages = tuple(
                replace(stage, streams=stage.name != "sample") for stage in self.schedule._stages
            )
        self._ends: dict[tuple[str, int], list[float]] = {}

    def _work(self, name: str, item: Item) -> None:
        if self.chunks == 1 or name == "update":
            super()._work(name, item)
            return
        now, whole = self.lanes.now, getattr(self.times, name)[item.step]
        before = STAGES[STAGES.index(name) - 1]
        if name == "sample":
            share = (1 - self.begins) / (self.chunks - 1)
            ends = [now + whole * (self.begins + share * chunk) for chunk in range(self.chunks)]
        else:
            ends, free = [], now
            for ready in self._ends[before, item.step]:
                free = max(free, ready) + whole / self.chunks
                ends.append(free)
        self._ends[name, item.step] = ends
        self.lanes.takes(name, item.step, ends[-1] - now, lambda: item.done.add(name))


def simulated(
    seconds: dict[str, float],
    ahead: int,
    *,
    late: bool = False,
    sharing: frozenset[str] = frozenset(),
    **streamed: float,
) -> float:
    """Seconds of a step of a long run, in its middle."""
    times = Times(
        sample=[seconds[GEN]] * STEPS, score=[seconds[ADV]] * STEPS, refer=[seconds[REF]] * STEPS,
        update=[seconds[UPDATE]] * STEPS, push=seconds[SYNC], late=late, sharing=sharing,
    )  # fmt: skip
    done = StreamedRun(times, ahead, **streamed).run()  # type: ignore[arg-type]
    ends = [box.end for box in done.lanes.of("push")]
    middle = ends[len(ends) // 4 : -len(ends) // 4]
    return sum(b - a for a, b in pairwise(middle)) / (len(middle) - 1)


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("seconds", SECONDS)
def test_roles_on_devices_of_their_own(seconds: dict[str, float], ahead: int) -> None:
    found = pace(jobs(), stages(seconds), lookahead=ahead, streams=False).seconds
    assert found == pytest.approx(simulated(seconds, ahead), rel=0.05)


def test_random_seconds() -> None:
    draw = random.Random(0)
    for _ in range(200):
        seconds = {name: draw.lognormvariate(0, 1) for name in (GEN, ADV, REF, UPDATE, SYNC)}
        ahead = draw.randrange(4)
        found = pace(jobs(), stages(seconds), lookahead=ahead, streams=False).seconds
        assert found == pytest.approx(simulated(seconds, ahead), rel=0.05), (seconds, ahead)


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("seconds", SECONDS)
def test_the_trainer_is_its_own_reference(seconds: dict[str, float], ahead: int) -> None:
    own = replace(jobs(), train=train_job(refers=True), reference=None)
    found = pace(own, stages(seconds), lookahead=ahead, streams=False)
    assert found.seconds == pytest.approx(simulated(seconds, ahead, late=True), rel=0.05)
    busy = (seconds[UPDATE] + seconds[REF] + seconds[SYNC]) / found.seconds
    assert found.busy["train"] == pytest.approx(busy)


LANES = {"train": "update", "infer": "sample", "ref": "refer", "reward": "score"}


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize(
    "roles", ["ref reward", "train ref", "train reward", "train ref reward", "infer reward", "infer ref reward"]
)
@pytest.mark.parametrize("seconds", SECONDS)
def test_roles_that_share_devices(seconds: dict[str, float], roles: str, ahead: int) -> None:
    together = tuple(roles.split())
    apart = [Place(name=role, roles=(role,), devices=1) for role in LANES if role not in together]  # type: ignore[arg-type]
    shared = jobs(Place(name="shared", roles=together, devices=2), *apart)  # type: ignore[arg-type]
    sharing = frozenset(LANES[role] for role in together)
    found = pace(shared, stages(seconds), lookahead=ahead, streams=False).seconds
    real = simulated(seconds, ahead, sharing=sharing)
    if ahead and {"train", "ref"} <= set(together) and seconds[REF] + seconds[ADV] > seconds[GEN]:
        # The trainer's lane takes an update before the reference of a later step: a bound, not the pace.
        assert 0.75 * real <= found <= 1.05 * real
    else:
        assert found == pytest.approx(real, rel=0.05)


def test_colocated_and_local_runs_are_serial() -> None:
    seconds = SECONDS[1]
    everything = jobs(Place(name="all", roles=("train", "infer", "ref", "reward"), devices=4))
    for run in (everything, jobs(local=True)):
        found = pace(run, stages(seconds), lookahead=0, streams=False)
        assert found.seconds == pytest.approx(sum(seconds.values()))
    assert pace(everything, stages(seconds), lookahead=0, streams=False).busy_all == pytest.approx(1.0)
    assert pace(jobs(local=True), stages(seconds), lookahead=2, streams=False).seconds == pytest.approx(
        sum(seconds.values())
    )


@pytest.mark.parametrize("first", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("chunks", [2, 8])
@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("seconds", SECONDS)
def test_chunks_are_scored_beside_the_sampling(
    seconds: dict[str, float], ahead: int, chunks: int, first: float
) -> None:
    streamed = jobs(chunks=chunks, train=train_job(mini_batch=WORK.prompts))
    found = pace(streamed, stages(seconds), lookahead=ahead, streams=True, first=first).seconds
    assert found == pytest.approx(simulated(seconds, ahead, chunks=chunks, begins=first), rel=0.05)
    assert found <= pace(streamed, stages(seconds), lookahead=ahead, streams=False).seconds


def test_the_first_mini_batch_begins_before_the_last_chunk() -> None:
    seconds = {GEN: 4.0, ADV: 0.4, REF: 0.4, UPDATE: 2.0, SYNC: 0.1}
    whole, halves = (
        pace(jobs(chunks=8, train=train_job(mini_batch=size)), stages(seconds), lookahead=0, streams=True, first=0.2)
        for size in (WORK.prompts, WORK.prompts // 2)
    )
    assert halves.seconds == pytest.approx(whole.seconds - 1.0)


def test_equal_lengths_leave_nothing_to_hide() -> None:
    """All completions end together, unless an engine has more of them than slots."""
    seconds = SECONDS[1]
    plan = jobs(chunks=8, train=train_job(mini_batch=WORK.prompts))
    found = pace(plan, stages(seconds), lookahead=0, streams=True).seconds
    assert found > seconds[GEN] + max(seconds[ADV], seconds[REF]) + seconds[UPDATE] + seconds[SYNC]
    uneven = replace(plan, work=replace(WORK, longest=4.0))
    assert pace(uneven, stages(seconds), lookahead=0, streams=True).seconds < found


def test_busy_shares_are_device_seconds() -> None:
    places = tuple(
        Place(name=role, roles=(role,), devices=devices)  # type: ignore[arg-type]
        for role, devices in (("train", 4), ("infer", 2), ("ref", 1), ("reward", 1))
    )
    seconds = {GEN: 2.0, ADV: 0.5, REF: 0.25, UPDATE: 1.0, SYNC: 0.25}
    found = pace(jobs(*places), stages(seconds), lookahead=0, streams=False)
    assert found.seconds == pytest.approx(4.0)
    assert found.busy == pytest.approx({"train": 1.25 / 4, "infer": 2.25 / 4, "ref": 0.25 / 4, "reward": 0.5 / 4})
    assert found.busy_all == pytest.approx((4 * 1.25 + 2 * 2.25 + 0.25 + 0.5) / (8 * 4.0))


def test_a_push_between_roles_of_the_same_devices_counts_once() -> None:
    shared = Place(name="shared", roles=("train", "infer"), devices=2)
    apart = [Place(name=role, roles=(role,), devices=1) for role in ("ref", "reward")]  # type: ignore[arg-type]
    seconds = {GEN: 2.0, ADV: 0.5, REF: 0.25, UPDATE: 1.0, SYNC: 0.25}
    found = pace(jobs(shared, *apart), stages(seconds), lookahead=0, streams=False)
    assert found.busy_all == pytest.approx((2 * 3.25 + 0.25 + 0.5) / (4 * 4.0))


def test_cores_of_a_cpu_bound_what_overlaps() -> None:
    seconds = SECONDS[5]
    found = pace(jobs(), stages(seconds), lookahead=1, streams=False, cores=2)
    assert found.seconds == pytest.approx(2.5)
    assert pace(jobs(), stages(seconds), lookahead=1, streams=False, cores=1).seconds == pytest.approx(5.0)
