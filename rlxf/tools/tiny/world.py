"""Film reviews from a grammar of about 110 words, with a ground truth.

A prompt is ``review of the <title> :``; a response is one to three sentences, whose clauses praise or blame, some of
them by negation. The score of a text is the sum of its clauses' polarities; whether a text still follows the grammar is
decided apart. Report both: a policy that maximises the score alone ends in broken text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


ASPECTS = _words("acting plot music ending dialogue pacing hero villain camera humor script cast")
PRAISE = _words("great wonderful brilliant charming clever moving superb delightful fresh lovely funny gripping")
BLAME = _words("dull awful boring clumsy weak terrible silly flat tedious messy bland painful")
LIKED = _words("loved enjoyed admired")
DISLIKED = _words("hated disliked regretted")
DEGREES = _words("really quite truly so rather")
NOUNS = _words("film movie story picture")
NEUTRAL = (
    "it was made in paris",
    "it was made in tokyo",
    "it runs for two hours",
    "my sister saw it with me",
    "my brother saw it with me",
    "we saw it on monday",
    "we saw it on friday",
    "it is based on a book",
)
NEGATIONS = ("not", "never")
POLARITY = dict.fromkeys((*PRAISE, *LIKED), 1) | dict.fromkeys((*BLAME, *DISLIKED), -1)

_TITLE_ADJECTIVES = _words("silver golden lonely hidden frozen broken burning silent crooked distant")
_TITLE_NOUNS = _words("dragon harbor winter mirror soldier garden island letter mountain clock river castle")
_NUM_TRAIN_TITLES = 90


def _titles() -> list[str]:
    titles = [f"{adjective} {noun}" for adjective in _TITLE_ADJECTIVES for noun in _TITLE_NOUNS]
    Random(7).shuffle(titles)
    return titles


_ALL_TITLES = _titles()
TRAIN_TITLES = tuple(_ALL_TITLES[:_NUM_TRAIN_TITLES])
HELD_OUT_TITLES = tuple(_ALL_TITLES[_NUM_TRAIN_TITLES:])


def prompt(title: str) -> str:
    return f"review of the {title} :"


def random_prompt(rng: Random, titles: Sequence[str] = TRAIN_TITLES) -> str:
    return prompt(rng.choice(titles))


def _clause(rng: Random, positive: bool) -> str:
    kind = rng.random()
    aspect = rng.choice(ASPECTS)
    if kind < 0.5:
        word = rng.choice(PRAISE if positive else BLAME)
        degree = rng.choice(DEGREES) + " " if rng.random() < 0.4 else ""
        return f"the {aspect} was {degree}{word}"
    if kind < 0.65:
        return f"the {aspect} was not {rng.choice(BLAME if positive else PRAISE)}"
    if kind < 0.9:
        return f"i {rng.choice(LIKED if positive else DISLIKED)} the {aspect}"
    return f"i never {rng.choice(DISLIKED if positive else LIKED)} the {aspect}"


def _sentence(rng: Random, positive_share: float) -> str:
    if rng.random() < 0.3:
        return f"{rng.choice(NEUTRAL)} ."
    if rng.random() < 0.35:
        first, second = rng.random() < positive_share, rng.random() < positive_share
        link = "and" if first == second else "but"
        return f"{_clause(rng, first)} {link} {_clause(rng, second)} ."
    return f"{_clause(rng, rng.random() < positive_share)} ."


def random_response(rng: Random) -> str:
    """One or two sentences, and in half of the reviews a closing one. Each review leans to praise or to blame."""
    positive_share = rng.choice((0.25, 0.75))
    sentences = [_sentence(rng, positive_share) for _ in range(rng.choice((1, 2, 2)))]
    if rng.random() < 0.5:
        word = rng.choice(PRAISE if rng.random() < positive_share else BLAME)
        sentences.append(f"overall , a {word} {rng.choice(NOUNS)} .")
    return " ".join(sentences)


def corpus(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """``count`` pairs of prompt and response over the training titles."""
    rng = Random(seed)
    return [(random_prompt(rng), random_response(rng)) for _ in range(count)]


def score(text: str) -> int:
    """Ground truth: the sum of the polarities of its words; a word after a negation counts the other way round."""
    words = text.split()
    total = 0
    for before, word in zip(["", *words], words, strict=False):
        polarity = POLARITY.get(word, 0)
        total += -polarity if before in NEGATIONS else polarity
    return total


def _one_of(*words: str) -> str:
    return f"(?:{'|'.join(words)})"


def _grammar() -> re.Pattern[str]:
    aspect, adjective, verb = _one_of(*ASPECTS), _one_of(*PRAISE, *BLAME), _one_of(*LIKED, *DISLIKED)
    clause = f"(?:the {aspect} was (?:not |{_one_of(*DEGREES)} )?{adjective}|i (?:never )?{verb} the {aspect})"
    opinion = f"{clause}(?: (?:and|but) {clause})? \\."
    sentence = f"(?:{opinion}|{_one_of(*NEUTRAL)} \\.|overall , a {adjective} {_one_of(*NOUNS)} \\.)"
    return re.compile(f"{sentence}(?: {sentence}){{0,3}}")


_GRAMMAR = _grammar()


def valid(text: str) -> bool:
    """Whether ``text``, outer blanks aside, is one to four sentences of the grammar."""
    return _GRAMMAR.fullmatch(text.strip()) is not None
