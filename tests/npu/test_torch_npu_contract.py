"""The functions and arguments of torch_npu that ``rlxf/platform/npu.py`` uses are in the pinned wheel, by name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import rlxf.platform.npu
from tests.npu.wheels import source, wheel

TORCH_NPU = "torch-npu==2.10.0.post4"
PLATFORM = ast.parse(Path(rlxf.platform.npu.__file__).read_text())

pytestmark = pytest.mark.npu


def calls() -> list[tuple[str, ast.Call]]:
    """Dotted name below ``_torch_npu()`` and node of every call that the platform makes."""
    found = []
    for node in ast.walk(PLATFORM):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.startswith("_torch_npu()."):
                found.append((name.removeprefix("_torch_npu()."), node))
    return found


def arguments_of(operation: str) -> list[str]:
    """Parameter names, as the wheel documents its schema."""
    text = source(TORCH_NPU, "torch_npu/_op_plugin_docs.py")
    schema = re.search(rf"^torch_npu\.{operation}\((.*?)\) ->", text, re.MULTILINE)
    assert schema is not None
    return [part.split("=")[0].split()[-1] for part in schema.group(1).split(", ") if part != "*"]


def test_the_platform_calls_something() -> None:
    assert {name for name, _ in calls()} >= {"npu.set_device", "npu.is_available", "npu_fusion_attention"}


def test_device_functions_exist() -> None:
    text = source(TORCH_NPU, "torch_npu/npu/__init__.py")
    public = set(re.findall(r'"(\w+)"', text.split("__all__ = [")[1].split("]")[0]))
    for name, _ in calls():
        if name.startswith("npu."):
            assert name.removeprefix("npu.") in public, name


def test_attention_arguments_exist() -> None:
    known = arguments_of("npu_fusion_attention")
    (call,) = [node for name, node in calls() if name == "npu_fusion_attention"]
    positional = [ast.unparse(argument) for argument in call.args]
    assert known[: len(positional)] == ["query", "key", "value", "head_num", "input_layout"]
    assert positional[3:] == ["query.shape[1]", "'TND'"]
    assert {keyword.arg for keyword in call.keywords} <= set(known)


@pytest.mark.parametrize(
    ("operation", "first", "named"),
    [
        ("npu_rms_norm", ["self", "gamma"], {"epsilon"}),
        ("npu_rotary_mul", ["input", "r1", "r2"], set()),
        ("npu_swiglu", ["self"], {"dim"}),
    ],
)
def test_arguments_of_the_fused_operations_exist(operation: str, first: list[str], named: set[str]) -> None:
    known = arguments_of(operation)
    (call,) = [node for name, node in calls() if name == operation]
    assert known[: len(call.args)] == first
    assert {keyword.arg for keyword in call.keywords} == named <= set(known)


def test_the_rotation_turns_halves_and_takes_angles_for_all_heads() -> None:
    text = source(TORCH_NPU, "torch_npu/_op_plugin_docs.py").split("npu_rotary_mul(")[1].split('"""')[0]
    assert "rotary_mode='half'" in text
    lines = [line.strip() for line in text.splitlines()]
    half = lines.index("half模式：")
    assert lines[half + 2 : half + 4] == ["x_new = torch.cat((-x2, x1), dim=-1)", "output = r1 * input + r2 * x_new"]
    assert "input为SBND: S11D" in text


def test_sequence_ends_are_cumulative_without_a_leading_zero() -> None:
    """The wheel's own example: lengths 2 2 2 2 2 are given as 2 4 6 8 10."""
    text = source(TORCH_NPU, "torch_npu/_op_plugin_docs.py")
    assert "2 2 2 2 2, 则actual_seq_qlen传: 2 4 6 8 10" in text
    platform = Path(rlxf.platform.npu.__file__).read_text()
    assert all(
        f"actual_seq_{side}len=list(accumulate(blocks.{name}))" in platform
        for side, name in (("q", "queries"), ("kv", "keys"))
    )


def test_the_transfer_layer_is_there_and_leaves_tensor_type_to_us() -> None:
    assert "torch_npu/contrib/transfer_to_npu.py" in wheel(TORCH_NPU).namelist()
    text = source(TORCH_NPU, "torch_npu/contrib/transfer_to_npu.py")
    assert "Tensor.cuda" in text
    assert "Tensor.type" not in text  # once it patches that too, _make_type_strings_look_like_cuda can go
