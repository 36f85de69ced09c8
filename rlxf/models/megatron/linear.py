"""Megatron's parallel linear layers with the product of the platform; parameters, names and checkpoints are Megatron's.

Only the product is replaced: splitting, gathering and the sum over ranks stay in Megatron's ``forward``.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from rlxf.platform.base import Platform
from rlxf.platform.linear import Linear


class PlatformColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
    """``ColumnParallelLinear`` whose three products are the platform's.

    Under sequence parallelism the gathered input is kept for the backward pass, where Megatron gathers it again.
    """

    def __init__(self, *args: Any, linear: Linear, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._linear = linear

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup,
        **_: Any,  # fusions and deferrals of accelerators
    ) -> Tensor:
        if sequence_parallel:  # backward: reduce-scatter
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        return self._linear(input, weight, bias)


class PlatformRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    """``RowParallelLinear`` whose three products are the platform's."""

    def __init__(self, *args: Any, linear: Linear, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._linear = linear

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        return self._linear(input, weight, bias)  # the caller reduces or scatters the partial sums


def column_parallel(platform: Platform) -> type[ColumnParallelLinear] | ModuleSpec:
    """What a layer spec names for ``linear_qkv`` and ``linear_fc1``."""
    return _spec(platform, ColumnParallelLinear, PlatformColumnParallelLinear)


def row_parallel(platform: Platform) -> type[RowParallelLinear] | ModuleSpec:
    """What a layer spec names for ``linear_proj`` and ``linear_fc2``."""
    return _spec(platform, RowParallelLinear, PlatformRowParallelLinear)


def _spec(platform: Platform, megatron: Any, ours: Any) -> Any:
    # Megatron's own layers overlap communication with products; they stay wherever torch's product is used.
    if type(platform.linear) is Linear:
        return megatron
    return ModuleSpec(module=ours, params={"linear": platform.linear})
