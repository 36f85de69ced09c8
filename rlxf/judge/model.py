"""Judges that are models: a reward model that scores each answer, or a classifier that reads both."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlxf.core.errors import ModelError
from rlxf.core.files import file_digest
from rlxf.core.types import Text
from rlxf.judge.judge import Columns, Heard, Verdict, ignore, plain_text
from rlxf.judge.template import fill

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ScoreTexts = Callable[[Sequence[Text], Sequence[str]], Tensor]
"""Prompts and their answers -> [N] float32 scores; NaN where missing."""

_LONGEST = 10**6  # what tokenizers without a limit say is far above it


def folder_digest(folder: Path) -> str:
    """Which model a folder holds: the content of its small files, name and size of the others."""
    parts = []
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        large = path.suffix in (".safetensors", ".bin", ".distcp")
        parts.append(f"{path.name} {path.stat().st_size} {_weights_digest(path) if large else file_digest(path)}")
    return "\n".join(parts)


def _weights_digest(path: Path) -> str:
    """Of the first and the last bytes: enough to tell two trained models of one shape apart, without reading all."""
    block, digest = 2**20, hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(block))
        file.seek(max(0, path.stat().st_size - block))
        digest.update(file.read(block))
    return digest.hexdigest()


class RewardModelJudge:
    """The probability of Bradley and Terry from the scores of a reward model: sigmoid(score(first) - score(second)).

    Args:
        score: gives answers their scores.
        identity: what names the reward model, as JSON data.
    """

    is_symmetric = True
    reads_columns = False

    def __init__(self, score: ScoreTexts, identity: Mapping[str, Any]) -> None:
        self._score = score
        self._identity = {"kind": "reward_model", **identity}

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def compare(
        self,
        prompts: Sequence[Text],
        first: Sequence[str],
        second: Sequence[str],
        columns: Columns,
        *,
        heard: Heard = ignore,
    ) -> Tensor:
        """[N] float32 probability that the first answer is better; NaN where a score is missing.

        An answer that several questions have is scored once.
        """
        names = [str(prompt) for prompt in prompts]
        rows: dict[tuple[str, str], int] = {}  # each answer once, and its row in what is scored
        asked: list[tuple[Text, str]] = []
        for texts in (first, second):
            for name, prompt, text in zip(names, prompts, texts, strict=True):
                if rows.setdefault((name, text), len(asked)) == len(asked):
                    asked.append((prompt, text))
        scores = self._score([prompt for prompt, _ in asked], [text for _, text in asked]).double()
        sides = [
            scores[[rows[name, text] for name, text in zip(names, texts, strict=True)]] for texts in (first, second)
        ]
        found = torch.sigmoid(sides[0] - sides[1]).float()
        heard({index: Verdict(probability=value) for index, value in enumerate(found.tolist())})
        return found


class ClassifierJudge:
    """A Hugging Face classifier that reads a prompt and both answers as one text, on the CPU.

    One logit: sigmoid of it is the probability that the first answer is better (PairRM). Two: softmax, read at
    ``first_label``. A text that is longer than the model reads has no verdict.

    Args:
        folder: the model's.
        template: text with {prompt}, {first} and {second}.
        first_label: the label that says that the first answer is better; of a model with two.
        batch_size: questions in one forward pass.
        trust_remote_code: let the folder run its own code.

    Raises:
        ModelError: the folder holds no classifier with one or two labels.
    """

    is_symmetric = False
    reads_columns = False

    def __init__(
        self,
        folder: Path,
        template: str,
        *,
        first_label: int = 0,
        batch_size: int = 16,
        trust_remote_code: bool = False,
    ) -> None:
        self._template = template
        self._first_label = first_label
        self._batch_size = batch_size
        self._model, self._tokenizer = _load(folder, trust_remote_code=trust_remote_code)
        self._identity = {
            "kind": "pair_classifier",
            "folder": folder_digest(folder),
            "template": template,
            "first_label": first_label,
        }
        labels = int(self._model.config.num_labels)
        if labels not in (1, 2):
            raise ModelError(f"judge.load = {folder}: has {labels} labels; expected one or two")
        positions = getattr(self._model.config, "max_position_embeddings", None) or _LONGEST
        self._max_length = min(int(positions), int(self._tokenizer.model_max_length), _LONGEST)

    @property
    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def compare(
        self,
        prompts: Sequence[Text],
        first: Sequence[str],
        second: Sequence[str],
        columns: Columns,
        *,
        heard: Heard = ignore,
    ) -> Tensor:
        """[N] float32 probability that the first answer is better; NaN where the text is too long."""
        texts = [
            fill(self._template, prompt=plain_text(prompt), first=one, second=two)
            for prompt, one, two in zip(prompts, first, second, strict=True)
        ]
        rows = self._tokenizer(texts, truncation=False)["input_ids"] if texts else []
        found = torch.full((len(texts),), math.nan)
        fits = [index for index, row in enumerate(rows) if len(row) <= self._max_length]
        fits.sort(key=lambda index: len(rows[index]))  # of similar lengths together: less padding
        for start in range(0, len(fits), self._batch_size):
            batch = fits[start : start + self._batch_size]
            found[batch] = self._probabilities([rows[index] for index in batch])
        # All at once: if a part of them was kept, a resumed run would form other batches, and the last bits differ.
        heard({index: Verdict(probability=value) for index, value in enumerate(found.tolist())})
        if long := len(texts) - len(fits):
            log.warning("judge.load: %d of %d questions are longer than the %d tokens that it reads; no verdict",
                        long, len(texts), self._max_length)  # fmt: skip
        return found

    @torch.no_grad()
    def _probabilities(self, rows: Sequence[Sequence[int]]) -> Tensor:
        batch = self._tokenizer.pad({"input_ids": list(rows)}, padding=True, return_tensors="pt")
        logits = self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        if logits.shape[1] == 1:
            return torch.sigmoid(logits[:, 0])
        return torch.softmax(logits, dim=1)[:, self._first_label]


def _load(folder: Path, *, trust_remote_code: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"judge.load = {folder}: cannot be loaded as a classifier: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer
