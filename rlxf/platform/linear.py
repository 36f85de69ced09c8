"""Linear layers and their three products, through the library that computes them fastest on this device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlxf.config.kinds import CpuLinear
from rlxf.core.errors import ConfigError

# benchmarks/cpu_linear.py: below these sizes the product is bound by memory, or by the call itself.
MIN_ROWS = 4
MIN_WEIGHT_ELEMENTS = 2**16
_FEW_ROWS = 16  # that a packed weight is laid out for; others work as well


class Linear:
    """``x @ weight.T + bias`` as torch computes it: on an accelerator its own library, on a CPU MKL.

    Called, it is differentiable. The three products by themselves record no gradient: they are for code that writes its
    backward pass by hand.
    """

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., N] from ``x`` [..., K], ``weight`` [N, K] and ``bias`` [N]."""
        return F.linear(x, weight, bias)

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., N]: the same without a gradient."""
        return F.linear(x, weight, bias)

    def frozen(self, *layers: tuple[Tensor, Tensor | None]) -> Callable[[Tensor], Tensor]:
        """[..., sum of N]: outputs of layers (weight, bias) of one input, as a function of it alone.

        For weights that many calls with few rows read. It may read copies, so after a change of a weight it is out of
        date: ask for a new one.
        """
        return lambda x: torch.cat([self.output(x, *layer) for layer in layers], dim=-1)

    def grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        """[..., K]: ``grad @ weight`` from the output's gradient [..., N]."""
        return grad @ weight

    def grad_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        """[N, K]: ``grad.T @ x``, summed over all rows."""
        return _rows(grad).t() @ _rows(x)


class OneDnnLinear(Linear):
    """fp32 products through oneDNN, everything else and small products as ``Linear`` does.

    Same precision as MKL, another order of sums. oneDNN reads a transposed weight as it lies, so no copy of it is made
    and nothing can go stale when an optimizer or a weight sync changes it in place.
    """

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return self.output(x, weight, bias)
        if not _wins(x, weight):
            return F.linear(x, weight, bias)
        result: Tensor = _OneDnnFunction.apply(self, x, weight, bias)  # type: ignore[no-untyped-call]
        return result

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _times_transposed(x, weight, bias) if _wins(x, weight) else super().output(x, weight, bias)

    def frozen(self, *layers: tuple[Tensor, Tensor | None]) -> Callable[[Tensor], Tensor]:
        given = [bias for _, bias in layers if bias is not None]
        if (given and len(given) < len(layers)) or not _packs(layers[0][0].dtype):
            return super().frozen(*layers)
        # In oneDNN's own layout a few rows cost 1.5 to 2 times less: it would lay the weight out anew in each call.
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.cat([w.detach() for w, _ in layers]), _FEW_ROWS)
        bias = torch.cat(given).detach() if given else None
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

    def grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        return _times_transposed(grad, weight.t()) if _wins(grad, weight) else super().grad_input(grad, weight)

    def grad_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        grad, x = _rows(grad), _rows(x)
        if grad.dtype == torch.float32 and _is_large(len(x), grad.shape[1] * x.shape[1]):
            # The left factor is laid out anew: the smaller of the two.
            if grad.shape[1] > x.shape[1]:
                return _times_transposed(x.t(), grad.t()).t()
            return _times_transposed(grad.t(), x.t())
        return super().grad_weight(grad, x)


def _packs(dtype: torch.dtype) -> bool:
    """Whether this processor computes with packed weights of that type; half precision takes AVX-512 or newer."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype not in known or bool(getattr(torch.ops.mkldnn, known[dtype])())


class _OneDnnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.linear = linear
        # A frozen weight needs no input, a detached input no weight: each is kept only for the other's gradient.
        _, wants_x, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if wants_weight else None, weight if wants_x else None)
        return linear.output(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        _, wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            None,
            ctx.linear.grad_input(grad, weight) if wants_x else None,
            ctx.linear.grad_weight(grad, x) if wants_weight else None,
            _rows(grad).sum(dim=0) if wants_bias else None,
        )


def cpu_linear(choice: CpuLinear = "auto") -> Linear:
    """The linear layer that ``training.cpu_linear`` asks for; by a rule and not by timing, so that all processes agree.

    Raises:
        ConfigError: oneDNN is asked for, and this PyTorch is built without it.
    """
    built = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    present = built and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if choice == "onednn" and not present:
        raise ConfigError(
            "training.cpu_linear = onednn: this PyTorch is built without oneDNN's linear (torch.ops.mkldnn); "
            "install the cpu extra's torch, or set training.cpu_linear=auto"
        )
    fast = choice == "onednn" or (choice == "auto" and present and _mkl_is_slow())
    return OneDnnLinear() if fast else Linear()


def _mkl_is_slow() -> bool:
    """MKL keeps its AVX-512 kernels for Intel; on AMD it computes fp32 at half of what oneDNN reaches."""
    has_mkl = bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]
    if not has_mkl or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with contextlib.suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return False


def _wins(x: Tensor, weight: Tensor) -> bool:
    if x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False  # torch computes bf16 through oneDNN anyway
    return _is_large(x.numel() // max(x.shape[-1], 1), weight.numel())


def _is_large(num_rows: int, weight_elements: int) -> bool:
    return num_rows >= MIN_ROWS and weight_elements >= MIN_WEIGHT_ELEMENTS


def _times_transposed(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b.T + bias``; either may lie transposed in memory, ``a`` at the price of a copy."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(_dense(a), _dense(b), bias, "none", [], "")
    return result


def _dense(x: Tensor) -> Tensor:
    """oneDNN reads row after row or column after column; gaps and broadcast strides are copied away."""
    return x if x.is_contiguous() or (x.dim() == 2 and x.t().is_contiguous()) else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
