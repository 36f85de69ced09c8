"""The fast linear path: exact to fp32 rounding, forward and backward, and never a weight of yesterday."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlxf.core.errors import ConfigError
from rlxf.platform import get_platform, linear
from rlxf.platform.linear import Linear, OneDnnLinear, _packs, cpu_linear

SHAPES = [(4, 256, 256), (37, 512, 384), (64, 384, 1000), (513, 256, 320)]  # rows, inputs, outputs: all on the path
SMALL = [(1, 512, 512), (3, 512, 512), (200, 64, 192), (0, 512, 512)]  # left to MKL

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this PyTorch is built without oneDNN"
)
pytestmark = needs_onednn


def inputs(rows: int, size: int, outputs: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the output's gradient."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, size), (outputs, size), (outputs,), (rows, outputs))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def results(layer: object, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> list[Tensor]:
    """Output and the gradients of all inputs, in the dtype of ``x``."""
    leaves = [leaf.detach().to(x.dtype).requires_grad_() for leaf in (x, weight, bias) if leaf is not None]
    out = layer(*leaves)  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(x.dtype))]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the outputs that oneDNN computed."""
    seen: list[tuple[int, ...]] = []
    through = linear._times_transposed

    def counted(*arguments: Tensor) -> Tensor:
        out = through(*arguments)
        seen.append(tuple(out.shape))
        return out

    monkeypatch.setattr(linear, "_times_transposed", counted)
    return seen


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_float64(
    shape: tuple[int, int, int], with_bias: bool, calls: list[tuple[int, ...]]
) -> None:
    x, weight, bias, grad = inputs(*shape)
    chosen_bias = bias if with_bias else None
    expected = results(F.linear, x.double(), weight, chosen_bias, grad)
    found = results(OneDnnLinear(), x, weight, chosen_bias, grad)
    rows, size, outputs = shape
    # All three products took the path. The left factor of the last one is copied: the smaller one.
    assert calls == [(rows, outputs), (rows, size), (min(outputs, size), max(outputs, size))]
    for mine, exact in zip(found, expected, strict=True):
        assert relative_error(mine, exact) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_the_path_is_as_precise_as_mkl(shape: tuple[int, int, int]) -> None:
    """A path that computed in bf16 or tf32 behind our back would be wrong by 1e-3."""
    x, weight, bias, grad = inputs(*shape)
    expected = results(F.linear, x.double(), weight, bias, grad)
    for mine, mkl, exact in zip(
        results(OneDnnLinear(), x, weight, bias, grad), results(F.linear, x, weight, bias, grad), expected, strict=True
    ):
        assert relative_error(mine, exact) < 4 * relative_error(mkl, exact) + 1e-7


@pytest.mark.parametrize("shape", SMALL)
def test_small_products_are_torchs_own_bit_for_bit(shape: tuple[int, int, int], calls: list[tuple[int, ...]]) -> None:
    x, weight, bias, grad = inputs(*shape)
    expected = results(F.linear, x, weight, bias, grad)
    assert all(map(torch.equal, results(OneDnnLinear(), x, weight, bias, grad), expected))
    assert calls == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_torchs_own_bit_for_bit(dtype: torch.dtype, calls: list[tuple[int, ...]]) -> None:
    x, weight, bias, grad = (tensor.to(dtype) for tensor in inputs(64, 384, 320))
    expected = results(F.linear, x, weight, bias, grad)
    assert all(map(torch.equal, results(OneDnnLinear(), x, weight, bias, grad), expected))
    assert calls == []


def test_mkl_is_torchs_own_bit_for_bit() -> None:
    chosen = get_platform("cpu", cpu_linear="mkl").linear
    for shape in SHAPES:
        x, weight, bias, grad = inputs(*shape)
        expected = results(F.linear, x, weight, bias, grad)
        assert all(map(torch.equal, results(chosen, x, weight, bias, grad), expected))
        assert torch.equal(chosen.output(x, weight, bias), expected[0])


@pytest.mark.parametrize("change", ["copy_", "data", "optimizer", "inference"])
def test_a_weight_changed_in_place_is_seen_by_the_next_call(change: str) -> None:
    """Nothing may keep a packed copy: an optimizer, a weight sync and a checkpoint all write into the parameter."""
    x, weight, _, grad = inputs(64, 384, 320)
    parameter = torch.nn.Parameter(weight.clone())
    layer = OneDnnLinear()
    first = layer(x, parameter).detach()
    layer(x, parameter).backward(grad)
    if change == "copy_":
        with torch.no_grad():
            parameter.copy_(-weight)
    elif change == "data":
        parameter.data.neg_()
    elif change == "optimizer":
        parameter.grad = 2 * weight
        torch.optim.SGD([parameter], lr=1.0).step()
    else:
        with torch.inference_mode():
            layer(x, parameter)
            parameter.neg_()
    torch.testing.assert_close(layer(x, parameter).detach(), -first)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x, parameter), -first)


