"""``Elementwise`` with one kernel per operation, which torch.compile makes at its first use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlxf.platform.elementwise import Elementwise

log = logging.getLogger(__name__)


class CompiledElementwise(Elementwise):
    """The same functions with one rounding at the end of each, not one per operation."""

    def __init__(self) -> None:
        plain = Elementwise()
        self._rotate, self._swiglu = Compiled(plain.rotate), Compiled(plain.swiglu)
        self._add_logits, self._slope = Compiled(_add_logits), Compiled(_slope)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), weight, eps)  # one kernel of torch's own, fp32 inside

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self._rotate(x, cos, sin)  # type: ignore[no-any-return]

    def swiglu(self, x: Tensor) -> Tensor:
        return self._swiglu(x)  # type: ignore[no-any-return]

    def add_logits(
        self, logits: Tensor, columns: Tensor, top: Tensor, total: Tensor, picked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._add_logits(logits, columns, top, total, picked)  # type: ignore[no-any-return]

    def slope(self, logits: Tensor, columns: Tensor, normalizer: Tensor, grad: Tensor) -> Tensor:
        return self._slope(logits, columns, normalizer, grad)  # type: ignore[no-any-return]


class Compiled:
    """A function of tensors, compiled for any number of rows (their first dimension).

    Where no kernel can be built, because there is no C compiler for example, the function as it is, and a warning.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._plain = function
        self._call: Callable[..., Any] | None = None

    def __call__(self, *tensors: Tensor) -> Any:
        if self._call is None:
            self._call = torch.compile(self._plain)
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return self._call(*tensors)
        except _compile_errors() as error:
            reason = " ".join(str(error).split())[:300]
            log.warning("torch.compile failed; training and log-probabilities are slower: %s", reason)
            self._call = self._plain
            return self._plain(*tensors)


def _compile_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError


def _add_logits(
    logits: Tensor, columns: Tensor, top: Tensor, total: Tensor, picked: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide, width = logits.float(), logits.size(1)
    here = (columns >= 0) & (columns < width)
    found = wide.gather(1, columns.clamp(0, width - 1)[:, None])[:, 0]
    highest = torch.maximum(top, wide.amax(dim=1))
    total = total * (top - highest).exp() + (wide - highest[:, None]).exp().sum(dim=1)
    return highest, total, torch.where(here, found, picked)


def _slope(logits: Tensor, columns: Tensor, normalizer: Tensor, grad: Tensor) -> Tensor:
    softmax = (logits.float() - normalizer[:, None]).exp()
    is_target = torch.arange(logits.size(1), device=logits.device)[None] == columns[:, None]
    return torch.where(is_target, grad[:, None] * (1 - softmax), -grad[:, None] * softmax).to(logits.dtype)
