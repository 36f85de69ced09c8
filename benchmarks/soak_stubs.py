"""Workers that do nothing, so that a run on Ray costs what its driver costs: ``benchmarks/soak.py --engine stub``.

python -m benchmarks.soak_stubs ARGUMENTS ...    # is `python ray_gpt.py ARGUMENTS ...` with these workers
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.core.types import Batch, Metrics, Pairs, PairValues, PromptBatch, Rollouts, Sequences
from rlxf.models.megatron.parallel import Layout
from rlxf.platform import get_platform
from rlxf.platform.memory import PhaseMemory
from rlxf.platform.visible import visible_device
from rlxf.rollout.engine import Completion, Sampling, pack_rollouts, sample_requests
from rlxf.rollout.session import WholeSession
from rlxf.sync.checksums import Checksums, checksums
from rlxf.sync.plan import Bucket, TensorSpec, plan_buckets
from rlxf.sync.transports.transport import Address, Message, Receiver, ReceiverPlace, Transport
from workers import actor, engine, reference, reward

PLAN = plan_buckets([TensorSpec("head.weight", (512, 64), "float32")], 2**20)


class Policy:
    """Weights that stay as they are."""

    layout = Layout(device=torch.device("cpu"))

    def __init__(self, *_: Any) -> None:
        self._weight = torch.zeros(PLAN[0].tensors[0].shape)

    def prepare(self, batch: Batch, step: int) -> None: ...

    def update(self, batch: Batch, step: int) -> Metrics:
        return {"loss": 0.0}

    def is_untouched(self) -> bool:
        return True

    def token_logps(self, sequences: Sequences) -> Tensor:
        return torch.zeros(int(sequences.completion_lengths.sum()))

    def sync_plan(self) -> tuple[Bucket, ...]:
        return PLAN

    def begin_push(self) -> None: ...

    def keep_pushed(self) -> None: ...

    def memory_peaks(self) -> dict[str, int]:
        return {}

    def bucket_tensors(self, index: int, *, everywhere: bool) -> Iterator[tuple[str, Tensor]]:
        yield PLAN[index].tensors[0].name, self._weight

    def save_hf(self, folder: Path) -> None:
        folder.mkdir(parents=True)

    def save_checkpoint(self, folder: Path, background: bool = False) -> None:
        (folder / "weights").write_bytes(b"-")

    def checkpoint_written(self, wait: bool) -> bool:
        return True


class Engine:
    """Samples eight tokens that depend on the seed."""

    memory = PhaseMemory(get_platform("cpu"))

    def __init__(self, *_: Any) -> None:
        self._version = 0
        self._receiver: Receiver | None = None

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        seeds = [seed for part in sample_requests(prompts, sampling, None) for _, seed in part]
        rows = [[2 + (seed >> shift) % 500 for shift in range(8)] for seed in seeds]
        completions = [Completion(tokens=row, logps=[-1.0] * len(row)) for row in rows]
        return pack_rollouts(prompts, sampling.num_samples, completions, self._version)

    def session(self, sampling: Sampling) -> WholeSession:
        return WholeSession(self.generate, sampling)

    def begin_update(self) -> None: ...

    def open_receivers(self, transport: Transport, address: Address, first: int, host: str) -> None:
        platform = get_platform("cpu")
        where, device = visible_device(platform, 0), torch.device("cpu")
        place = ReceiverPlace(number=first, platform=platform, device=device, where=where, host=host)
        self._receiver = transport.receiver(address, place)

    def receive(self, bucket: Bucket, message: Message, *, check: bool = False) -> list[Checksums]:
        assert self._receiver is not None  # connected
        payload = self._receiver.receive(bucket, message)
        return [checksums(bucket, payload)] if check else []

    def load_bucket(self, bucket: Bucket, payload: Tensor) -> None: ...

    def end_update(self, version: int) -> None:
        self._version = version


class Frozen:
    """The reference: every log-probability is zero."""

    def __init__(self, *_: Any) -> None: ...

    def logps(self, pairs: Pairs) -> PairValues:
        return PairValues(chosen=torch.zeros(len(pairs)), rejected=torch.zeros(len(pairs)))

    def token_logps(self, sequences: Sequences) -> Tensor:
        return torch.zeros(int(sequences.completion_lengths.sum()))


class Sum:
    """Scores a completion by the sum of its tokens."""

    def score(self, rollouts: Rollouts) -> Tensor:
        return torch.tensor([float(sum(row)) for row in rollouts.sequences.completion_rows()])


# The names by which Ray shows the real ones, for `measure.part_of`.
class ActorWorker(actor.ActorWorker):
    make = staticmethod(Policy)


class RolloutWorker(engine.RolloutWorker):
    make = staticmethod(Engine)


class ReferenceWorker(reference.ReferenceWorker):
    make = staticmethod(Frozen)


class RewardWorker(reward.RewardWorker):
    make = staticmethod(lambda *_: {"reward": Sum()})


def main() -> int:
    from benchmarks import soak_stubs as here  # by the name under which workers import it, which is not `__main__`
    from workers import crew
    from workers.train import main as train

    crew.WORKERS.update(
        {
            "train": here.ActorWorker, "infer": here.RolloutWorker,
            "ref": here.ReferenceWorker, "reward": here.RewardWorker,
        }
    )  # fmt: skip
    return train(("python", "ray_gpt.py"), sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
