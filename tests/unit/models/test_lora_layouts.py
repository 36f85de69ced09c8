"""Adapters train alike in every tensor-parallel layout, with and without sequence parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lora_layouts import train_on
from tests.tiny_models import save_causal_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("qwen3") / "model", "qwen3", vocab_size=260)


@pytest.fixture(scope="module")
def one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train_on(1, folder, tmp_path_factory.mktemp("one") / "out")[0]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2-sp"])
def test_two_processes_equal_one(folder: Path, one: dict[str, Any], tmp_path: Path, sequence_parallel: bool) -> None:
    first, second = train_on(2, folder, tmp_path / "out", sequence_parallel=sequence_parallel)
    assert one["losses"][-1][0] < one["losses"][0][0] - 0.02  # they do train
    for step, (expected, found) in enumerate(zip(one["losses"], first["losses"], strict=True)):
        assert found == pytest.approx(expected, abs=1e-5), f"loss of step {step}"
    assert first["norms"] == pytest.approx(one["norms"], rel=1e-5)
    for kind in ("adapters", "merged"):
        for name, value in one[kind].items():
            message = f"{kind} {name}: "
            torch.testing.assert_close(first[kind][name], value, atol=1e-5, rtol=0, msg=lambda m, n=message: n + m)
    for name, value in first["local"].items():
        is_whole = name.endswith("lora_A") == any(part in name for part in ("linear_qkv", "linear_fc1"))
        assert torch.equal(value, second["local"][name]) == is_whole, name  # halves that both hold stay the same


@pytest.mark.slow
def test_dropout_keeps_what_both_processes_hold_the_same(folder: Path, tmp_path: Path) -> None:
    first, second = train_on(2, folder, tmp_path / "out", lora_dropout=0.4)
    assert first["norms"] == second["norms"]
    for name, value in first["local"].items():
        is_whole = name.endswith("lora_A") == any(part in name for part in ("linear_qkv", "linear_fc1"))
        assert torch.equal(value, second["local"][name]) == is_whole, name


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_a_checkpoint_goes_on_in_any_layout(
    folder: Path, one: dict[str, Any], tmp_path: Path, before: int, after: int
) -> None:
    """Adapters and optimizer state; in one layout bit for bit, with dropout."""
    (tmp_path / "saved").mkdir()
    dropout = {"lora_dropout": 0.3} if before == after else {}
    train_on(before, folder, tmp_path / "a", checkpoint=str(tmp_path / "saved"), steps=range(2), **dropout)
    resumed = train_on(after, folder, tmp_path / "b", start=str(tmp_path / "saved"), steps=range(2, 4), **dropout)[0]
    whole = train_on(before, folder, tmp_path / "c", **dropout)[0] if dropout else one
    tolerance = 0 if dropout else 1e-5
    for expected, found in zip(whole["losses"][2:], resumed["losses"], strict=True):
        assert found == pytest.approx(expected, abs=tolerance)
    for name, value in whole["adapters"].items():
        torch.testing.assert_close(resumed["adapters"][name], value, atol=tolerance, rtol=0)


@pytest.mark.slow
def test_a_4_bit_base_computes_the_same_with_and_without_a_split_sequence(folder: Path, tmp_path: Path) -> None:
    plain = train_on(2, folder, tmp_path / "a", qlora=True)[0]
    split = train_on(2, folder, tmp_path / "b", qlora=True, sequence_parallel=True)[0]
    assert split["norms"] == pytest.approx(plain["norms"], rel=1e-5)
    assert plain["losses"][-1][0] < plain["losses"][0][0] - 0.02
    for name, value in plain["adapters"].items():
        torch.testing.assert_close(split["adapters"][name], value, atol=1e-5, rtol=0)
