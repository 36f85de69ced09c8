"""The actor's update: equal to a plain Hugging Face step, and blind to how its batch is cut."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from rlxf.assembly.roles import build_actor, build_reference
from rlxf.core.errors import TrainingError
from rlxf.core.types import Metrics, Pairs, PairValues, ReferencedPairs, Sequences
from rlxf.models.hf_folder import HfWeights
from rlxf.platform import Process, get_platform
from rlxf.platform.cpu import CpuPlatform
from rlxf.update.actor import MegatronActor
from tests.settings import online_pairs, random_pairs, referenced, run_config
from tests.tiny_models import save_causal_lm


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("actor") / "model", tied=request.param)


def actor(folder: Path, **settings: Any) -> MegatronActor:
    return build_actor(run_config(folder, **settings), get_platform("cpu"), Process())


def weights(of: MegatronActor) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in of.model.export([name for name, _ in of.model.exported_shapes()])}


def update(folder: Path, batch: ReferencedPairs, **settings: Any) -> tuple[Metrics, dict[str, Tensor]]:
    # With so large an epsilon the first Adam step is nearly the gradient itself, so weights show gradients.
    trained = actor(folder, ppo_mini_batch_size=len(batch), lr=0.1, adam_eps=0.1, **settings)
    return trained.update(batch, 0), weights(trained)


def hf_logps(model: Any, sequences: Sequences) -> Tensor:
    rows = zip(sequences.prompt_rows(), sequences.completion_rows(), strict=True)
    sums = []
    for prompt, completion in rows:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        sums.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(sums)


def test_five_steps_equal_plain_hugging_face_training(folder: Path) -> None:
    trained = actor(folder, ppo_mini_batch_size=6)
    reference = build_reference(run_config(folder), get_platform("cpu"), Process())
    policy = transformers.AutoModelForCausalLM.from_pretrained(folder)
    frozen = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(5):
        pairs = random_pairs(6, seed=step)
        metrics = trained.update(ReferencedPairs(pairs=pairs, reference=reference.logps(pairs)), step)
        with torch.no_grad():
            expected_reference = hf_logps(frozen, pairs.chosen) - hf_logps(frozen, pairs.rejected)
        margin = 0.1 * (hf_logps(policy, pairs.chosen) - hf_logps(policy, pairs.rejected) - expected_reference)
        loss = -F.logsigmoid(margin).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if step == 0:
            assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-7)  # actor and reference agree to the last bit
            assert metrics["rewards/margins"] == metrics["rewards/accuracies"] == 0.0
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert metrics["rewards/margins"] == pytest.approx(margin.mean().item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_micro_batch_size_never_changes_loss_or_weights(folder: Path, micro_batch_size: int) -> None:
    batch = referenced(random_pairs(7))
    whole, whole_weights = update(folder, batch, micro_batch_size=7)
    cut, cut_weights = update(folder, batch, micro_batch_size=micro_batch_size)
    for name, value in whole.items():
        assert cut[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for name, value in whole_weights.items():
        torch.testing.assert_close(cut_weights[name], value, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("layout", "num_made", "num_passes"),
    [
        ({}, 0, 2),
        ({"dp_rank": 3, "dp_size": 4}, 1, 1),  # four ranks share three pairs
        ({"pp_size": 2, "vp_size": 2}, 0, 2),
        ({"pp_size": 4, "vp_size": 2}, 1, 4),  # the same one twice
    ],
)
def test_a_filler_is_made_only_where_one_is_needed(
    folder: Path, layout: dict[str, int], num_made: int, num_passes: int
) -> None:
    trained, batch = actor(folder, micro_batch_size=2), referenced(random_pairs(3))
    mini_batch = trained.objective.mini_batch(batch, torch.arange(3), first_pass=True)
    made: list[bool] = []

    def noted(groups: Tensor, counted: bool) -> Any:
        made.append(counted)
        return mini_batch.micro_batch(groups, counted)

    trained.layout = replace(trained.layout, **layout)
    assert len(trained._micro_batches(replace(mini_batch, micro_batch=noted))) == num_passes
    assert made.count(False) == num_made


def test_order_of_the_pairs_never_changes_loss_or_weights(folder: Path) -> None:
    batch = referenced(random_pairs(7))
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    shuffled = ReferencedPairs(pairs=batch.pairs.select(order), reference=batch.reference.select(order))
    first, first_weights = update(folder, batch)
    second, second_weights = update(folder, shuffled)
    assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
    for name, value in first_weights.items():
        torch.testing.assert_close(second_weights[name], value, atol=2e-6, rtol=0)


def test_a_neighbour_of_any_length_never_changes_a_log_prob(folder: Path) -> None:
    """Padding does not exist here: the same row beside a short and beside a long neighbour."""
    trained = actor(folder)
    row = Sequences.from_rows([[5, 6, 7]], [[8, 9, 10, 11]])
    alone = trained.token_logps(row)
    for length in (1, 200):
        both = Sequences.concat([Sequences.from_rows([[4, 4]], [[12] * length]), row])
        torch.testing.assert_close(trained.token_logps(both)[length:], alone, atol=5e-6, rtol=0)


def test_swapping_the_sides_turns_the_margin_around(folder: Path) -> None:
    batch = referenced(random_pairs(5))
    swapped = ReferencedPairs(
        pairs=Pairs(chosen=batch.pairs.rejected, rejected=batch.pairs.chosen),
        reference=PairValues(chosen=batch.reference.rejected, rejected=batch.reference.chosen),
    )
    one, _ = update(folder, batch)
    other, _ = update(folder, swapped)
    assert one["rewards/margins"] == pytest.approx(-other["rewards/margins"], rel=1e-4)
    assert one["rewards/accuracies"] == pytest.approx(1 - other["rewards/accuracies"])


def test_mini_batches_make_one_optimizer_step_each_and_passes_repeat_them(folder: Path) -> None:
    batch = referenced(random_pairs(7))
    _, once = update(folder, batch)
    trained = actor(folder, ppo_mini_batch_size=3, ppo_epochs=2, shuffle_minibatch=True)
    steps = [group["step"] for group in trained.trainable.optimizer.param_groups]
    trained.update(batch, 0)
    steps_after = [group["step"] for group in trained.trainable.optimizer.param_groups]
    assert [after - before for before, after in zip(steps, steps_after, strict=True)] == [6] * len(steps)  # ceil(7/3)*2
    assert any(not torch.equal(value, once[name]) for name, value in weights(trained).items())


@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_mean_reduction_divides_each_side_by_its_own_length(folder: Path, loss_type: str) -> None:
    batch = referenced(random_pairs(5))
    metrics, _ = update(folder, batch, dpo_loss_type=loss_type, dpo_logp_reduction="mean")
    fresh = actor(folder)
    sides = []
    for sequences, reference in (
        (batch.pairs.chosen, batch.reference.chosen),
        (batch.pairs.rejected, batch.reference.rejected),
    ):
        lengths = sequences.completion_lengths
        rows = torch.split(fresh.token_logps(sequences), lengths.tolist())
        sides.append((torch.stack([row.sum() for row in rows]) - reference) / lengths)
    margin = sides[0] - sides[1]
    losses = (margin - 1 / 0.2) ** 2 if loss_type == "ipo" else torch.relu(1 - 0.1 * margin)
    assert metrics["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_engine_drift_is_measured_before_the_update(folder: Path) -> None:
    pairs = random_pairs(4)
    fresh = actor(folder)
    online = online_pairs(pairs, *(fresh.token_logps(side) + 0.25 for side in (pairs.chosen, pairs.rejected)))
    metrics = fresh.update(ReferencedPairs(pairs=online, reference=referenced(pairs).reference), 0)
    assert metrics["rollout/logp_diff_mean"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["rollout/logp_diff_max"] == pytest.approx(0.25, abs=1e-5)


def test_a_non_finite_loss_stops_before_the_weights_change(folder: Path) -> None:
    batch = referenced(random_pairs(4))
    broken = PairValues(chosen=batch.reference.chosen.clone(), rejected=batch.reference.rejected)
    broken.chosen[2] = math.nan
    trained = actor(folder, ppo_mini_batch_size=4)
    before = weights(trained)
    with pytest.raises(TrainingError, match=r"step 18: the loss is nan"):
        trained.update(ReferencedPairs(pairs=batch.pairs, reference=broken), 17)
    assert all(torch.equal(value, before[name]) for name, value in weights(trained).items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(folder: Path, value: float) -> None:
    trained = actor(folder, ppo_mini_batch_size=4)
    parameter = next(parameter for parameter in trained.model.last.parameters() if parameter.requires_grad)
    parameter.register_hook(lambda gradient: torch.full_like(gradient, value))
    before = weights(trained)
    with pytest.raises(TrainingError, match=r"step 18: the gradient norm is (nan|inf); no parameter was changed"):
        trained.update(referenced(random_pairs(4)), 17)
    assert trained.is_untouched()
    assert all(torch.equal(value, before[name]) for name, value in weights(trained).items())


def test_buckets_carry_the_newest_weights_by_hugging_face_names(folder: Path) -> None:
    trained = actor(folder, ppo_mini_batch_size=4)
    trained.update(referenced(random_pairs(4)), 0)
    received = {}
    for index, bucket in enumerate(trained.sync_plan()):
        found = {name: tensor.clone() for name, tensor in trained.bucket_tensors(index)}
        assert [(spec.name, spec.shape) for spec in bucket.tensors] == [
            (name, tuple(t.shape)) for name, t in found.items()
        ]
        assert all(torch.equal(found[name], view) for name, view in bucket.views(trained.export_copy(index)))
        received |= found
    assert set(received) == {name for name, _ in trained.model.exported_shapes()}
    assert all(torch.equal(value, received[name]) for name, value in weights(trained).items())
    start = HfWeights(folder).read("model.embed_tokens.weight")
    assert not torch.equal(received["model.embed_tokens.weight"], start)


def test_a_saved_policy_loads_in_transformers_with_the_trained_weights(folder: Path, tmp_path: Path) -> None:
    trained = actor(folder, ppo_mini_batch_size=4)
    trained.update(referenced(random_pairs(4)), 0)
    trained.save_hf(tmp_path / "policy")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    saved = model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in weights(trained).items())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "policy").eos_token == "</s>"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_training_goes_on_bit_for_bit_from_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    batches = [referenced(random_pairs(4, seed=seed), seed) for seed in range(4)]
    whole = actor(folder, ppo_mini_batch_size=4)
    for step in range(2):
        whole.update(batches[step], step)
    whole.save_checkpoint(tmp_path)
    expected = [whole.update(batches[step], step) for step in (2, 3)]
    resumed = actor(folder, ppo_mini_batch_size=4)
    resumed.load_checkpoint(tmp_path)
    assert [resumed.update(batches[step], step) for step in (2, 3)] == expected
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_only_a_trainer_keeps_the_memory_that_it_has_freed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[CpuPlatform] = []
    monkeypatch.setattr(CpuPlatform, "keep_freed_memory", lambda self: kept.append(self))
    build_reference(run_config(folder), get_platform("cpu"), Process())
    assert not kept
    actor(folder)
    assert len(kept) == 1
