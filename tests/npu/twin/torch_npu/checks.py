"""What an operation refuses, and how often each was called."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
CALLS: collections.Counter[str] = collections.Counter()


class Refused(RuntimeError):
    """The documentation of the real operation excludes this call."""


def need(condition: bool, message: str) -> None:
    if not condition:
        raise Refused(message)


def tensor(name: str, value: Tensor, *, dims: range = range(1, 9)) -> None:
    need(isinstance(value, Tensor), f"{name} is a {type(value).__name__}")
    need(value.dtype in FLOATS, f"{name} is {value.dtype}")
    need(value.dim() in dims, f"{name} has {value.dim()} dimensions")


def numbers(value: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """What a check reads: as an array, so that a test can tell the twin's reads from those of the program."""
    return value.detach().float().numpy()
