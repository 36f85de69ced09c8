"""`--pack`: several examples in one row of the files, each row exactly as long as a training sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rlxf.data.encoders import Ids
from rlxf.data.tokenized import IGNORED


def pack(rows: Iterable[Ids], seq_length: int, *, pad_id: int, neat: bool) -> Iterator[Ids]:
    """Rows of ``seq_length`` tokens, each made of the next examples in order for as long as they fit, then padding.

    Args:
        rows: examples of ``input_ids``, ``attention_mask`` and ``labels``, none longer than ``seq_length``.
        pad_id: the token that fills a row up; no loss counts it.
        neat: number the examples of a row 1, 2, ... in its attention mask, so that a trainer can keep them apart;
            otherwise the mask is 1. Padding is 0 in both.
    """
    held: list[Ids] = []
    length = 0
    for row in rows:
        size = len(row["input_ids"])
        if held and length + size > seq_length:
            yield _join(held, seq_length, pad_id=pad_id, neat=neat)
            held, length = [], 0
        held.append(row)
        length += size
    if held:
        yield _join(held, seq_length, pad_id=pad_id, neat=neat)


def _join(rows: list[Ids], seq_length: int, *, pad_id: int, neat: bool) -> Ids:
    fill = seq_length - sum(len(row["input_ids"]) for row in rows)
    mask = [number if neat else 1 for number, row in enumerate(rows, start=1) for _ in row["input_ids"]]
    return {
        "input_ids": [token for row in rows for token in row["input_ids"]] + [pad_id] * fill,
        "attention_mask": mask + [0] * fill,
        "labels": [label for row in rows for label in row["labels"]] + [IGNORED] * fill,
    }
