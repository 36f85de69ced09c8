"""The known word that somebody meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like a wrong one, or else one that begins with it."""
    words = sorted(known)
    matches = get_close_matches(word, words, n=1, cutoff=0.6)
    matches += [other for other in words if len(word) > 2 and other.startswith(word)]
    return matches[0] if matches else None
