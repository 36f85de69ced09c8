"""Judges that are models: scores by Bradley and Terry, and a classifier over both answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from rlxf.config.judge import JudgeConfig
from rlxf.core.errors import ConfigError, ModelError
from rlxf.core.types import Text
from rlxf.judge import JUDGES, JudgeParts
from rlxf.judge.model import ClassifierJudge, RewardModelJudge
from tests.tiny_models import byte_tokenizer

TEMPLATE = "<|source|>{prompt}<|candidate1|>{first}<|candidate2|>{second}"


def test_scores_make_the_probability_of_bradley_and_terry() -> None:
    asked: list[tuple[Text, str]] = []

    def score(prompts: Sequence[Text], answers: Sequence[str]) -> Tensor:
        asked.extend(zip(prompts, answers, strict=True))
        return torch.tensor([{"a": 2.0, "b": 0.5}.get(answer, math.nan) for answer in answers])

    judge = RewardModelJudge(score, {"folder": "x"})
    chat: Text = [{"role": "user", "content": "p"}]
    found = judge.compare(["p", "p", "p", chat], ["a", "b", "a", "a"], ["b", "a", "c", "b"], {})
    better = 1 / (1 + math.exp(-1.5))
    assert found[[0, 1, 3]].tolist() == pytest.approx([better, 1 - better, better])
    assert math.isnan(found[2])
    assert len(asked) == 5  # each answer once
    assert judge.is_symmetric


def classifier(folder: Path, labels: int, *, seed: int = 0, positions: int = 256) -> Path:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=positions, num_labels=labels, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def logits(folder: Path, texts: Sequence[str]) -> Tensor:
    model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = byte_tokenizer()
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([tokenizer.encode(text)])).logits for text in texts])


QUESTIONS = (["p", "question"], ["a", "long answer"], ["bb", "c"])
TEXTS = ["<|source|>p<|candidate1|>a<|candidate2|>bb", "<|source|>question<|candidate1|>long answer<|candidate2|>c"]


def test_one_logit_says_that_the_first_answer_is_better(tmp_path: Path) -> None:
    judge = ClassifierJudge(classifier(tmp_path, 1), TEMPLATE)
    found = judge.compare(*QUESTIONS, {})
    torch.testing.assert_close(found, torch.sigmoid(logits(tmp_path, TEXTS)[:, 0]), atol=1e-5, rtol=1e-4)
    assert found[0] != found[1]


@pytest.mark.parametrize("label", [0, 1])
def test_two_labels_are_a_softmax(tmp_path: Path, label: int) -> None:
    config = JudgeConfig(load=str(classifier(tmp_path, 2)), load_as="pair_classifier", first_label=label, batch_size=1)
    found = JUDGES["model"](JudgeParts(config=config)).compare(*QUESTIONS, {})
    torch.testing.assert_close(found, torch.softmax(logits(tmp_path, TEXTS), 1)[:, label], atol=1e-5, rtol=1e-4)


def test_a_question_that_is_too_long_has_no_verdict(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    judge = ClassifierJudge(classifier(tmp_path, 1, positions=60), TEMPLATE)
    heard: list[int] = []
    found = judge.compare(["p", "p"], ["a", "a" * 60], ["b", "b"], {}, heard=lambda verdicts: heard.extend(verdicts))
    assert [math.isnan(value) for value in found.tolist()] == [False, True]
    assert sorted(heard) == [0, 1]
    assert "1 of 2 questions are longer than the 60 tokens" in caplog.text


def test_a_folder_that_is_no_classifier_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"judge\.load = .*has 3 labels; expected one or two"):
        ClassifierJudge(classifier(tmp_path / "three", 3), TEMPLATE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="cannot be loaded as a classifier"):
        ClassifierJudge(tmp_path / "empty", TEMPLATE)


def test_other_weights_are_another_judge(tmp_path: Path) -> None:
    one, two = (ClassifierJudge(classifier(tmp_path / str(seed), 1, seed=seed), TEMPLATE) for seed in range(2))
    assert one.identity != two.identity
    assert one.identity == ClassifierJudge(tmp_path / "0", TEMPLATE).identity


def test_a_reward_model_needs_what_scores(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"judge\.load_as = reward_model: nothing scores"):
        JUDGES["model"](JudgeParts(config=JudgeConfig(load=str(tmp_path))))
