"""Weights that engines still sample from although the actor has newer ones, in a checkpoint: ``<checkpoint>/pushed``.

A file of safetensors for each bucket, so that one bucket at a time is in memory. They are found by the names of their
tensors: the run that reads them may have another layout, and other buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlxf.core.errors import CheckpointError
from rlxf.sync.plan import Bucket

FOLDER = "pushed"


def save_buckets(checkpoint: Path, plan: Sequence[Bucket], payload: Callable[[int], Tensor]) -> None:
    """Write the buckets of a plan; ``payload`` gives the bytes of each, [num_bytes] uint8."""
    folder = checkpoint / FOLDER
    folder.mkdir()
    for index, bucket in enumerate(plan):
        tensors = {name: tensor.contiguous() for name, tensor in bucket.views(payload(index))}
        save_file(tensors, folder / f"bucket_{index:05d}.safetensors")


def saved_tensors(checkpoint: Path, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that is in a bucket, from what ``save_buckets`` wrote.

    Raises:
        CheckpointError: something is missing.
    """
    missing = {spec.name for spec in bucket.tensors}
    for path in sorted((checkpoint / FOLDER).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in missing & set(file.keys()):
                missing.discard(name)
                yield name, file.get_tensor(name)
    if missing:
        raise CheckpointError(
            f"{checkpoint / FOLDER}: {min(missing)} is missing; copy the checkpoint again, or name an earlier one in "
            "training.resume"
        )
