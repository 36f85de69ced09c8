"""Gradients of a step's first mini-batch before the others are known: not a bit of the step changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.assembly.roles import build_actor
from rlxf.core.errors import ShapeError, TrainingError
from rlxf.core.types import Batch, Examples, Metrics, PairValues, ReferencedPairs, RewardPairs
from rlxf.models.megatron.lora import dropout_states
from rlxf.platform import Process, get_platform
from rlxf.update.actor import MegatronActor
from rlxf.update.batches import digest, mini_batches
from tests.actors import weights
from tests.ranks import on_ranks
from tests.settings import online_pairs, random_examples, random_pairs, random_reward_pairs, referenced, run_config
from tests.tiny_models import save_causal_lm, save_reward_model

NUM_ROWS, MINI_BATCH = 7, 3  # three optimizer steps, the last of one row
LORA: dict[str, Any] = {"lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.5}
Between = Callable[[MegatronActor, Path], object]  # what is asked of an actor between prepare and update


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("prepare") / "model")


def actor(folder: Path, process: Process | None = None, **settings: Any) -> MegatronActor:
    keys = {"ppo_mini_batch_size": MINI_BATCH, "micro_batch_size": 2, "lr": 1e-2} | settings
    return build_actor(run_config(folder, **keys), get_platform("cpu"), process or Process())


def online(seed: int, num_rows: int = NUM_ROWS) -> ReferencedPairs:
    """A step with a beta of its own, and unequal weights and margins."""
    generator = torch.Generator().manual_seed(100 + seed)
    pairs = random_pairs(num_rows, seed)
    lengths = [int(side.completion_lengths.sum()) for side in (pairs.chosen, pairs.rejected)]
    found = online_pairs(pairs, *(-torch.rand(length, generator=generator) for length in lengths))
    found = replace(found, weight=torch.rand(num_rows, generator=generator) + 0.5)
    return replace(referenced(found, seed), beta=0.1 * (seed + 1))


def first(batch: Batch, num_rows: int = MINI_BATCH) -> Batch:
    return batch.select(torch.arange(num_rows))


def train(trained: MegatronActor, batches: list[Batch], prepares: bool, num_rows: int = MINI_BATCH) -> list[Metrics]:
    told = []
    for step, batch in enumerate(batches):
        if prepares:
            trained.prepare(first(batch, num_rows), step)
        told.append(trained.update(batch, step))
    return told


def count_passes(of: MegatronActor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of micro-batches of each mini-batch whose gradients are computed from now on."""
    counts: list[int] = []
    accumulate = of.trainable.accumulate

    def counting(step: Any, batches: Any, report_size: int) -> Tensor:
        counts.append(len(batches))
        return accumulate(step, batches, report_size)

    monkeypatch.setattr(of.trainable, "accumulate", counting)
    return counts


def assert_equal_bits(found: Any, expected: Any) -> None:
    assert repr(found) == repr(expected)  # repr: NaN is itself


