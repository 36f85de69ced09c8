"""Train adapters on several processes, and keep what they computed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlxf.models.megatron.parallel import free_port
from rlxf.platform import Process, get_platform
from rlxf.types import Sequences
from tests.settings import random_rows

NUM_STEPS = 4


def even_sequences(seed: int) -> Sequences:
    """Rows whose packed inputs have an even number of tokens, which sequence parallelism asks for."""
    generator = torch.Generator().manual_seed(seed)
    prompts, completions = random_rows(4, 2, 12, generator), random_rows(4, 3, 30, generator)
    if sum(len(row) - 1 for row in (*prompts, *completions)) % 2:
        completions[0].pop()
    return Sequences.from_rows(prompts, completions)


def train(rank: int, world_size: int, port: int, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Losses, gradient norms and final adapters of a few steps of maximum likelihood on this rank."""
    get_platform("cpu").prepare_megatron()
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    from rlxf.config.schema import ActorConfig
    from rlxf.models.megatron import model as megatron_model
    from rlxf.models.megatron.checkpoint import load, save
    from rlxf.models.megatron.lora import seed_dropout
    from rlxf.models.megatron.optimizer import TrainableModel
    from rlxf.models.megatron.packing import pack_for_logps
    from tests.lora_model import adapted_model, adapter_tensors, merged_tensors

    is_split = settings.pop("sequence_parallel", False)
    start, checkpoint = settings.pop("start", None), settings.pop("checkpoint", None)
    steps = settings.pop("steps", range(NUM_STEPS))
    build = megatron_model.transformer_config
    megatron_model.transformer_config = lambda *a, **k: replace(build(*a, **k), sequence_parallel=is_split)  # type: ignore[assignment]
    process = Process(rank=rank, world_size=world_size, master_port=port)
    model = adapted_model(folder, process, tensor_model_parallel_size=world_size, **settings)
    trainable = TrainableModel(model, ActorConfig(model="tiny", lr=1e-2, adam_eps=1e-3, clip_grad=0.5))

    def forward(batches: Any, ddp: Any) -> Any:
        packed = pack_for_logps(next(batches), torch.device("cpu"))
        hidden = ddp(packed)
        if is_split and world_size > 1:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        values = -model.logps(hidden, packed)
        count = torch.tensor(len(values), dtype=torch.int)
        return values, lambda losses: (losses.sum(), count, float(losses.detach().sum()) / len(losses))

    losses, norms = [], []
    if start:
        with checkpointing_adapters(trainable, model):
            load(Path(start), trainable)
    for step in steps:
        seed_dropout(1, step)
        losses.append(trainable.accumulate(forward, [even_sequences(1), even_sequences(2)]))
        norms.append(trainable.step(1e-2))
    if checkpoint:
        with checkpointing_adapters(trainable, model):
            save(Path(checkpoint), trainable)
    return {
        "losses": losses,
        "norms": norms,
        "adapters": adapter_tensors(model),
        "merged": merged_tensors(model),
        "local": {name: p.detach().clone() for name, p in model.gpt.named_parameters() if p.requires_grad},
    }


@contextmanager
def checkpointing_adapters(trainable: Any, model: Any) -> Iterator[None]:
    """The checkpoint takes the adapters for the whole model."""
    from rlxf.models.megatron.lora import sharded_adapters

    gpt = trainable.ddp.module
    load_state_dict = gpt.load_state_dict
    gpt.sharded_state_dict = lambda metadata: sharded_adapters(gpt, model.table)
    gpt.load_state_dict = lambda state: load_state_dict(state, strict=False)
    yield
    del gpt.sharded_state_dict, gpt.load_state_dict


def _child(rank: int, world_size: int, port: int, folder: Path, settings: dict[str, Any], out: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.save(train(rank, world_size, port, folder, settings), out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def train_on(world_size: int, folder: Path, out: Path, **settings: Any) -> list[dict[str, Any]]:
    """What each rank of fresh processes computed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    out.mkdir()
    args = (world_size, free_port(), folder, settings, out)
    mp.start_processes(_child, args=args, nprocs=world_size, start_method="spawn")
    return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(world_size)]
