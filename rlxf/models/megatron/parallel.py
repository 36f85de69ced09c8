"""A role's group of processes: torch.distributed, megatron's parallel state, and this rank's place in it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.config.roles import LayoutConfig
from rlxf.core.errors import ConfigError
from rlxf.platform.base import Platform, Process

MEGATRON = "0.16.1"  # pyproject.toml asks for the same
# What megatron-core would log to. It imports them where they are installed, which takes every process half a second,
# and a process that is killed afterwards leaves two temporary folders of wandb behind.
_LOGGERS = ("wandb", "torch.utils.tensorboard")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelSizes:
    """Ranks along each axis of a role; data parallel is what remains of its processes."""

    tp: int = 1  # each layer's matrices
    pp: int = 1  # the sequence of layers
    vp: int = 1  # pieces of layers per pipeline rank, passed in turn
    cp: int = 1  # each stream of tokens
    sequence: bool = False  # norms and residuals between the matrices are cut along the tokens over tp, too

    @classmethod
    def of(cls, config: LayoutConfig) -> ParallelSizes:
        return cls(
            tp=config.tensor_model_parallel_size,
            pp=config.pipeline_model_parallel_size,
            vp=config.virtual_pipeline_model_parallel_size,
            cp=config.context_parallel_size,
            sequence=config.sequence_parallel and config.tensor_model_parallel_size > 1,
        )

    @property
    def processes(self) -> int:
        """Processes of one data-parallel replica."""
        return self.tp * self.pp * self.cp


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """This rank's place in its role: index and size of each parallel axis, and the device it works on."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    vp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    sequence_parallel: bool = False
    device: torch.device

    @property
    def stream_multiple(self) -> int:
        """A stream of tokens must divide by this: two chunks per context rank, and a share per sequence rank."""
        share = self.tp_size if self.sequence_parallel else 1
        return 2 * self.cp_size * share if self.cp_size > 1 else share

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank's weights are the ones that an export reads; all replicas hold the same."""
        return self.dp_rank == 0 and self.cp_rank == 0


@contextmanager
def _hidden(names: Iterable[str]) -> Iterator[None]:
    """Whoever imports one of these modules meanwhile is told that there is none; what is imported already stays."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: Python's own sign for that
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def require_megatron() -> None:
    """Refuse a megatron-core whose internals (its checkpoint writer, its optimizer) may differ from those used here."""
    with _hidden(_LOGGERS):
        from megatron.core import __version__ as found

    if found != MEGATRON:
        raise ConfigError(
            f"megatron-core {found} is installed; expected {MEGATRON}, whose internals write checkpoints and step the "
            f"optimizer: pip install megatron-core=={MEGATRON}"
        )


def _store(process: Process, timeout: timedelta) -> Any:
    """Where the group's ranks find each other."""
    if process.world_size == 1:  # no port that another program could take first
        return dist.HashStore()  # type: ignore[attr-defined]  # documented, but not in torch's own list
    return dist.TCPStore(  # type: ignore[attr-defined]
        process.master_addr,
        process.master_port,
        process.world_size,
        is_master=process.rank == 0,
        timeout=timeout,
        master_listen_fd=process.listen_fd,
    )


def init_parallel(platform: Platform, process: Process, *, sizes: ParallelSizes, seed: int, timeout_s: int) -> Layout:
    """Join the role's process group and lay the parallel axes over it; a second role in one process reuses them.

    Args:
        platform: the device; its megatron bridge is installed here.
        process: rank and rendezvous of this process.
        sizes: of the parallel axes; their product must divide ``process.world_size``.
        seed: of megatron's random states.
        timeout_s: longest wait in one collective call, seconds; a lost peer is noticed at the latest then.

    Raises:
        ConfigError: the sizes do not fit, or this process already works in another layout; or another megatron-core is
            installed.
    """
    platform.prepare_megatron()
    require_megatron()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if process.world_size % sizes.processes:
        raise ConfigError(
            f"tensor * pipeline * context parallel size = {sizes.tp} * {sizes.pp} * {sizes.cp} must divide the "
            f"{process.world_size} processes of its pool"
        )
    device = platform.set_device(process.local_rank)
    if not dist.is_initialized():
        dist.init_process_group(
            platform.collective_backend,
            store=_store(process, timedelta(seconds=timeout_s)),
            rank=process.rank,
            world_size=process.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tp,
            pipeline_model_parallel_size=sizes.pp,
            virtual_pipeline_model_parallel_size=sizes.vp if sizes.vp > 1 else None,
            context_parallel_size=sizes.cp,
            distributed_timeout_minutes=max(1, timeout_s // 60),
        )
        model_parallel_cuda_manual_seed(seed)
    present = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_context_parallel_world_size(),
    )
    if dist.get_world_size() != process.world_size or present != (sizes.tp, sizes.pp, sizes.vp, sizes.cp):
        raise ConfigError("roles that share one process must have the same number of processes and parallel sizes")
    return Layout(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=sizes.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=sizes.pp,
        vp_size=sizes.vp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=sizes.cp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        sequence_parallel=sizes.sequence,
        device=device,
    )


def from_last_stage(values: Tensor, layout: Layout) -> Tensor:
    """``values`` of the last pipeline stage, on every stage; the others give a tensor of the same shape and dtype."""
    if layout.pp_size > 1:
        from megatron.core import parallel_state

        last = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(values, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return values


def reduce_over_data_parallel(values: Tensor, layout: Layout, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    """``values`` summed (or reduced otherwise) over the data-parallel ranks, on the CPU.

    The sum runs on the CPU too: every platform's backend has gloo for it, and HCCL has no float64 sum.
    """
    total = values.cpu()
    if layout.dp_size > 1:
        from megatron.core import parallel_state

        dist.all_reduce(total, op=operation, group=parallel_state.get_data_parallel_group())
    return total
