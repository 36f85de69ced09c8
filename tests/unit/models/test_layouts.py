"""Every parallel layout computes what one process computes: losses, gradient norms, log-probs, scores, weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rlxf.platform import Process
from tests.layouts import train, train_on
from tests.tiny_models import save_causal_lm, save_reward_model

# clip_grad is below the norms, so a norm that counts a share twice, or not at all, changes the weights.
SETTINGS = {"ppo_mini_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "adam_eps": 1e-3, "clip_grad": 0.5}
SETTINGS |= {"num_layers": 4}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
SP = {"sequence_parallel": True}
DP2 = {"ppo_mini_batch_size": 2}  # two data-parallel ranks take twice the pairs of one in a step
FULL = {"recompute_granularity": "full"}
BF16 = {"bf16": True}
VP2 = {"virtual_pipeline_model_parallel_size": 2, "max_tokens_per_micro_batch": 160}

CASES: list[tuple[str, int, dict[str, Any], str, bool]] = [
    ("tp2", 2, TP2, "llama", True),
    ("tp2-sp", 2, TP2 | SP, "qwen3", True),
    ("pp2", 2, PP2, "llama", True),
    ("cp2", 2, CP2, "llama", False),
    ("dp2", 2, DP2, "llama", False),
    ("tp2-pp2", 4, TP2 | PP2, "qwen2", False),
]
SLOW: list[tuple[str, int, dict[str, Any], str, bool]] = [
    ("recompute-full", 1, FULL, "llama", False),
    ("recompute-selective", 1, {"recompute_granularity": "selective"}, "llama", False),
    ("tp2-untied", 2, TP2, "qwen3", False),
    ("tp2-sp-recompute", 2, TP2 | SP | FULL, "llama", False),
    ("tp2-sp-qwen2", 2, TP2 | SP, "qwen2", True),
    ("pp2-untied", 2, PP2, "qwen3", False),
    ("pp2-token-budget", 2, PP2 | {"max_tokens_per_micro_batch": 150}, "llama", True),
    ("pp2-vp2", 2, PP2 | VP2, "llama", True),
    ("cp2-recompute", 2, CP2 | {"recompute_granularity": "selective"}, "qwen2", True),
    ("dp2-token-budget", 2, DP2 | {"max_tokens_per_micro_batch": 150}, "llama", True),
    ("dp2-no-sharing", 2, DP2 | {"share_prompts": False}, "llama", True),
    ("tp4-two-kv-heads", 4, {"tensor_model_parallel_size": 4}, "llama", True),
    ("pp4", 4, {"pipeline_model_parallel_size": 4}, "llama", True),
    ("pp4-untied", 4, {"pipeline_model_parallel_size": 4}, "qwen2", False),
    ("cp4", 4, {"context_parallel_size": 4}, "llama", True),
    ("tp2-sp-pp2", 4, TP2 | SP | PP2, "llama", True),
    ("tp2-sp-cp2", 4, TP2 | SP | CP2, "qwen3", False),
    ("tp2-sp-dp2", 4, TP2 | SP | DP2, "llama", False),
    ("pp2-dp2", 4, PP2 | DP2, "llama", True),
    ("pp2-cp2", 4, PP2 | CP2, "llama", True),
    ("bf16-dp2", 2, BF16 | DP2, "llama", True),
    ("bf16-pp2", 2, BF16 | PP2, "qwen3", True),
    ("bf16-cp2", 2, BF16 | CP2, "qwen3", False),
    ("bf16-tp2-sp-pp2", 4, BF16 | TP2 | SP | PP2, "llama", True),
    ("cp2-dp2", 4, CP2 | DP2, "qwen2", False),
]
PARAMETERS = [pytest.param(*case, id=case[0]) for case in CASES]
PARAMETERS += [pytest.param(*case, id=case[0], marks=pytest.mark.slow) for case in SLOW]


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest absolute differences; metrics may differ by ten times as much as the loss, relative or absolute."""

    loss: float
    weights: float
    logps: float


FP32 = Tolerance(loss=1e-6, weights=2e-5, logps=2e-5)
# Two units in the last place of a bf16 weight near 1; log-probs are sums over a hidden state of that precision.
HALF = Tolerance(loss=2e-3, weights=8e-3, logps=5e-2)


