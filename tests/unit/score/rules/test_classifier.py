"""Scores of a classifier are Hugging Face's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rlxf.core.errors import ConfigError, ModelError
from rlxf.core.types import Text
from rlxf.score.rules import make_rule
from tests.data_world import CHAT_TEMPLATE
from tests.tiny_models import byte_tokenizer, save_reward_model

TEXTS = ["good", "a much longer completion than the others", "", "bad bad"]
PROMPTS = ["How is it? ", "And it? ", "Is it? ", "So? "]
NAMES = {0: "negative", 1: "neutral", 2: "positive"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labels."""
    return save_reward_model(
        tmp_path_factory.mktemp("classifier"), labels=3, id2label=NAMES, label2id={v: k for k, v in NAMES.items()}
    )


def score(folder: Path, texts: list[Text], prompts: list[Text] | None = None, **options: Any) -> list[float | None]:
    rule = make_rule("classifier", {"load": str(folder), **options})
    return rule(prompts or ["p"] * len(texts), texts, [[1]] * len(texts))


@torch.no_grad()
def logits(folder: Path, texts: list[str], **options: Any) -> torch.Tensor:
    """[texts, labels], one text at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text, return_tensors="pt", **options) for text in texts]
    return torch.cat([model(**row).logits for row in rows])


# An empty text has no token of this tokenizer; a forward pass alone cannot take it, a padded batch can.
FULL = [text for text in TEXTS if text]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize("label", ["positive", 2])
def test_probability_and_logit_of_a_label(folder: Path, label: str | int, batch_size: int) -> None:
    expected = logits(folder, FULL)
    options: dict[str, Any] = {"label": label, "batch_size": batch_size}
    found = score(folder, list(FULL), **options)
    torch.testing.assert_close(torch.tensor(found), expected.softmax(dim=-1)[:, 2])
    found = score(folder, list(FULL), **options, output="logit")
    torch.testing.assert_close(torch.tensor(found), expected[:, 2])


def test_a_text_that_is_too_long_is_cut(folder: Path) -> None:
    long = "x" * 600  # the model reads 512
    expected = logits(folder, [long], truncation=True, max_length=512)[:, 0]
    torch.testing.assert_close(torch.tensor(score(folder, [long], label=0, output="logit")), expected)
    expected = logits(folder, ["xxx"])[:, 0]
    found = score(folder, [long], label=0, output="logit", max_length=3)
    torch.testing.assert_close(torch.tensor(found), expected)


def test_prompt_and_completion_are_read_as_one_text_or_as_a_pair(folder: Path, tmp_path: Path) -> None:
    joined = [prompt + text for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    found = score(folder, list(TEXTS), list(PROMPTS), label=1, output="logit", text="joined")
    torch.testing.assert_close(torch.tensor(found), logits(folder, joined)[:, 1])
    # The byte tokenizer puts nothing between the two texts of a pair.
    pair = score(folder, list(TEXTS), list(PROMPTS), label=1, output="logit", text="pair")
    torch.testing.assert_close(torch.tensor(pair), torch.tensor(found))
    chat: list[Text] = [[{"role": "user", "content": "Hi"}]]
    reply: list[Text] = [[{"role": "assistant", "content": "good"}]]
    found = score(folder, reply, chat, label=1, output="logit", text="joined")
    torch.testing.assert_close(torch.tensor(found), logits(folder, ["Hi\ngood"])[:, 1])
    model = save_reward_model(tmp_path, labels=2)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(model)
    found = score(model, reply, chat, label=1, output="logit", text="joined")
    text = "<s>[user]Hi</s>[assistant]good</s>"
    torch.testing.assert_close(torch.tensor(found), logits(model, [text])[:, 1])


def test_one_label_needs_no_name_and_gives_a_sigmoid(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path, labels=1)
    expected = logits(folder, FULL)[:, 0]
    torch.testing.assert_close(torch.tensor(score(folder, list(FULL), output="logit")), expected)
    torch.testing.assert_close(torch.tensor(score(folder, list(FULL))), expected.sigmoid())


def test_labels_that_can_hold_together_give_a_sigmoid_each(tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path, labels=3, problem_type="multi_label_classification")
    expected = logits(folder, FULL).sigmoid()[:, 1]
    torch.testing.assert_close(torch.tensor(score(folder, list(FULL), label="LABEL_1")), expected)


def test_a_folder_or_label_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'one of the labels negative \(0\), .*; did you mean "positive"\?'):
        score(folder, ["x"], label="positiv")
    with pytest.raises(ConfigError, match="a Hugging Face folder with a classifier"):
        score(tmp_path, ["x"])
    save_reward_model(tmp_path, labels=1)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="cannot be loaded"):
        score(tmp_path, ["x"])
