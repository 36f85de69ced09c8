"""A run of given times on a clock that nobody waits for: the real schedule, and stages that only take time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from rlxf.schedule import Lookahead, Stage

T = TypeVar("T")
STAGES = ("sample", "score", "refer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Seconds of each step's stages, and of what the driver does at boundaries."""

    sample: list[float]
    score: list[float]
    refer: list[float]
    update: list[float]
    push: float = 0.05
    evaluate: float = 0.5
    every: int = 0  # boundaries from one evaluation to the next; 0: none
    late: bool = False  # the trainer refers, when the step's turn has come
    sharing: frozenset[str] = frozenset()  # stages whose devices are the same

    def __len__(self) -> int:
        return len(self.update)

    def lane(self, name: str) -> str:
        name = "update" if self.late and name == "refer" else name
        return "shared" if name in self.sharing else name

    def evaluates(self, boundary: int) -> bool:
        return self.every > 0 and boundary % self.every == 0


def given_times(kind: str, num_engines: int, num_steps: int, *, slow: str = "", seed: int = 0, **others: Any) -> Times:
    """Times of about a second for sampling and for the update, less for the rest.

    Args:
        kind: "fixed"; "lognormal": each engine's share of the sampling varies, so that the longest grows with their
            number, and the update varies, too; "uneven": every fifth step samples four times as long, and every third
            one updates twice as long.
        num_engines: a step is sampled when the last of them is ready.
        slow: the stage that takes three times as long.
        others: fields of ``Times``.
    """
    random = np.random.default_rng(seed)
    shares = np.ones((num_steps, num_engines))
    times = {"score": np.full(num_steps, 0.3), "refer": np.full(num_steps, 0.2), "update": np.ones(num_steps)}
    if kind == "lognormal":
        shares = random.lognormal(sigma=0.8, size=shares.shape)
        times = {name: mean * random.lognormal(sigma=0.8, size=num_steps) for name, mean in times.items()}
    elif kind == "uneven":
        shares[::5] *= 4.0
        times["update"][::3] *= 2.0
    times["sample"] = shares.max(axis=1)
    if slow:
        times[slow] = 3.0 * times[slow]
    return Times(**{name: values.tolist() for name, values in times.items()}, **others)


@dataclass(frozen=True, kw_only=True, slots=True)
class Box:
    """One piece of work, as a picture of the run would show it."""

    name: str
    step: int  # or boundary
    begin: float
    end: float
    pushed: int  # boundary whose weights the engines had

    def meets(self, other: Box) -> bool:
        """Whether the two were under way at the same time."""
        return self.begin < other.end and other.begin < self.end


@dataclass(eq=False, slots=True)
class Task:
    box: Box
    effect: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)

    def finish(self) -> None:
        try:
            self.future.set_result(self.effect())
        except Exception as error:  # noqa: BLE001  as a thread's
            self.future.set_exception(error)


class Timeline:
    """Lanes whose work ends when the clock has come to its end; the clock goes on when somebody waits.

    Work says with ``takes`` how long it takes and what it does at its end.
    """

    overlap = True

    def __init__(self) -> None:
        self.now = 0.0
        self.pushed = -1
        self.boxes: list[Box] = []
        self.closed = False
        self._running: dict[str, Task] = {}
        self._announced: Task | None = None

    def takes(self, name: str, step: int, seconds: float, effect: Callable[[], Any]) -> None:
        box = Box(name=name, step=step, begin=self.now, end=self.now + seconds, pushed=self.pushed)
        self._announced = Task(box, effect)

    def start(self, lane: str, work: Callable[[], T]) -> Future[T]:
        assert lane not in self._running, f"{lane} does two things at a time"
        work()
        task, self._announced = self._announced, None
        assert task is not None
        self._running[lane] = task
        return task.future

    def wait(self, futures: Collection[Future[None]]) -> None:
        assert futures, "nothing is under way, and nothing will ever be"
        while not any(future.done() for future in futures):
            self._go_to(min(task.box.end for task in self._running.values()))

    def close(self) -> None:
        self.closed = True

    def at_boundary(self, name: str, boundary: int, seconds: float) -> None:
        """What the driver does itself; stages that are under way may end meanwhile."""
        begin, end = self.now, self.now + seconds
        while any(task.box.end <= end for task in self._running.values()):
            self._go_to(min(task.box.end for task in self._running.values()))
        self.now = end
        self.boxes.append(Box(name=name, step=boundary, begin=begin, end=end, pushed=self.pushed))

    def of(self, name: str) -> list[Box]:
        """In the order in which they ended."""
        return [box for box in self.boxes if box.name == name]

    @property
    def under_way(self) -> list[Box]:
        return [task.box for task in self._running.values()]

    def _go_to(self, time: float) -> None:
        self.now = time
        for lane, task in list(self._running.items()):
            if task.box.end <= time:
                del self._running[lane]
                self.boxes.append(task.box)
                task.finish()


@dataclass(eq=False, slots=True)
class Item:
    """A step that is being collected."""

    step: int
    boundary: int  # at which it is sampled
    done: set[str] = field(default_factory=set)


