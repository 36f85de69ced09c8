"""Floating-point operations of one prompt and its completions, from their lengths: what has to be computed, no more.

Prompts are packed and shared as ``rlxf/models/megatron/packing.py`` does, and the head reads completion rows only.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlxf.planner.jobs import Shape, Work


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Counts of one stream, or of many of them."""

    tokens: float  # that go through the layers
    read: float  # that go through the head
    seen: float  # (query, key) pairs of causal attention

    def times(self, number: float) -> Rows:
        return Rows(tokens=self.tokens * number, read=self.read * number, seen=self.seen * number)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forward:
    """Operations of a forward pass."""

    body: float  # products of the layers
    attention: float  # scores and their products with the values
    head: float

    @property
    def total(self) -> float:
        return self.body + self.attention + self.head


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """Prompts of a step that are trained on, and completions of each."""

    prompts: float
    sides: float

    @classmethod
    def of(cls, work: Work) -> Trained:
        """A completion that is in several pairs is computed once (``rlxf/models/sharing.py``)."""
        if work.samples < 2:  # rows of a file
            return cls(prompts=work.pairs, sides=work.sides)
        prompts = min(work.pairs, float(work.prompts))
        sides = min(work.sides * work.pairs / prompts, float(work.samples)) if prompts else 0.0
        return cls(prompts=prompts, sides=sides)


def stream(prompt: float, completion: float, sides: float, *, share: bool, scores: bool = False) -> Rows:
    """Of one prompt with ``sides`` completions.

    Args:
        prompt: its tokens.
        completion: tokens of each completion. The last one predicts nothing, so log-probs do not need it.
        sides: completions.
        share: the prompt is computed once for all of them.
        scores: a reward model reads the last token of each sequence; otherwise all completion tokens are predicted.
    """
    fed = completion if scores else max(completion - 1, 0.0)
    own = fed * prompt + fed * (fed + 1) / 2
    prompts = min(sides, 1.0) if share else sides
    return Rows(
        tokens=prompts * prompt + sides * fed,
        read=sides if scores else sides * completion,
        seen=prompts * prompt * (prompt + 1) / 2 + sides * own,
    )


def forward_flops(shape: Shape, rows: Rows) -> Forward:
    """2 for each weight and token; 4 for each channel of the queries and (query, key) pair, in each layer.

    The head of a reward model has one row, which does not count.
    """
    return Forward(
        body=2 * shape.body * rows.tokens,
        attention=4 * shape.layers * shape.heads * shape.head_size * rows.seen,
        head=0.0 if shape.scores else 2 * shape.head * rows.read,
    )


def model_flops(shape: Shape, rows: Rows) -> float:
    """Forward and backward, as the MFU of docs/platforms.md counts it: three forward passes, nothing computed again."""
    return 3 * forward_flops(shape, rows).total


def prefill_rows(work: Work) -> Rows:
    """Of the prompts of a step: once for all samples of a prompt, by vLLM's prefix cache and by the hf engine alike."""
    prompt = work.prompt_tokens
    return Rows(tokens=prompt, read=1.0, seen=prompt * (prompt + 1) / 2).times(work.prompts)


def decode_rows(work: Work) -> Rows:
    """Of the tokens of a step that are fed one by one: the last one of a completion is not.

    The first token of a completion comes from its prompt's pass.
    """
    fed = max(work.completion_tokens - 1, 0.0)
    one = Rows(tokens=fed, read=fed, seen=fed * work.prompt_tokens + fed * (fed + 1) / 2)
    return one.times(work.completions)
