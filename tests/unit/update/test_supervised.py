"""Supervised fine-tuning: equal to a plain Hugging Face step, deaf to what is not counted, blind to how it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rlxf.core.types import Examples, Metrics, Sequences
from rlxf.models.hf_folder import HfWeights
from rlxf.update.actor import MegatronActor
from tests import actors
from tests.actors import assert_equal_steps, hf_token_logps, weights
from tests.settings import random_examples, random_rows, without_moments
from tests.tiny_models import save_causal_lm


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("sft") / "model", tied=request.param)


def actor(folder: Path, **settings: Any) -> MegatronActor:
    return actors.actor(folder, "sft", **{"ppo_mini_batch_size": 6} | settings)


def one_step(folder: Path, batch: Examples, **settings: Any) -> tuple[Metrics, dict[str, Tensor]]:
    return actors.one_step(folder, "sft", batch, **settings)


def all_counted(sequences: Sequences) -> Examples:
    return Examples(sequences=sequences, counted=torch.ones(int(sequences.completion_lengths.sum()), dtype=torch.bool))


def hf_loss(model: Any, batch: Examples) -> Tensor:
    """transformers' own loss on padded rows, with -100 where a token does not count."""
    rows = [torch.tensor(row) for row in batch.sequences.rows()]
    marks = torch.split(batch.counted, batch.sequences.completion_lengths.tolist())
    labels = [
        torch.cat([torch.full((int(n),), -100), row[int(n) :].masked_fill(~mark, -100)])
        for row, n, mark in zip(rows, batch.sequences.prompt_lengths, marks, strict=True)
    ]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    tokens, targets = pad(rows, batch_first=True), pad(labels, batch_first=True, padding_value=-100)
    loss: Tensor = model(tokens, attention_mask=mask, labels=targets).loss
    return loss


def test_five_steps_equal_plain_hugging_face_training(folder: Path) -> None:
    trained = actor(folder, lr=2e-4, micro_batch_size=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
    for step in range(5):
        batch = random_examples(6, seed=step)
        metrics = trained.update(batch, step)
        loss = hf_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)


def test_the_mean_is_over_tokens_not_over_rows(folder: Path) -> None:
    long, short = random_rows(2, 20, 21, torch.Generator().manual_seed(1))
    batch = all_counted(Sequences.from_rows([[4, 5], [6, 7]], [long, short[:2]]))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        rows = hf_token_logps(model, batch.sequences)
    assert actor(folder).evaluate(batch)["loss"] == pytest.approx(-torch.cat(rows).mean().item(), rel=1e-5)
    assert abs(torch.cat(rows).mean() - torch.stack([row.mean() for row in rows]).mean()) > 1e-3  # it does matter


def test_what_follows_the_last_counted_token_has_no_gradient(folder: Path) -> None:
    """Neither as a target nor as a context: cut off or replaced, every weight ends up the same."""
    prompts, completions = [[4, 5, 6], [7, 8]], [[9, 10, 11, 12], [13, 14, 15]]
    short = all_counted(Sequences.from_rows(prompts, completions))
    marks = torch.tensor([True] * 4 + [False] * 3 + [True] * 3 + [False] * 2)
    for tails in ([[20, 21, 22], [23, 24]], [[99, 98, 97], [96, 95]]):
        rows = [row + tail for row, tail in zip(completions, tails, strict=True)]
        longer = Examples(sequences=Sequences.from_rows(prompts, rows), counted=marks)
        assert_equal_steps(one_step(folder, longer), one_step(folder, short))


