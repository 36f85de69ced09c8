"""A reward model is read where it was trained: at the token that ends the answer, in every path to a score."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rlxf.assembly.data import open_preferences
from rlxf.assembly.roles import build_actor, build_scorer
from rlxf.config.schema import RunConfig
from rlxf.core.read_position import stored_position
from rlxf.core.types import RewardPairs, Rollouts
from rlxf.models.endings import Endings
from rlxf.platform import Process, get_platform
from tests.data_world import make_rollouts, prompt_batch, write_rows
from tests.reward_world import (
    GOOD,
    KINDS,
    QUESTION,
    Kind,
    hf_scores,
    sampled,
    save_policy,
    texts_of,
    tokenizer_of,
)
from tests.settings import run_config

TOLERANCE: dict[str, Any] = {"atol": 5e-6, "rtol": 0}


@dataclass(frozen=True)
class Trained:
    """A reward model after stage rm, and what that stage saw."""

    kind: Kind
    policy: Path  # with the reward model's tokenizer
    foreign: Path  # a policy with other token ids
    reward: Path
    pairs: RewardPairs  # one pair
    evaluation: dict[str, float]

    @property
    def evaluated(self) -> torch.Tensor:
        """[2] scores of the chosen and the rejected answer, by stage rm's own evaluation."""
        margin, mean = self.evaluation["margin"], self.evaluation["mean_reward"]
        return torch.tensor([mean + margin / 2, mean - margin / 2])

    def rows(self) -> list[list[int]]:
        """The token ids that both answers were trained on."""
        return self.pairs.chosen.rows() + self.pairs.rejected.rows()

    def recipe(self, policy: Path, **reward: Any) -> RunConfig:
        config = run_config(policy, reward=self.reward, seq_length=256)
        return config.model_copy(update={"reward": config.reward.model_copy(update=reward)})

    def scores(self, policy: Path, rollouts: Rollouts, **reward: Any) -> torch.Tensor:
        return build_scorer(self.recipe(policy, **reward), get_platform("cpu"), Process()).score(rollouts)


def train(kind: Kind, folder: Path) -> Trained:
    """Two steps of stage rm on one pair."""
    policy = save_policy(folder / "policy", kind)
    foreign = save_policy(folder / "foreign", kind, reverse=True)
    prompt, chosen, rejected = texts_of(kind)
    file = write_rows(folder / "pairs.jsonl", [{"prompt": prompt, "chosen": chosen, "rejected": rejected}] * 2)
    config = run_config(policy, stage="rm", data_path=(str(file),), seq_length=256)
    actor = build_actor(config, get_platform("cpu"), Process())
    source = open_preferences(config, tokenizer_of(kind))
    for step in range(2):
        batch = source.next_batch(step)
        assert isinstance(batch, RewardPairs)
        actor.update(batch, step)
    pairs = source.first(1)
    assert isinstance(pairs, RewardPairs)
    evaluation = actor.evaluate(pairs)
    actor.save_hf(folder / "rm")
    return Trained(kind, policy, foreign, folder / "rm", pairs, evaluation)


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(KINDS[request.param], tmp_path_factory.mktemp("reward"))


def test_training_reads_the_token_that_ends_the_answer(trained: Trained) -> None:
    end = tokenizer_of(trained.kind).convert_tokens_to_ids(trained.kind.end)
    for row in trained.rows():
        assert row[-1] == end
    torch.testing.assert_close(trained.evaluated, hf_scores(trained.reward, trained.rows()), **TOLERANCE)


def test_sampled_ids_are_read_there(trained: Trained) -> None:
    rollouts = sampled(trained.kind, tokenizer_of(trained.kind))
    assert rollouts.sequences.rows() == trained.rows()
    torch.testing.assert_close(trained.scores(trained.policy, rollouts), trained.evaluated, **TOLERANCE)


def test_text_that_is_encoded_again_is_read_there(trained: Trained) -> None:
    rollouts = sampled(trained.kind, tokenizer_of(trained.kind, reverse=True))
    assert rollouts.sequences.rows() != trained.rows()
    torch.testing.assert_close(trained.scores(trained.foreign, rollouts), trained.evaluated, **TOLERANCE)


@pytest.mark.parametrize("reverse", [False, True], ids=["ids", "text"])
def test_an_answer_that_was_cut_gets_no_end(trained: Trained, reverse: bool) -> None:
    rollouts = sampled(trained.kind, tokenizer_of(trained.kind, reverse=reverse), ended=False)
    expected = hf_scores(trained.reward, [row[:-1] for row in trained.rows()])
    found = trained.scores(trained.foreign if reverse else trained.policy, rollouts)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert (found - trained.evaluated).abs().min() > 1e-3  # the position matters


# Models trained elsewhere


