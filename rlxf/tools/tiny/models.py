"""The tiny world's tokenizer and untrained model; samples and scores of the trained ones. Repeatable on one machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, PreTrainedTokenizerFast

from rlxf.tools.tiny import world
from rlxf.tools.tiny.recipe import Recipe

PAD, BOS, EOS = 0, 1, 2
_LENGTH_GROUPS = 4  # texts are padded in this many groups of similar length
_SAMPLE_BATCH = 1024  # prompts that are sampled at a time

Row = list[int]


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE tokenizer that puts ``<s>`` in front, unless ``add_special_tokens=False``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def model_config(recipe: Recipe, vocab_size: int) -> Any:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.ffn_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_heads,
        max_position_embeddings=recipe.max_positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def _padded(rows: Sequence[Row]) -> Tensor:
    """[rows, T] int64, padded on the right, where causal attention does not see it: no mask is needed."""
    width = max(map(len, rows))
    return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


def _by_length(rows: Sequence[Row]) -> Iterator[tuple[list[int], Tensor]]:
    """The rows in a few groups of similar length: their places in ``rows``, and the group, padded."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    size = -(-len(rows) // _LENGTH_GROUPS)
    for start in range(0, len(rows), size):
        places = order[start : start + size]
        yield places, _padded([rows[i] for i in places])


def grammar_pairs(count: int, rng: Random, label_noise: float = 0.0) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """``count`` pairs (prompt, better) and (prompt, worse) of the grammar, by ground truth; ties are left out.

    ``label_noise``: share of pairs with the sides swapped.
    """
    pairs: list[tuple[tuple[str, str], tuple[str, str]]] = []
    while len(pairs) < count:
        prompt = world.random_prompt(rng)
        worse, better = sorted((world.random_response(rng), world.random_response(rng)), key=world.score)
        if world.score(worse) == world.score(better):
            continue
        if rng.random() < label_noise:
            worse, better = better, worse
        pairs.append(((prompt, better), (prompt, worse)))
    return pairs


def _scores(model: Any, tokens: Tensor) -> Tensor:
    """[rows] float32: the reward model reads its score at the last token that is not padding."""
    return model(input_ids=tokens, use_cache=False).logits[:, 0]  # type: ignore[no-any-return]


@torch.no_grad()
def score_rows(model: Any, rows: Sequence[Row]) -> Tensor:
    """[rows] float32, in the order of ``rows``."""
    scores = torch.empty(len(rows))
    for places, tokens in _by_length(rows):
        scores[places] = _scores(model, tokens)
    return scores


@dataclass(frozen=True, slots=True)
class Sample:
    """What the policy answered: token ids without ``</s>``, and whether it ended by itself."""

    prompt: str
    tokens: Row
    finished: bool


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[Sample]:
    """One completion of each prompt at temperature 1, in order."""
    model.eval()
    encoded = tokenizer(list(prompts))["input_ids"]
    samples: dict[int, Sample] = {}
    for length in sorted({len(row) for row in encoded}):  # prompts of one length need neither padding nor a mask
        places = [i for i, row in enumerate(encoded) if len(row) == length]
        for start in range(0, len(places), _SAMPLE_BATCH):
            batch = places[start : start + _SAMPLE_BATCH]
            completions = _sample_batch(model, torch.tensor([encoded[i] for i in batch]), max_new_tokens)
            for i, (tokens, finished) in zip(batch, completions, strict=True):
                samples[i] = Sample(prompts[i], tokens, finished)
    return [samples[i] for i in range(len(prompts))]


def _draw(logits: Tensor) -> Tensor:
    """[n, 1] int64: a token for each row of ``logits`` ([n, V]), with one random number each (multinomial takes V)."""
    cumulative = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(cumulative, torch.rand(len(logits), 1) * cumulative[:, -1:], right=True)


def _sample_batch(model: Any, prompts: Tensor, max_new_tokens: int) -> list[tuple[Row, bool]]:
    """Completion of each row of ``prompts`` ([n, T] int64), and whether it ended. Rows that ended leave the batch."""
    completions: list[Row] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    cache, current = DynamicCache(), prompts
    for _ in range(max_new_tokens):
        logits = model(input_ids=current, past_key_values=cache, logits_to_keep=1).logits[:, -1]  # [alive, V]
        drawn = _draw(logits)  # [alive, 1]
        going = drawn[:, 0] != EOS
        alive = [row for row, goes_on in zip(alive, going.tolist(), strict=True) if goes_on]
        if not alive:
            break
        current = drawn[going]
        for row, token in zip(alive, current[:, 0].tolist(), strict=True):
            completions[row].append(token)
        if not going.all():
            cache.batch_select_indices(going.nonzero()[:, 0])
    unfinished = set(alive)
    return [(tokens, row not in unfinished) for row, tokens in enumerate(completions)]
