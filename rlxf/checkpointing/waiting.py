"""Steps that were sampled and not trained on when a checkpoint was written: ``<checkpoint>/waiting``.

Each is ``0000012.safetensors`` (tokens, log-probabilities, scores) and ``0000012.json`` (texts and columns of the
prompts, metrics), named by the number of its step, which counts from 0. Steps that were still being sampled by weights
that the actor no longer has are a ``.json`` without tensors; the run folder keeps those weights beside them.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlxf.core.errors import CheckpointError
from rlxf.core.jsonl import finite_or_null, from_json
from rlxf.core.types import Comparisons, PairValues, PromptBatch, Rollouts, Sequences, Tokens
from rlxf.loop.collected import Collected

FOLDER = "waiting"  # in a checkpoint

# What tables of other formats than JSON hold besides, by the name under which it is written.
_OTHER_TYPES: dict[str, tuple[type, Any, Any]] = {
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
    "decimal": (Decimal, str, Decimal),
}
_MARK = "\0type"  # no key of a user's data


def save_waiting(checkpoint: Path, steps: Iterable[Collected]) -> None:
    """Write what is known of each step; nothing is written without any.

    Raises:
        CheckpointError: a column of the data holds what cannot be written.
    """
    folder = checkpoint / FOLDER
    for step in steps:
        folder.mkdir(exist_ok=True)
        if step.rollouts is not None:
            save_file(_tensors(step, step.rollouts), folder / f"{step.step:07d}.safetensors")
        (folder / f"{step.step:07d}.json").write_text(json.dumps(_values(step), default=_encode))


def load_waiting(checkpoint: Path) -> list[Collected]:
    """What ``save_waiting`` wrote, in the order of the steps; none of a checkpoint without it."""
    return [_load(path) for path in sorted((checkpoint / FOLDER).glob("*.json"))]


def next_to_sample(step: int, waiting: Iterable[Collected]) -> int:
    """The first step that is not sampled, after ``step`` complete ones and with ``waiting`` steps behind them.

    With steps 3, 4 and 5 waiting after 3 complete ones, the last of which was being sampled: 5.
    """
    return step + sum(item.rollouts is not None for item in waiting)


def _tensors(step: Collected, rollouts: Rollouts) -> dict[str, Tensor]:
    prompts, sequences = rollouts.prompts, rollouts.sequences
    found = {
        "prompts.tokens": prompts.prompts.tokens,
        "prompts.lengths": prompts.prompts.lengths,
        "prompts.row_ids": prompts.row_ids,
        "prompts.positions": prompts.positions,
        "tokens": sequences.tokens,
        "lengths": sequences.lengths,
        "prompt_lengths": sequences.prompt_lengths,
        "prompt_index": rollouts.prompt_index,
        "sample_index": rollouts.sample_index,
        "engine_logps": rollouts.engine_logps,
        "policy_version": rollouts.policy_version,
    }
    if step.raw_scores is not None:
        found["raw_scores"] = step.raw_scores
    if step.table is not None:
        found["table"] = step.table
    if step.comparisons is not None:
        judged = step.comparisons
        found |= {"judged.first": judged.first, "judged.second": judged.second, "judged": judged.probability}
    if step.reference is not None:
        found |= {"reference.chosen": step.reference.chosen, "reference.rejected": step.reference.rejected}
    if step.shown is not None:
        found["shown"] = step.shown
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in found.items()}


def _values(step: Collected) -> dict[str, Any]:
    prompts = step.rollouts.prompts if step.rollouts is not None else None
    return {
        "step": step.step,
        "sampled_at": step.sampled_at,
        "version": step.version,
        "chunks": step.chunks,
        "failed": step.failed,
        "extra": step.extra,
        "referred": step.referred,
        "metrics": finite_or_null(step.metrics),
        "seconds": step.seconds,
        "texts": prompts.texts if prompts else None,
        "columns": prompts.columns if prompts else None,
    }


def _load(path: Path) -> Collected:
    try:
        values = json.loads(path.read_text(), object_hook=_decode)
        step = Collected(
            step=values["step"],
            sampled_at=values["sampled_at"],
            version=values["version"],
            chunks=tuple(map(tuple, values.get("chunks", ()))),
            failed=values["failed"],
            extra=values.get("extra", {}),
            referred=values["referred"],
            metrics=from_json(values["metrics"]),
            seconds=values["seconds"],
        )
        if values["texts"] is not None:
            _fill(step, load_file(path.with_suffix(".safetensors")), values["texts"], values["columns"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: the waiting step cannot be read ({error}); copy the checkpoint again, or name another one in "
            "training.resume"
        ) from error
    return step


def _fill(step: Collected, tensors: dict[str, Tensor], texts: list[Any], columns: dict[str, list[Any]]) -> None:
    step.rollouts = Rollouts(
        prompts=PromptBatch(
            prompts=Tokens(tokens=tensors["prompts.tokens"], lengths=tensors["prompts.lengths"]),
            row_ids=tensors["prompts.row_ids"],
            positions=tensors["prompts.positions"],
            texts=tuple(texts),
            columns=columns,
        ),
        sequences=Sequences(
            tokens=tensors["tokens"], lengths=tensors["lengths"], prompt_lengths=tensors["prompt_lengths"]
        ),
        prompt_index=tensors["prompt_index"],
        sample_index=tensors["sample_index"],
        engine_logps=tensors["engine_logps"],
        policy_version=tensors["policy_version"],
    )
    step.raw_scores, step.table = tensors.get("raw_scores"), tensors.get("table")
    step.shown = tensors.get("shown")
    if "judged" in tensors:
        step.comparisons = Comparisons(
            first=tensors["judged.first"], second=tensors["judged.second"], probability=tensors["judged"]
        )
    if "reference.chosen" in tensors:
        step.reference = PairValues(chosen=tensors["reference.chosen"], rejected=tensors["reference.rejected"])


def _encode(value: object) -> dict[str, str]:
    for name, (kind, write, _) in _OTHER_TYPES.items():
        if isinstance(value, kind):
            return {_MARK: name, "value": write(value)}
    raise CheckpointError(
        f"a column of the prompts holds a {type(value).__name__}, which a checkpoint cannot keep for a step that waits "
        "to be trained on (rollout.lookahead); write the column as text or numbers, or set rollout.lookahead=0"
    )


def _decode(values: dict[str, Any]) -> Any:
    return _OTHER_TYPES[values[_MARK]][2](values["value"]) if _MARK in values else values
