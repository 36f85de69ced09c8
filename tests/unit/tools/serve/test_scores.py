"""A served reward model gives the scores of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlxf.assembly.roles import build_scorer
from rlxf.platform import Process, get_platform
from rlxf.score.texts import Asked
from rlxf.tools.serve.forms import Wanted
from rlxf.tools.serve.scorers import ModelScores, ModelSettings
from tests.reward_world import BAD, GOOD, KINDS, sampled, save_policy, texts_of, tokenizer_of
from tests.settings import run_config
from tests.tiny_models import save_reward_model


def wanted(kind: str, *, ended: bool = True, prefix: str = "") -> Wanted:
    prompt, good, bad = texts_of(KINDS[kind])
    prompt = prefix + prompt if isinstance(prompt, str) else prompt
    asked = Asked(prompts=[prompt] * 2, completions=[good, bad], completion_ids=[[], []], columns={})
    return Wanted(asked=asked, ended=[ended] * 2, answer=lambda scores: scores)


def reward_model(folder: Path, kind: str) -> Path:
    tokenizer = tokenizer_of(KINDS[kind])
    save_reward_model(folder, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "cut"])
@pytest.mark.parametrize("read_at", ["last_token", "end_of_turn"])
@pytest.mark.parametrize("kind", KINDS)
def test_texts_get_the_scores_that_a_run_gives_to_sampled_ids(
    kind: str, read_at: Any, ended: bool, tmp_path: Path
) -> None:
    folder = reward_model(tmp_path / "rm", kind)
    config = run_config(save_policy(tmp_path / "policy", KINDS[kind]), reward=folder, seq_length=256)
    config = config.model_copy(update={"reward": config.reward.model_copy(update={"read_at": read_at})})
    rollouts = sampled(KINDS[kind], tokenizer_of(KINDS[kind]), ended=ended)
    expected = build_scorer(config, get_platform("cpu"), Process()).score(rollouts)
    scores = ModelScores(ModelSettings(load=folder, read_at=read_at, device="cpu"))
    found = scores([wanted(kind, ended=ended)])
    assert found == pytest.approx(expected.tolist(), abs=5e-6)
    assert scores([wanted(kind, ended=not ended)]) != pytest.approx(expected.tolist(), abs=1e-4)


def test_requests_are_scored_together_and_too_long_a_text_is_missing(tmp_path: Path) -> None:
    scores = ModelScores(
        ModelSettings(load=reward_model(tmp_path / "rm", "text"), read_at="last_token", seq_length=60, device="cpu")
    )
    alone = scores([wanted("text")])
    together = scores([wanted("text", prefix="x" * 100), wanted("text")])
    assert len(GOOD) != len(BAD)
    assert together[:2] == [None, None]
    assert together[2:] == pytest.approx(alone, abs=5e-6)
