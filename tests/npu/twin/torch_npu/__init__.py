"""A stand-in for ``torch_npu`` on a CPU: the operations that rlxf calls, in plain torch.

Written from the wheel's documentation (``torch_npu/_op_plugin_docs.py``) and its schemas. Each operation refuses what
the documentation excludes, and what it leaves open but the platform never means. Nothing is said about kernels: their
precision, speed, memory, streams and collectives stay untested.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import compiled
from . import npu as npu
from .checks import CALLS as CALLS
from .checks import Refused as Refused
from .checks import need, numbers, tensor

_C = compiled
_MASK_SIZE = 2048  # of the compressed causal mask
_MAX_SEQUENCES = 1024  # in a list of lengths: 1K
_UNLIMITED = 2147483647


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        CALLS[function.__name__] += 1
        return function(*args, **options)

    return call


@_counted
def npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    tensor("self", self, dims=range(2, 9))
    tensor("gamma", gamma)
    need(gamma.dtype == self.dtype, f"gamma is {gamma.dtype}, self is {self.dtype}")
    need(gamma.shape == self.shape[-1:], f"gamma {tuple(gamma.shape)} is not the last dimension of {tuple(self.shape)}")
    need(isinstance(epsilon, float) and epsilon > 0, f"epsilon = {epsilon!r}")
    reverse = (self.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (self.float() * reverse * gamma.float()).to(self.dtype), reverse


@_counted
def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    need(rotary_mode == "half" and rotate is None, "only the half mode is used")
    for name, value in (("input", input), ("r1", r1), ("r2", r2)):
        tensor(name, value, dims=range(4, 5))
    size, batch, heads, width = input.shape  # SBND
    need(r1.shape == r2.shape == (size, 1, 1, width), f"r1 {tuple(r1.shape)} is not S11D of {tuple(input.shape)}")
    need(r1.dtype == r2.dtype == input.dtype, f"r1 is {r1.dtype}, r2 is {r2.dtype}, input is {input.dtype}")
    need(width < 896 and width % 2 == 0, f"D = {width}")
    need(batch < 1000 and heads < 1000, f"B = {batch}, N = {heads}")
    need(all(abs(numbers(r)).max() <= 1 for r in (r1, r2)), "r1 and r2 are in [-1, 1]")
    need(not (r1.requires_grad or r2.requires_grad) or batch * heads <= 1024, f"B * N = {batch * heads}")
    first, second = input.chunk(2, -1)
    return r1 * input + r2 * torch.cat((-second, first), dim=-1)


@_counted
def npu_swiglu(self: Tensor, dim: int = -1) -> Tensor:
    tensor("self", self, dims=range(1, 9))
    need(self.size(dim) % 2 == 0, f"dimension {dim} of {tuple(self.shape)} has no halves")
    first, second = self.chunk(2, dim)
    return F.silu(first) * second


@_counted
def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = _UNLIMITED,
    next_tockens: int = _UNLIMITED,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Of the seven results only the first is made: the platform reads no other, and autograd needs none here."""
    need(input_layout == "TND", f"only the layout TND is used, got {input_layout!r}")
    need(pse is None and padding_mask is None and prefix is None, "pse, padding_mask and prefix are not used")
    need(keep_prob == 1 and inner_precise == 0 and softmax_layout in ("", "TND"), "dropout and precision are not used")
    _check_heads(query, key, value, head_num)
    lengths = _lengths("actual_seq_qlen", actual_seq_qlen, query), _lengths("actual_seq_kvlen", actual_seq_kvlen, key)
    need(len(lengths[0]) == len(lengths[1]), f"{len(lengths[0])} sequences of queries, {len(lengths[1])} of keys")
    need(isinstance(scale, float), f"scale is a {type(scale).__name__}")
    hidden = _hidden(atten_mask, sparse_mode, (pre_tockens, next_tockens), (max(lengths[0]), max(lengths[1])))
    groups = query.size(1) // key.size(1)
    outputs = []
    for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        k, v = (x.repeat_interleave(groups, dim=1).float() for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
        scores = scores.masked_fill(hidden(len(q), len(k)), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    unused = torch.empty(0)
    return torch.cat(outputs).to(query.dtype), unused, unused, unused, 0, 0, 0


def _check_heads(query: Tensor, key: Tensor, value: Tensor, head_num: int) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        tensor(name, x, dims=range(3, 4))
        need(x.dtype == query.dtype, f"{name} is {x.dtype}, query is {query.dtype}")
        need(1 <= x.size(0) <= 2**20, f"{name}: T = {x.size(0)}")
        need(1 <= x.size(2) <= 768, f"{name}: D = {x.size(2)}")
    need(key.shape == value.shape, f"key {tuple(key.shape)}, value {tuple(value.shape)}")
    need(query.size(2) == key.size(2), f"D of query is {query.size(2)}, of key {key.size(2)}")
    need(head_num == query.size(1) <= 256, f"head_num = {head_num}, query has {query.size(1)} heads")
    need(query.size(1) % key.size(1) == 0, f"{query.size(1)} heads of query, {key.size(1)} of key")


def _lengths(name: str, ends: list[int] | None, x: Tensor) -> list[int]:
    """Rows of each sequence. A tail of zeros, for sequences that are left out, is documented but never meant."""
    need(isinstance(ends, list), f"{name}: TND needs a list, got {type(ends).__name__}")
    assert ends is not None
    need(all(type(end) is int for end in ends), f"{name} holds something else than int")
    need(1 <= len(ends) <= _MAX_SEQUENCES, f"{name} has {len(ends)} entries, at most {_MAX_SEQUENCES} are supported")
    need(ends[0] > 0, f"{name} begins with {ends[0]}: ends of sequences, without a leading 0")
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    need(min(lengths) >= 0, f"{name} falls: it is not cumulative")
    need(ends[-1] == x.size(0), f"{name} ends at {ends[-1]}, T is {x.size(0)}")
    return lengths


def _hidden(
    mask: Tensor | None, mode: int, window: tuple[int, int], longest: tuple[int, int]
) -> Callable[[int, int], Tensor]:
    """What gives the [queries, keys] bool mask of one sequence; True hides."""
    if mask is None:  # the documentation: mode and window have no effect then
        return lambda queries, keys: torch.zeros(queries, keys, dtype=torch.bool)
    need(mask.dtype in (torch.bool, torch.uint8), f"atten_mask is {mask.dtype}, expected bool or uint8")
    need(mode in (0, 1, 2, 3, 4), f"sparse_mode {mode} is not for TND, or wants what is not given")
    if mode in (0, 1):
        need(mask.shape == longest, f"atten_mask {tuple(mask.shape)}: sparse_mode {mode} wants {longest}")
        return lambda queries, keys: mask[:queries, :keys].bool()
    need(
        mask.shape == (_MASK_SIZE, _MASK_SIZE), f"atten_mask {tuple(mask.shape)}: sparse_mode {mode} wants 2048 x 2048"
    )
    same = bool((numbers(mask) == _triangle()).all())
    need(same, "atten_mask is not the compressed triangle: True hides what comes later")
    before, after = (_UNLIMITED, 0) if mode in (2, 3) else window

    def hidden(queries: int, keys: int) -> Tensor:
        aligned = 0 if mode == 2 else keys - queries  # 3 and 4 begin at the last query and the last key
        ahead = torch.arange(keys) - torch.arange(queries)[:, None] - aligned
        return (ahead > after) | (ahead < -before)

    return hidden


@functools.lru_cache
def _triangle() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.triu(np.ones((_MASK_SIZE, _MASK_SIZE), dtype=np.float32), 1)


@_counted
def _fused_adamw_(
    self: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    amsgrad: bool,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2); stands for ``torch._fused_adamw_`` on tensors of the device."""
    need(all(type(x) is float for x in (lr, beta1, beta2, weight_decay, eps)), "a number is not a float")
    need(not amsgrad and not maximize and not max_exp_avg_sqs, "amsgrad and maximize are not used")
    need(grad_scale is None and found_inf is None, "gradients are scaled before")
    lists = (self, grads, exp_avgs, exp_avg_sqs, state_steps)
    need(len({len(values) for values in lists}) == 1, f"lists of {[len(values) for values in lists]} tensors")
    for parameter, grad, first, second, step in zip(*lists, strict=True):
        for name, x in (("grad", grad), ("exp_avg", first), ("exp_avg_sq", second)):
            need(x.shape == parameter.shape and x.device == parameter.device, f"{name} is not like its parameter")
        t = float(numbers(step))
        need(step.shape == () and step.dtype == torch.float32 and t >= 1, f"state_steps: {step}")
        parameter.mul_(1 - lr * weight_decay)
        first.mul_(beta1).add_(grad, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        spread = (second / (1 - beta2**t)).sqrt().add_(eps)
        parameter.sub_(lr * (first / (1 - beta1**t)) / spread)
