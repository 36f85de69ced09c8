"""Preference pairs for offline training: what the first policy answers, ranked by the reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlxf.tools.tiny import models, world
from rlxf.tools.tiny.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Collected:
    pairs: list[dict[str, str]]  # prompt, chosen, rejected
    first_policy: dict[str, float]  # ground truth of what it answers


def collect(recipe: Recipe, policy: Any, reward: Any, tokenizer: Any) -> Collected:
    """Two samples for each of ``recipe.num_preferences`` prompts; ties, empty and unfinished ones are left out."""
    prompts = [world.prompt(world.TRAIN_TITLES[i % len(world.TRAIN_TITLES)]) for i in range(recipe.num_preferences)]
    samples = models.sample(policy, tokenizer, [prompt for prompt in prompts for _ in range(2)], recipe.max_new_tokens)
    rows = [[*tokenizer(one.prompt)["input_ids"], *one.tokens, models.EOS] for one in samples]
    scores = models.score_rows(reward, rows).tolist()
    texts = [tokenizer.decode(one.tokens) for one in samples]
    pairs = []
    for i in range(0, len(samples), 2):
        best, worst = (i, i + 1) if scores[i] > scores[i + 1] else (i + 1, i)
        whole = all(samples[row].finished and texts[row].strip() for row in (best, worst))
        if scores[best] > scores[worst] and whole:
            pairs.append({"prompt": samples[i].prompt, "chosen": texts[best], "rejected": texts[worst]})
    return Collected(pairs, _truth(samples, texts))


def _truth(samples: list[models.Sample], texts: list[str]) -> dict[str, float]:
    count = max(1, len(texts))
    return {
        "positive": sum(world.score(text) > 0 for text in texts) / count,
        "valid": sum(world.valid(text) for text in texts) / count,
        "finished": sum(one.finished for one in samples) / count,
    }
