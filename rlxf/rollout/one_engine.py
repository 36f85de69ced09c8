"""One engine in this process, in place of all the engines of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from rlxf.core.types import PromptBatch, Rollouts
from rlxf.rollout.dispatch import Dispatch
from rlxf.rollout.engine import Sampling, Session


class Samples(Protocol):
    """What samples: an engine, or a recording in its place."""

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts: ...

    def session(self, sampling: Sampling) -> Session: ...

    def sleep(self) -> None: ...

    def wake_weights(self) -> None: ...

    def wake_cache(self) -> None: ...


class OneEngine:
    """All engines of a run, where there is one."""

    num_engines = 1

    def __init__(self, engine: Samples) -> None:
        self._engine = engine

    def num_slots(self, sampling: Sampling) -> int | None:
        """Completions that the engine decodes at the same time at most; None: all that it gets."""
        return self._engine.session(sampling).num_slots

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        """``num_samples`` completions of each prompt, in the order of the prompts."""
        return self._engine.generate(prompts, sampling)

    def sample(self, prompts: PromptBatch, sampling: Sampling, dispatch: Dispatch) -> Iterator[Rollouts]:
        """The completions of a step, of some prompts at a time."""
        rows = dispatch.order if dispatch.shares is None else dispatch.shares[0]
        mine = prompts if rows == tuple(range(len(prompts))) else prompts.select(rows)
        if len(dispatch.chunks) <= 1:
            yield self._engine.generate(mine, sampling)
            return
        session = self._engine.session(sampling)
        try:
            session.add(mine)
            while (part := session.advance()) is not None:
                yield part
        finally:
            session.close()

    def sleep(self) -> None:
        self._engine.sleep()

    def wake_weights(self) -> None:
        self._engine.wake_weights()

    def wake_cache(self) -> None:
        self._engine.wake_cache()
