"""Reference log-probabilities on disk: computed once for each pair and model, and shared by all runs.

Each model has a folder, and in it each run that computes something has a file. A run appends only to its own file, so
runs at the same time, even on several machines, need no lock.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import rlxf
from rlxf.core.disk import writing
from rlxf.core.files import file_digest
from rlxf.core.kept_file import KeptFile
from rlxf.core.model_folder import assets_folder, megatron_checkpoint
from rlxf.core.types import Pairs, PairValues, Sequences

log = logging.getLogger(__name__)

VERSION = 2  # raise it when a reference computes other numbers, or when a record changes

_RECORD = struct.Struct("<16sffI")  # digest of the pair's tokens, chosen, rejected, CRC-32 of the three
_DIGEST_BYTES = 16
_MANY = 2**16  # records at a time
Part = tuple[NDArray[np.bytes_], NDArray[np.float32]]  # [n] digests, [n, 2] chosen and rejected


class PairReference(Protocol):
    """The reference that computes what the files do not hold."""

    def logps(self, pairs: Pairs) -> PairValues: ...

    def token_logps(self, sequences: Sequences) -> Tensor: ...


class CachedReference:
    """A frozen reference whose answers are kept in a folder of its model.

    A pair is identified by its tokens: its order and its data file do not matter, and a changed pair is another pair. A
    record that was cut or changed on disk is computed again. In memory a pair takes 24 bytes.

    Args:
        inner: the reference.
        folder: see ``cache_folder``.
    """

    def __init__(self, inner: PairReference, folder: Path) -> None:
        self._inner = inner
        self._path = folder / f"{secrets.token_hex(8)}.logps"  # of this run
        self._file: KeptFile | None = None
        self._known = _Known([part for path in sorted(folder.glob("*.logps")) for part in _read(path)])
        self.num_computed = 0

    def token_logps(self, sequences: Sequences) -> Tensor:
        return self._inner.token_logps(sequences)

    def logps(self, pairs: Pairs) -> PairValues:
        """Log-probabilities of both sides, summed over the completion tokens."""
        keys = _as_array(_keys(pairs))
        values, known = self._known.find(keys)
        missing = np.flatnonzero(~known)
        if len(missing):
            found = self._inner.logps(pairs.select(torch.from_numpy(missing)))
            values[missing] = torch.stack([found.chosen, found.rejected], dim=1).numpy()
            self._add(keys[missing], values[missing])
        logps = torch.from_numpy(values)
        return PairValues(chosen=logps[:, 0].contiguous(), rejected=logps[:, 1].contiguous())

    def fill(self, batches: Iterable[Pairs]) -> int:
        """Compute what is missing of all pairs of a data set; the number of pairs that were not known."""
        before = self.num_computed
        for pairs in batches:
            self.logps(pairs)
        if self._file is not None:
            self._file.retry()  # what the disk did not take is computed again by the next run
        return self.num_computed - before

    def _add(self, keys: NDArray[np.bytes_], logps: NDArray[np.float32]) -> None:
        records = b"".join(_record(key, *sides) for key, sides in zip(keys.tolist(), logps.tolist(), strict=True))
        if self._file is None:
            with writing(self._path, "ref.cache"):
                self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = KeptFile(self._path, size=0, key="ref.cache", sync=True)
        self._file.write(records)
        self._known.add(keys, logps)
        self.num_computed += len(keys)


class _Known:
    """The pairs known so far: arrays that are sorted by key, and a dict of the newest pairs."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._keys, self._logps = _merged(parts)
        self._new: dict[bytes, list[float]] = {}

    def find(self, keys: NDArray[np.bytes_]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """[N, 2] log-probs, and [N] which of them are known; the others are 0."""
        values, known = np.zeros((len(keys), 2), dtype=np.float32), np.zeros(len(keys), dtype=np.bool_)
        if len(self._keys):
            places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
            known = self._keys[places] == keys
            values[known] = self._logps[places[known]]
        for row, key in enumerate(keys.tolist()):
            if key in self._new:
                values[row], known[row] = self._new[key], True
        return values, known

    def add(self, keys: NDArray[np.bytes_], logps: NDArray[np.float32]) -> None:
        self._new |= dict(zip(keys.tolist(), logps.tolist(), strict=True))
        if len(self._new) >= _MANY:
            new = _as_array(self._new), np.array(list(self._new.values()), dtype=np.float32)
            self._keys, self._logps = _merged([(self._keys, self._logps), new])
            self._new = {}


def _merged(parts: Sequence[Part]) -> Part:
    """One part with each key once, sorted."""
    if not parts:
        return _as_array(()), np.zeros((0, 2), dtype=np.float32)
    keys, first = np.unique(np.concatenate([keys for keys, _ in parts]), return_index=True)
    return keys, np.concatenate([logps for _, logps in parts])[first]


def _as_array(keys: Iterable[bytes]) -> NDArray[np.bytes_]:
    """Digests as a numpy array. It hides zero bytes at the end of an item; different digests stay different."""
    return np.array(list(keys), dtype=f"S{_DIGEST_BYTES}")


def cache_folder(root: Path, model: Path, dtype: str, device: str, ld_alpha: float | None = None) -> Path:
    """The folder of one model below ``root``.

    Its name is a hash of the model's weights and config, the dtype and kind of device that it computes with, the weight
    of the tokens by which one side is longer (if they have one), and the version of this program.
    """
    checkpoint = megatron_checkpoint(model)
    weights = model.glob("*.safetensors") if checkpoint is None else checkpoint.glob("*.distcp")
    files = [file_digest(path) for path in sorted([*weights, assets_folder(model) / "config.json"])]
    earlier = root / f"{_name(dtype, *files)}.logps"  # of version 1, which knew neither device nor version
    if earlier.is_file():
        log.info("%s was written by an earlier version and is not used; you can delete it", earlier)
    weighted = "" if ld_alpha is None else f"ld_alpha {ld_alpha!r} "
    return root / _name(f"{rlxf.__version__} {VERSION} {device} {dtype} {weighted}", *files)


def _name(*parts: str) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:32]


