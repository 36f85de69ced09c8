"""A checksum per tensor of a bucket, made where it was packed and where it was received, on the device of each."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rlxf.core.errors import SyncError
from rlxf.sync.plan import Bucket

Checksums = Mapping[str, int]
"""By the name of the tensor."""

_PIECE = 2**22  # numbers at a time: 32 MiB of int64
_STEP = 0x9E3779B1  # odd: every position has a weight of its own


def checksums(bucket: Bucket, payload: Tensor) -> Checksums:
    """Of each tensor in ``payload`` ([>= bucket.num_bytes] uint8): a sum of its bytes, in fours, weighted by position.

    Integers that wrap around, so every kind of device gives the same.
    """
    found = {}
    for spec in bucket.tensors:
        raw = payload[spec.offset : spec.offset + spec.num_bytes]
        whole = spec.num_bytes // 4 * 4
        total = _sum(raw[:whole].view(torch.int32)) + _sum(raw[whole:]) * 3
        found[spec.name] = total & (2**63 - 1)
    return found


def _sum(numbers: Tensor) -> int:
    total = torch.zeros((), dtype=torch.int64, device=numbers.device)
    for start in range(0, len(numbers), _PIECE):
        piece = numbers[start : start + _PIECE].long()
        place = torch.arange(start + 1, start + 1 + len(piece), device=numbers.device)
        total += (piece * (place * _STEP & 0x7FFFFFFF | 1)).sum()
    return int(total)


def compare(sent: Checksums, received: Checksums, who: str) -> None:
    """Whether ``who`` received what was sent.

    Raises:
        SyncError: a tensor differs, or is not there.
    """
    wrong = [name for name in sent if received.get(name) != sent[name]]
    if wrong:
        raise SyncError(
            f"{who} received other bytes than the trainer sent: {len(wrong)} of {len(sent)} tensors of a bucket "
            f"differ, the first is {wrong[0]}. Set sync.transport=object_store, and report it with the transport used"
        )
