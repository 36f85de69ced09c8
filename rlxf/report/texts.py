"""Pairs and answers for the page: cut to a size, with numbers for each token where there is room."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlxf.report.read import RunData
from rlxf.report.rows import Row, number, parse
from rlxf.report.thin import keep_evenly, keep_newest

MAX_PAIRS = 2000
MAX_TOKENISED = 300  # pairs with numbers for each token
MAX_ANSWERED = 40  # evaluations whose answers are shown
MAX_CHARACTERS = 8000  # of one text
MAX_TOKENS = 2048  # of one text with numbers
PAIR_BYTES, TOKEN_BYTES, ANSWER_BYTES = 1_700_000, 800_000, 700_000  # of all pairs, their tokens, and all answers

Tokens = dict[str, Any]


def short(value: float | None, digits: int = 5) -> float | int | None:
    """A number as few characters: ``digits`` significant ones; None for NaN."""
    if value is None or value != value:
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def cut(text: str) -> str | list[Any]:
    """A text, or its beginning and the number of characters that are left out."""
    return text if len(text) <= MAX_CHARACTERS else [text[:MAX_CHARACTERS], len(text) - MAX_CHARACTERS]


@dataclass(slots=True)
class Prompts:
    """Each prompt once; rows name it by its number."""

    texts: list[Any] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def number(self, prompt: object) -> int:
        """Of a text, or of a list of messages."""
        if isinstance(prompt, list):
            messages = [message for message in prompt if isinstance(message, Mapping)]
            shown: Any = [[str(m.get("role", "")), cut(str(m.get("content", "")))] for m in messages]
        else:
            shown = cut(str(prompt or ""))
        key = json.dumps(shown, ensure_ascii=False)
        if key not in self._numbers:
            self._numbers[key] = len(self.texts)
            self.texts.append(shown)
        return self._numbers[key]


class Pairs:
    """The pairs of one run, each read from its file when the page first shows it."""

    def __init__(self) -> None:
        self._rows: dict[int, Row | None] = {}
        self._generation = -1

    def data(self, run: RunData, share: int = 1) -> dict[str, Any]:
        """As many pairs as the page has room for. ``share``: the number of runs on the page."""
        index = run.samples
        if index.generation != self._generation:
            self._rows, self._generation = {}, index.generation
        tokenised = set(keep_newest(len(index), MAX_TOKENISED // share))
        wanted = keep_newest(len(index), MAX_PAIRS // share)
        self._rows = {place: self._read(run, place, tokens=place in tokenised) for place in wanted}
        rows = [row for row in self._rows.values() if row is not None]
        rows = _within(rows, PAIR_BYTES // share, [_length({**row, "t": 0}) for row in rows])
        with_tokens = [row for row in rows if "t" in row]
        fitting = _within(with_tokens, TOKEN_BYTES // share, [_length(row["t"]) for row in with_tokens])
        shown = {id(row) for row in fitting}
        prompts = Prompts()
        return {
            "total": len(index),
            "prompts": prompts.texts,
            "rows": [
                {
                    "p": prompts.number(row["prompt"]),
                    **{key: value for key, value in row.items() if key not in ("prompt", "t", "known")},
                    **({"t": row["t"]} if id(row) in shown else {"more": 1} if row["known"] else {}),
                }
                for row in rows
            ],
            "tokenised": len(fitting),
        }

    def _read(self, run: RunData, place: int, *, tokens: bool) -> Row | None:
        row = self._rows.get(place)
        if row is None or (tokens and row["known"] and "t" not in row):
            row = _pair(run.samples.row(place))
        if row is not None and not tokens:
            row.pop("t", None)
        return row


def _within(rows: list[Row], room: int, sizes: Sequence[int]) -> list[Row]:
    """The rows that ``room`` bytes hold, older ones thinned. ``sizes``: bytes of each."""
    kept = list(range(len(rows)))
    while len(kept) > 1 and (size := sum(sizes[place] for place in kept)) > room:
        fewer = min(len(kept) * room // size, len(kept) - 1)
        kept = [kept[place] for place in keep_newest(len(kept), max(fewer, 1))]
    return [rows[place] for place in kept]


class Answers:
    """The answers to the fixed evaluation prompts, each evaluation read from its file when the page first shows it."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], list[Row]] = {}

    def data(self, run: RunData, share: int = 1) -> dict[str, Any]:
        """As many evaluations as the page has room for. ``share``: the number of runs on the page."""
        wanted = [run.answered[place] for place in keep_evenly(len(run.answered), MAX_ANSWERED)]
        self._rows = {key: self._rows.get(key) or self._read(run, key[1]) for key in wanted}
        found = [(step, answers) for (step, _), answers in self._rows.items()]
        sizes = [_length([{**answer, "t": 0} for answer in answers]) for _, answers in found]
        kept = list(range(len(found)))
        while len(kept) > 2 and sum(sizes[place] for place in kept) > ANSWER_BYTES // share:
            kept = [kept[place] for place in keep_evenly(len(kept), len(kept) * 3 // 4)]
        room, prompts, rows = TOKEN_BYTES // (2 * share), Prompts(), []
        for place in reversed(kept):  # numbers for each token: of the newest, as far as there is room
            step, answers = found[place]
            room -= _length([answer.get("t") for answer in answers])
            rows.append({"step": step, "answers": [_shown(answer, prompts, tokens=room > 0) for answer in answers]})
        return {"total": len(run.answered), "prompts": prompts.texts, "rows": rows[::-1]}

    @staticmethod
    def _read(run: RunData, place: int) -> list[Row]:
        answers = (parse(run.evaluated.line_at(place)) or {}).get("answers")
        return [_answer(answer) for answer in answers if isinstance(answer, dict)] if isinstance(answers, list) else []


def _shown(answer: Row, prompts: Prompts, *, tokens: bool) -> Row:
    found = {key: value for key, value in answer.items() if key != "prompt" and (tokens or key != "t")}
    return {"p": prompts.number(answer["prompt"]), **found}


def _answer(answer: Row) -> Row:
    row: Row = {"prompt": answer.get("prompt"), "text": cut(str(answer.get("text") or ""))}
    for key, name, digits in (("score", "score", 5), ("length", "length", 6), ("kl", "kl", 4)):
        row[key] = short(number(answer.get(name)), digits)
    row["eos"] = _flag(answer.get("eos"))
    if tokens := _tokens(answer, ""):
        row["t"] = tokens
    return row


def _pair(row: Row | None) -> Row | None:
    """A row of ``samples.jsonl``, made small; derived numbers of older files are left empty."""
    if row is None or not isinstance(row.get("step"), int):
        return None
    found: Row = {"step": row["step"], "prompt": row.get("prompt"), "v": _whole(row.get("policy_version"))}
    scores = [number(row.get(f"{side}_score")) for side in ("chosen", "rejected")]
    margin = number(row.get("margin"))
    found["margin"] = short(margin if margin == margin else scores[0] - scores[1])
    sides = []
    for side, score in zip(("chosen", "rejected"), scores, strict=True):
        sources = row.get(f"{side}_scores")
        sides.append(
            {
                "text": cut(str(row.get(side) or "")),
                "score": short(score),
                "length": _whole(row.get(f"{side}_length")),
                "kl": short(number(row.get(f"{side}_kl")), 4),
                "eos": _flag(row.get(f"{side}_eos")),
                **({"scores": _scores(sources)} if isinstance(sources, Mapping) and sources else {}),
            }
        )
    found["s"] = sides
    tokens = [_tokens(row, f"{side}_") for side in ("chosen", "rejected")]
    found["known"] = all(tokens)
    if all(tokens):
        found["t"] = tokens
    return found


def _scores(sources: Mapping[object, object]) -> dict[str, float | int | None]:
    return {str(name): short(number(value)) for name, value in sources.items()}


def _tokens(row: Row, prefix: str) -> Tokens | None:
    """Tokens with the log-probs of policy and reference; None if the row lacks one of them."""
    texts = row.get(f"{prefix}tokens")
    policy, reference = row.get(f"{prefix}logps"), row.get(f"{prefix}reference_logps")
    if not (isinstance(texts, list) and isinstance(policy, list) and isinstance(reference, list)):
        return None
    if not len(texts) == len(policy) == len(reference) or len(texts) > MAX_TOKENS:
        return None
    return {"t": [str(text) for text in texts], "p": _hundredths(policy), "r": _hundredths(reference)}


def _hundredths(values: Iterable[object]) -> list[int | None]:
    """Nats as whole hundredths, which take few characters."""
    found = [number(value) for value in values]
    return [None if value != value else round(value * 100) for value in found]


def _length(value: object) -> int:
    return len(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass"))


def _whole(value: object) -> int | None:
    found = number(value)
    return None if found != found else round(found)


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None