def _record(key: bytes, chosen: float, rejected: float) -> bytes:
    return _RECORD.pack(key, chosen, rejected, zlib.crc32(_RECORD.pack(key, chosen, rejected, 0)))


def _read(path: Path) -> Iterator[Part]:
    """The whole records of a file. A part of a record at its end may be one that another run is writing now."""
    damaged = 0
    with path.open("rb") as file:
        while content := file.read(_MANY * _RECORD.size):
            whole = len(content) // _RECORD.size * _RECORD.size
            damaged += int(whole < len(content))
            keys, logps = list[bytes](), list[tuple[float, float]]()
            for key, chosen, rejected, crc in _RECORD.iter_unpack(content[:whole]):
                if crc == zlib.crc32(_RECORD.pack(key, chosen, rejected, 0)):
                    keys.append(key)
                    logps.append((chosen, rejected))
                else:
                    damaged += 1
            yield _as_array(keys), np.array(logps, dtype=np.float32).reshape(-1, 2)
    if damaged:
        log.warning("%s: %d records are damaged; those pairs are computed again", path, damaged)


def _keys(pairs: Pairs) -> list[bytes]:
    """A digest of each pair's tokens and of where its completions begin."""
    sides = zip(*(_rows(side) for side in (pairs.chosen, pairs.rejected)), strict=True)
    return [hashlib.blake2b(chosen + rejected, digest_size=_DIGEST_BYTES).digest() for chosen, rejected in sides]


def _rows(side: Sequences) -> list[bytes]:
    rows = torch.split(side.tokens, side.lengths.tolist())
    header = struct.Struct("<qq")
    return [
        header.pack(len(row), prompt) + row.numpy().tobytes()
        for row, prompt in zip(rows, side.prompt_lengths.tolist(), strict=True)
    ]
