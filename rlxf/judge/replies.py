"""What a language model that judges wrote, as the probability that the first answer is better."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from rlxf.config.kinds import JudgeAnswer

_ARENA = re.compile(r"\[\[\s*([AB])\s*(<<|<|=|>|>>)\s*([AB])\s*\]\]")
_STRENGTH = {">>": 1.0, ">": 0.75, "=": 0.5, "<": 0.25, "<<": 0.0}  # that the side on the left is better
_LONGEST = 20_000  # characters at the end of a reply in which a verdict is looked for
_WINNERS = {
    **dict.fromkeys(("first", "a", "1"), 1.0),
    **dict.fromkeys(("second", "b", "2"), 0.0),
    **dict.fromkeys(("tie", "draw", "equal", "both", "neither"), 0.5),
}


def probability(text: str, form: JudgeAnswer) -> float:
    """The verdict in a judge's text, NaN if there is none. Of several verdicts the last one counts.

    ``json``: an object with ``first`` (a probability) or ``winner`` (``first``, ``second`` or ``tie``; also A and B),
    anywhere in the text. ``arena``: ``[[A>>B]]``, ``[[A>B]]``, ``[[A=B]]``, ``[[B>A]]`` or ``[[B>>A]]``, which count
    1, 0.75, 0.5, 0.25 and 0.
    """
    return _arena(text) if form == "arena" else _json(text)


def arena_label(value: float) -> str | None:
    """The label of ``[[A>>B]]``'s form that is nearest to a probability; None for NaN."""
    if math.isnan(value):
        return None
    labels = {1.0: "A>>B", 0.75: "A>B", 0.5: "A=B", 0.25: "B>A", 0.0: "B>>A"}
    return labels[min(labels, key=lambda strength: abs(strength - value))]


def _arena(text: str) -> float:
    found = _ARENA.findall(text)
    if not found:
        return math.nan
    left, sign, right = found[-1]
    if left == right:
        return math.nan
    return _STRENGTH[sign] if left == "A" else 1 - _STRENGTH[sign]


def _json(text: str) -> float:
    found = [value for value in map(_of_object, _objects(text)) if value is not None]
    return found[-1] if found else math.nan


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a text, without those inside others."""
    decoder, text = json.JSONDecoder(), text[-_LONGEST:]
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


def _of_object(found: dict[str, Any]) -> float | None:
    """The verdict of one object; None if it is about something else, NaN if its verdict is none."""
    if "first" in found:
        value = found["first"]
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        return float(value) if good else math.nan
    if "winner" in found:
        return _WINNERS.get(str(found["winner"]).strip().lower(), math.nan)
    return None
