"""Small tensors of the host: rows of them, and their way to a device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def take(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]`` of tensors on the CPU; ``index`` is [n] int64.

    By numpy, which takes a fifth of torch's time for a few rows. Torch also gives the interpreter up to the other
    threads of the driver at each call, and they fight for it.
    """
    return torch.from_numpy(values.numpy()[index.numpy()])


def join_slices(values: Tensor, begins: NDArray[np.int64], ends: NDArray[np.int64]) -> Tensor:
    """``values[begin:end]`` of each begin and end, one after the other; a copy, on the CPU.

    As bytes, each slice as a whole: an index of every value takes twice as long for the rows of a chunk, and eight
    times as long for a thousand rows of a thousand tokens; and the interpreter is kept, see ``take``. Ten thousand rows
    of a few tokens take 2 ms more.
    """
    flat = np.ascontiguousarray(values.numpy()).data
    joined = bytearray().join([flat[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)])
    return torch.frombuffer(joined, dtype=values.dtype) if joined else values.new_empty(0)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values``, made on the host, on a device.

    The host does not wait: a plain copy ends only when the device has done everything it was asked for before.
    """
    if values.device == device or device.type == "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
