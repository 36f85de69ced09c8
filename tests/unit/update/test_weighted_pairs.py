"""A beta of its own for each step, LD-DPO's weights of tokens and WPO's weights of pairs, on a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlxf.core.types import ReferencedPairs, Sequences
from rlxf.models.backend import sum_rows, sum_sides
from rlxf.reference.frozen import FrozenReference
from tests.actors import actor, assert_equal_steps, hf_token_logps, one_step
from tests.settings import random_pairs, referenced, without_moments
from tests.tiny_models import save_causal_lm

ALPHA = 0.4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("weighted") / "model", tied=True)


def batch_of(count: int, **changes: Any) -> ReferencedPairs:
    return replace(referenced(random_pairs(count)), **changes)


def test_a_step_has_the_beta_of_its_batch(folder: Path) -> None:
    batch = batch_of(6)
    told, own = one_step(folder, "dpo", replace(batch, beta=0.4)), one_step(folder, "dpo", batch, dpo_beta=0.4)
    assert told[0] == own[0]
    assert told[0]["beta"] == 0.4
    assert all(torch.equal(value, own[1][name]) for name, value in told[1].items())
    listed = one_step(folder, "dpo", replace(batch, beta=0.4), dpo_beta=(0.1, 0.4))
    assert listed[0] == own[0]


def test_an_evaluation_has_the_beta_of_its_batch_and_leaves_none_behind(folder: Path) -> None:
    batch, trained = batch_of(6), actor(folder, "dpo", dpo_beta=0.1, ppo_mini_batch_size=6)
    first, other = trained.evaluate(replace(batch, beta=0.1)), trained.evaluate(replace(batch, beta=0.5))
    assert other["rewards/margins"] == pytest.approx(5 * first["rewards/margins"], rel=1e-6)
    assert trained.evaluate(replace(batch, beta=0.1)) == first


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5), st.floats(0, 1))
def test_the_tail_of_the_longer_side_counts_alpha(lengths: list[tuple[int, int]], alpha: float) -> None:
    flat = torch.tensor([c for c, _ in lengths] + [r for _, r in lengths])
    values = torch.randn(int(flat.sum()), dtype=torch.float64)
    rows = torch.split(values, flat.tolist())
    shared = [min(pair) for pair in lengths] * 2
    expected = [row[:n].sum() + alpha * row[n:].sum() for row, n in zip(rows, shared, strict=True)]
    torch.testing.assert_close(sum_sides(values, flat, alpha), torch.stack(expected))
    assert torch.equal(sum_sides(values, flat, 1.0), sum_rows(values, flat))
    assert torch.equal(sum_sides(values, flat), sum_rows(values, flat))


@torch.no_grad()
def ld_sums(model: Any, first: Sequences, second: Sequences) -> Tensor:
    shared = torch.minimum(first.completion_lengths, second.completion_lengths).tolist()
    rows = hf_token_logps(model, first)
    return torch.stack([row[:n].sum() + ALPHA * row[n:].sum() for row, n in zip(rows, shared, strict=True)])


def test_the_reference_and_an_evaluation_weigh_the_tail_too(folder: Path) -> None:
    pairs = random_pairs(5)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = ld_sums(model, pairs.chosen, pairs.rejected), ld_sums(model, pairs.rejected, pairs.chosen)
    trained = actor(folder, "dpo", ld_alpha=ALPHA, lora_r=2, micro_batch_size=2)
    frozen = FrozenReference(actor(folder, "dpo").model, trained._limits, ld_alpha=ALPHA)
    for found in (frozen.logps(pairs), trained.base_logps(pairs)):
        torch.testing.assert_close(found.chosen, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.rejected, expected[1], rtol=1e-5, atol=1e-5)
    metrics = trained.evaluate(ReferencedPairs(pairs=pairs, reference=found))
    assert metrics["logps/chosen"] == pytest.approx(float(expected[0].mean()), rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)


def hf_weights(model: Any, pairs: ReferencedPairs) -> Tensor:
    """[N] by the paper's formula, from whole softmaxes."""

    def alignment(side: Sequences) -> Tensor:
        found = []
        for prompt, completion in zip(side.prompt_rows(), side.completion_rows(), strict=True):
            probabilities = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].softmax(-1)
            own = probabilities.gather(1, torch.tensor(completion)[:, None])[:, 0]
            found.append((own / probabilities.square().sum(-1)).log().mean().exp())
        return torch.stack(found)

    return alignment(pairs.pairs.chosen) * alignment(pairs.pairs.rejected)


@pytest.mark.parametrize("stage", ["dpo", "ray_online_dpo"])
def test_wpo_multiplies_the_loss_of_each_pair(folder: Path, stage: str) -> None:
    batch = batch_of(6)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        sums = [
            torch.stack([row.sum() for row in hf_token_logps(model, side)])
            for side in (batch.pairs.chosen, batch.pairs.rejected)
        ]
        ratio = sums[0] - batch.reference.chosen - (sums[1] - batch.reference.rejected)
        expected = float((-F.logsigmoid(0.1 * ratio) * hf_weights(model, batch)).mean())
    found = one_step(folder, stage, batch, dpo_weighting="wpo")
    assert found[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert_equal_steps(one_step(folder, stage, batch, dpo_weighting="wpo", micro_batch_size=1), found)


@pytest.mark.parametrize("keys", [{"ld_alpha": ALPHA}, {"dpo_weighting": "wpo"}], ids=["ld", "wpo"])
def test_an_evaluation_is_what_an_update_reports(folder: Path, keys: dict[str, Any]) -> None:
    batch, trained = batch_of(6), actor(folder, "dpo", ppo_mini_batch_size=6, micro_batch_size=2, **keys)
    found, reported = without_moments(trained.evaluate(batch)), trained.update(batch, 0)
    for name, value in found.items():
        assert value == pytest.approx(reported[name], rel=1e-6, abs=1e-6), name


def test_a_weight_of_one_for_the_tail_changes_no_bit(folder: Path) -> None:
    batch = batch_of(6)
    plain, weighted = one_step(folder, "dpo", batch), one_step(folder, "dpo", batch, ld_alpha=1.0)
    assert plain[0] == weighted[0]
    assert all(torch.equal(value, weighted[1][name]) for name, value in plain[1].items())
