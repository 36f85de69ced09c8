"""A bigram policy that samples, in place of a rollout engine."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from rlxf.core.types import PromptBatch, Rollouts
from rlxf.rollout.engine import Completion, Sampling, pack_rollouts, sample_requests

VOCAB, EOS = 6, 1
Trace = list[str]


class SmallEngine:
    """Samples from its own copy of the weights, each completion with the seed of its identity."""

    def __init__(self, trace: Trace) -> None:
        self.logits = torch.zeros(VOCAB, VOCAB)
        self.version = 0
        self._trace = trace
        self.samplings: list[Sampling] = []
        self.seeds: list[list[int]] = []  # of each call, one per completion
        self.during_generate: Callable[[], None] = lambda: None
        self.busy = False
        self.next_prompt = -1  # of those that are left, the one that a session ends first

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        assert not self.busy
        self.busy = True
        try:
            self._trace.append("rollout")
            version = self.version  # of the weights that it begins with
            self.during_generate()
            return self.sample(prompts, sampling, version)
        finally:
            self.busy = False

    def session(self, sampling: Sampling) -> SmallSession:
        assert not self.busy
        return SmallSession(self, sampling, self._trace)

    def sample(self, prompts: PromptBatch, sampling: Sampling, version: int) -> Rollouts:
        self.samplings.append(sampling)
        requests = [request for part in sample_requests(prompts, sampling, None) for request in part]
        self.seeds.append([seed for _, seed in requests])
        completions = [self._sample(row, sampling, seed) for row, seed in requests]
        return pack_rollouts(prompts, sampling.num_samples, completions, version)

    def _sample(self, prompt: list[int], sampling: Sampling, seed: int) -> Completion:
        generator = torch.Generator().manual_seed(seed)
        tokens, logps, last = list[int](), list[float](), prompt[-1]
        while len(tokens) < sampling.max_new_tokens and last != EOS:
            probabilities = self.logits[last].softmax(-1)
            greedy = sampling.temperature == 0
            last = int(probabilities.argmax() if greedy else torch.multinomial(probabilities, 1, generator=generator))
            tokens.append(last)
            logps.append(math.log(float(probabilities[last])))
        return Completion(tokens=tokens, logps=logps)


class SmallSession:
    """Hands over a prompt at a time."""

    num_slots = None

    def __init__(self, engine: SmallEngine, sampling: Sampling, trace: Trace) -> None:
        self._engine, self._sampling, self._version = engine, sampling, engine.version
        self._trace = trace
        self._left: list[PromptBatch] = []

    def add(self, prompts: PromptBatch) -> None:
        assert not self._engine.busy
        self._engine.busy = True
        self._trace.append("rollout")
        self._engine.during_generate()
        self._left += [prompts.select([row]) for row in range(len(prompts))]

    def advance(self) -> Rollouts | None:
        if not self._left:
            return None
        self._trace.append("part")
        return self._engine.sample(self._left.pop(self._engine.next_prompt), self._sampling, self._version)

    def close(self) -> None:
        self._engine.busy = False
