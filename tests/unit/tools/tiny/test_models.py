"""The tiny world's tokenizer and models, on a handful of steps."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rlxf.tools.tiny import models, world
from rlxf.tools.tiny.recipe import Recipe

SMALL = Recipe(hidden_size=32, ffn_size=64, num_heads=1)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return models.train_tokenizer(f"{prompt} {response}" for prompt, response in world.corpus(4_000))


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[models.Row]:
    """Prompt, response and EOS."""
    texts = [f"{prompt} {response}" for prompt, response in world.corpus(300)]
    return [[*ids, models.EOS] for ids in tokenizer(texts)["input_ids"]]


@pytest.fixture(scope="module")
def policy(tokenizer: Any) -> Any:
    """Weights with opinions: a fresh model gives every token the same chance."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(models.model_config(SMALL, len(tokenizer)))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(20)
    return model


def _with_one_label(config: Any) -> Any:
    config = type(config)(**config.to_dict())
    config.num_labels = 1
    return config


def test_tokenizer_has_the_recipe_s_vocabulary_and_specials(tokenizer: Any) -> None:
    assert len(tokenizer) == 586
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [models.PAD, models.BOS, models.EOS]


def test_prompt_starts_with_bos_and_completion_does_not(tokenizer: Any) -> None:
    prompt = tokenizer("review of the silver dragon :")["input_ids"]
    completion = tokenizer(" the plot was dull .", add_special_tokens=False)["input_ids"]
    assert prompt[0] == models.BOS
    assert models.BOS not in prompt[1:]
    assert models.BOS not in completion
    assert tokenizer.decode(completion) == " the plot was dull ."


def test_grammar_pairs_are_ordered_by_the_truth_and_share_their_prompt() -> None:
    pairs = models.grammar_pairs(200, Random(0))
    assert len(pairs) == 200
    for (prompt, better), (same_prompt, worse) in pairs:
        assert prompt == same_prompt
        assert world.score(better) > world.score(worse)


def test_label_noise_swaps_its_share_of_pairs() -> None:
    pairs = models.grammar_pairs(1_000, Random(0), label_noise=0.25)
    swapped = sum(world.score(better) < world.score(worse) for (_, better), (_, worse) in pairs)
    assert swapped == pytest.approx(250, abs=50)


def test_scores_do_not_depend_on_the_other_rows(rows: list[models.Row], policy: Any) -> None:
    torch.manual_seed(1)
    reward = LlamaForSequenceClassification(_with_one_label(policy.config))
    some = rows[:13]
    together = models.score_rows(reward.eval(), some)
    alone = torch.cat([models.score_rows(reward, [row]) for row in some])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_samples_follow_the_policy_and_keep_their_order(tokenizer: Any, policy: Any) -> None:
    prompts = [world.prompt(title) for title in world.TRAIN_TITLES[:7]]
    torch.manual_seed(3)
    samples = models.sample(policy, tokenizer, prompts, max_new_tokens=12)
    assert [one.prompt for one in samples] == prompts
    for one in samples:
        assert models.EOS not in one.tokens
        assert len(one.tokens) <= 12
        assert one.finished or len(one.tokens) == 12


def test_sampled_frequencies_are_the_policy_s_probabilities(tokenizer: Any, policy: Any) -> None:
    prompt = world.prompt(world.TRAIN_TITLES[0])
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    expected = logits.softmax(-1)
    torch.manual_seed(4)
    drawn = [
        one.tokens[0] if one.tokens else models.EOS for one in models.sample(policy, tokenizer, [prompt] * 4_000, 1)
    ]
    measured = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / len(drawn)
    assert (measured - expected).abs().max().item() < 4 * (0.25 / 4_000) ** 0.5


def test_rows_that_end_leave_the_others_undisturbed() -> None:
    """With logits so large that sampling is greedy, every token must be the model's choice for its own row."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(models.model_config(SMALL, vocab_size=8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
        model.model.norm.weight.fill_(1e4)
    prompts = torch.randint(3, 8, (40, 5))
    completions = models._sample_batch(model, prompts, max_new_tokens=10)
    assert len({len(tokens) for tokens, _ in completions}) > 3  # they do end at different steps
    for prompt, (tokens, finished) in zip(prompts.tolist(), completions, strict=True):
        with torch.no_grad():
            choices = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0].argmax(-1).tolist()
        expected = [*tokens, models.EOS] if finished else tokens
        assert choices[len(prompt) - 1 :][: len(expected)] == expected
