"""Scoring with a reward model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from rlxf.config.schema import RunConfig
from rlxf.errors import ConfigError
from rlxf.models.backend import load_model, sequence_scores
from rlxf.models.batching import Limits
from rlxf.models.tokenizer import load_tokenizer
from rlxf.platform.base import Platform, Process
from rlxf.types import Rollouts, Sequences, Text


class RewardModelScorer:
    """One rank of the reward model, a Hugging Face ``*ForSequenceClassification`` with one label.

    With the policy's own tokenizer the sampled token ids are scored as they are, EOS included. With another tokenizer
    the completion is decoded and encoded again after the prompt's text: through the reward tokenizer's chat template
    for chat messages, else as plain text with its EOS where the completion ended.

    Raises:
        ModelError: ``reward.load`` does not hold such a model.
    """

    def __init__(self, config: RunConfig, platform: Platform, process: Process) -> None:
        self.model = load_model(config, "reward", platform, process)
        self.model.requires_grad_(False)
        self._limits = Limits.of(config.reward)
        trust = config.training.trust_remote_code
        self._own = load_tokenizer(_tokenizer_path(config, "reward"), trust_remote_code=trust)
        self._policy = load_tokenizer(_tokenizer_path(config, "actor_rollout"), trust_remote_code=trust)
        self._same = _same_ids(self._own, self._policy)

    def score(self, rollouts: Rollouts) -> Tensor:
        """[B] float32 scores, read at the last token of prompt and completion."""
        if self._same:
            return sequence_scores(self.model, rollouts.sequences, self._limits)
        # Where a prompt ends is not known in the other tokens, so there is none to share.
        return sequence_scores(self.model, self._reencode(rollouts), replace(self._limits, share_prompts=False))

    def _reencode(self, rollouts: Rollouts) -> Sequences:
        texts = [rollouts.prompts.texts[row] for row in rollouts.prompt_index.tolist()]
        rows = [
            self._encode(text, completion)
            for text, completion in zip(texts, rollouts.sequences.completion_rows(), strict=True)
        ]
        # Only the whole counts: a score is read at the last token, wherever the prompt ends.
        return Sequences.from_rows([row[:1] for row in rows], [row[1:] for row in rows])

    def _encode(self, prompt: Text, completion: list[int]) -> list[int]:
        answer = self._policy.decode(completion, skip_special_tokens=True)
        if not isinstance(prompt, str):
            messages = [*prompt, {"role": "assistant", "content": answer}]
            ids: list[int] = self._own.apply_chat_template(messages, tokenize=True, return_dict=False)
            return ids
        ids = self._own(prompt + answer)["input_ids"]
        ended = bool(completion) and completion[-1] in self._policy.all_special_ids
        if ended and self._own.eos_token_id is not None and ids[-1] != self._own.eos_token_id:
            ids = [*ids, self._own.eos_token_id]
        return ids


def _tokenizer_path(config: RunConfig, role: str) -> str:
    section = getattr(config, role)
    path: str | None = section.tokenizer_name_or_path or section.load
    if path is None:
        raise ConfigError(f"{role}.tokenizer_name_or_path: expected a tokenizer folder, got none")
    return path


def _same_ids(first: Any, second: Any) -> bool:
    return bool(first.get_vocab() == second.get_vocab())
