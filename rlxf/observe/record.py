"""Recorded rollouts (`rollouts.jsonl`), written by a live run and read by a replay; sampled pairs (`samples.jsonl`).

A row of `rollouts.jsonl` is one prompt:
``{"step": n, "prompt_ids": [...], "completions": [{"token_ids": [...], "score": number or null}, ...],
"policy_version": n}``.
``step`` counts from 1, and a replay does not need it. ``token_ids`` include the EOS that was sampled, ``score`` is the
raw score (penalties apply on replay as they do live), with several sources of rewards their sum, and then ``scores``
holds those of each source; ``extra`` holds what reward functions logged; ``kl`` is the summed log-ratio to the
reference, nats, of completions that are in a pair. Rows stand in the order in which the run saw
the prompts: with the run's batch size, a replay makes the same steps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlxf.core.jsonl import JsonLines, Row, describe, open_after
from rlxf.core.pairs import PairingResult
from rlxf.core.types import OnlinePairs, PairValues, ReferenceRecord, ScoredRollouts
from rlxf.observe.tokens import beside_reference, pieces, rounded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FLOAT32_MAX = torch.finfo(torch.float32).max
_INT32_MAX = torch.iinfo(torch.int32).max
_KEYS = ("prompt_ids", "completions", "policy_version")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recorded:
    """One row: a prompt and its completions."""

    prompt: list[int]
    completions: list[list[int]]
    scores: list[float]  # raw, one per completion; NaN where the row has none
    policy_version: int


class RecordedRollouts:
    """The rows of a `rollouts.jsonl`, each checked when the file is opened and read from disk on request.

    Raises:
        DataError: rows that cannot be trained on, with file, line and reason.
    """

    def __init__(self, path: str | Path, *, vocab_size: int | None = None, seq_length: int | None = None) -> None:
        """``vocab_size``: token ids at or above it are refused; ``seq_length``: so are longer prompt + completion."""
        self._largest_id = (vocab_size or _INT32_MAX + 1) - 1
        self._seq_length = seq_length
        self._rows = JsonLines(path, self._check)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Recorded:
        fields = self._rows[row]
        completions = fields["completions"]
        return Recorded(
            prompt=fields["prompt_ids"],
            completions=[completion["token_ids"] for completion in completions],
            scores=[math.nan if (score := c.get("score")) is None else float(score) for c in completions],
            policy_version=fields["policy_version"],
        )

    def where(self, row: int) -> str:
        """``file:line`` of a row, for messages."""
        return self._rows.where(row)

    def _check(self, row: Row) -> str | None:
        missing = [repr(key) for key in _KEYS if key not in row]
        if missing:
            return f"{' and '.join(missing)} missing; a recorded row has {', '.join(_KEYS)}"
        if problem := self._ids_problem(row["prompt_ids"], "prompt_ids"):
            return problem
        if not _is_count(row["policy_version"]):
            return f"policy_version: expected a number of updates (0, 1, ...), got {describe(row['policy_version'])}"
        completions = row["completions"]
        if not isinstance(completions, list) or len(completions) < 2:
            found = f"{len(completions)}" if isinstance(completions, list) else describe(completions)
            return f"completions: expected a list of at least 2, got {found}"
        for index, completion in enumerate(completions):
            problem = self._completion_problem(completion, len(row["prompt_ids"]))
            if problem:
                return f"completion {index}: {problem}"
        return None

    def _completion_problem(self, completion: Any, prompt_length: int) -> str | None:
        if not isinstance(completion, dict) or "token_ids" not in completion:
            return f"expected an object with token_ids and score, got {describe(completion)}"
        if problem := self._ids_problem(completion["token_ids"], "token_ids"):
            return problem
        length = prompt_length + len(completion["token_ids"])
        if self._seq_length is not None and length > self._seq_length:
            return f"prompt and completion are {length} tokens, more than actor_rollout.seq_length={self._seq_length}"
        score = completion.get("score")
        if score is None:
            return None
        if isinstance(score, bool) or not isinstance(score, int | float):
            return f"score: expected a number or null, got {describe(score)}"
        return (
            None if abs(score) <= _FLOAT32_MAX else f"score: {score} is not a finite float32; write null for no score"
        )

    def _ids_problem(self, ids: Any, name: str) -> str | None:
        if not isinstance(ids, list) or not ids:
            return f"{name}: expected a list of token ids, not empty; got {describe(ids)}"
        if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= self._largest_id:
            return None
        wrong = next(i for i in ids if not _is_count(i) or i > self._largest_id)
        return f"{name}: expected token ids from 0 to {self._largest_id}, got {describe(wrong)}"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class RolloutRecorder:
    """Writes `rollouts.jsonl`, a step at a time and only whole lines, so that a killed run leaves whole rows."""

    def __init__(self, path: str | Path, *, after: int | None = None, unwritten: bytes = b"") -> None:
        """``after``: the step after which a resumed run continues; its rows and earlier ones stay.

        ``unwritten``: of those, the ones that the disk did not take.
        """
        self.file = open_after(Path(path), after, unwritten)

    def write(self, step: int, scored: ScoredRollouts, kl: Tensor | None = None) -> None:
        """Append the prompts of one step, in batch order, each with its completions by sample index.

        ``kl``: [B] float32, each completion's summed log-ratio to the reference, nats; NaN where it is not known.
        """
        rows = ({"step": step, **row} for row in _record(scored, kl))
        lines = [json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n" for row in rows]
        self.file.write("".join(lines).encode())

    def close(self) -> None:
        self.file.close()


def _record(scored: ScoredRollouts, kl: Tensor | None) -> list[Row]:
    rollouts = scored.rollouts
    ratios = [None] * len(scored) if kl is None else rounded(kl.tolist())
    known = [{} if ratio is None else {"kl": ratio} for ratio in ratios]
    completions = rollouts.sequences.completion_rows()
    raw_scores = scored.raw_scores.tolist()  # a float32 as a double: its repr gives the same float32 back
    by_prompt: list[list[int]] = [[] for _ in range(len(rollouts.prompts))]
    for row in _by_sample(rollouts.sample_index):
        by_prompt[int(rollouts.prompt_index[row])].append(row)
    return [
        {
            "prompt_ids": prompt,
            "completions": [
                {
                    "token_ids": completions[row],
                    "score": _or_null(raw_scores[row]),
                    **known[row],
                    **_details(scored, row),
                }
                for row in rows
            ],
            "policy_version": min(int(rollouts.policy_version[row]) for row in rows),
        }
        for prompt, rows in zip(rollouts.prompts.prompts.rows(), by_prompt, strict=True)
    ]


def _details(scored: ScoredRollouts, row: int) -> Row:
    """What several sources say of a completion, and what reward functions logged of it."""
    details: Row = {}
    if len(scored.sources) > 1:
        details["scores"] = {name: _or_null(float(scores[row])) for name, scores in scored.sources.items()}
    if scored.extra:
        details["extra"] = {name: values[row] for name, values in scored.extra.items()}
    return details


def _by_sample(sample_index: Tensor) -> list[int]:
    rows: list[int] = torch.argsort(sample_index, stable=True).tolist()
    return rows


def _or_null(score: float) -> float | None:
    return score if math.isfinite(score) else None


class SampleRecorder:
    """Writes `samples.jsonl`: pairs as text, for people to read, with what both models say of each token.

    A row takes 30 to 45 bytes per token, the two texts included; a step has at most ``max_rows``.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_rows: int = 16,
        after: int | None = None,
        unwritten: bytes = b"",
    ) -> None:
        """``max_rows``: pairs written per step. The others: as above."""
        self.file = open_after(Path(path), after, unwritten)
        self.max_rows = max_rows
        self._tokenizer = tokenizer

    def write(
        self, step: int, scored: ScoredRollouts, pairs: OnlinePairs, reference: Tensor | None = None
    ) -> list[Row]:
        """Append pairs of one step and return them.

        Args:
            step: counts from 1.
            scored: the step's completions.
            pairs: what is written: N pairs of ``scored``.
            reference: [sum completion tokens] float32 log-probs of both sides, chosen ones first; None: not known.
        """
        sides = {"chosen": (pairs.chosen_rows, pairs.chosen), "rejected": (pairs.rejected_rows, pairs.rejected)}
        engine = {"chosen": pairs.chosen_engine_logps, "rejected": pairs.rejected_engine_logps}
        known = dict(zip(sides, _halves(pairs, reference), strict=True)) if reference is not None else {}
        columns = {
            name: [
                self._side(scored, row, tokens, logps.tolist(), None if not known else known[name][place].tolist())
                for place, (row, tokens, logps) in enumerate(
                    zip(
                        rows.tolist(),
                        sequences.completion_rows(),
                        torch.split(engine[name], sequences.completion_lengths.tolist()),
                        strict=True,
                    )
                )
            ]
            for name, (rows, sequences) in sides.items()
        }
        texts = scored.rollouts.prompts.texts
        table: list[Row] = [
            {
                "step": step,
                "prompt": texts[int(pairs.prompt_index[place])],
                "policy_version": int(pairs.policy_version[place]),
                "margin": float(pairs.margin[place]),
                **{
                    name if key == "text" else f"{name}_{key}": side[key]
                    for key in columns["chosen"][place]
                    for name, side in (("chosen", columns["chosen"][place]), ("rejected", columns["rejected"][place]))
                    if key in side
                },
            }
            for place in range(len(pairs))
        ]
        self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table).encode())
        return table

    def _side(
        self, scored: ScoredRollouts, row: int, tokens: list[int], logps: list[float], reference: list[float] | None
    ) -> Row:
        """One side of a pair."""
        return {
            "text": self._tokenizer.decode(tokens, skip_special_tokens=True),
            "score": _or_null(float(scored.scores[row])),
            "eos": bool(scored.contains_eos[row]),
            "length": len(tokens),
            **_details(scored, row),
            "tokens": pieces(self._tokenizer, tokens),
            "logps": rounded(logps),
            **(
                {"reference_logps": rounded(reference), "kl": beside_reference(logps, reference)}
                if reference is not None
                else {}
            ),
        }

    def close(self) -> None:
        self.file.close()


