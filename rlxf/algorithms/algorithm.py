"""The algorithm's protocol: the things that differ between stages within a driver step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from rlxf.core.types import Batch, Examples, Pairs, ReferencedPairs
from rlxf.loop.collected import Collected
from rlxf.loop.run import Reference, Run
from rlxf.schedule.lookahead import Stage


class Algorithm(Protocol):
    """One stage's way from the data to what an update trains on. It has no state: that is the run's.

    What the update minimises is the stage's ``objective`` in ``rlxf/config/stages.py``, which the checks of a recipe
    read, too. It is built in the actor's processes, and ``batch`` gives what it takes.
    """

    def stages(self, run: Run) -> tuple[Stage[Collected], ...]:
        """How a step is collected, in order; the first stage reads or samples it, the last one fills in ``batch``.

        A step that ends up without any rows in ``data`` (all its prompts tie) needs no ``batch``: no update is made.
        """
        ...

    def record(self, run: Run, collected: Collected) -> None:
        """Write down how a step was made, when its turn to be trained on has come."""
        ...

    def complete(self, run: Run, collected: Collected) -> None:
        """Remember of a step that is complete now what later steps use."""
        ...

    def batch(self, data: Pairs | Examples, reference: Reference) -> Batch:
        """What was collected, or is held out, with what the reference says of it where the objective reads that."""
        ...


def with_reference(pairs: Pairs, reference: Reference) -> ReferencedPairs:
    """Pairs with the reference's log-probabilities: what the preference objective takes."""
    return ReferencedPairs(pairs=pairs, reference=reference.logps(pairs))


def with_beta(batch: Batch, beta: float) -> Batch:
    """Pairs that are trained on, or evaluated, with this beta; other batches as they are."""
    return replace(batch, beta=beta) if isinstance(batch, ReferencedPairs) else batch


def reference_stage(
    run: Run,
    algorithm: Algorithm,
    *,
    before: Callable[[Collected], None] = lambda collected: None,
    also: Callable[[Collected], None] = lambda collected: None,
) -> Stage[Collected]:
    """The last stage of every algorithm: ``batch`` from ``data``. A step without rows is done without it.

    Where the reference is the actor with its adapters off, the trainer has to answer: it does so when the step's turn
    has come, before the update.

    Args:
        run: the run.
        algorithm: what it collects.
        before: asks the reference part by part, in a run whose steps move on in chunks.
        also: asks it what is not trained on, once the step has pairs.
    """
    on_actor = run.config.reference_is_base

    def refer(collected: Collected) -> None:
        before(collected)
        assert collected.data is not None  # the stages before this one
        if len(collected.data):
            also(collected)
            collected.batch = algorithm.batch(collected.data, run.reference_for(collected))

    return Stage(
        name="ref",
        lane=run.lane("train" if on_actor else "ref"),
        is_done=lambda item: item.batch is not None or (item.data is not None and not len(item.data)),
        work=refer,
        late=on_actor,
        streams=run.streams("ref"),
    )
