"""A reward by rule, for a first run on chat prompts without a reward model: short, complete, not repetitive.

Use it with ``reward.function=./examples/rewards/concise.py``. A score lies between 0 and 3, up to one point each for

* **concise**: rises up to 8 words, an answer in a sentence, and falls slowly from there (half a point at 40 words);
* **complete**: the text ends as a sentence does, with or without a closing quote or bracket, or with code;
* **fresh**: the share of three-word sequences that occur for the first time.

An answer of fewer than 3 words scores 0: saying nothing is not concise. The rule does not know whether an answer is
right: it shows that the loop learns. Trained on it for long, a policy pleases the rule and nobody else.
"""

from __future__ import annotations

from typing import Any

MIN_WORDS = 3
SENTENCE_WORDS = 8
HALF_POINT_WORDS = 40
ENDINGS = (".", "!", "?", '."', '!"', '?"', ".)", "```")


def reward(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A score for each completion: a string, or a list with one assistant message."""
    return [
        score(completion if isinstance(completion, str) else completion[0]["content"]) for completion in completions
    ]


def score(text: str) -> float:
    words = text.lower().split()
    if len(words) < MIN_WORDS:
        return 0.0
    complete = float(text.rstrip().endswith(ENDINGS))
    return concise(len(words)) + complete + fresh(words)


def concise(num_words: int) -> float:
    """Never equal for two lengths above a sentence, so that few pairs tie."""
    return min(1.0, num_words / SENTENCE_WORDS) * HALF_POINT_WORDS / (HALF_POINT_WORDS + num_words)


def fresh(words: list[str]) -> float:
    """Share of three-word sequences that have not occurred before in the text."""
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) / len(triples)
