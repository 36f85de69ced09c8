"""What scores by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlxf.assembly.roles import build_scorer
from rlxf.config.load import load_config
from rlxf.platform import Process, get_platform
from rlxf.score import SCORERS, ScorerParts
from tests.data_world import write_rows
from tests.unit.config.recipes import recipe

PROCESS = Process(rank=1, world_size=2)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ScorerParts]]:
    """Which entries were asked for, and with what; nothing is built."""
    asked: list[tuple[str, ScorerParts]] = []
    for name in SCORERS:
        monkeypatch.setitem(SCORERS, name, lambda parts, name=name: asked.append((name, parts)))
    return asked


def replayed(folder: Path, score: float | None) -> dict[str, Any]:
    row = {"prompt_ids": [5], "completions": [{"token_ids": [6], "score": score}] * 2, "policy_version": 0}
    return {"engine": "replay", "replay_path": str(write_rows(folder / f"{score}.jsonl", [row]))}


def test_the_reward_section_chooses_the_scorer_unless_a_replay_holds_scores(
    tmp_path: Path, chosen: list[tuple[str, ScorerParts]]
) -> None:
    with_scores, without = (recipe(rollout=replayed(tmp_path, score)) for score in (0.5, None))
    for raw in (recipe(), with_scores, without):
        config = load_config(raw)
        build_scorer(config, get_platform("cpu"), PROCESS)
        assert (chosen[-1][1].config, chosen[-1][1].recording) == (config.reward, config.rollout.replay_path)
    assert [name for name, _ in chosen] == ["model", "recorded", "model"]
