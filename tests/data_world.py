"""Recipes, tokenizers, files and rollouts for tests of data, scoring, pairing and recording."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rlxf.config.schema import RunConfig
from rlxf.core.types import PromptBatch, Rollouts, Sequences, Text, Tokens
from tests.tiny_models import BOS, VOCAB, byte_tokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'refused' %}{{ raise_exception('no such role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer as a chat model has it: its own rule puts BOS in front, its template writes BOS and EOS."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def recipe(**sections: dict[str, Any]) -> RunConfig:
    """A small recipe; each section's keys replace those given here."""
    shape = {"num_layers": 2, "hidden_size": 128, "ffn_hidden_size": 192, "num_attention_heads": 4}
    base: dict[str, dict[str, Any]] = {
        "training": {"stage": "ray_online_dpo", "global_batch_size": 4, "train_iters": 2},
        "model": {"tiny": {**shape, "vocab_size": VOCAB, "max_position_embeddings": 512}},
        "actor_rollout": {"model": "tiny", "seq_length": 256, "max_prompt_length": 64},
        "ref": {"model": "tiny"},
        "reward": {},
    }
    merged = {name: base.get(name, {}) | sections.get(name, {}) for name in base | sections}
    return RunConfig.model_validate(merged)


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prompt_batch(
    rows: Sequence[Sequence[int]], *, texts: Sequence[Text] | None = None, columns: dict[str, list[Any]] | None = None
) -> PromptBatch:
    return PromptBatch(
        prompts=Tokens.from_rows(rows),
        row_ids=torch.arange(len(rows)),
        positions=torch.arange(len(rows)),
        texts=tuple(texts if texts is not None else [f"prompt {i}" for i in range(len(rows))]),
        columns=columns or {},
    )


def make_rollouts(
    prompts: PromptBatch, completions: Sequence[Sequence[Sequence[int]]], *, version: int = 0
) -> Rollouts:
    """``completions[p][k]`` answers prompt ``p``; the engine log-prob of a token is minus its id."""
    rows = prompts.prompts.rows()
    flat = [(p, k, list(ids)) for p, answers in enumerate(completions) for k, ids in enumerate(answers)]
    return Rollouts(
        prompts=prompts,
        sequences=Sequences.from_rows([rows[p] for p, _, _ in flat], [ids for _, _, ids in flat]),
        prompt_index=torch.tensor([p for p, _, _ in flat], dtype=torch.int64),
        sample_index=torch.tensor([k for _, k, _ in flat], dtype=torch.int64),
        engine_logps=-torch.tensor([float(t) for _, _, ids in flat for t in ids]),
        policy_version=torch.full((len(flat),), version, dtype=torch.int64),
    )


def reorder(rollouts: Rollouts, order: Sequence[int]) -> Rollouts:
    """The same rollouts with their rows in another order."""
    index = torch.tensor(order, dtype=torch.int64)
    logps = rollouts.engine_logps.split(rollouts.sequences.completion_lengths.tolist())
    return Rollouts(
        prompts=rollouts.prompts,
        sequences=rollouts.sequences.select(index),
        prompt_index=rollouts.prompt_index[index],
        sample_index=rollouts.sample_index[index],
        engine_logps=torch.cat([logps[i] for i in order]),
        policy_version=rollouts.policy_version[index],
    )
