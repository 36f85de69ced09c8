"""Texts as rollouts, for a reward model that is asked about texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from rlxf.core.types import PromptBatch, Rollouts, Sequences, Text, Tokens
from rlxf.models.encoding import encode_prompt, encode_string

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def as_rollouts(
    prompts: Sequence[Text], answers: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, eos_id: int
) -> Rollouts:
    """Answers as completions that have ended, in the tokens of ``tokenizer``; each has a prompt row of its own."""
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    completions = [[*encode_string(tokenizer, answer), eos_id] for answer in answers]
    index = torch.arange(len(rows))
    return Rollouts(
        prompts=PromptBatch(
            prompts=Tokens.from_rows(rows), row_ids=index, positions=index, texts=tuple(prompts), columns={}
        ),
        sequences=Sequences.from_rows(rows, completions),
        prompt_index=index,
        sample_index=torch.zeros(len(rows), dtype=torch.int64),
        engine_logps=torch.full((sum(map(len, completions)),), torch.nan),
        policy_version=torch.zeros(len(rows), dtype=torch.int64),
    )
