"""Reference log-probabilities on disk: computed once for a pair and a model, whatever run asks for them."""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rlxf.checkpoint import file_digest
from rlxf.config.folders import assets_folder, megatron_checkpoint
from rlxf.types import PairLogps, Pairs, Sequences

log = logging.getLogger(__name__)

_RECORD = struct.Struct("<16sffI")  # digest of the pair's tokens, chosen, rejected, CRC-32 of the three
_DIGEST_BYTES = 16


class PairReference(Protocol):
    """What is asked for the pairs that the file does not hold."""

    def logps(self, pairs: Pairs) -> PairLogps: ...

    def token_logps(self, sequences: Sequences) -> Tensor: ...


class CachedReference:
    """A frozen reference whose answers are kept in a file of one model.

    A pair is known by its tokens, so neither the order nor the file that it came from matters, and a changed pair is
    another pair. A record that was cut or changed on disk is computed again.

    Args:
        inner: the reference.
        path: the file; see ``cache_file``.
    """

    def __init__(self, inner: PairReference, path: Path) -> None:
        self._inner = inner
        self._path = path
        self._known = _read(path)
        self.num_computed = 0

    def token_logps(self, sequences: Sequences) -> Tensor:
        return self._inner.token_logps(sequences)

    def logps(self, pairs: Pairs) -> PairLogps:
        """Log-probabilities of both sides, summed over the completion tokens."""
        keys = _keys(pairs)
        missing = torch.tensor([row for row, key in enumerate(keys) if key not in self._known], dtype=torch.int64)
        if len(missing):
            found = self._inner.logps(pairs.select(missing))
            rows = zip(missing.tolist(), found.chosen.tolist(), found.rejected.tolist(), strict=True)
            self._add([(keys[row], chosen, rejected) for row, chosen, rejected in rows])
        values = torch.tensor([self._known[key] for key in keys], dtype=torch.float32)  # [N, 2]
        return PairLogps(chosen=values[:, 0].contiguous(), rejected=values[:, 1].contiguous())

    def fill(self, batches: Iterable[Pairs]) -> int:
        """Compute what is missing of all pairs of a data set; the number of pairs that were not known."""
        before = self.num_computed
        for pairs in batches:
            self.logps(pairs)
        return self.num_computed - before

    def _add(self, rows: list[tuple[bytes, float, float]]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("ab") as file:
            file.write(b"".join(_record(*row) for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self._known |= {key: (chosen, rejected) for key, chosen, rejected in rows}
        self.num_computed += len(rows)


def cache_file(folder: Path, model: Path, dtype: str) -> Path:
    """The file of one model: its name is a hash of the model's weights and config, and of the dtype it computes in."""
    digest = hashlib.sha256(dtype.encode())
    checkpoint = megatron_checkpoint(model)
    weights = model.glob("*.safetensors") if checkpoint is None else checkpoint.glob("*.distcp")
    for path in sorted([*weights, assets_folder(model) / "config.json"]):
        digest.update(file_digest(path).encode())
    return folder / f"{digest.hexdigest()[:32]}.logps"


def _record(key: bytes, chosen: float, rejected: float) -> bytes:
    return _RECORD.pack(key, chosen, rejected, zlib.crc32(_RECORD.pack(key, chosen, rejected, 0)))


def _read(path: Path) -> dict[bytes, tuple[float, float]]:
    """The whole records; the file is cut behind the last of them, so that new ones stand on their places."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = len(content) // _RECORD.size * _RECORD.size
    known: dict[bytes, tuple[float, float]] = {}
    damaged = int(whole < len(content))
    for key, chosen, rejected, crc in _RECORD.iter_unpack(content[:whole]):
        if crc == zlib.crc32(_RECORD.pack(key, chosen, rejected, 0)):
            known[key] = (chosen, rejected)
        else:
            damaged += 1
    if damaged:
        log.warning("%s: %d records are damaged; those pairs are computed again", path, damaged)
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    return known


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
