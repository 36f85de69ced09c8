"""The functions and arguments of torch_npu that ``rlxf/platform/npu.py`` uses are in the pinned wheel, by name."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

import rlxf.platform.npu
from rlxf.platform.links import _DEVICE, DeviceLinks
from rlxf.platform.npu import NpuPlatform
from tests.npu.wheels import source, wheel
from tests.npu_world import torch_npu

__all__ = ["torch_npu"]

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
    (call,) = [node for name, node in calls() if name == "npu_fusion_attention"]
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert given["actual_seq_qlen"] == "list(accumulate(queries))"
    assert given["actual_seq_kvlen"] == "list(accumulate(keys))"


def test_the_documentation_says_what_the_twin_refuses() -> None:
    text = source(TORCH_NPU, "torch_npu/_op_plugin_docs.py").replace("\uff0c", ",").replace("\uff1a", ":")
    attention = text.split('"npu_fusion_attention"')[1].split("_add_torch_npu_docstr")[0]
    for sentence in (
        "actual_seq_qlen的长度取值范围为1~2K, varlen场景下长度最大支持1K",  # at most 1K entries
        "取值为1(或True)代表该位不参与计算(被遮蔽)",  # True hides
        "数据类型支持bool、uint8",
        "3: rightDownCausal模式",
        "TND(actual_seq_qlen/actual_seq_kvlen需传值)",
        "D: Head Dim必须满足Dq=Dk和Dk≥Dv,取值范围1~768",
        "Nq取值范围1~256",
        "T(B*S)取值范围1~1M",
        "当atten_mask输入为None时, sparse_mode, pre_tockens, next_tockens参数不生效, 固定为全计算",
    ):
        assert sentence in attention, sentence
    assert "2048*2048" in attention.split("sparse_mode为3时")[1].split("\n")[0]
    rotary = text.split('"npu_rotary_mul"')[1]
    assert "D < 896,且为2的倍数; B, N < 1000; 当需要计算cos/sin的反向梯度时,B*N <= 1024" in rotary
    norm = text.split('"npu_rms_norm"')[1]
    assert "gamma:Tensor类型,数据类型需要和self保持一致,输入shape支持2-8维,通常为self的最后一维" in norm
    assert "A * sigmoid(A) * B" in text.split('"npu_swiglu"')[1]


@pytest.mark.parametrize("operation", ["npu_fusion_attention", "npu_rms_norm", "npu_rotary_mul", "npu_swiglu"])
def test_the_twin_takes_the_arguments_of_the_wheel(operation: str, torch_npu: Any) -> None:
    assert list(inspect.signature(getattr(torch_npu, operation)).parameters) == arguments_of(operation)


def test_the_optimizer_kernel_is_registered_with_the_arguments_of_the_twin(torch_npu: Any) -> None:
    registered = source(TORCH_NPU, "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml")
    schema = re.search(r"- func: _fused_adamw_\((.*)\) -> \(\)", registered)
    assert schema is not None
    assert "float lr" in schema.group(1)
    names = [part.split("=")[0].split()[-1] for part in schema.group(1).split(", ") if part != "*"]
    assert list(inspect.signature(torch_npu._fused_adamw_).parameters) == names


def test_the_twin_has_every_device_function_of_the_platform(torch_npu: Any) -> None:
    for name, _ in calls():
        assert callable(functools.reduce(getattr, name.split("."), torch_npu)), name


def test_a_group_beside_others_is_made_as_the_wheel_makes_its_own() -> None:
    text = source(TORCH_NPU, "torch_npu/_init/registry/distributed.py")
    assert "torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()" in text
    assert "pg_options._timeout = dist_backend_opts.timeout" in text
    assert re.search(r"ProcessGroupHCCL\(\s*store, group_rank, group_size, pg_options\s*\)", text)
    header = source(TORCH_NPU, "torch_npu/include/torch_npu/csrc/distributed/ProcessGroupHCCL.hpp")
    assert "class C10_NPU_API ProcessGroupHCCL : public c10d::Backend" in header
    assert "c10::intrusive_ptr<c10d::Work> broadcast(" in header
    assert "struct Options : c10d::Backend::Options" in header  # which has the timeout


def test_a_group_is_given_its_limit_and_no_other_option(torch_npu: Any) -> None:
    links = NpuPlatform().links
    assert isinstance(links, DeviceLinks)
    with pytest.raises(torch_npu.Refused, match="before set_device"):
        links._backend(HashStore(), 1, 3, 8.0)
    torch_npu.npu.set_device(0)
    group: Any = links._backend(HashStore(), 1, 3, 8.0)
    assert type(group) is torch_npu._C._distributed_c10d.ProcessGroupHCCL
    assert (group.rank, group.size, group.timeout_s) == (1, 3, 8.0)
    with pytest.raises(torch_npu.Refused, match="rank = 3 of 3"):
        links._backend(HashStore(), 3, 3, 8.0)


def test_a_handle_names_its_device_where_the_links_put_their_own() -> None:
    """And it is what torch's own function gives, which this wheel replaces."""
    text = source(TORCH_NPU, "torch_npu/multiprocessing/reductions.py")
    (function,) = [
        node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "rebuild_npu_tensor"
    ]
    names = [argument.arg for argument in function.args.args]
    assert names[_DEVICE] == "storage_device"
    reduced = next(
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Tuple) and node.elts and ast.unparse(node.elts[0]) == "rebuild_npu_tensor"
    )
    given = reduced.elts[1]
    assert isinstance(given, ast.Tuple)
    assert len(given.elts) == len(names)
    assert ast.unparse(given.elts[_DEVICE]) == "device"
    assert "torch.multiprocessing.reductions.reduce_tensor = _npu_reduce_tensor" in text
    assert "torch.multiprocessing.reductions.init_reductions()" in text
    patches = source(TORCH_NPU, "torch_npu/_init/patches/api_patches.py")
    assert "from torch_npu.multiprocessing.reductions import _add_reductions_methods" in patches
    assert re.search(r"^    +_add_reductions_methods\(\)$", patches, re.MULTILINE)


def test_the_transfer_layer_is_there_and_leaves_tensor_type_to_us() -> None:
    assert "torch_npu/contrib/transfer_to_npu.py" in wheel(TORCH_NPU).namelist()
    text = source(TORCH_NPU, "torch_npu/contrib/transfer_to_npu.py")
    assert "Tensor.cuda" in text
    assert "Tensor.type" not in text  # once it patches that too, _make_type_strings_look_like_cuda can go