def assert_equal_runs(found: dict[str, Any], expected: dict[str, Any], tolerance: Tolerance) -> None:
    for step, (ours, theirs) in enumerate(zip(found["metrics"], expected["metrics"], strict=True)):
        for name, value in theirs.items():
            # Before the first update every margin is 0, so the sign that accuracies count is rounding; in bf16 it
            # often is later, too.
            if name != "rewards/accuracies" or (step > 0 and tolerance is FP32):
                near = pytest.approx(value, rel=10 * tolerance.loss, abs=max(10 * tolerance.loss, tolerance.logps))
                assert ours[name] == near, f"{name} in step {step}"
        near = pytest.approx(theirs["loss"], rel=tolerance.loss, abs=tolerance.loss)
        assert ours["loss"] == near, f"loss in step {step}"
    for name, value in expected["evaluation"].items():
        if name != "rewards/accuracies":
            near = pytest.approx(value, rel=10 * tolerance.loss, abs=max(10 * tolerance.loss, tolerance.logps))
            assert found["evaluation"][name] == near, f"{name} of the evaluation"
    for name in ("logps", "scores"):
        torch.testing.assert_close(found[name], expected[name], atol=tolerance.logps, rtol=0)
    assert set(found["weights"]) == set(expected["weights"])
    for name, value in expected["weights"].items():
        found_value = found["weights"][name]
        torch.testing.assert_close(
            found_value, value, atol=tolerance.weights, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("name", "world_size", "layout", "kind", "tied"), PARAMETERS)
def test_a_layout_equals_one_process(
    tmp_path: Path, name: str, world_size: int, layout: dict[str, Any], kind: str, tied: bool
) -> None:
    # A vocabulary that no number of ranks divides evenly.
    folder = save_causal_lm(tmp_path / "model", kind, tied=tied, num_hidden_layers=4)
    reward = save_reward_model(tmp_path / "reward", kind, num_hidden_layers=4)
    half = "bf16" in layout
    one = train(folder, reward, Process(), SETTINGS | (BF16 if half else {}))
    found = train_on(folder, world_size, tmp_path / "found.pt", reward=reward, **(SETTINGS | layout))
    assert_equal_runs(found, one, HALF if half else FP32)


# The other stages: stage, keys of actor_rollout.
STAGES: dict[str, dict[str, Any]] = {
    "sigmoid": {"stage": "dpo"},
    "aot": {"stage": "dpo", "dpo_loss_type": "aot"},
    "simpo": {"stage": "dpo", "dpo_loss_type": "simpo", "dpo_beta": 2.0},
    "weighted": {"stage": "dpo", "ld_alpha": 0.4, "dpo_weighting": "wpo"},
    "sft": {"stage": "sft"},
    "rm": {"stage": "rm", "center_rewards_coefficient": 0.01},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, TP2),
    "tp2-sp": (2, TP2 | SP),
    "pp2": (2, PP2),
    "dp2": (2, DP2),
    "cp2": (2, CP2),
}
EVERY_TIME = {("sft", "tp2-sp"), ("rm", "pp2"), ("aot", "dp2"), ("weighted", "tp2-sp")}
STAGE_PARAMETERS = [
    pytest.param(stage, layout, id=f"{stage}-{layout}", marks=[] if (stage, layout) in EVERY_TIME else pytest.mark.slow)
    for stage in STAGES
    for layout in LAYOUTS
]


@pytest.mark.parametrize(("stage", "layout"), STAGE_PARAMETERS)
def test_a_layout_of_another_stage_equals_one_process(tmp_path: Path, stage: str, layout: str) -> None:
    """A reward model begins as a language model: every rank must make up the same head."""
    folder = save_causal_lm(tmp_path / "model", tied=True, num_hidden_layers=4)
    world_size, sizes = LAYOUTS[layout]
    settings = SETTINGS | STAGES[stage]
    one = train(folder, None, Process(), settings)
    found = train_on(folder, world_size, tmp_path / "found.pt", **(settings | sizes))
    assert_equal_runs(found, one, FP32)
