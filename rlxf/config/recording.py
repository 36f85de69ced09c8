"""What the checks of a recipe must know of a recorded run."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

_SCORE = re.compile(rb'"score"\s*:\s*[-0-9]')  # only a line that holds this is parsed


def holds_scores(path: str | Path) -> bool | None:
    """Whether a `rollouts.jsonl` holds any score, so that a replay needs no scorer; None if it cannot be read.

    Reads up to the first score. Wrong rows are reported later, when a run trains on them.
    """
    try:
        status = Path(path).stat()
        return _holds_scores(Path(path).absolute(), status.st_size, status.st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=16)
def _holds_scores(path: Path, num_bytes: int, modified_ns: int) -> bool:
    with path.open("rb") as lines:
        return any(_SCORE.search(line) and _is_scored(line) for line in lines)


def _is_scored(line: bytes) -> bool:
    try:
        completions: Any = json.loads(line)["completions"]
        return any(completion.get("score") is not None for completion in completions)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
