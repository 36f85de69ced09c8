"""The stages whose data set already holds what they train on."""

from __future__ import annotations

from rlxf.algorithms.algorithm import reference_stage, with_reference
from rlxf.core.types import Batch, Examples, Pairs, RewardPairs
from rlxf.loop.collected import Collected
from rlxf.loop.run import Online, Reference, Run
from rlxf.observe.formulas import data_metrics
from rlxf.schedule.lookahead import Stage


class FromFile:
    """Examples (``sft``) and pairs of a reward model (``rm``): whole as they are read."""

    def stages(self, run: Run) -> tuple[Stage[Collected], ...]:
        source = run.source
        assert not isinstance(source, Online)  # assembly opens the files of these stages

        def read(collected: Collected) -> None:
            with run.stop.interruptible():
                data = source.next_batch(collected.step)
                collected.metrics = data_metrics(source, collected.step)
                collected.data = data

        return (
            Stage(name="read", lane="driver", is_done=lambda item: item.data is not None, work=read),
            reference_stage(run, self),
        )

    def record(self, run: Run, collected: Collected) -> None:
        """The file says it."""

    def complete(self, run: Run, collected: Collected) -> None:
        """No step uses another one."""

    def batch(self, data: Pairs | Examples, reference: Reference) -> Batch:
        assert isinstance(data, Examples | RewardPairs)  # as these stages' files are read
        return data


class PairsFromFile(FromFile):
    """Preference pairs (``dpo``), which are compared with the reference."""

    def batch(self, data: Pairs | Examples, reference: Reference) -> Batch:
        assert isinstance(data, Pairs)
        return with_reference(data, reference)
