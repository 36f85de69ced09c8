"""Fixed prompts, completions and scores that every trainer of a comparison learns from.

A completion without an EOS is always ``max_new_tokens`` long, as a sampler would leave it: TRL counts every token up to
the first EOS as part of the completion, padding included. Completions are short because TRL sums log-probs in fp32: a
sum of 100 has steps of 8e-6, so a reward (``beta`` times a difference of two sums) could not be known to 1e-6.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from tests.tiny_models import EOS, byte_tokenizer, save_causal_lm

LETTERS = string.ascii_letters + " ,."


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedCompletion:
    text: str  # without the EOS
    token_ids: list[int]  # with the EOS when it was "sampled"
    score: float

    @property
    def has_eos(self) -> bool:
        return self.token_ids[-1] == EOS


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedPrompt:
    text: str
    token_ids: list[int]
    completions: tuple[FixedCompletion, FixedCompletion]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPair:
    """What one pair is made of once somebody has decided which completion is better."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """One comparison. The same values go to TRL, to the oracle and to the recipe of this project."""

    num_steps: int = 6
    pairs_per_step: int = 8
    micro_batch_size: int = 8
    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    divergence: str = "reverse_kl"
    alpha: float = 0.5
    beta: float | tuple[float, ...] = 0.1
    ld_alpha: float | None = None
    weighting: str = "none"
    missing_eos_penalty: float = 0.0
    lr: float = 1e-5
    clip_grad: float = 1.0
    weight_decay: float = 0.0
    max_new_tokens: int = 8
    seed: int = 1

    @property
    def accumulation(self) -> int:
        return self.pairs_per_step // self.micro_batch_size


def make_fixed_data(
    num_prompts: int, *, seed: int = 0, max_new_tokens: int = 8, penalty: float = 1.0
) -> list[FixedPrompt]:
    """Prompts with two completions each, never tied. A score is the share of lower-case letters, with noise."""
    source = random.Random(seed)
    tokenizer = byte_tokenizer()

    def completion() -> FixedCompletion:
        ended = source.random() < 0.7
        length = source.randint(3, max_new_tokens - 1) if ended else max_new_tokens
        weights = [source.choice([1, 8]) if letter.islower() else 2 for letter in LETTERS]
        text = "".join(source.choices(LETTERS, weights, k=length))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [EOS] * ended
        share = sum(letter.islower() for letter in text) / length
        return FixedCompletion(text=text, token_ids=ids, score=round(4 * share + source.gauss(0, 0.3), 4))

    def is_tie(first: FixedCompletion, second: FixedCompletion) -> bool:
        return any(abs(first.score - second.score + shift) < 1e-3 for shift in (-penalty, 0.0, penalty))

    rows = []
    for index in range(num_prompts):
        text = f"{index}" + "".join(source.choices(LETTERS, k=source.randint(3, 20))) + ":"
        first, second = completion(), completion()
        while is_tie(first, second):
            second = completion()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append(FixedPrompt(text=text, token_ids=ids, completions=(first, second)))
    return rows


def best_first(row: FixedPrompt, *, penalty: float) -> TokenPair:
    """The pair that the scores ask for, once a missing EOS has cost ``penalty``; the first completion wins a tie."""
    scores = [c.score - (0.0 if c.has_eos else penalty) for c in row.completions]
    chosen, rejected = row.completions if scores[0] >= scores[1] else reversed(row.completions)
    return TokenPair(prompt=row.token_ids, chosen=chosen.token_ids, rejected=rejected.token_ids)


def steps_of(pairs: Sequence[TokenPair], settings: Settings) -> Iterator[Sequence[TokenPair]]:
    for step in range(settings.num_steps):
        yield pairs[step * settings.pairs_per_step : (step + 1) * settings.pairs_per_step]


def write_rollouts(rows: Sequence[FixedPrompt], path: Path) -> Path:
    """The rows as a ``rollouts.jsonl``, which ``rollout.engine=replay`` reads."""
    with path.open("w") as file:
        for row in rows:
            completions = [{"token_ids": c.token_ids, "score": c.score} for c in row.completions]
            record = {"prompt_ids": row.token_ids, "completions": completions, "policy_version": 0}
            file.write(json.dumps(record) + "\n")
    return path


def write_preferences(rows: Sequence[FixedPrompt], path: Path) -> Path:
    """The rows as prompt / chosen / rejected texts; every completion of an offline file ends with an EOS."""
    with path.open("w") as file:
        for record in preference_records(rows):
            file.write(json.dumps(record) + "\n")
    return path


def preference_records(rows: Sequence[FixedPrompt]) -> list[dict[str, str]]:
    records = []
    for row in rows:
        chosen, rejected = sorted(row.completions, key=lambda c: c.score, reverse=True)
        records.append({"prompt": row.text, "chosen": chosen.text, "rejected": rejected.text})
    return records


def preference_pairs(rows: Sequence[FixedPrompt]) -> list[TokenPair]:
    tokenizer = byte_tokenizer()
    return [
        TokenPair(
            prompt=tokenizer(record["prompt"])["input_ids"],
            chosen=[*tokenizer(record["chosen"])["input_ids"], EOS],
            rejected=[*tokenizer(record["rejected"])["input_ids"], EOS],
        )
        for record in preference_records(rows)
    ]


def save_policy_and_reference(folder: Path, *, distance: float = 0.01) -> tuple[Path, Path]:
    """A tiny Llama and a reference that differs from it, so that the first step already has margins to get wrong."""
    policy = save_causal_lm(folder / "policy", seed=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=distance)
    model.save_pretrained(folder / "reference")
    byte_tokenizer().save_pretrained(folder / "reference")
    return policy, folder / "reference"