def test_the_last_token_is_that_of_the_whole_text(trained: Trained) -> None:
    """As TRL trains: with all that the template writes behind the answer, where sampling has stopped before it."""
    own, other = tokenizer_of(trained.kind), tokenizer_of(trained.kind, reverse=True)
    tail = own(trained.kind.tail, add_special_tokens=False)["input_ids"]
    expected = hf_scores(trained.reward, [row + tail for row in trained.rows()])
    for policy, tokenizer in ((trained.policy, own), (trained.foreign, other)):
        scores = trained.scores(policy, sampled(trained.kind, tokenizer), read_at="last_token")
        torch.testing.assert_close(scores, expected, **TOLERANCE)
    assert bool(tail) == bool((expected - trained.evaluated).abs().max() > 1e-3)


@pytest.mark.parametrize("reverse", [False, True], ids=["ids", "text"])
def test_a_cut_answer_gets_no_tail_either(trained: Trained, reverse: bool) -> None:
    policy = trained.foreign if reverse else trained.policy
    rollouts = sampled(trained.kind, tokenizer_of(trained.kind, reverse=reverse), ended=False)
    scores = [trained.scores(policy, rollouts, read_at=position) for position in ("last_token", "end_of_turn")]
    assert scores[0].tolist() == scores[1].tolist()


def test_a_folder_that_says_nothing_is_read_at_the_last_token(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.reward, tmp_path / "rm")
    settings = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert settings.pop("rlxf_read_at") == "end_of_turn"
    (tmp_path / "rm" / "config.json").write_text(json.dumps(settings))
    rollouts = sampled(trained.kind, tokenizer_of(trained.kind))
    unmarked = trained.scores(trained.policy, rollouts, load=str(tmp_path / "rm"))
    assert unmarked.tolist() == trained.scores(trained.policy, rollouts, read_at="last_token").tolist()


def test_transformers_keeps_what_the_folder_says(trained: Trained, tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(trained.reward)
    model.save_pretrained(tmp_path / "again")
    assert stored_position(tmp_path / "again") == stored_position(trained.reward) == "end_of_turn"


# What ends an answer


def test_only_an_eos_of_the_policy_ends_an_answer(trained: Trained) -> None:
    """A special token that is no EOS does not, and one that only generation_config.json names does."""
    tokenizer = tokenizer_of(trained.kind, reverse=True)
    cut, prompt = sampled(trained.kind, tokenizer, ended=False), "is it"
    (good, _), bos = cut.sequences.completion_rows(), tokenizer.bos_token_id
    ended = [*good, tokenizer.convert_tokens_to_ids(trained.kind.end)]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    rollouts = make_rollouts(prompt_batch([ids], texts=[prompt]), [[good, [*good, bos], ended]])
    whole, stopped, finished = trained.scores(trained.foreign, rollouts).tolist()
    assert whole == pytest.approx(stopped, abs=5e-6)
    assert abs(whole - finished) > 1e-3
    own = tokenizer_of(trained.kind)
    space = " " if trained.kind.template is None else ""
    row = own(f"{prompt}{space}{GOOD}{trained.kind.eos}", add_special_tokens=False)["input_ids"]
    assert finished == pytest.approx(float(hf_scores(trained.reward, [row])), abs=5e-6)


def test_an_assistants_message_that_was_continued_is_one_message(trained: Trained) -> None:
    if trained.kind.template is None:
        return
    tokenizer, own = tokenizer_of(trained.kind, reverse=True), tokenizer_of(trained.kind)
    prompt = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "yes ,"}]
    answer = tokenizer(f" it is{trained.kind.end}")["input_ids"]
    rollouts = make_rollouts(prompt_batch([[9]], texts=[prompt]), [[answer]])
    whole = own.apply_chat_template([prompt[0], {"role": "assistant", "content": GOOD}], return_dict=False)
    expected = hf_scores(trained.reward, [Endings.of(own, trained.reward).cut(whole)])
    torch.testing.assert_close(trained.scores(trained.foreign, rollouts), expected, **TOLERANCE)


# Texts that do not fit


@pytest.mark.parametrize("reverse", [False, True], ids=["ids", "text"])
def test_a_text_beyond_the_reward_model_has_no_score(
    trained: Trained, reverse: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rollouts = sampled(trained.kind, tokenizer_of(trained.kind, reverse=reverse))
    policy = trained.foreign if reverse else trained.policy
    long, short = trained.pairs.chosen.lengths.item(), trained.pairs.rejected.lengths.item()
    fits = trained.scores(policy, rollouts, seq_length=long)
    assert not fits.isnan().any()
    assert caplog.records == []
    scores = trained.scores(policy, rollouts, seq_length=long - 1)
    assert scores.isnan().tolist() == [True, False]
    assert scores[1] == pytest.approx(float(fits[1]), abs=5e-6)
    assert trained.scores(policy, rollouts, seq_length=short - 1).isnan().all()
    assert f"1 of 2 completions get no score: with their prompts they have up to {long} tokens" in caplog.text


def test_positions_that_the_reward_model_lacks_are_never_asked_for(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.reward, tmp_path / "rm")
    file = tmp_path / "rm" / "config.json"
    limit = trained.pairs.rejected.lengths.item()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": limit}))
    rollouts = sampled(trained.kind, tokenizer_of(trained.kind))
    scores = trained.scores(trained.policy, rollouts, load=str(tmp_path / "rm"), seq_length=512)
    assert scores.isnan().tolist() == [True, False]
