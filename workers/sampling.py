"""Sampling a step's prompts on all engines: each engine a share of them, or the next prompt when it has room.

An engine that is lost is started again, and what it has not finished is sampled again; nothing is handed over twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from rlxf.core.errors import WorkerLost
from rlxf.core.types import PromptBatch, Rollouts
from rlxf.rollout.engine import Sampling
from rlxf.rollout.shares import part_of

from .group import WorkerGroup
from .remote import Answer, Pending


class Engines(Protocol):
    """The engines' processes, and those that are started in place of lost ones."""

    @property
    def group(self) -> WorkerGroup: ...

    @property
    def loading(self) -> dict[int, Pending]:
        """Engines that were started again and load their model, and the calls that do it."""
        ...

    def take_loaded(self, engine: int, answer: Answer) -> None:
        """One of them has loaded, and gets the weights from which the others sample."""
        ...

    def start_again(self, engines: Iterable[int], lost: WorkerLost, *, hopeless: bool) -> None:
        """Begin to start these again; ``hopeless``: others would be lost in the same way, and ``lost`` is raised."""
        ...

    def prove(self, engines: Iterable[int]) -> None:
        """These have done a piece of work."""
        ...


@dataclass(frozen=True, slots=True)
class Share:
    """Prompts that one engine samples.

    Six prompts in chunks of 4 and 2: ``sizes = (4, 2)``.
    """

    prompts: PromptBatch
    sizes: tuple[int, ...] = ()  # of the chunks that it hands over, in the order of the prompts; (): all at once


def sample_shares(engines: Engines, shares: Sequence[Share], sampling: Sampling) -> Iterator[Rollouts]:
    """The completions of all shares, in chunks, in the order in which they are there.

    A lost engine's share is sampled again as a whole, which gives the same completions to the bit where an engine's
    depend on what it samples beside them.

    Raises:
        WorkerLost: two engines were lost over the same share, or one twice before it had finished any.
    """
    group = engines.group
    todo = deque(number for number, share in enumerate(shares) if len(share.prompts))
    free = deque(engine for engine in range(len(group.members)) if engine not in engines.loading)
    left = [{*share.prompts.positions.tolist()} for share in shares]
    at_work: dict[Any, tuple[int, int, Pending]] = {}  # by the call's reference: engine and share
    losses: set[int] = set()  # shares over which an engine was lost

    def note(engine: int, number: int, calls: Iterable[Pending]) -> None:
        at_work.update((call.ref, (engine, number, call)) for call in calls)

    def drop(engine: int) -> None:
        for ref in [ref for ref, (other, _, _) in at_work.items() if other == engine]:
            del at_work[ref]

    while any(left):
        while todo and free:
            engine, number = free.popleft(), todo.popleft()
            note(engine, number, _begin(group, engine, shares[number], sampling))
        answer = _first(engines, [call for _, _, call in at_work.values()])
        if (loaded := _loaded(engines, answer)) is not None:
            free.append(loaded)
            continue
        engine, number, _ = at_work.pop(answer.call.ref)
        if answer.lost is not None:
            drop(engine)
            engines.start_again([engine], answer.lost, hopeless=number in losses)
            losses.add(number)
            todo.append(number)
            continue
        engines.prove([engine])
        parts = [answer.value] if isinstance(answer.value, Rollouts) else answer.value
        for part in parts:
            yield from _fresh(part, left[number], engine)
        if left[number]:
            note(engine, number, [group.one(engine, "advance")])
        else:
            drop(engine)
            free.append(engine)


def _begin(group: WorkerGroup, engine: int, share: Share, sampling: Sampling) -> list[Pending]:
    """The first calls of a share. One more is on its way while an answer is, so that the engine never waits."""
    if not share.sizes:
        return [group.one(engine, "generate", share.prompts, sampling)]
    first = group.one(engine, "start", share.prompts, sampling, share.sizes)
    return [first, group.one(engine, "advance")] if len(share.sizes) > 1 else [first]


def sample_queue(
    engines: Engines, prompts: PromptBatch, order: Sequence[int], sampling: Sampling, *, room: int
) -> Iterator[Rollouts]:
    """The completions of ``prompts``, of some of them at a time; an engine with room takes the next one of ``order``.

    Args:
        engines: all of them.
        prompts: of a step.
        order: their rows.
        sampling: how to sample.
        room: prompts that an engine samples at the same time.

    Raises:
        WorkerLost: two engines were lost over the same prompt, or one twice before it had finished any.
    """
    group, positions = engines.group, prompts.positions.tolist()
    waiting = deque(order)
    under_way: dict[int, list[int]] = {engine: [] for engine in range(len(group.members))}
    left, lost_rows = set(positions), set[int]()
    at_work: dict[Any, tuple[int, Pending]] = {}
    free = deque(engine for engine in under_way if engine not in engines.loading)

    def give(candidates: Sequence[int]) -> dict[int, list[int]]:
        """The next prompts for those that have room, one at a time in turn."""
        new: dict[int, list[int]] = {engine: [] for engine in candidates}
        while waiting and any(len(under_way[engine]) < room for engine in candidates):
            for engine in candidates:
                if waiting and len(under_way[engine]) < room:
                    new[engine].append(waiting.popleft())
                    under_way[engine].append(new[engine][-1])
        return new

    while left:
        for engine, rows in give(list(free)).items():
            if rows:
                free.remove(engine)
                call = group.one(engine, "start", prompts.select(rows), sampling, ())
                at_work[call.ref] = engine, call
        answer = _first(engines, [call for _, call in at_work.values()])
        if (loaded := _loaded(engines, answer)) is not None:
            free.append(loaded)
            continue
        engine, _ = at_work.pop(answer.call.ref)
        if answer.lost is not None:
            rows, under_way[engine] = under_way[engine], []
            engines.start_again([engine], answer.lost, hopeless=bool(lost_rows & set(rows)))
            lost_rows |= set(rows)
            waiting.extendleft(reversed(rows))
            continue
        engines.prove([engine])
        for part in answer.value:
            yield from _fresh(part, left, engine)
        under_way[engine] = [row for row in under_way[engine] if positions[row] in left]
        more = give([engine])[engine]
        if under_way[engine]:
            call = group.one(engine, "advance", prompts.select(more) if more else None)
            at_work[call.ref] = engine, call
        else:
            free.append(engine)


def _first(engines: Engines, calls: Sequence[Pending]) -> Answer:
    return engines.group.waiter.first([*calls, *engines.loading.values()])


def _loaded(engines: Engines, answer: Answer) -> int | None:
    """The engine that was started again and answers now; None: the answer is to another call."""
    for engine, call in engines.loading.items():
        if call.ref == answer.call.ref:
            engines.take_loaded(engine, answer)
            return engine
    return None


def _fresh(part: Rollouts, left: set[int], engine: int) -> Iterator[Rollouts]:
    """What is new of a part; it is not ``left`` any more."""
    rows = [row for row, position in enumerate(part.prompts.positions.tolist()) if position in left]
    if rows:
        found = part if len(rows) == len(part.prompts) else part_of(part, rows)
        left.difference_update(found.prompts.positions.tolist())
        yield replace(found, engine=torch.full((len(found),), engine))
