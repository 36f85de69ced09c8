"""Scores equal Hugging Face's on the sampled ids, and go through text when the tokenizers differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlxf.assembly.roles import build_scorer
from rlxf.core.types import PromptBatch, Rollouts, Sequences, Text, Tokens
from rlxf.platform import Process, get_platform
from rlxf.score.reward_model import RewardModelScorer
from tests.settings import random_rows, run_config
from tests.tiny_models import EOS, byte_tokenizer, save_causal_lm, save_reward_model


def rollouts(texts: list[Text], prompts: list[list[int]], completions: list[list[int]]) -> Rollouts:
    """One completion per prompt."""
    rows = len(prompts)
    sequences = Sequences.from_rows(prompts, completions)
    return Rollouts(
        prompts=PromptBatch(
            prompts=Tokens.from_rows(prompts),
            row_ids=torch.arange(rows),
            positions=torch.arange(rows),
            texts=tuple(texts),
            columns={},
        ),
        sequences=sequences,
        prompt_index=torch.arange(rows),
        sample_index=torch.zeros(rows, dtype=torch.int64),
        engine_logps=torch.full((int(sequences.completion_lengths.sum()),), torch.nan),
        policy_version=torch.zeros(rows, dtype=torch.int64),
    )


def scorer(policy: Path, reward: Path) -> RewardModelScorer:
    return build_scorer(run_config(policy, reward=reward), get_platform("cpu"), Process())


@torch.no_grad()
def hf_scores(folder: Path, rows: list[list[int]]) -> Tensor:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    return torch.cat([model(torch.tensor([row])).logits[:, 0] for row in rows])


def reversed_tokenizer(folder: Path, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte tokenizer whose ids are the policy's in another order, saved over the one in ``folder``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    if chat:
        fast.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    return fast


def test_sampled_ids_are_scored_as_they_are_eos_included(tmp_path: Path) -> None:
    policy, reward = save_causal_lm(tmp_path / "policy"), save_reward_model(tmp_path / "rm")
    generator = torch.Generator().manual_seed(0)
    prompts, completions = random_rows(6, 2, 9, generator), random_rows(6, 1, 20, generator)
    completions[2].append(EOS)
    scores = scorer(policy, reward).score(rollouts(["?"] * 6, prompts, completions))
    expected = hf_scores(reward, [p + c for p, c in zip(prompts, completions, strict=True)])
    torch.testing.assert_close(scores, expected, atol=5e-6, rtol=0)


def test_another_tokenizer_scores_the_text(tmp_path: Path) -> None:
    policy, reward = save_causal_lm(tmp_path / "policy"), save_reward_model(tmp_path / "rm")
    other = reversed_tokenizer(reward)
    own = byte_tokenizer()
    prompt, answer = "is it good ?", " yes , it is"
    batch = rollouts(
        [prompt] * 2, [own(prompt)["input_ids"]] * 2, [own(answer)["input_ids"], [*own(answer)["input_ids"], EOS]]
    )
    ids = other(prompt + answer)["input_ids"]
    assert ids != own(prompt + answer)["input_ids"]
    expected = hf_scores(reward, [ids, [*ids, other.eos_token_id]])
    torch.testing.assert_close(scorer(policy, reward).score(batch), expected, atol=5e-6, rtol=0)


def test_chat_messages_go_through_the_reward_models_own_template(tmp_path: Path) -> None:
    policy, reward = save_causal_lm(tmp_path / "policy"), save_reward_model(tmp_path / "rm")
    other = reversed_tokenizer(reward, chat=True)
    own = byte_tokenizer()
    messages: Text = [{"role": "user", "content": "hi"}]
    batch = rollouts([messages], [own("<|user|>hi<|assistant|>")["input_ids"]], [own("hello")["input_ids"]])
    expected = hf_scores(reward, [other("[user]hi[assistant]hello")["input_ids"]])
    torch.testing.assert_close(scorer(policy, reward).score(batch), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_neighbours_never_change_a_score(tmp_path: Path, micro_batch_size: int) -> None:
    policy, reward = save_causal_lm(tmp_path / "policy"), save_reward_model(tmp_path / "rm")
    generator = torch.Generator().manual_seed(1)
    prompts, completions = random_rows(7, 2, 9, generator), random_rows(7, 1, 60, generator)
    batch = rollouts(["?"] * 7, prompts, completions)
    config = run_config(policy, reward=reward, micro_batch_size=micro_batch_size)
    scores = build_scorer(config, get_platform("cpu"), Process()).score(batch)
    torch.testing.assert_close(scores, scorer(policy, reward).score(batch), atol=5e-6, rtol=0)
