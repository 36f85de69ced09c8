"""A rule that asks a Hugging Face classifier, such as one for sentiment or toxicity."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlxf.config.rules import ClassifierOptions, classifier_labels, label_index
from rlxf.core.errors import ConfigError, ModelError
from rlxf.core.types import Text
from rlxf.score.rules.rule import text_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LONGEST = 10**6  # tokenizers without a limit name a huge number


class Classifier:
    """Probability or logit of one label, by a classifier from a folder, in fp32 on the CPU.

    Raises:
        ConfigError: the folder holds no classifier, or it has no such label.
    """

    def __init__(self, options: ClassifierOptions) -> None:
        folder = Path(options.load)
        try:
            self._index = label_index(options.label, classifier_labels(folder))
        except ValueError as error:
            raise ConfigError(f"rule classifier: {folder}, label {options.label!r}: expected {error}") from None
        self._options = options
        self._model, self._tokenizer = _load(folder)
        self._one_label = self._model.config.num_labels == 1
        self._several = self._model.config.problem_type == "multi_label_classification"
        self._max_length = options.max_length or _longest(self._model, self._tokenizer)

    def __call__(
        self, prompts: list[Text], completions: list[Text], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        texts = [self._text(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        order = sorted(range(len(texts)), key=lambda row: sum(map(len, texts[row])))  # little padding in a batch
        scores = torch.empty(len(texts))
        for start in range(0, len(order), self._options.batch_size):
            rows = order[start : start + self._options.batch_size]
            scores[rows] = self._scores([texts[row] for row in rows])
        return [score if math.isfinite(score) else None for score in scores.tolist()]

    def _text(self, prompt: Text, completion: Text) -> tuple[str, ...]:
        """One text, or a pair."""
        kind = self._options.text
        if kind == "completion":
            return (text_of(completion),)
        if kind == "pair":
            return text_of(prompt), text_of(completion)
        if isinstance(prompt, str) or isinstance(completion, str):
            return (text_of(prompt) + text_of(completion),)
        messages = [*prompt, *completion]
        if self._tokenizer.chat_template is None:
            return (text_of(messages),)
        return (str(self._tokenizer.apply_chat_template(messages, tokenize=False)),)

    @torch.no_grad()
    def _scores(self, texts: list[tuple[str, ...]]) -> Tensor:
        """[rows] float32."""
        columns = [list(part) for part in zip(*texts, strict=True)]
        batch = self._tokenizer(
            *columns, padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        )
        logits: Tensor = self._model(**batch).logits.float()  # [rows, labels]
        if self._options.output == "logit":
            return logits[:, self._index]
        if self._one_label or self._several:
            return logits[:, self._index].sigmoid()
        return logits.softmax(dim=-1)[:, self._index]


def _load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        ).eval()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"rule classifier: {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"rule classifier: {folder}: its tokenizer has neither a pad nor an EOS token")
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # a decoder reads its score before the padding
    return model, tokenizer


def _longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What both can read, in tokens."""
    limits = [tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < _LONGEST]
    return min(known, default=None)