def test_tensors_with_gaps_broadcasts_and_more_dimensions() -> None:
    x, weight, _, _ = inputs(64, 384, 320)
    layer = OneDnnLinear()
    for view in (x.repeat(1, 2)[:, ::2], x.t().contiguous().t(), x[:1].expand(64, 384), x[None].expand(2, 64, 384)):
        torch.testing.assert_close(layer(view, weight), F.linear(view, weight), rtol=1e-5, atol=1e-4)
    for odd in (weight.t().contiguous().t(), weight.repeat(1, 2)[:, ::2], weight.repeat(2, 1)[::2]):
        torch.testing.assert_close(layer(x, odd), F.linear(x, odd), rtol=1e-5, atol=1e-4)
    rows = x.view(8, 8, 384).transpose(0, 1)
    assert layer(rows, weight).shape == (8, 8, 320)
    torch.testing.assert_close(layer(rows, weight), F.linear(rows, weight), rtol=1e-5, atol=1e-4)


def test_a_broadcast_gradient_is_exact() -> None:
    """``sum().backward()`` hands over a gradient without memory of its own."""
    x, weight, bias, grad = inputs(64, 384, 320)
    ones = torch.ones_like(grad)
    expected = results(F.linear, x.double(), weight, bias, ones)
    found = results(OneDnnLinear(), x, weight, bias, torch.ones(()).expand_as(ones))
    for mine, exact in zip(found, expected, strict=True):
        assert relative_error(mine, exact) < 1e-5


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_a_frozen_input_costs_no_product_and_no_memory(wanted: str, calls: list[tuple[int, ...]]) -> None:
    x, weight, _, grad = inputs(64, 384, 320)
    (x if wanted == "x" else weight).requires_grad_()
    out = OneDnnLinear()(x, weight)
    saved = [tensor for tensor in out.grad_fn.saved_tensors if tensor is not None]  # type: ignore[union-attr]
    out.backward(grad)
    assert [tensor.data_ptr() for tensor in saved] == [(weight if wanted == "x" else x).data_ptr()]
    assert calls == [(64, 320), (64, 384) if wanted == "x" else (320, 384)]
    assert (x.grad is None) == (wanted == "weight")


def test_a_second_derivative_is_refused_not_wrong() -> None:
    x, weight, _, _ = inputs(64, 384, 320)
    x.requires_grad_()
    first = torch.autograd.grad(OneDnnLinear()(x, weight).pow(2).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("vendor", "capability", "fast"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_auto_follows_the_processor_not_a_clock(
    vendor: str, capability: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda _: f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert isinstance(cpu_linear("auto"), OneDnnLinear) == fast
    assert type(cpu_linear("mkl")) is Linear
    assert isinstance(cpu_linear("onednn"), OneDnnLinear)


def test_onednn_without_onednn_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"training\.cpu_linear = onednn.*training\.cpu_linear=auto"):
        get_platform("cpu", cpu_linear="onednn")
    assert type(cpu_linear("auto")) is Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 16, 70])
def test_a_frozen_weight_gives_what_it_gave_when_it_was_asked_for(rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size, dtype=dtype) for size in ((rows, 96), (64, 96), (64,)))
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(Linear().frozen((weight, bias))(x), expected)
    frozen = OneDnnLinear().frozen((weight, bias))
    torch.testing.assert_close(frozen(x), expected)
    weight.zero_()
    if _packs(dtype):
        torch.testing.assert_close(frozen(x), expected)  # a copy does not follow: its reader has to ask for a new one
    torch.testing.assert_close(OneDnnLinear().frozen((weight, bias))(x), bias.expand(rows, -1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_type_that_the_processor_does_not_pack_is_computed_unpacked(dtype: torch.dtype) -> None:
    """oneDNN refuses to lay out fp16 weights on most processors, also on some that are fast in fp32."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size, dtype=dtype) for size in ((3, 96), (64, 96), (64,)))
    expected = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(OneDnnLinear().frozen((weight, bias))(x), expected)


@pytest.mark.parametrize("linear", [Linear(), OneDnnLinear()])
@pytest.mark.parametrize("biases", [(True, True), (False, False), (True, False)])
def test_frozen_layers_of_one_input_give_their_outputs_side_by_side(linear: Linear, biases: tuple[bool, bool]) -> None:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(96, size, bias=bias) for size, bias in zip((64, 32), biases, strict=True)]
    x = torch.randn(5, 96)
    with torch.no_grad():
        found = linear.frozen(*((layer.weight, layer.bias) for layer in layers))(x)
        torch.testing.assert_close(found, torch.cat([layer(x) for layer in layers], dim=-1))
