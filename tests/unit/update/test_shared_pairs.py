"""Several pairs of a prompt: weights, margins, and completions that are computed once."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor

from rlxf.assembly.roles import build_actor, build_reference
from rlxf.config.schema import AlgorithmConfig
from rlxf.core.errors import ShapeError
from rlxf.core.types import OnlinePairs, ReferencedPairs, Sequences
from rlxf.platform import Process, get_platform
from tests.actors import actor, assert_equal_steps, hf_sums, one_step, weights
from tests.pair_world import as_strangers, paired
from tests.ranks import on_ranks
from tests.settings import run_config
from tests.tiny_models import save_causal_lm

BETA, STAGE = 0.1, "ray_online_dpo"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("shared") / "model", tied=True)


def uneven(seed: int = 0, **settings: Any) -> ReferencedPairs:
    """Prompts of three to six pairs each: weights differ."""
    return paired(4, 4, seed=seed, min_score_margin=0.3, **settings)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of each forward pass."""
    from rlxf.models.megatron.model import HiddenStates

    found: list[int] = []
    forward = HiddenStates.forward

    def counting(self: HiddenStates, packed: Any) -> Any:
        found.append(packed.tokens.numel())
        return forward(self, packed)

    with monkeypatch.context() as patch:
        patch.setattr(HiddenStates, "forward", counting)
        yield found


