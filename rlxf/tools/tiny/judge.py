"""A judge of the tiny world that is wrong now and then, for ``judge.function: rlxf.tools.tiny.judge``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from rlxf.tools.tiny.world import score

NOISE = 0.15  # share of verdicts that are the wrong way round


def judge(prompts: Sequence[str], first: Sequence[str], second: Sequence[str], **columns: Any) -> list[float]:
    """1 where the first answer is better by ground truth, 0 where it is worse, 0.5 in a tie; 15 % are turned round.

    Which ones depends on the texts alone: a judge that is asked again, or in the other order, makes the same mistake.
    """
    return [_verdict(*question) for question in zip(prompts, first, second, strict=True)]


def _verdict(prompt: str, first: str, second: str) -> float:
    mine, other = score(first), score(second)
    if mine == other:
        return 0.5
    return float((mine > other) != _wrong(prompt, *sorted((first, second))))


def _wrong(*texts: str) -> bool:
    digest = hashlib.sha256("\0".join(texts).encode()).digest()
    return int.from_bytes(digest[:8], "big") < NOISE * 2**64
