"""Scoring with a reward model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlxf.config.roles import RewardConfig
from rlxf.core.errors import DataError, ModelError
from rlxf.core.read_position import read_position
from rlxf.core.types import Messages, Rollouts, Sequences, Text
from rlxf.models.backend import sequence_scores
from rlxf.models.batching import MicroBatchLimits
from rlxf.models.encoding import encode_chat, encode_string, with_eos
from rlxf.models.endings import Endings
from rlxf.score.scorer import SampledBy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlxf.models.megatron.model import MegatronModel

log = logging.getLogger(__name__)


class RewardModelScorer:
    """One rank of the reward model, a Hugging Face ``*ForSequenceClassification`` with one label.

    With the policy's own tokenizer the sampled token ids are scored as they are, EOS included. With another tokenizer
    the completion is decoded and encoded again after the prompt's text: through the reward tokenizer's chat template
    for chat messages, else as plain text. A completion that was cut has no EOS, and gets none.

    A score is read where the model was trained (``reward.read_at``): at the token that ends the answer, or at the last
    token that the reward model's chat template writes after it. The score of a cut completion is read at its last
    token.

    Args:
        model: this rank's share of it.
        config: of the reward.
        limits: of one forward pass.
        tokenizer: the reward model's.
        policy: who sampled the completions.

    Raises:
        ConfigError: the model's config.json names a position that is not known.
    """

    def __init__(
        self,
        model: MegatronModel,
        config: RewardConfig,
        limits: MicroBatchLimits,
        tokenizer: PreTrainedTokenizerBase,
        policy: SampledBy,
    ) -> None:
        self.model = model
        self.model.requires_grad_(False)
        self._limits = limits
        self._max_tokens = min(config.seq_length, int(model.hf_config.max_position_embeddings))
        self._said_too_long = False
        self._own, self._policy = tokenizer, policy.tokenizer
        self._same = bool(tokenizer.get_vocab() == policy.tokenizer.get_vocab())
        self._eos_ids = policy.eos_ids
        ids = self._eos_ids if self._same else ()
        self._endings = Endings.of(self._own, config.load, ids=ids)
        self._reads_tail = read_position(config.read_at, config.load) == "last_token"

    def score(self, rollouts: Rollouts) -> Tensor:
        """[B] float32 scores; NaN for a text that is longer than the reward model takes."""
        texts = [rollouts.prompts.texts[row] for row in rollouts.prompt_index.tolist()]
        sequences = self._sampled(rollouts.sequences, texts) if self._same else self._encoded(rollouts.sequences, texts)
        # In another tokenizer's tokens the end of a prompt is not known, so no prompt can be shared.
        return self._scored(sequences, self._limits if self._same else replace(self._limits, share_prompts=False))

    def score_texts(self, prompts: Sequence[Text], answers: Sequence[str], ended: Sequence[bool]) -> Tensor:
        """[B] float32 scores of texts, as those of a policy with another tokenizer; NaN for one that is too long.

        Args:
            prompts: strings, or chat messages.
            answers: one to each prompt.
            ended: the answer is whole; else it was cut and gets no EOS.
        """
        rows = [self._encode(*text) for text in zip(prompts, answers, ended, strict=True)]
        return self._scored(_split_anywhere(rows), replace(self._limits, share_prompts=False))

    def _scored(self, sequences: Sequences, limits: MicroBatchLimits) -> Tensor:
        fits = sequences.lengths <= self._max_tokens
        if bool(fits.all()):
            return sequence_scores(self.model, sequences, limits)
        self._say_too_long(sequences)
        scores = torch.full((len(sequences),), math.nan)
        if bool(fits.any()):
            scores[fits] = sequence_scores(self.model, sequences.select(fits.nonzero().flatten()), limits)
        return scores

    def _sampled(self, sequences: Sequences, texts: Sequence[Text]) -> Sequences:
        """Prompt and completion up to the token where the score is read."""
        completions = sequences.completion_rows()
        read = [self._up_to_position(ids, text) for ids, text in zip(completions, texts, strict=True)]
        return sequences if read == completions else Sequences.from_rows(sequences.prompt_rows(), read)

    def _up_to_position(self, completion: list[int], prompt: Text) -> list[int]:
        if not self._reads_tail:
            return self._endings.cut(completion)
        place = self._endings.find(completion)
        if place is None or isinstance(prompt, str):
            return completion
        return completion[: place + 1] + self._endings.tail

    def _encoded(self, sequences: Sequences, texts: Sequence[Text]) -> Sequences:
        rows = []
        for prompt, completion in zip(texts, sequences.completion_rows(), strict=True):
            ended = bool(completion) and completion[-1] in self._eos_ids
            answer = self._policy.decode(completion[:-1] if ended else completion, skip_special_tokens=True)
            rows.append(self._encode(prompt, answer, ended))
        return _split_anywhere(rows)

    def _encode(self, prompt: Text, answer: str, ended: bool) -> list[int]:
        """Prompt and answer in the reward model's own tokens."""
        if isinstance(prompt, str):
            text, eos = prompt + answer, self._own.eos_token
            return encode_string(self._own, with_eos(text, eos) if ended and eos is not None else text)
        ids = self._encode_chat(prompt, answer)
        place = self._endings.find(ids)
        if place is None or (ended and self._reads_tail):
            return ids
        return ids[: place + 1] if ended else ids[:place]

    def _encode_chat(self, prompt: Messages, answer: str) -> list[int]:
        messages = [*prompt, {"role": "assistant", "content": answer}]
        if prompt[-1]["role"] == "assistant":  # the policy continued this message
            messages = [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + answer}]
        try:
            return encode_chat(self._own, messages)
        except DataError as error:
            raise ModelError(f"{self._own.name_or_path}: the reward model's tokenizer: {error}") from error

    def _say_too_long(self, sequences: Sequences) -> None:
        if not self._said_too_long:
            self._said_too_long = True
            log.warning(
                "%d of %d completions get no score: with their prompts they have up to %d tokens, but the reward model "
                "takes %d (the smaller of reward.seq_length and its max_position_embeddings); score/missing counts "
                "such completions from now on",
                int((sequences.lengths > self._max_tokens).sum()),
                len(sequences),
                int(sequences.lengths.max()),
                self._max_tokens,
            )


def _split_anywhere(rows: Sequence[list[int]]) -> Sequences:
    """Rows of which it does not matter where the prompt ends: a score is read at the last token."""
    return Sequences.from_rows([row[:1] for row in rows], [row[1:] for row in rows])
