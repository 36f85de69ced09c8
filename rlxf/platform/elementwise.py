"""What a model computes besides products and attention: norm, rotation, gate, and the softmax of its head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Elementwise:
    """In plain torch, an operation at a time. In fp32 equal to ``transformers`` bit for bit on a CPU.

    ``rms_norm``, ``rotate`` and ``swiglu`` are differentiable; the parts of the head record no gradient and may write
    into ``logits``.
    """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """[..., H] root mean square norm (Zhang & Sennrich 2019) over the last dimension, computed in fp32."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, (x.size(-1),), weight, eps)
        return weight * F.rms_norm(x.float(), (x.size(-1),), None, eps).to(x.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[T, heads, d] turned by the angles whose ``cos`` and ``sin`` ([T, 1, d], both halves equal) are given."""
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def swiglu(self, x: Tensor) -> Tensor:
        """[..., F] from [..., 2F]: the sigmoid linear unit of the first half times the second (Shazeer 2020)."""
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    def add_logits(
        self, logits: Tensor, columns: Tensor, top: Tensor, total: Tensor, picked: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A softmax that goes on over more of the vocabulary.

        Args:
            logits: [rows, part] of this part of the vocabulary.
            columns: [rows] int64, the target's column in this part; outside of it another part holds the target.
            top: [rows] fp32, the largest logit so far.
            total: [rows] sum of ``exp(logit - top)`` so far.
            picked: [rows] the target's logit; unchanged if the target is not in this part.

        Returns:
            The three, with this part.
        """
        logits = logits.float()
        here, inside = _inside(columns, logits.size(1))
        picked = torch.where(here, logits.gather(1, inside[:, None])[:, 0], picked)
        highest = torch.maximum(top, logits.amax(dim=1))
        # What was summed under a lower maximum shrinks to the new one (online softmax).
        total = total * (top - highest).exp_() + logits.sub_(highest[:, None]).exp_().sum(dim=1)
        return highest, total, picked

    def slope(self, logits: Tensor, columns: Tensor, normalizer: Tensor, grad: Tensor) -> Tensor:
        """[rows, part] gradient of the logits, in their dtype: ``grad * (one-hot - softmax)``.

        Args:
            logits: [rows, part] of this part of the vocabulary.
            columns: [rows] int64, as above.
            normalizer: [rows] fp32 log of the whole vocabulary's sum of exponentials.
            grad: [rows] fp32 gradient of the target's log-probability.
        """
        slope = logits.float().sub_(normalizer[:, None]).exp_().mul_(-grad[:, None])
        here, inside = _inside(columns, logits.size(1))
        slope.scatter_add_(1, inside[:, None], torch.where(here, grad, 0)[:, None])
        return slope.to(logits.dtype)


def _inside(columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Which columns are in ``[0, width)``, and all of them moved to the nearest that is.

    A search for the rows (``nonzero``) would make the host wait for their number.
    """
    return (columns >= 0) & (columns < width), columns.clamp(0, width - 1)
