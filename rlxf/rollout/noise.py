"""Exponential noise for many requests in one pass, each by its own seed and the number of its token.

A sampler takes the token with the largest ``probability / noise``. Samplers with a generator per request draw a row at
a time: on an NPU a kernel launch per sequence and token. Here a row is a function of (seed, position) alone, computed
for all rows by products with a fixed table:

    key  = 64 bits, hashed from seed and position on the host
    u[v] = (the sum of table[k, v] over the bits k that are 1 in the key) mod 1

The table holds integers, so that every sum is exact: a row does not depend on the rows beside it. Columns of the table
are independent, so the entries of a row are. Two rows are independent in every column, because their keys differ.
Integer hashes with shifts would do as well, but an NPU computes shifts on its few CPU cores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from rlxf.core.tensors import to_device

_KEY_BITS = 64
_BITS = 15  # of a table entry: 64 of them add up exactly even where a device rounds fp32 products to 11 bits
_ELEMENTS = 2**24  # of the noise at a time: 64 MiB
_STEP = 4  # of a generator's offset per draw, which is what a runner takes back for a token that does not count

Sample = Callable[[Tensor, Mapping[int, Any]], Tensor]


class Seeded(Protocol):
    """A request's generator, as far as it is used: ``torch.Generator`` on a device that counts by offsets."""

    def initial_seed(self) -> int: ...

    def get_offset(self) -> int: ...

    def set_offset(self, offset: int) -> Any: ...


def exponential(seeds: Sequence[int], positions: Sequence[int], width: int, device: torch.device) -> Tensor:
    """[rows, width] fp32, exponentially distributed with rate 1, > 0 and finite.

    Args:
        seeds: of each row, in [0, 2**64).
        positions: of each row: how many tokens its request has drawn before.
        width: size of the vocabulary.
        device: where the noise is made.
    """
    bits = to_device(_key_bits(seeds, positions), device)
    rows = max(1, _ELEMENTS // width)
    out = torch.empty(len(seeds), width, device=device)
    for start in range(0, len(seeds), rows):
        part = bits[start : start + rows]
        high, low = (_fraction(part @ table) for table in _table(width, device))
        # Together 30 bits. A little less than 1 at most, and never 0: a ratio must not become infinite.
        uniform = high.add_(low, alpha=2.0**-_BITS * (1 - 2**-8)).add_(2.0 ** (-2 * _BITS - 2))
        out[start : start + rows] = uniform.neg_().log1p_().neg_()
    return out


def install(sampler: ModuleType) -> None:
    """Let vLLM's plugin draw by this noise: replaces ``random_sample`` of the module that its sampler calls it in."""
    functions = vars(sampler)
    if not isinstance(functions["random_sample"], _RandomSample):
        functions["random_sample"] = _RandomSample(functions["random_sample"])


class _RandomSample:
    """[rows] int64 tokens drawn from ``probs`` [rows, vocabulary], by the generators of the rows that have one."""

    def __init__(self, original: Sample) -> None:
        self._original = original

    def __call__(self, probs: Tensor, generators: Mapping[int, Seeded]) -> Tensor:
        if not generators:
            return self._original(probs, generators)
        noise = exponential(*_draw(generators.values()), probs.size(1), probs.device)
        if list(generators) != list(range(len(probs))):
            rows = to_device(torch.tensor(list(generators)), probs.device)
            noise = torch.empty_like(probs).exponential_().index_copy_(0, rows, noise)
        return probs.div_(noise).argmax(dim=-1).view(-1)


def _draw(generators: Any) -> tuple[list[int], list[int]]:
    """Seeds and positions, and every generator has drawn once more."""
    seeds, positions = [], []
    for generator in generators:
        offset = generator.get_offset()
        generator.set_offset(offset + _STEP)
        seeds.append(generator.initial_seed())
        positions.append(offset // _STEP)
    return seeds, positions


def _fraction(sums: Tensor) -> Tensor:
    """[rows, width] in [0, 1): what the sums are modulo 2 ** _BITS, over that."""
    sums = sums.mul_(2.0**-_BITS)
    return sums.sub_(sums.floor())


def _key_bits(seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
    """[rows, 64] fp32 zeros and ones."""
    with np.errstate(over="ignore"):
        keys = _mix(_mix(np.array(seeds, dtype=np.uint64)) + np.array(positions, dtype=np.uint64))
    bits = np.unpackbits(keys[:, None].view(np.uint8), axis=1)
    return torch.from_numpy(bits.astype(np.float32))


def _mix(values: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64 bits whose results look independent."""
    values = (values + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=2)
def _table(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two of [64, width] fp32 integers below 2 ** 15, the same in every process; 64 MiB for 128k tokens."""
    drawn = np.random.Philox(key=0).random_raw(2 * _KEY_BITS * -(-width // 4)).view(np.uint16) & (2**_BITS - 1)
    tables = torch.from_numpy(drawn.astype(np.float32)).view(2, _KEY_BITS, -1)[:, :, :width].contiguous()
    return tables[0].to(device), tables[1].to(device)
