"""Supervised fine-tuning and reward models: this project's steps against TRL's live trainers, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from rlxf.platform import Process, get_platform
from rlxf.types import Batch, Examples, RewardPairs, Sequences
from rlxf.update.actor import Actor
from tests.parity import trl_stages
from tests.parity.compare import assert_parity, excess
from tests.parity.fixed_data import FixedPrompt, Settings, preference_records
from tests.parity.oracle import Metrics
from tests.settings import run_config
from tests.tiny_models import save_reward_model

Record = dict[str, Any]
SFT = ("loss", "grad_norm")
REWARD = ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward")
T = TypeVar("T")


def train_here(folder: Path, stage: str, batches: Sequence[Batch], settings: Settings, **keys: Any) -> list[Metrics]:
    """Metrics of one optimizer step for each batch."""
    config = run_config(
        folder,
        stage=stage,
        ppo_mini_batch_size=settings.pairs_per_step,
        micro_batch_size=settings.micro_batch_size,
        lr=settings.lr,
        clip_grad=settings.clip_grad,
        **keys,
    )
    actor = Actor(config, get_platform("cpu"), Process())
    return [actor.update(batch, step) for step, batch in enumerate(batches)]


def in_steps(rows: Sequence[T], settings: Settings) -> list[Sequence[T]]:
    size = settings.pairs_per_step
    return [rows[step * size : (step + 1) * size] for step in range(settings.num_steps)]


def examples_of(rows: Sequence[Record]) -> Examples:
    """The tokens of one step; a row's prompt ends before the first label."""
    starts = [next(i for i, label in enumerate(row["labels"]) if label != -100) for row in rows]
    return Examples(
        sequences=Sequences.from_rows(
            [row["input_ids"][:start] for row, start in zip(rows, starts, strict=True)],
            [row["input_ids"][start:] for row, start in zip(rows, starts, strict=True)],
        ),
        counted=torch.tensor(
            [label != -100 for row, start in zip(rows, starts, strict=True) for label in row["labels"][start:]]
        ),
    )


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
    theirs = trl_stages.train_sft(records, folders[0], settings, tmp_path)
    batches = [examples_of(part) for part in in_steps(theirs.rows, settings)]
    later_turns = sum(int((~batch.counted).sum()) for batch in batches)
    assert (later_turns > 0) == (kind == "chats")
    mine = train_here(folders[0], "sft", batches, settings)
    assert_parity(mine, theirs.steps, steps=settings.num_steps, names=SFT)
    assert mine[-1]["loss"] < mine[0]["loss"] - 0.1


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("classifier") / "model")


def reward_pairs_of(rows: Sequence[Record], prompts: Sequence[FixedPrompt]) -> RewardPairs:
    """The tokens of one step; prompts are known, so that the two sides share them."""
    starts = [len(prompt.token_ids) for prompt in prompts]
    assert all(row["chosen_ids"][:n] == p.token_ids for row, p, n in zip(rows, prompts, starts, strict=True))
    sides = [
        Sequences.from_rows(
            [row[side][:n] for row, n in zip(rows, starts, strict=True)],
            [row[side][n:] for row, n in zip(rows, starts, strict=True)],
        )
        for side in ("chosen_ids", "rejected_ids")
    ]
    margin = torch.tensor([row.get("margin", 0.0) for row in rows])
    return RewardPairs(chosen=sides[0], rejected=sides[1], margin=margin)


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
    if margin:
        for record, row in zip(records, rows, strict=True):
            record["margin"] = abs(row.completions[0].score - row.completions[1].score)
    theirs = trl_stages.train_reward(records, model, settings, folder, centering=centering or None)
    steps = zip(in_steps(theirs.rows, settings), in_steps(rows, settings), strict=True)
    batches = [reward_pairs_of(*step) for step in steps]
    own = settings if lr is None else replace(settings, lr=lr)
    return train_here(model, "rm", batches, own, center_rewards_coefficient=centering), theirs.steps


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
