"""Two tensor-parallel or data-parallel ranks compute what one process computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.layouts import train, train_on
from tests.tiny_models import save_causal_lm

SETTINGS = {"ppo_mini_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "adam_eps": 1e-3, "clip_grad": 0.5}


@pytest.mark.parametrize(
    ("layout", "kind", "tied"),
    [
        pytest.param({"tensor_model_parallel_size": 2}, "llama", True, id="tp2-llama-tied"),
        pytest.param({"tensor_model_parallel_size": 2}, "qwen3", False, id="tp2-qwen3", marks=pytest.mark.slow),
        pytest.param({"tensor_model_parallel_size": 2}, "qwen2", False, id="tp2-qwen2", marks=pytest.mark.slow),
        pytest.param({"ppo_mini_batch_size": 2}, "llama", False, id="dp2-llama-untied"),
    ],
)
def test_two_processes_equal_one(tmp_path: Path, layout: dict[str, int], kind: str, tied: bool) -> None:
    # A vocabulary that two ranks share evenly; two data-parallel ranks take twice the pairs of one in a step.
    folder = save_causal_lm(tmp_path / "model", kind, tied=tied, vocab_size=260)
    one = train(folder, 0, 1, 0, SETTINGS)
    two = train_on(folder, 2, tmp_path / "two.pt", **(SETTINGS | layout))
    for step, (expected, found) in enumerate(zip(one["metrics"], two["metrics"], strict=True)):
        for name, value in expected.items():
            # Before the first update every margin is 0, so the sign that accuracies count is rounding; sums of about
            # 100 nats carry an error of 1e-5.
            if not (step == 0 and name == "rewards/accuracies"):
                assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), f"{name} in step {step}"
    torch.testing.assert_close(two["logps"], one["logps"], atol=2e-5, rtol=0)
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, atol=2e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