def _halves(pairs: OnlinePairs, values: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Values of every completion token, chosen sides first: of each chosen side, and of each rejected one."""
    chosen, rejected = (side.completion_lengths.tolist() for side in (pairs.chosen, pairs.rejected))
    parts = torch.split(values, [*chosen, *rejected])
    return parts[: len(chosen)], parts[len(chosen) :]


class Recorders:
    """Writes ``rollouts.jsonl`` every step if asked to, and ``samples.jsonl`` after the first and every n-th step."""

    def __init__(self, rollouts: RolloutRecorder | None, samples: SampleRecorder | None, samples_interval: int) -> None:
        self._rollouts = rollouts
        self._samples = samples
        self._interval = samples_interval
        self.files = [recorder.file for recorder in (rollouts, samples) if recorder is not None]

    def shown(self, step: int, pairs: OnlinePairs) -> OnlinePairs:
        """The pairs of a step that ``samples.jsonl`` gets: few pairs of many prompts; none in most steps."""
        due = self._samples is not None and (step == 1 or step % self._interval == 0)
        order = _prompts_in_turn(pairs.prompt_index) if due else torch.zeros(0, dtype=torch.int64)
        return pairs.select(order if self._samples is None else order[: self._samples.max_rows])

    def write(self, step: int, scored: ScoredRollouts, pairing: PairingResult, reference: ReferenceRecord) -> None:
        if self._rollouts is not None:
            kl = None if reference.pairs is None else _kl(scored, pairing.pairs, reference.pairs)
            self._rollouts.write(step, scored, kl)
        if self._samples is not None:
            shown = self.shown(step, pairing.pairs)
            if len(shown):
                self._samples.write(step, scored, shown, reference.tokens)


def _kl(scored: ScoredRollouts, pairs: OnlinePairs, reference: PairValues) -> Tensor:
    """[B] float32: the summed log-ratio of each completion that is in a pair, nats; NaN of the others.

    The policy's log-probs are those of the engine, by the weights that sampled.
    """
    rollouts = scored.rollouts
    lengths = rollouts.sequences.completion_lengths
    row = torch.arange(len(scored)).repeat_interleave(lengths)
    sums = torch.zeros(len(scored), dtype=torch.float64).index_add(0, row, rollouts.engine_logps.double())
    found = torch.full((len(scored),), math.nan, dtype=torch.float64)
    for rows, logps in ((pairs.chosen_rows, reference.chosen), (pairs.rejected_rows, reference.rejected)):
        found[rows] = sums[rows] - logps.double().cpu()
    return found.float()


def _prompts_in_turn(prompt_index: Tensor) -> Tensor:
    """[N] int64: the first pair of every prompt, then the second ones, and so on, so that few pairs show many prompts.

    ``prompt_index`` [N] int64: the prompt of each pair.
    """
    met: dict[int, int] = {}
    place: list[int] = []
    for prompt in prompt_index.tolist():
        met[prompt] = met.get(prompt, -1) + 1
        place.append(met[prompt])
    return torch.argsort(torch.tensor(place, dtype=torch.int64), stable=True)
