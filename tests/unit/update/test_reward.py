"""Training a reward model: equal to a plain Hugging Face step, blind to how its batch is cut, and saved whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from rlxf.assembly.roles import build_actor
from rlxf.core.errors import ConfigError, TrainingError
from rlxf.core.types import Metrics, RewardPairs, Sequences
from rlxf.models.backend import sequence_scores
from rlxf.models.hf_folder import HfWeights
from rlxf.platform import Process, get_platform
from rlxf.update.actor import MegatronActor
from rlxf.update.reward import bradley_terry_loss
from tests import actors
from tests.actors import assert_equal_steps, weights
from tests.settings import random_pairs, random_reward_pairs, run_config, without_moments
from tests.tiny_models import PAD, save_causal_lm, save_reward_model

CENTERING = 0.03


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward") / "model")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def language_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("words") / "model", tied=request.param)


def actor(folder: Path, **settings: Any) -> MegatronActor:
    return actors.actor(folder, "rm", **{"center_rewards_coefficient": CENTERING, "ppo_mini_batch_size": 6} | settings)


def scores_of(of: MegatronActor, sequences: Sequences) -> Tensor:
    return sequence_scores(of.model, sequences, of._limits)


def hf_scores(model: Any, sequences: Sequences) -> Tensor:
    return torch.stack([model(torch.tensor([row])).logits[0, 0] for row in sequences.rows()])


@torch.no_grad()
def hf_scores_padded(model: Any, sequences: Sequences) -> Tensor:
    """In one batch, filled up on the right."""
    rows = [torch.tensor(row) for row in sequences.rows()]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits: Tensor = model(tokens, attention_mask=mask).logits[:, 0]
    return logits


def one_step(folder: Path, batch: RewardPairs, **settings: Any) -> tuple[Metrics, dict[str, Tensor]]:
    return actors.one_step(folder, "rm", batch, center_rewards_coefficient=CENTERING, **settings)


# The step


def test_five_steps_equal_plain_hugging_face_training(folder: Path) -> None:
    trained = actor(folder, lr=2e-4)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0.0)
    for step in range(5):
        batch = random_reward_pairs(6, seed=step)
        metrics = trained.update(batch, step)
        chosen, rejected = hf_scores(model, batch.chosen), hf_scores(model, batch.rejected)
        centred = CENTERING * (chosen + rejected).square()
        loss = (-F.logsigmoid(chosen - rejected - batch.margin) + centred).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        both = torch.cat([chosen, rejected])
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert metrics["margin"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
        assert metrics["accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
        assert metrics["mean_reward"] == pytest.approx(both.mean().item(), abs=1e-5)
        assert metrics["max_reward"] == pytest.approx(both.max().item(), abs=1e-5)
        assert metrics["min_reward"] == pytest.approx(both.min().item(), abs=1e-5)


def test_the_loss_is_the_papers() -> None:
    chosen, rejected, margin = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]), torch.tensor([0.0, 1.0])
    expected = [0.20141328, 5.00671535]  # log(1 + e**-1.5), log(1 + e**5)
    assert bradley_terry_loss(chosen, rejected, margin).tolist() == pytest.approx(expected)
    centred = bradley_terry_loss(chosen, rejected, margin, centering=0.1).tolist()
    assert centred == pytest.approx([expected[0] + 0.625, expected[1] + 0.4])


@pytest.mark.parametrize(
    "settings",
    [{"micro_batch_size": 1}, {"micro_batch_size": 5}, {"share_prompts": False}, {"max_tokens_per_micro_batch": 120}],
    ids=str,
)
def test_how_the_batch_is_cut_never_changes_report_or_weights(folder: Path, settings: dict[str, Any]) -> None:
    batch = random_reward_pairs(7)
    assert_equal_steps(one_step(folder, batch, **settings), one_step(folder, batch, micro_batch_size=7))


def test_order_of_the_pairs_never_changes_report_or_weights(folder: Path) -> None:
    batch = random_reward_pairs(7)
    shuffled = batch.select(torch.tensor([4, 2, 6, 0, 1, 5, 3]))
    assert_equal_steps(*(one_step(folder, rows, micro_batch_size=3) for rows in (batch, shuffled)))


def test_a_pass_takes_as_many_pairs_as_the_recipe_says(folder: Path) -> None:
    trained, batch = actor(folder, micro_batch_size=2), random_reward_pairs(7)
    parts = trained._micro_batches(trained.objective.mini_batch(batch, torch.arange(7), first_pass=True))
    assert [len(part.packed.lengths) for part in parts] == [4, 4, 4, 2]  # sequences: two a pair


def test_evaluation_is_what_an_update_reports_and_trains_nothing(folder: Path) -> None:
    trained, batch = actor(folder), random_reward_pairs(6)
    before = weights(trained)
    found = without_moments(trained.evaluate(batch))
    assert all(torch.equal(value, before[name]) for name, value in weights(trained).items())
    reported = trained.update(batch, 0)
    assert set(found) == set(reported) - {"grad_norm", "learning_rate"}
    for name, value in found.items():
        assert value == pytest.approx(reported[name], rel=1e-6, abs=1e-7), name


def test_a_non_finite_loss_stops_before_the_weights_change(folder: Path) -> None:
    batch = random_reward_pairs(4)
    trained = actor(folder, ppo_mini_batch_size=4)
    before = weights(trained)
    with pytest.raises(TrainingError, match=r"step 3: the loss is nan"):
        trained.update(replace(batch, margin=torch.tensor([0.0, torch.nan, 0.0, 0.0])), 2)
    assert all(torch.equal(value, before[name]) for name, value in weights(trained).items())


# The head, and what is saved


def test_a_language_model_gets_a_head_that_the_seed_decides(language_model: Path) -> None:
    def head(seed: int) -> Tensor:
        config = run_config(language_model, stage="rm")
        training = config.training.model_copy(update={"seed": seed})
        made = build_actor(config.model_copy(update={"training": training}), get_platform("cpu"), Process())
        return weights(made)["score.weight"]

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))
    spread = float(head(1).std()) / transformers.AutoConfig.from_pretrained(language_model).initializer_range
    assert 0.7 < spread < 1.3


@pytest.mark.parametrize("settings", [{}, {"lora_r": 4}], ids=["full", "lora"])
def test_a_saved_model_scores_as_the_trained_one(
    language_model: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    trained = actor(language_model, lr=1e-2, **settings)
    for step in range(3):
        trained.update(random_reward_pairs(6, seed=step), step)
    trained.save_hf(tmp_path / "saved")
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    rows = random_pairs(5, seed=9).chosen  # of unequal lengths
    expected = scores_of(trained, rows)
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(hf_scores_padded(model, rows), expected, atol=2e-5, rtol=0)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "</s>"
    again = actor(tmp_path / "saved")
    torch.testing.assert_close(scores_of(again, rows), expected, atol=2e-5, rtol=0)


def test_training_goes_on_bit_for_bit_from_a_checkpoint(language_model: Path, tmp_path: Path) -> None:
    batches = [random_reward_pairs(4, seed=seed) for seed in range(4)]
    whole = actor(language_model, ppo_mini_batch_size=4)
    for step in range(2):
        whole.update(batches[step], step)
    whole.save_checkpoint(tmp_path)
    expected = [whole.update(batches[step], step) for step in (2, 3)]
    resumed = actor(language_model, ppo_mini_batch_size=4)
    resumed.load_checkpoint(tmp_path)
    assert [resumed.update(batches[step], step) for step in (2, 3)] == expected
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


# LoRA


def lora_actor(folder: Path, **settings: Any) -> MegatronActor:
    return actor(folder, **({"lora_r": 4, "lora_alpha": 8.0, "lr": 1e-2} | settings))


def test_with_adapters_the_head_trains_and_the_base_does_not(language_model: Path) -> None:
    trained = lora_actor(language_model, lora_target_modules=("linear_proj",))
    before = weights(trained)
    trained.update(random_reward_pairs(6), 0)
    moved = {name for name, value in weights(trained).items() if not torch.equal(value, before[name])}
    # In a first step B is zero, so nothing flows into A, but B and the head move.
    assert moved == {"score.weight", *(f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2))}


def test_five_steps_with_adapters_equal_training_with_peft(folder: Path, tmp_path: Path) -> None:
    """From PEFT's own start; linears whose A is not shared, so that both train the same matrices."""
    torch.manual_seed(3)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["o_proj", "down_proj"], task_type="SEQ_CLS")
    model = peft.get_peft_model(base, settings)
    model.save_pretrained(tmp_path / "adapter")
    targets = ("linear_proj", "linear_fc2")
    trained = lora_actor(folder, lora_load=str(tmp_path / "adapter"), lora_target_modules=targets, lr=5e-3)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    for step in range(5):
        batch = random_reward_pairs(6, seed=step)
        metrics = trained.update(batch, step)
        chosen, rejected = hf_scores(model, batch.chosen), hf_scores(model, batch.rejected)
        losses = bradley_terry_loss(chosen, rejected, batch.margin, centering=CENTERING)
        optimizer.zero_grad()
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        assert metrics["loss"] == pytest.approx(losses.mean().item(), rel=2e-5)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=2e-4)