@dataclass
class VirtualRun:
    """Drives the schedule as ``rlxf/driver.py`` does.

    Args:
        times: of its stages; their number is that of the run's steps.
        num_ahead: k.
        first: the step that it begins with.
        waiting: steps of an earlier process.
        early: work has put what it makes into the step long before it ends.
        breaks: asked at the end of each piece of work, by name and step; may raise.
    """

    times: Times
    num_ahead: int
    first: int = 0
    waiting: Sequence[Item] = ()
    early: bool = False
    breaks: Callable[[str, int], None] = lambda name, step: None
    lanes: Timeline = field(default_factory=Timeline)
    steps: deque[Item] = field(default_factory=deque)
    trained: list[Item] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.given = {item.step: replace(item, done=set(item.done)) for item in self.waiting}
        stages = [
            Stage(
                name=name,
                lane=self.times.lane(name),
                is_done=lambda item, name=name: name in item.done,
                work=partial(self._work, name),
                late=self.times.late and name == "refer",
            )
            for name in STAGES
        ]
        self.steps.extend(self.waiting)
        self.schedule = Lookahead[Item](
            stages, self.lanes, Item, num_ahead=self.num_ahead, num_steps=len(self.times), steps=self.steps
        )

    def run(self) -> VirtualRun:
        cut = self.schedule.unsampled()
        if cut:  # when the earlier process ended
            self.lanes.at_boundary("push saved", cut[0].boundary, self.times.push)
            self.lanes.pushed = cut[0].boundary
            self.schedule.sampled()
        self.boundary(self.first)
        for step in range(self.first, len(self.times)):
            item = self.schedule.take(step)
            assert item.step == step
            self.schedule.beside(self.times.lane("update"), partial(self._work, "update", item))
            self.trained.append(item)
            self.schedule.sampled()
            self.boundary(step + 1)
        return self

    def boundary(self, boundary: int) -> None:
        if boundary > self.first:
            self.schedule.beside("sync", partial(self._push, boundary))
        else:
            self.lanes.at_boundary("push", boundary, self.times.push)
        self.lanes.pushed = boundary
        if self.times.evaluates(boundary):
            self.schedule.drained()
            self.lanes.at_boundary("evaluate", boundary, self.times.evaluate)

    def _push(self, boundary: int) -> None:
        self.lanes.takes("push", boundary, self.times.push, lambda: None)

    def _work(self, name: str, item: Item) -> None:
        def effect() -> None:
            self.breaks(name, item.step)
            item.done.add(name)

        assert name not in item.done
        if self.early:
            item.done.add(name)
        self.lanes.takes(name, item.step, getattr(self.times, name)[item.step], effect)


def ideal_end(times: Times, num_ahead: int) -> float:
    """When the last boundary is over, if nothing waits for anything but what the definition of ``rollout.lookahead``
    says. It shares no code with the schedule. For k steps ahead, N steps, and everything that ends "at" a time:

        opened(b)   the engines have W(b), and what the driver does at boundary b is done
        sampled(s)  = max(sampled(s - 1), opened(max(0, s - k))) + sample(s)
        scored(s)   = max(scored(s - 1), sampled(s)) + score(s)
        referred(s) = max(referred(s - 1), scored(s)) + refer(s)      late: max(opened(s), scored(s)) + refer(s)
        updated(s)  = max(opened(s), referred(s)) + update(s)         step 0 also waits for sampled(k - 1)
        pushed(b)   = max(updated(b - 1), sampled(b + k - 1)) + push
        opened(b)   = pushed(b), or with an evaluation max(pushed(b), referred(b + k - 1)) + evaluate
                                                            late: max(pushed(b), scored(b + k - 1)) + evaluate

    with the last step in place of those that are not part of the run.
    """
    num_steps, k = len(times), num_ahead
    sampled, scored, referred = [0.0] * num_steps, [0.0] * num_steps, [0.0] * num_steps
    opened = times.push + (times.evaluate if times.evaluates(0) else 0.0)
    known = 0  # steps whose sampling has a time
    for s in range(num_steps):
        last = min(s + k, num_steps - 1)  # sampled at boundary s, or at an earlier one
        while known <= last:
            before = known - 1 if known else None
            sampled[known] = max(opened, sampled[before] if before is not None else 0.0) + times.sample[known]
            scored[known] = max(sampled[known], scored[before] if before is not None else 0.0) + times.score[known]
            if not times.late:
                free = referred[before] if before is not None else 0.0
                referred[known] = max(scored[known], free) + times.refer[known]
            known += 1
        if times.late:
            referred[s] = max(opened, scored[s]) + times.refer[s]
        begin = max(opened, referred[s])
        if s == 0 and k:
            begin = max(begin, sampled[min(k - 1, num_steps - 1)])
            if times.late:  # the trainer refers as soon as it can, and waits only then
                begin = max(referred[0], sampled[min(k - 1, num_steps - 1)])
        updated = begin + times.update[s]
        opened = max(updated, sampled[last]) + times.push
        if times.evaluates(s + 1):
            opened = max(opened, (scored if times.late else referred)[last]) + times.evaluate
    return opened
