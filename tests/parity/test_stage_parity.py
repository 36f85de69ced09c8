"""Supervised fine-tuning and reward models from a file: this project against TRL's live trainers, in fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.parity import ours, trl_stages
from tests.parity.compare import assert_parity, excess
from tests.parity.fixed_data import FixedPrompt, Settings, preference_records
from tests.parity.oracle import Metrics
from tests.tiny_models import save_reward_model

Record = dict[str, Any]
SFT = ("loss", "grad_norm")
REWARD = ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward")


def train_here(
    stage: str, records: list[Record], model: Path, settings: Settings, folder: Path, **keys: Any
) -> list[Metrics]:
    return ours.train(ours.stage_recipe(stage, records, model, settings, folder, **keys), folder / "run")


def completion_records(rows: list[FixedPrompt]) -> list[Record]:
    return [{"prompt": record["prompt"], "completion": record["chosen"]} for record in preference_records(rows)]


def chat_records(rows: list[FixedPrompt]) -> list[Record]:
    """Two turns each: the later question lies between answers that count."""
    records = []
    for row in rows:
        contents = (row.text, row.completions[0].text, row.text[::-1], row.completions[1].text)
        roles = ("user", "assistant", "user", "assistant")
        records.append({"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]})
    return records


@pytest.mark.parametrize("micro_batch_size", [8, 2])
@pytest.mark.parametrize("kind", ["completions", "chats"])
def test_every_step_of_supervised_fine_tuning_equals_trl(
    kind: str, micro_batch_size: int, rows: list[FixedPrompt], folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """The mean is over all tokens of the step, however it is cut: a micro-batch with long answers weighs more."""
    settings = Settings(micro_batch_size=micro_batch_size, lr=1e-4)
    records = chat_records(rows) if kind == "chats" else completion_records(rows)
    mine = train_here("sft", records, folders[0], settings, tmp_path)
    theirs = trl_stages.train_sft(records, folders[0], settings, tmp_path)
    assert_parity(mine, theirs, steps=settings.num_steps, names=SFT)
    assert [step["num_tokens"] for step in mine] == [step["num_tokens"] for step in theirs]
    assert mine[-1]["loss"] < mine[0]["loss"] - 0.1


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("classifier") / "model")


def both_sides(
    rows: list[FixedPrompt],
    model: Path,
    settings: Settings,
    folder: Path,
    *,
    margin: bool = False,
    centering: float = 0.0,
    lr: float | None = None,
) -> tuple[list[Metrics], list[Metrics]]:
    """Metrics of every step, here and of TRL; ``lr`` is one for this side alone."""
    records: list[Record] = [dict(record) for record in preference_records(rows)]
    keys: dict[str, Any] = {"center_rewards_coefficient": centering}
    if margin:
        keys["margin_key"] = "margin"
        for record, row in zip(records, rows, strict=True):
            record["margin"] = abs(row.completions[0].score - row.completions[1].score)
    own = settings if lr is None else replace(settings, lr=lr)
    mine = train_here("rm", records, model, own, folder, **keys)
    return mine, trl_stages.train_reward(records, model, settings, folder, centering=centering or None)


@pytest.mark.parametrize(
    ("margin", "centering"),
    [(False, 0.0), (True, 0.0), (False, 0.01), (True, 0.1)],
    ids=["plain", "margin", "centred", "both"],
)
def test_every_step_of_a_reward_model_equals_trl(
    margin: bool, centering: float, rows: list[FixedPrompt], classifier: Path, tmp_path: Path
) -> None:
    settings = Settings(lr=1e-4)
    mine, theirs = both_sides(rows, classifier, settings, tmp_path, margin=margin, centering=centering)
    assert_parity(mine, theirs, steps=settings.num_steps, names=REWARD)
    assert [step["num_tokens"] for step in mine] == [step["num_tokens"] for step in theirs]


def test_accumulated_steps_of_a_reward_model_equal_trl_but_for_the_extremes(
    rows: list[FixedPrompt], classifier: Path, tmp_path: Path
) -> None:
    """TRL averages the smallest and largest score of each micro-batch; here they are those of the step."""
    settings = Settings(micro_batch_size=2, lr=1e-4)
    mine, theirs = both_sides(rows, classifier, settings, tmp_path, margin=True, centering=0.1)
    assert_parity(mine, theirs, steps=settings.num_steps, names=REWARD[:5])
    assert all(a["max_reward"] > b["max_reward"] + 1e-3 for a, b in zip(mine, theirs, strict=True))
    assert all(a["min_reward"] < b["min_reward"] - 1e-3 for a, b in zip(mine, theirs, strict=True))


def test_the_comparison_of_reward_models_sees_an_update_that_was_not_made(
    rows: list[FixedPrompt], classifier: Path, tmp_path: Path
) -> None:
    frozen, theirs = both_sides(rows, classifier, Settings(lr=1e-4), tmp_path, lr=0.0)
    far = {name: excess(frozen[-1][name], theirs[-1][name]) for name in REWARD if name != "accuracy"}
    assert min(far.values()) > 100, far
