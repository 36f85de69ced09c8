"""Requests that come at the same time are scored together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from rlxf.core.errors import ScoreError
from rlxf.core.waiting import in_thread
from rlxf.tools.serve.forms import Scores, Wanted

Score = Callable[[Sequence[Wanted]], Scores]
"""Scores of the completions of some requests, one request after the other."""


@dataclass(kw_only=True, slots=True)
class Counts:
    """What the service has done since it was started."""

    requests: int = 0
    completions: int = 0
    failed: int = 0  # requests that got no scores
    batches: int = 0  # calls of the model or function
    queue: int = 0  # completions that wait or are being scored


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    wanted: Wanted
    gone: Callable[[], Awaitable[bool]]  # nobody waits for the answer any more
    scores: asyncio.Future[Scores] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Batcher:
    """Gives requests to a model or function, one batch at a time.

    Args:
        score: runs in a thread.
        batch_size: completions; a batch is not longer by more than its last request.
        max_wait_s: how long a batch that is not full waits for more.
        merge: put requests together; else each is a batch.
    """

    def __init__(self, score: Score, *, batch_size: int, max_wait_s: float, merge: bool) -> None:
        self._score, self._merge = score, merge
        self._batch_size, self._max_wait_s = batch_size, max_wait_s
        self._jobs: asyncio.Queue[_Job] = asyncio.Queue()
        self.counts = Counts()

    async def score(self, wanted: Wanted, gone: Callable[[], Awaitable[bool]]) -> Scores:
        """The scores of a request, in its order; raises what scoring it raises."""
        job = _Job(wanted=wanted, gone=gone)
        self.counts.requests += 1
        self.counts.completions += len(wanted)
        self.counts.queue += len(wanted)
        try:
            self._jobs.put_nowait(job)
            return await job.scores
        except BaseException:
            self.counts.failed += 1
            raise
        finally:
            self.counts.queue -= len(wanted)

    async def run(self) -> None:
        """Score what is asked for, until this task is cancelled."""
        while True:
            jobs = []
            for job in await self._next():
                if await job.gone():
                    job.scores.set_exception(ScoreError("the client has gone"))
                else:
                    jobs.append(job)
            if jobs:
                await self._answer(jobs)

    async def _next(self) -> list[_Job]:
        jobs = [await self._jobs.get()]
        count = len(jobs[0].wanted)
        try:
            async with asyncio.timeout(self._max_wait_s if self._merge else 0):
                while self._merge and count < self._batch_size:
                    jobs.append(await self._jobs.get())
                    count += len(jobs[-1].wanted)
        except TimeoutError:
            pass
        return jobs

    async def _answer(self, jobs: list[_Job]) -> None:
        self.counts.batches += 1
        try:
            scores = await asyncio.wrap_future(
                in_thread(partial(self._score, [job.wanted for job in jobs]), "score requests")
            )
        except Exception as error:  # noqa: BLE001  each request is told
            if len(jobs) > 1:  # one of them spoils it for the others
                for job in jobs:
                    await self._answer([job])
            elif not jobs[0].scores.done():
                jobs[0].scores.set_exception(error)
            return
        for job in jobs:
            if not job.scores.done():
                job.scores.set_result(scores[: len(job.wanted)])
            scores = scores[len(job.wanted) :]