def assert_equal_weights(found: MegatronActor, expected: MegatronActor) -> None:
    theirs = weights(expected)
    different = [name for name, value in weights(found).items() if not torch.equal(value, theirs[name])]
    assert not different


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ppo_epochs": 2, "lr_warmup_iters": 2, "clip_grad": 0.1},
        {"dpo_weighting": "wpo", "ld_alpha": 0.5, "pref_ftx": 0.1},
        {"dpo_loss_type": ["kto_pair", "sft"], "ppo_epochs": 2},
        {"max_tokens_per_micro_batch": 100, "bf16": True},
        {"fp16": True, "initial_loss_scale": 2.0**30, "hysteresis": 1},  # the first steps overflow
        LORA | {"ppo_epochs": 2},
        LORA | {"recompute_granularity": "full"},
    ],
    ids=["plain", "passes", "weighted", "whole", "bf16", "fp16", "lora", "lora-recompute"],
)
def test_not_a_bit_differs_over_several_steps(
    folder: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Batch] = [online(seed) for seed in range(3)]
    if "kto_pair" in settings.get("dpo_loss_type", []):  # which wants equal weights
        batches = [replace(referenced(random_pairs(NUM_ROWS, seed)), beta=0.1 * (seed + 1)) for seed in range(3)]
    plain, prepared = actor(folder, **settings), actor(folder, **settings)
    counts = count_passes(prepared, monkeypatch)
    assert_equal_bits(train(prepared, batches, prepares=True), train(plain, batches, prepares=False))
    assert len(counts) == 3 * 3 * settings.get("ppo_epochs", 1)  # nothing was computed twice
    assert_equal_weights(prepared, plain)


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_the_other_objectives_go_on_from_there_too(
    folder: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make: Callable[..., Examples | RewardPairs] = random_examples if stage == "sft" else random_reward_pairs
    load = folder if stage == "sft" else save_reward_model(tmp_path / "model")
    batches: list[Batch] = [make(NUM_ROWS, seed=seed) for seed in range(2)]
    plain, prepared = actor(load, stage=stage), actor(load, stage=stage)
    counts = count_passes(prepared, monkeypatch)
    assert_equal_bits(train(prepared, batches, prepares=True), train(plain, batches, prepares=False))
    assert len(counts) == 2 * 3
    assert_equal_weights(prepared, plain)


@pytest.mark.parametrize("settings", [{}, LORA], ids=["plain", "lora"])
def test_a_mini_batch_of_the_whole_step_is_prepared(folder: Path, settings: dict[str, Any]) -> None:
    batches: list[Batch] = [online(seed, 3) for seed in range(2)]
    plain, prepared = actor(folder, **settings), actor(folder, **settings)
    assert_equal_bits(train(prepared, batches, prepares=True), train(plain, batches, prepares=False))


def _other_reference(batch: ReferencedPairs) -> ReferencedPairs:
    chosen = batch.reference.chosen.clone()
    chosen[0] = torch.nextafter(chosen[0], torch.tensor(0.0))
    return replace(batch, reference=PairValues(chosen=chosen, rejected=batch.reference.rejected))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda batch: (batch, 0), id="another step"),
        pytest.param(lambda batch: (first(batch, 2), 1), id="fewer rows"),
        pytest.param(lambda batch: (batch.select(torch.tensor([1, 0, 2])), 1), id="another order"),
        pytest.param(lambda batch: (replace(batch, beta=0.7), 1), id="another beta"),
        pytest.param(lambda batch: (_other_reference(batch), 1), id="another reference"),
    ],
)
def test_other_rows_than_those_of_the_step_are_computed_anew(
    folder: Path, change: Callable[[Batch], tuple[Batch, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = online(1)
    plain, prepared = actor(folder, **LORA), actor(folder, **LORA)
    prepared.prepare(*change(first(batch)))
    counts = count_passes(prepared, monkeypatch)
    assert_equal_bits(prepared.update(batch, 1), plain.update(batch, 1))
    assert len(counts) == 3
    assert_equal_weights(prepared, plain)


def test_a_second_prepare_replaces_the_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = online(1)
    plain, prepared = actor(folder), actor(folder)
    for rows in (first(online(2)), first(batch)):
        prepared.prepare(rows, 1)
    counts = count_passes(prepared, monkeypatch)
    assert_equal_bits(prepared.update(batch, 1), plain.update(batch, 1))
    assert len(counts) == 2
    assert_equal_weights(prepared, plain)


def test_what_was_prepared_is_used_once(folder: Path) -> None:
    batch = online(1)
    plain, prepared = actor(folder), actor(folder)
    prepared.prepare(first(batch), 1)
    for trained in (plain, prepared):
        trained.update(batch, 1)
    assert_equal_bits(prepared.update(batch, 1), plain.update(batch, 1))


def _export(trained: MegatronActor, _: Path) -> None:
    for index in range(len(trained.sync_plan())):
        trained.export_copy(index)
        list(trained.bucket_tensors(index))


def _save_in_the_background(trained: MegatronActor, path: Path) -> None:
    (path / "a").mkdir()
    trained.save_checkpoint(path / "a", background=True)
    trained.checkpoint_written(wait=True)


def _save_and_load(trained: MegatronActor, path: Path) -> None:
    trained.save_checkpoint(path)
    trained.load_checkpoint(path)


BETWEEN: dict[str, Between] = {
    "evaluate": lambda trained, _: trained.evaluate(replace(online(5), beta=0.9)),
    "token_logps": lambda trained, _: trained.token_logps(random_pairs(4).chosen),
    "save_checkpoint": lambda trained, path: trained.save_checkpoint(path),
    "background": _save_in_the_background,
    "save_hf": lambda trained, path: trained.save_hf(path / "hf"),
    "export": _export,
}
WITH_ADAPTERS: dict[str, Between] = {
    "base_logps": lambda trained, _: trained.base_logps(random_pairs(4)),
    "base_token_logps": lambda trained, _: trained.base_token_logps(random_pairs(4).chosen),
}
CASES = [(name, settings) for name in BETWEEN for settings in ({}, LORA)] + [(name, LORA) for name in WITH_ADAPTERS]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_whatever_is_asked_between_leaves_the_gradients_whole(
    folder: Path, tmp_path: Path, name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Batch] = [online(seed) for seed in range(2)]
    plain, prepared = actor(folder, **settings), actor(folder, **settings)
    for trained in (plain, prepared):
        trained.update(batches[0], 0)
    prepared.prepare(first(batches[1]), 1)
    (BETWEEN | WITH_ADAPTERS)[name](prepared, tmp_path)
    counts = count_passes(prepared, monkeypatch)
    assert_equal_bits(prepared.update(batches[1], 1), plain.update(batches[1], 1))
    assert len(counts) == 2
    assert_equal_weights(prepared, plain)


@pytest.mark.parametrize("settings", [{}, LORA, {"bf16": True}], ids=["plain", "lora", "bf16"])
def test_weights_that_are_loaded_between_make_it_compute_anew(
    folder: Path, tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[Batch] = [online(seed) for seed in range(2)]
    plain, prepared = actor(folder, **settings), actor(folder, **settings)
    plain.save_checkpoint(tmp_path)
    for trained in (plain, prepared):
        trained.update(batches[0], 0)
    prepared.prepare(first(batches[1]), 1)
    for trained in (plain, prepared):
        trained.load_checkpoint(tmp_path)
    counts = count_passes(prepared, monkeypatch)
    assert_equal_bits(prepared.update(batches[1], 1), plain.update(batches[1], 1))
    assert len(counts) == 3
    assert_equal_weights(prepared, plain)


def test_the_random_states_of_a_checkpoint_are_those_without_prepare(folder: Path) -> None:
    trained = actor(folder, **LORA)
    trained.update(online(0), 0)
    before = dropout_states()
    trained.prepare(first(online(1)), 1)
    after = dropout_states()
    assert before
    assert all(torch.equal(after[name], state) for name, state in before.items())


def test_nothing_is_changed_by_prepare_alone(folder: Path) -> None:
    trained, batch = actor(folder), online(1)
    trained.update(batch, 0)
    assert not trained.is_untouched()
    before = weights(trained)
    trained.prepare(first(batch), 1)
    assert trained.is_untouched()
    assert all(torch.equal(value, before[name]) for name, value in weights(trained).items())


def test_a_non_finite_loss_ends_prepare_as_it_ends_an_update(folder: Path) -> None:
    batch = online(1)
    broken = PairValues(chosen=batch.reference.chosen.clone(), rejected=batch.reference.rejected)
    broken.chosen[2] = math.nan
    bad, trained = replace(batch, reference=broken), actor(folder)
    before = weights(trained)
    with pytest.raises(TrainingError) as expected:
        trained.update(bad, 17)
    with pytest.raises(TrainingError, match=r"step 18: the loss is nan .* no parameter was changed") as found:
        trained.prepare(first(bad), 17)
    assert str(found.value) == str(expected.value)
    assert trained.is_untouched()
    assert all(torch.equal(value, before[name]) for name, value in weights(trained).items())
    assert_equal_bits(trained.update(batch, 17), actor(folder).update(batch, 17))


def test_rows_that_are_no_first_mini_batch_are_refused(folder: Path) -> None:
    with pytest.raises(ShapeError, match="expected at most 3 rows, a mini-batch, got 7"):
        actor(folder).prepare(online(1), 0)
    with pytest.raises(ShapeError, match=r"actor_rollout\.shuffle_minibatch = true"):
        actor(folder, shuffle_minibatch=True).prepare(first(online(1)), 0)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_recipe_knows_the_rows_of_the_first_mini_batch(folder: Path, ranks: int) -> None:
    config = run_config(folder, ppo_mini_batch_size=3, num_gpus_for_train=2 * ranks, tensor_model_parallel_size=2)
    size = 3 * ranks
    assert config.actor_rollout.first_rows() == size
    assert mini_batches(7, size, shuffle_key=None)[0].tolist() == list(range(size))
    assert run_config(folder, shuffle_minibatch=True).actor_rollout.first_rows() is None


def test_a_digest_sees_every_bit_of_a_batch() -> None:
    batch = online(1)
    assert isinstance(batch.pairs.chosen.tokens, Tensor)
    assert digest(batch) == digest(online(1)) != digest(online(2))
    others = [replace(batch, beta=0.3), _other_reference(batch), replace(batch, pairs=random_pairs(NUM_ROWS, 1))]
    assert len({digest(other) for other in [batch, *others]}) == 4
    examples = random_examples(3)
    assert digest(examples) != digest(replace(examples, counted=~examples.counted))


def _rank(rank: int, world_size: int, port: int, folder: Path, settings: dict[str, Any], out: Path) -> None:
    torch.set_num_threads(1)
    process = Process(rank=rank, world_size=world_size, master_port=port)
    batches: list[Batch] = [online(seed) for seed in range(3)]
    found = []
    for prepares in (False, True):
        trained = actor(folder, process, ppo_mini_batch_size=2, ppo_epochs=2, **settings)
        told = train(trained, batches, prepares, num_rows=4)
        found.append((told, weights(trained)))
    if rank == 0:
        torch.save(found, out)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("settings", [LORA, pytest.param({}, marks=pytest.mark.slow)], ids=["lora", "plain"])
def test_two_data_parallel_ranks_go_on_from_there(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    on_ranks(_rank, 2, folder, settings, tmp_path / "found.pt")
    (plain, plain_weights), (prepared, prepared_weights) = torch.load(tmp_path / "found.pt", weights_only=True)
    assert_equal_bits(prepared, plain)
    assert all(torch.equal(value, plain_weights[name]) for name, value in prepared_weights.items())
