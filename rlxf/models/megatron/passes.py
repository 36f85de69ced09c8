"""Forward passes, with or without backward, through all pipeline stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from rlxf.core.progress import progress
from rlxf.models.megatron.model import MegatronModel
from rlxf.models.megatron.packing import Packed
from rlxf.models.megatron.parallel import Layout, from_last_stage

T = TypeVar("T")
ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[Tensor, Callable[..., Any]]]


@torch.no_grad()
def forward_all(
    model: MegatronModel,
    batches: Sequence[Packed],
    compute: Callable[[Tensor, Packed], Tensor],
    sizes: Sequence[int],
) -> list[Tensor]:
    """Apply ``compute`` to the last stage's hidden states of each batch; every stage's rank gets the results.

    Args:
        model: this rank's share.
        batches: at least one; the same on all ranks of a data-parallel replica.
        compute: gives [size] float32.
        sizes: length of each result.
    """
    with model.evaluating():
        if model.layout.pp_size == 1:
            return [compute(model.last(packed), packed) for packed in batches]
        return _through_stages(model, batches, compute, sizes)


def _through_stages(
    model: MegatronModel,
    batches: Sequence[Packed],
    compute: Callable[[Tensor, Packed], Tensor],
    sizes: Sequence[int],
) -> list[Tensor]:
    def step(iterator: Iterator[Packed], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Tensor]]:
        packed = next(iterator)

        def collect(hidden: Tensor, non_loss_data: bool = False) -> Tensor:
            return compute(hidden, packed)

        return chunk(packed), collect

    filled = fill_up(batches, model.layout, lambda: batches[0])
    found = run_schedule(step, model.chunks, filled, model.layout, forward_only=True, collect_non_loss_data=True)
    total = torch.zeros(sum(sizes), device=model.layout.device)
    if model.layout.is_last_stage:
        total = torch.cat(found[: len(batches)])
    return list(torch.split(from_last_stage(total, model.layout), list(sizes)))


def run_schedule(
    step: ForwardStep, chunks: Sequence[torch.nn.Module], batches: Sequence[Any], layout: Layout, **options: Any
) -> list[Any]:
    """Run megatron's schedule of the layout over ``batches``: the loss functions' results on the last stage, else [].

    ``batches`` are ``Packed`` or have one as ``packed``.
    """

    def moving(*args: Any) -> Any:
        progress.tick()
        return step(*args)

    several = len(chunks) > 1
    first = batches[0] if isinstance(batches[0], Packed) else batches[0].packed
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=moving,
        data_iterator=[iter(batches) for _ in chunks] if several else iter(batches),
        model=list(chunks) if several else chunks[0],
        num_microbatches=len(batches),
        seq_length=first.num_tokens,  # read where the length is fixed; else shapes travel with the tensors
        micro_batch_size=1,
        **options,
    )
    return results


def fill_up(batches: Sequence[T], layout: Layout, filler: Callable[[], T]) -> list[T]:
    """As many batches as the schedule can handle: interleaved stages need a multiple of the pipeline size.

    ``filler``: makes what is added; called only if something is.
    """
    missing = -len(batches) % layout.pp_size if layout.vp_size > 1 else 0
    return [*batches, *([filler()] * missing if missing else [])]
