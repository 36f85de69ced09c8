"""QLoRA's base (Dettmers et al. 2023): a frozen parallel linear whose weight is held in 4-bit NormalFloat.

bitsandbytes does the arithmetic: the product dequantizes the weight, forward and backward, and keeps no copy. Each
block of 64 values of this rank's share has its own scale, so layouts that cut rows quantize slightly differently.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor

from rlxf.core.errors import ConfigError
from rlxf.models.megatron.weights import Entry

_LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigError(
            f"actor_rollout.qlora = true: needs bitsandbytes, which does not import ({error}); "
            "install rlxf[qlora], or set it to false"
        ) from error
    return bitsandbytes


class Nf4Linear(torch.nn.Module):
    """Replaces a column- or row-parallel linear and returns what it returns: ``(output, bias or None)``.

    ``weight`` has shape, dtype and marks of the weight that it stands for, and no storage.
    """

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.config = linear.config
        self.tp_group = linear.tp_group
        self.sequence_parallel = linear.config.sequence_parallel and self.tp_group.size() > 1
        self.skip_bias_add = linear.skip_bias_add
        self.bias = linear.bias
        weight = linear.weight
        packed, self._state = _bitsandbytes().functional.quantize_4bit(weight.data.contiguous(), quant_type="nf4")
        self.register_buffer("packed", packed, persistent=False)  # [out * in / 2, 1] uint8
        self.weight = torch.nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        set_tensor_model_parallel_attributes(self.weight, True, weight.partition_dim, weight.partition_stride)
        self._is_column = weight.partition_dim == 0

    def dequantized(self) -> Tensor:
        """[out / tp, in] or [out, in / tp]: the weight that the product uses."""
        weight: Tensor = _bitsandbytes().functional.dequantize_4bit(self.packed, self._state)
        return weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self._is_column:
            region = (
                gather_from_sequence_parallel_region if self.sequence_parallel else copy_to_tensor_model_parallel_region
            )
            product = self._product(region(x, group=self.tp_group))
        else:
            region = (
                reduce_scatter_to_sequence_parallel_region
                if self.sequence_parallel
                else reduce_from_tensor_model_parallel_region
            )
            product = region(self._product(x), group=self.tp_group)
        if self.bias is None or self.skip_bias_add:
            return product, self.bias
        return product + self.bias, None

    def _product(self, x: Tensor) -> Tensor:
        product: Tensor = _bitsandbytes().matmul_4bit(x, self.packed, self._state)
        return product


def quantize_base(gpt: Any, table: Iterable[Entry]) -> None:
    """Put the linears of all layers, loaded already, into 4 bits; embedding, head and norms stay as they are.

    Raises:
        ConfigError: bitsandbytes is missing.
    """
    for entry in table:
        place, _, kind = entry.parameter.rpartition(".")
        parent, _, name = place.rpartition(".")
        if kind == "weight" and name in _LINEARS:
            setattr(gpt.get_submodule(parent), name, Nf4Linear(gpt.get_submodule(place)))


def base_weight(linear: Any) -> Tensor:
    """This rank's share of a linear's frozen weight, written out if it is held in 4 bits."""
    weight: Tensor = linear.dequantized() if isinstance(linear, Nf4Linear) else linear.weight.detach()
    return weight