def test_a_token_that_is_not_counted_is_a_context_of_those_behind_it(folder: Path) -> None:
    marks = torch.tensor([True, False, False, True])
    losses = [
        actor(folder).evaluate(Examples(sequences=Sequences.from_rows([[4, 5]], [row]), counted=marks))["loss"]
        for row in ([9, 10, 11, 12], [9, 70, 71, 12])
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_row_without_a_counted_token_adds_nothing(folder: Path) -> None:
    batch = random_examples(4)
    silent = Examples(sequences=Sequences.from_rows([[5, 6]], [[7, 8, 9]]), counted=torch.zeros(3, dtype=torch.bool))
    both = Examples(
        sequences=Sequences.concat([batch.sequences, silent.sequences]),
        counted=torch.cat([batch.counted, silent.counted]),
    )
    # The silent row has a pass of its own.
    assert_equal_steps(one_step(folder, both, micro_batch_size=4), one_step(folder, batch, micro_batch_size=4))


@pytest.mark.parametrize(
    "settings",
    [{"micro_batch_size": 1}, {"micro_batch_size": 5}, {"share_prompts": False}, {"max_tokens_per_micro_batch": 60}],
    ids=str,
)
def test_how_the_batch_is_cut_never_changes_loss_or_weights(folder: Path, settings: dict[str, Any]) -> None:
    batch = random_examples(7)
    assert_equal_steps(one_step(folder, batch, **settings), one_step(folder, batch, micro_batch_size=7))


def test_order_of_the_rows_never_changes_loss_or_weights(folder: Path) -> None:
    batch = random_examples(7)
    shuffled = batch.select(torch.tensor([4, 2, 6, 0, 1, 5, 3]))
    assert_equal_steps(*(one_step(folder, rows, micro_batch_size=3) for rows in (batch, shuffled)))


def test_a_neighbour_of_any_length_never_changes_a_rows_loss(folder: Path) -> None:
    trained = actor(folder)
    row = Sequences.from_rows([[5, 6, 7]], [[8, 9, 10, 11]])
    alone = trained.evaluate(all_counted(row))["loss"]
    for length in (1, 200):
        beside = Sequences.from_rows([[5, 6, 7]], [[12] * length])
        counted = torch.tensor([False] * length + [True] * 4)
        both = Examples(sequences=Sequences.concat([beside, row]), counted=counted)
        assert trained.evaluate(both)["loss"] == pytest.approx(alone, rel=1e-6)


def test_a_pass_takes_as_many_sequences_as_the_recipe_says(folder: Path) -> None:
    trained, batch = actor(folder, micro_batch_size=3), random_examples(7)
    parts = trained._micro_batches(trained.objective.mini_batch(batch, torch.arange(7), first_pass=True))
    assert [len(part.packed.lengths) for part in parts] == [3, 3, 1]


def test_evaluation_is_what_an_update_reports_and_trains_nothing(folder: Path) -> None:
    trained, batch = actor(folder), random_examples(6)
    before = weights(trained)
    found = without_moments(trained.evaluate(batch))
    assert all(torch.equal(value, before[name]) for name, value in weights(trained).items())
    assert found == {"loss": pytest.approx(trained.update(batch, 0)["loss"], rel=1e-6)}


def test_a_saved_model_loads_in_transformers_with_the_trained_weights(folder: Path, tmp_path: Path) -> None:
    trained = actor(folder)
    trained.update(random_examples(6), 0)
    trained.save_hf(tmp_path / "policy")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        assert hf_loss(model, random_examples(6)).item() == pytest.approx(
            trained.evaluate(random_examples(6))["loss"], rel=1e-5
        )


def test_adapters_learn_and_leave_the_base_alone(folder: Path) -> None:
    trained = actor(folder, lora_r=4, lora_alpha=8.0, lr=1e-2, lora_target_modules=("linear_fc2",))
    losses = [trained.update(random_examples(6), step)["loss"] for step in range(8)]
    assert losses[-1] < losses[0] - 0.1
    files, found = HfWeights(folder), weights(trained)
    moved = {name for name in found if not torch.equal(found[name], files.read(name))}
    assert moved == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}


@pytest.mark.parametrize("settings", [{}, {"lora_r": 4, "lora_dropout": 0.3}], ids=["full", "lora"])
def test_training_goes_on_bit_for_bit_from_a_checkpoint(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = actor(folder, **settings)
    for step in range(2):
        whole.update(random_examples(6, seed=step), step)
    whole.save_checkpoint(tmp_path)
    expected = [whole.update(random_examples(6, seed=step), step) for step in (2, 3)]
    resumed = actor(folder, **settings)
    resumed.load_checkpoint(tmp_path)
    assert [resumed.update(random_examples(6, seed=step), step) for step in (2, 3)] == expected
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())
