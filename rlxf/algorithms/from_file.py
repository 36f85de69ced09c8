"""The stages whose data set already holds what they train on."""

from __future__ import annotations

from rlxf.algorithms.algorithm import with_reference
from rlxf.core.types import Batch, Examples, Metrics, Pairs, RewardPairs
from rlxf.loop.run import Online, Reference, Run
from rlxf.observe.formulas import data_metrics


class FromFile:
    """Examples (``sft``) and pairs of a reward model (``rm``): whole as they are read."""

    def collect(self, run: Run, step: int) -> tuple[Pairs | Examples, Metrics]:
        source = run.source
        assert not isinstance(source, Online)  # assembly opens the files of these stages
        return source.next_batch(step), data_metrics(source, step)

    def batch(self, data: Pairs | Examples, reference: Reference) -> Batch:
        assert isinstance(data, Examples | RewardPairs)  # as these stages' files are read
        return data


class PairsFromFile(FromFile):
    """Preference pairs (``dpo``), which are compared with the reference."""

    def batch(self, data: Pairs | Examples, reference: Reference) -> Batch:
        assert isinstance(data, Pairs)
        return with_reference(data, reference)
