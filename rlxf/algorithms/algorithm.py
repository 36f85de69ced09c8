"""The algorithm's protocol: the two things that differ between stages within a driver step."""

from __future__ import annotations

from typing import Protocol

from rlxf.core.types import Batch, Examples, Metrics, Pairs, ReferencedPairs
from rlxf.loop.run import Reference, Run


class Algorithm(Protocol):
    """One stage's way from the data to what an update trains on. It has no state: that is the run's.

    What the update minimises is the stage's ``objective`` in ``rlxf/config/stages.py``, which the checks of a recipe
    read, too. It is built in the actor's processes, and ``batch`` gives what it takes.
    """

    def collect(self, run: Run, step: int) -> tuple[Pairs | Examples, Metrics]:
        """What driver step ``step`` (0 is the first) trains on, and the numbers of its making.

        Without any rows (a step whose prompts all tie) no update is made. Before the reference: a row that is dropped
        here costs neither a reference nor a training pass.
        """
        ...

    def batch(self, data: Pairs | Examples, reference: Reference) -> Batch:
        """What was collected, or is held out, with what the reference says of it where the objective reads that."""
        ...


def with_reference(pairs: Pairs, reference: Reference) -> ReferencedPairs:
    """Pairs with the reference's log-probabilities: what the preference objective takes."""
    return ReferencedPairs(pairs=pairs, reference=reference.logps(pairs))
