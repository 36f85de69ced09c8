"""Adapters train alike in every parallel layout, and a checkpoint of them goes on in any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlxf.platform import Process
from tests.layouts import train, train_on
from tests.tiny_models import save_causal_lm

# clip_grad is below the norms, so a norm that counts a share twice, or not at all, changes the weights.
SETTINGS: dict[str, Any] = {"ppo_mini_batch_size": 4, "micro_batch_size": 2, "adam_eps": 1e-3, "clip_grad": 0.5}
SETTINGS |= {"num_layers": 4, "lr": 1e-2, "lora_r": 4, "lora_alpha": 8.0}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SP = {"sequence_parallel": True}
FULL = {"recompute_granularity": "full"}
VP2 = {"virtual_pipeline_model_parallel_size": 2, "max_tokens_per_micro_batch": 160}

CASES: list[tuple[str, int, dict[str, Any], str]] = [
    ("tp2", 2, TP2, "llama"),
    ("tp2-sp", 2, TP2 | SP, "qwen3"),
]
SLOW: list[tuple[str, int, dict[str, Any], str]] = [
    ("recompute-full", 1, FULL, "llama"),
    ("tp2-sp-recompute", 2, TP2 | SP | FULL, "qwen2"),
    ("pp2", 2, PP2, "llama"),
    ("pp2-vp2", 2, PP2 | VP2, "llama"),
    ("cp2", 2, {"context_parallel_size": 2}, "llama"),
    ("dp2", 2, {"ppo_mini_batch_size": 2}, "llama"),
    ("tp2-pp2", 4, TP2 | PP2, "qwen2"),
    ("tp4-two-kv-heads", 4, {"tensor_model_parallel_size": 4}, "llama"),
]
PARAMETERS = [pytest.param(*case, id=case[0]) for case in CASES]
PARAMETERS += [pytest.param(*case, id=case[0], marks=pytest.mark.slow) for case in SLOW]


def assert_equal_runs(found: dict[str, Any], expected: dict[str, Any], *, tolerance: float) -> None:
    for step, (ours, theirs) in enumerate(zip(found["metrics"], expected["metrics"], strict=True)):
        for name, value in theirs.items():
            # Before the first update every margin is 0, so the sign that accuracies count is rounding.
            if name != "rewards/accuracies":
                assert ours[name] == pytest.approx(value, rel=tolerance, abs=tolerance), f"{name} in step {step}"
    for kind in ("adapters", "weights"):
        assert set(found[kind]) == set(expected[kind])
        for name, value in expected[kind].items():
            ours, message = found[kind][name], f"{kind} {name}: "
            torch.testing.assert_close(ours, value, atol=tolerance, rtol=0, msg=lambda m, n=message: n + m)


@pytest.mark.parametrize(("name", "world_size", "layout", "kind"), PARAMETERS)
def test_a_layout_equals_one_process(
    tmp_path: Path, name: str, world_size: int, layout: dict[str, Any], kind: str
) -> None:
    """Losses, gradient norms, adapters and merged weights."""
    folder = save_causal_lm(tmp_path / "model", kind, tied=True, num_hidden_layers=4)
    one = train(folder, None, Process(), SETTINGS)
    assert float(one["adapters"]["model.layers.3.mlp.down_proj.lora_B.weight"].abs().max()) > 1e-3  # they do train
    found = train_on(folder, world_size, tmp_path / "found.pt", **(SETTINGS | layout))
    assert_equal_runs(found, one, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [TP2 | SP, PP2, {"context_parallel_size": 2}], ids=["tp2-sp", "pp2", "cp2"])
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_layout_of_another_stage_equals_one_process(tmp_path: Path, stage: str, layout: dict[str, Any]) -> None:
    """A reward model's head trains beside the adapters, on the ranks that hold it."""
    folder = save_causal_lm(tmp_path / "model", tied=True, num_hidden_layers=4)
    settings = SETTINGS | {"stage": stage}
    one = train(folder, None, Process(), settings)
    assert ("score.weight" in one["adapters"]) == (stage == "rm")
    found = train_on(folder, 2, tmp_path / "found.pt", **(settings | layout))
    assert_equal_runs(found, one, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full"])
@pytest.mark.parametrize(("before", "after"), [(TP2, PP2), (PP2, {})], ids=["tp2-pp2", "pp2-one"])
def test_a_checkpoint_of_a_reward_model_goes_on_in_another_layout(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], rank: int
) -> None:
    folder = save_causal_lm(tmp_path / "model", num_hidden_layers=4)
    (tmp_path / "saved").mkdir()
    settings = SETTINGS | {"stage": "rm", "lora_r": rank, "lr": 1e-2 if rank else 1e-3}

    def run(name: str, layout: dict[str, Any], **more: Any) -> dict[str, Any]:
        return train_on(folder, 2 if layout else 1, tmp_path / f"{name}.pt", **(settings | layout | more))

    run("first", before, checkpoint=str(tmp_path / "saved"), steps=[0, 1])
    resumed = run("second", after, start=str(tmp_path / "saved"), steps=[2, 3])
    whole = run("whole", before, steps=[0, 1, 2, 3])
    whole["metrics"] = whole["metrics"][2:]
    assert_equal_runs(resumed, whole, tolerance=1e-5)


@pytest.mark.slow
def test_a_4_bit_base_trains_the_same_with_and_without_a_split_sequence(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "model", num_hidden_layers=4)
    settings = SETTINGS | TP2 | {"qlora": True}
    plain = train_on(folder, 2, tmp_path / "plain.pt", **settings)
    split = train_on(folder, 2, tmp_path / "split.pt", **(settings | SP))
    assert_equal_runs(split, plain, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [(TP2 | SP, TP2 | SP), (TP2, {}), ({}, TP2), (TP2, PP2), (PP2, {})],
    ids=["tp2-sp", "tp2-one", "one-tp2", "tp2-pp2", "pp2-one"],
)
def test_a_checkpoint_goes_on_in_any_layout(tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Adapters and optimizer state; in one layout bit for bit, with dropout."""
    folder = save_causal_lm(tmp_path / "model", num_hidden_layers=4)
    (tmp_path / "saved").mkdir()
    same = before == after
    settings = SETTINGS | ({"lora_dropout": 0.3} if same else {})

    def run(name: str, layout: dict[str, Any], **more: Any) -> dict[str, Any]:
        size = 2 if layout else 1
        return train_on(folder, size, tmp_path / f"{name}.pt", **(settings | layout | more))

    run("first", before, checkpoint=str(tmp_path / "saved"), steps=[0, 1])
    resumed = run("second", after, start=str(tmp_path / "saved"), steps=[2, 3])
    whole = run("whole", before, steps=[0, 1, 2, 3])
    whole["metrics"] = whole["metrics"][2:]
    assert_equal_runs(resumed, whole, tolerance=0 if same else 1e-5)