def test_a_step_equals_plain_hugging_face_with_a_mean_by_weight(folder: Path) -> None:
    batch = uneven()
    pairs = batch.pairs
    assert isinstance(pairs, OnlinePairs)
    assert len(pairs.weight.unique()) > 1
    metrics, found = one_step(folder, STAGE, batch, micro_batch_size=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    chosen, rejected = (hf_sums(model, side) for side in (pairs.chosen, pairs.rejected))
    chosen_ratio, rejected_ratio = chosen - batch.reference.chosen, rejected - batch.reference.rejected
    losses = -F.logsigmoid(BETA * (chosen_ratio - rejected_ratio))
    loss = (pairs.weight * losses).sum() / pairs.weight.sum()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()

    def mean(values: Tensor) -> Any:
        return pytest.approx(float((pairs.weight * values).sum() / pairs.weight.sum()), rel=1e-4, abs=1e-5)

    assert metrics["loss"] == mean(losses)
    assert metrics["rewards/chosen"] == mean(BETA * chosen_ratio)
    assert metrics["rewards/accuracies"] == mean((chosen_ratio > rejected_ratio).float())
    assert metrics["logps/rejected"] == mean(rejected)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    start = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in found.items():  # Adam's first step with a large epsilon
        gradient = min(1.0, 1.0 / float(norm)) * gradients[name]
        torch.testing.assert_close(weight, start[name] - 0.1 * gradient / (gradient.abs() + 0.1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("limits", [{"micro_batch_size": 1}, {"micro_batch_size": 2}, {"micro_batch_size": 9},
                                    {"max_tokens_per_micro_batch": 90}], ids=str)  # fmt: skip
@pytest.mark.parametrize("loss", ["sigmoid", "sft"])
def test_sharing_changes_no_number_whatever_a_pass_takes(folder: Path, limits: dict[str, int], loss: str) -> None:
    batch = uneven()
    found = one_step(folder, STAGE, batch, dpo_loss_type=loss, **limits)
    assert_equal_steps(found, one_step(folder, STAGE, as_strangers(batch), dpo_loss_type=loss, micro_batch_size=5))
    assert {"offpolicy/ess", "rollout/logp_diff_mean"} <= set(found[0])


def test_the_order_of_the_pairs_changes_no_number(folder: Path) -> None:
    batch = uneven()
    shuffled = batch.select(torch.randperm(len(batch), generator=torch.Generator().manual_seed(3)))
    assert_equal_steps(one_step(folder, STAGE, shuffled, micro_batch_size=2), one_step(folder, STAGE, batch))


def test_a_mini_batch_is_a_mean_by_its_own_weights(folder: Path) -> None:
    batch = uneven()
    half = len(batch) // 2
    parts = [batch.select(torch.arange(half)), batch.select(torch.arange(half, len(batch)))]
    alone = [one_step(folder, STAGE, part, lr=0.0)[0]["loss"] for part in parts]
    sums = [float(part.pairs.weight.sum()) for part in parts]  # type: ignore[attr-defined]
    both = one_step(folder, STAGE, batch, lr=0.0, ppo_mini_batch_size=half)[0]["loss"]
    mean = sum(loss * weight for loss, weight in zip(alone, sums, strict=True)) / sum(sums)
    assert both == pytest.approx(mean, rel=1e-5)


def test_weights_that_are_all_doubled_change_nothing(folder: Path) -> None:
    batch = uneven()
    values = {name: getattr(batch.pairs, name) for name in OnlinePairs.__dataclass_fields__}
    doubled = OnlinePairs(**values | {"weight": 2 * values["weight"]})
    found = one_step(folder, STAGE, ReferencedPairs(pairs=doubled, reference=batch.reference))
    assert_equal_steps(found, one_step(folder, STAGE, batch))


def test_each_completion_and_prompt_is_computed_once_in_a_pass_that_takes_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A completion's last token predicts nothing and is not fed."""
    batch = paired(4, 4)
    completions = Sequences.concat([batch.pairs.chosen, batch.pairs.rejected])
    rows = {tuple(row): prompt for row, prompt in zip(completions.rows(), completions.prompt_rows(), strict=True)}
    assert len(rows) == 16
    prompts = {tuple(prompt) for prompt in rows.values()}
    once = sum(map(len, prompts)) + sum(len(row) - len(prompt) - 1 for row, prompt in rows.items())
    settings = {"micro_batch_size": 2, "ppo_mini_batch_size": len(batch)}
    with counted(monkeypatch) as trained:
        actor(folder, STAGE, **settings).update(batch, 0)
    reference = build_reference(run_config(folder, **settings), get_platform("cpu"), Process())
    with counted(monkeypatch) as asked:
        found = reference.logps(batch.pairs)
    assert sum(trained) == sum(asked) == once
    with counted(monkeypatch) as apart:
        expected = reference.logps(as_strangers(batch).pairs)
    assert sum(apart) > 2 * once
    torch.testing.assert_close(found.chosen, expected.chosen, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.rejected, expected.rejected, atol=2e-5, rtol=1e-5)


def test_the_reference_computes_a_completion_once_however_little_a_pass_takes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = paired(2, 5)
    reference = build_reference(run_config(folder, micro_batch_size=1), get_platform("cpu"), Process())
    with counted(monkeypatch) as asked:
        reference.logps(batch.pairs)
    assert len(asked) == 2 * 3  # of two completions each, five to a prompt


def with_margin(folder: Path, batch: ReferencedPairs, weight: float, **settings: Any) -> float:
    config = run_config(folder, ppo_mini_batch_size=len(batch), **settings)
    config = config.model_copy(update={"algorithm": AlgorithmConfig(margin_weight=weight)})
    trained = build_actor(config, get_platform("cpu"), Process())
    return trained.update(batch, 0)["loss"]


def test_the_margin_of_a_pair_is_subtracted_from_its_logit(folder: Path) -> None:
    batch = paired(5, 3, "best_worst")
    pairs = batch.pairs
    assert isinstance(pairs, OnlinePairs)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        chosen, rejected = (hf_sums(model, side) for side in (pairs.chosen, pairs.rejected))
    d = chosen - batch.reference.chosen - (rejected - batch.reference.rejected)
    for weight in (0.0, 0.5):
        expected = -F.logsigmoid(BETA * d - weight * pairs.margin).mean()
        assert with_margin(folder, batch, weight) == pytest.approx(float(expected), rel=1e-5)
    hinge = F.relu(1 - BETA * d + 0.5 * pairs.margin).mean()
    assert with_margin(folder, batch, 0.5, dpo_loss_type="hinge") == pytest.approx(float(hinge), rel=1e-5)


def test_a_loss_of_all_pairs_at_once_refuses_different_weights(folder: Path) -> None:
    with pytest.raises(ShapeError, match="different weights"):
        one_step(folder, STAGE, uneven(), dpo_loss_type="aot")
    one_step(folder, STAGE, paired(3, 3, "best_worst"), dpo_loss_type="aot")


def _child(rank: int, world_size: int, port: int, folder: Path, settings: dict[str, Any], out: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    batch = uneven()
    size = math.ceil(len(batch) / settings.pop("dp", 1))
    config = run_config(folder, ppo_mini_batch_size=size, lr=0.1, adam_eps=0.1, **settings)
    process = Process(rank=rank, world_size=world_size, master_port=port)
    trained = build_actor(config, get_platform("cpu"), process)
    metrics = trained.update(batch, 0)
    torch.save((metrics, weights(trained)), out / f"rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {"dp": 2, "micro_batch_size": 2},
    "pp": {"pipeline_model_parallel_size": 2, "max_tokens_per_micro_batch": 120},
    "cp": {"context_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_number_depends_on_the_layout(folder: Path, tmp_path: Path, layout: str) -> None:
    on_ranks(_child, 2, folder, LAYOUTS[layout], tmp_path)
    found = torch.load(tmp_path / "rank_0.pt", weights_only=True)
    expected = one_step(folder, STAGE, as_strangers(uneven()), micro_batch_size=4)
    assert_equal_steps(found, expected)