def test_a_saved_adapter_has_the_head_for_peft_and_for_us(language_model: Path, tmp_path: Path) -> None:
    trained = lora_actor(language_model)
    for step in range(3):
        trained.update(random_reward_pairs(6, seed=step), step)
    trained.save_hf(tmp_path / "saved")
    adapter = tmp_path / "saved" / "adapter"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(language_model, num_labels=1)
    adapted = peft.PeftModel.from_pretrained(base, adapter).eval()
    rows = random_pairs(5, seed=9).chosen
    expected = scores_of(trained, rows)
    torch.testing.assert_close(hf_scores_padded(adapted, rows), expected, atol=2e-5, rtol=0)
    again = lora_actor(language_model, lora_load=str(adapter))
    torch.testing.assert_close(scores_of(again, rows), expected, atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="the adapter is of a reward model"):
        build_actor(
            run_config(language_model, lora_r=4, lora_alpha=8.0, lora_load=str(adapter)),
            get_platform("cpu"),
            Process(),
        )


def test_adapters_and_head_go_on_bit_for_bit_from_a_checkpoint(language_model: Path, tmp_path: Path) -> None:
    whole = lora_actor(language_model)
    whole.update(random_reward_pairs(6), 0)
    whole.save_checkpoint(tmp_path)
    expected = [whole.update(random_reward_pairs(6, seed=step), step) for step in (1, 2)]
    resumed = lora_actor(language_model)
    start = weights(resumed)["score.weight"]
    resumed.load_checkpoint(tmp_path)
    assert not torch.equal(weights(resumed)["score.weight"], start)
    assert [resumed.update(random_reward_pairs(6, seed=step), step) for step in (1, 2)] == expected
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_the_base_of_adapters_is_the_folders(language_model: Path) -> None:
    trained = lora_actor(language_model, lora_target_modules=("linear_proj",))
    trained.update(random_reward_pairs(6), 0)
    files, found = HfWeights(language_model), weights(trained)
    assert torch.equal(found["model.embed_tokens.weight"], files.read("model.embed_tokens.weight"))
    assert torch.equal(found["model.norm.weight"], files.read("model.norm.weight"))
