"""The NPU platform's operations through the twin of torch_npu, which refuses what the documentation excludes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rlxf.platform import get_platform
from rlxf.platform.attention import AttentionBlocks
from rlxf.platform.elementwise import Elementwise
from rlxf.platform.npu import NpuElementwise, NpuPlatform
from tests.npu_world import NpuOnCpu, torch_npu

__all__ = ["torch_npu"]

pytestmark = pytest.mark.usefixtures("torch_npu")

QUERIES, KEYS = [5, 1, 3, 9], [5, 6, 7, 9]  # the second and third see keys before their own
Options = dict[str, Any]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_operations_are_the_plain_ones(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, heads = torch.randn(5, 1, 8), torch.randn(8), torch.randn(5, 3, 8)
    angles = torch.randn(5, 1, 8)
    plain, fused = Elementwise(), NpuElementwise()
    x, weight, heads, cos, sin = (value.to(dtype) for value in (x, weight, heads, angles.cos(), angles.sin()))
    tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(fused.rms_norm(x, weight, 1e-5), plain.rms_norm(x, weight, 1e-5), **tolerance)
    torch.testing.assert_close(fused.rotate(heads, cos, sin), plain.rotate(heads, cos, sin), **tolerance)
    torch.testing.assert_close(fused.swiglu(x), plain.swiglu(x), **tolerance)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Ascend910B3", "Ascend 910B 64GB"), ("Ascend910B4", "Ascend 910B 32GB"), ("Ascend310P3", "Ascend310P3")],
)
def test_the_name_of_a_device_says_how_much_memory_it_has(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    assert NpuPlatform().device_name() == ""  # without CANN's own module
    acl = ModuleType("acl")
    acl.__spec__ = ModuleSpec("acl", None)
    acl.get_soc_name = lambda: name  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "acl", acl)
    assert NpuPlatform().device_name() == expected


def attend(platform: Any, queries: list[int], keys: list[int], kv_heads: int = 2) -> list[Tensor]:
    """Output and gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(queries), 4), (sum(keys), kv_heads), (sum(keys), kv_heads)]
    leaves = [torch.randn(*shape, 8, generator=generator).requires_grad_() for shape in shapes]
    out = platform.packed_attention(*leaves, AttentionBlocks.of(queries, keys, torch.device("cpu")), 0.3)
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_that_of_a_cpu(kv_heads: int) -> None:
    wanted = attend(get_platform("cpu"), QUERIES, KEYS, kv_heads)
    for found, expected in zip(attend(NpuOnCpu(), QUERIES, KEYS, kv_heads), wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def differences(options: Options) -> Options:
    """Ends of sequences as their lengths."""
    return {name: [3] * len(options[name]) for name in ("actual_seq_qlen", "actual_seq_kvlen")}


REFUSED: dict[str, tuple[Callable[[Options], Options], str]] = {
    "inverted mask": (lambda o: {"atten_mask": ~o["atten_mask"]}, "True hides what comes later"),
    "mask that hides the diagonal": (
        lambda o: {"atten_mask": o["atten_mask"] | torch.eye(2048, dtype=torch.bool)},
        "True hides what comes later",
    ),
    "mask of 1024": (lambda o: {"atten_mask": o["atten_mask"][:1024, :1024]}, "wants 2048 x 2048"),
    "mask of floats": (lambda o: {"atten_mask": o["atten_mask"].float()}, "expected bool or uint8"),
    "leading 0 of queries": (lambda o: {"actual_seq_qlen": [0, *o["actual_seq_qlen"]]}, "without a leading 0"),
    "leading 0 of both": (
        lambda o: {name: [0, *o[name]] for name in ("actual_seq_qlen", "actual_seq_kvlen")},
        "without a leading 0",
    ),
    "no lengths of queries": (lambda o: {"actual_seq_qlen": None}, "actual_seq_qlen: TND needs a list"),
    "no lengths of keys": (lambda o: {"actual_seq_kvlen": None}, "actual_seq_kvlen: TND needs a list"),
    "lengths on the device": (lambda o: {"actual_seq_kvlen": torch.tensor(o["actual_seq_kvlen"])}, "needs a list"),
    "lengths in place of ends": (differences, "ends at 3"),
    "falling ends": (lambda o: {"actual_seq_qlen": [6, 5, 9, 18]}, "falls"),
    "an end too few": (lambda o: {"actual_seq_qlen": o["actual_seq_qlen"][:-1]}, "ends at 9, T is 18"),
    "lists of two lengths": (lambda o: {"actual_seq_qlen": [5, 9, 18]}, "3 sequences of queries, 4 of keys"),
    "mode 0": (lambda o: {"sparse_mode": 0}, "sparse_mode 0 wants"),
    "mode 1": (lambda o: {"sparse_mode": 1}, "sparse_mode 1 wants"),
    "mode 6": (lambda o: {"sparse_mode": 6}, "sparse_mode 6 is not for TND"),
    "heads of the keys": (lambda o: {"head_num": 2}, "head_num = 2, query has 4"),
    "another layout": (lambda o: {"input_layout": "BSND"}, "only the layout TND"),
}
OTHER_NUMBERS: dict[str, Callable[[Options], Options]] = {
    "causal from the upper left": lambda o: {"sparse_mode": 2},
    "a band without limits": lambda o: {"sparse_mode": 4},
    "no mask": lambda o: {"atten_mask": None},
    "no scale": lambda o: {"scale": 1.0},
    "sequences of other bounds": lambda o: {"actual_seq_qlen": [4, 6, 9, 18]},
}


def wrongly(monkeypatch: pytest.MonkeyPatch, twin: Any, change: Callable[[Options], Options]) -> list[Tensor]:
    """Attention by a platform that gives the kernel other arguments."""
    original = twin.npu_fusion_attention

    def call(query: Tensor, key: Tensor, value: Tensor, head_num: int, input_layout: str, **options: Any) -> Any:
        options |= {"head_num": head_num, "input_layout": input_layout}
        return original(query, key, value, **options | change(options))

    monkeypatch.setattr(twin, "npu_fusion_attention", call)
    return attend(NpuOnCpu(), QUERIES, KEYS)


@pytest.mark.parametrize("mutation", REFUSED)
def test_a_call_that_the_documentation_excludes_is_refused(
    mutation: str, torch_npu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = REFUSED[mutation]
    with pytest.raises(torch_npu.Refused, match=message):
        wrongly(monkeypatch, torch_npu, change)


@pytest.mark.parametrize("mutation", OTHER_NUMBERS)
def test_a_call_that_means_something_else_gives_other_numbers(
    mutation: str, torch_npu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found, *_), (wanted, *_) = (
        wrongly(monkeypatch, torch_npu, OTHER_NUMBERS[mutation]),
        attend(get_platform("cpu"), QUERIES, KEYS),
    )
    assert float((found - wanted).abs().max()) > 1e-2


def test_more_sequences_than_a_call_takes_are_several_calls(torch_npu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin refuses a list of more than 1024 ends."""
    queries = [1 + row % 3 for row in range(1030)]
    keys = [length + row % 2 for row, length in enumerate(queries)]
    torch_npu.CALLS.clear()
    found = attend(NpuOnCpu(), queries, keys)
    assert torch_npu.CALLS["npu_fusion_attention"] == 2
    for mine, theirs in zip(found, attend(get_platform("cpu"), queries, keys), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    attend(NpuOnCpu(), [1] * 1024, [1] * 1024)
    assert torch_npu.CALLS["npu_fusion_attention"] == 3


def test_other_operations_refuse_what_their_documentation_excludes(torch_npu: Any) -> None:
    heads, angles = torch.rand(5, 1, 3, 8), torch.rand(5, 1, 1, 8)
    with pytest.raises(torch_npu.Refused, match=r"gamma is torch\.bfloat16"):
        torch_npu.npu_rms_norm(heads, torch.ones(8, dtype=torch.bfloat16))
    with pytest.raises(torch_npu.Refused, match="2 dimensions"):
        torch_npu.npu_rotary_mul(heads[:, 0, 0], angles, angles)
    with pytest.raises(torch_npu.Refused, match="S11D"):
        torch_npu.npu_rotary_mul(heads, angles.expand(5, 1, 3, 8), angles.expand(5, 1, 3, 8))
    with pytest.raises(torch_npu.Refused, match=r"\[-1, 1\]"):
        torch_npu.npu_rotary_mul(heads, angles + 1, angles)
    with pytest.raises(torch_npu.Refused, match="no halves"):
        torch_npu.npu_swiglu(torch.rand(5, 3))
    with pytest.raises(torch_npu.Refused, match="before set_device"):
        torch_npu.npu.empty_cache()
    state = [torch.zeros(2)]
    numbers = {"lr": 1.0, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
    flags = {"amsgrad": False, "maximize": False}
    with pytest.raises(torch_npu.Refused, match="state_steps"):  # counted before the call, as PyTorch does
        torch_npu._fused_adamw_(state, state, state, state, [], [torch.zeros(())], **numbers, **flags)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("class AscendConfig:", {"enable_sleep_mode_extra_cleanup": True}),
        ("class RlConfig:\nclass AscendConfig:", {"rl_config": {"enabled": True, "sleep_mode_extra_cleanup": True}}),
    ],
)
def test_a_shared_engine_frees_all_it_can_by_the_key_that_its_version_knows(
    source: str, expected: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer versions refuse the older key."""
    (tmp_path / "vllm_ascend").mkdir()
    (tmp_path / "vllm_ascend" / "__init__.py").touch()
    (tmp_path / "vllm_ascend" / "ascend_config.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert NpuPlatform().vllm_arguments(colocated=True)["additional_config"] == {"weight_nz_mode": 0} | expected
    assert NpuPlatform().vllm_arguments(colocated=False)["additional_config"] == {"weight_nz_mode": 0}
