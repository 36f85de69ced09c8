"""Bytes of real models on several processes: what each rank holds, and what its passes keep."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.assembly.roles import build_actor, load_role
from rlxf.config.schema import RunConfig
from rlxf.core.types import Examples, Sequences
from rlxf.planner.jobs import Shape, TrainJob, _train
from rlxf.platform import Process, get_platform
from rlxf.platform.cpu import CpuPlatform
from tests.kept_bytes import Kept, Live
from tests.ranks import on_ranks
from tests.settings import random_rows, run_config
from tests.tiny_models import save_causal_lm

# Sizes of a Hugging Face config, and what a recipe calls them.
SIZES = {"hidden_size": "hidden_size", "intermediate_size": "ffn_hidden_size", "vocab_size": "vocab_size"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A tiny model of four layers, and keys of actor_rollout."""

    name: str
    settings: dict[str, Any]
    kind: str = "llama"
    tied: bool = False
    stage: str = "ray_online_dpo"
    sizes: dict[str, int] = field(default_factory=dict)  # that are not those of tests/tiny_models.py

    def folder(self, root: Path) -> Path:
        """Of its model, which is made if it is not there."""
        folder = root / "-".join(map(str, (self.kind, self.tied, *self.sizes.items())))
        if not folder.exists():
            save_causal_lm(folder, self.kind, tied=self.tied, num_hidden_layers=4, **self.sizes)
        return folder

    def config(self, root: Path, world_size: int = 1) -> RunConfig:
        settings = self.settings | {"num_gpus_for_train": world_size}
        config = run_config(self.folder(root), num_layers=4, stage=self.stage, **settings)
        sizes = {SIZES[name]: size for name, size in self.sizes.items()}
        model = config.model["tiny"].model_copy(update={"untie_embeddings_and_output_weights": not self.tied} | sizes)
        return config.model_copy(update={"model": {"tiny": model}})

    def job(self, root: Path, world_size: int) -> TrainJob:
        config = self.config(root, world_size)
        return _train(config, Shape.of(config.model["tiny"], str(self.folder(root)), scores=self.stage == "rm"))


def states_on(cases: Sequence[Case], world_size: int, out: Path) -> dict[str, list[dict[str, int]]]:
    """By case: the bytes of every rank, as ``StateBytes`` names them, and ``frozen``: weights of the same model
    without training."""
    for case in cases:
        case.folder(out)
    on_ranks(_states, world_size, cases, out)
    ranks = [json.loads((out / f"{rank}.json").read_text()) for rank in range(world_size)]
    return {case.name: [rank[case.name] for rank in ranks] for case in cases}


def _states(rank: int, world_size: int, port: int, cases: Sequence[Case], out: Path) -> None:
    process = _process(rank, world_size, port)
    found = {}
    for case in cases:
        found[case.name] = _state_bytes(case, process, out)
        _forget_layout()
    (out / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _process(rank: int, world_size: int, port: int) -> Process:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    return Process(rank=rank, world_size=world_size, master_port=port)


def _forget_layout() -> None:
    """The next model of this process may have another one."""
    from megatron.core import parallel_state

    dist.barrier()
    parallel_state.destroy_model_parallel()


def _state_bytes(case: Case, process: Process, root: Path) -> dict[str, int]:
    platform = get_platform("cpu")
    actor = build_actor(case.config(root), platform, process)
    trainable = actor.trainable
    trainable.step(1e-3)
    weights = list(_weights(actor.model.chunks))
    places = {tensor.untyped_storage().data_ptr() for tensor in weights}
    optimizers = trainable.optimizer.chained_optimizers
    main = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    moments = [m for o in optimizers for state in o.optimizer.state.values() for m in state.values()]
    buffers = [buffer for chunk in trainable.chunks for buffer in chunk.buffers]
    frozen = (
        0 if case.stage == "rm" else _bytes(_weights(load_role(case.config(root), "ref", platform, process).chunks))
    )
    return {
        "weights": _bytes(weights),
        "gradients": _bytes(buffer.grad_data for buffer in buffers),
        "main": _bytes(p for p in main if p.untyped_storage().data_ptr() not in places),
        "moments": _bytes(m for m in moments if isinstance(m, Tensor)),
        "frozen": frozen,
    }


def _weights(chunks: Any) -> Iterator[Tensor]:
    from rlxf.models.megatron.nf4 import Nf4Linear

    for gpt in chunks:
        yield from (tensor for tensor in (*gpt.parameters(), *gpt.buffers()) if tensor.device.type != "meta")
        for module in gpt.modules():
            if isinstance(module, Nf4Linear):
                yield from (module._state.absmax, module._state.code)


def _bytes(tensors: Any) -> int:
    """Of the distinct pieces of memory behind tensors."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Sequences of a step, all of the same lengths."""

    count: int = 2
    prompt: int = 40
    completion: int = 60
    shared: bool = False  # all have one prompt


def kept_on(runs: Sequence[tuple[Case, Rows]], world_size: int, out: Path) -> dict[str, list[dict[str, Any]]]:
    """By case, of every rank: ``kept`` by component, and peaks: of log-probs (``forward``) and of an ``update``."""
    for case, _ in runs:
        case.folder(out)
    on_ranks(_kept, world_size, runs, out)
    ranks = [json.loads((out / f"kept{rank}.json").read_text()) for rank in range(world_size)]
    return {case.name: [rank[case.name] for rank in ranks] for case, _ in runs}


def _kept(rank: int, world_size: int, port: int, runs: Sequence[tuple[Case, Rows]], out: Path) -> None:
    process = _process(rank, world_size, port)
    found = {}
    for case, rows in runs:
        found[case.name] = _kept_bytes(case, rows, process, out)
        _forget_layout()
    (out / f"kept{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def _kept_bytes(case: Case, rows: Rows, process: Process, root: Path) -> dict[str, Any]:
    actor = build_actor(case.config(root), CpuPlatform("onednn"), process)  # the same linears on every machine
    examples = _examples(rows)
    actor.update(examples, 0)  # the optimizer's state exists from here on
    kept = Kept(actor.model.chunks)
    with kept.watching():
        actor.update(examples, 1)
    forward = _peak(lambda: actor.token_logps(examples.sequences))
    update = _peak(lambda: actor.update(examples, 2))
    return {"kept": dict(kept.most), "forward": forward, "update": update}


def _peak(compute: Callable[[], Any]) -> int:
    """Of three times, because gloo sometimes holds what it has gathered a little longer."""
    peaks = []
    for _ in range(3):
        with Live() as live:
            compute()
        peaks.append(live.most)
    return min(peaks)


def _examples(rows: Rows) -> Examples:
    generator = torch.Generator().manual_seed(0)
    prompts = random_rows(1 if rows.shared else rows.count, rows.prompt, rows.prompt + 1, generator)
    completions = random_rows(rows.count, rows.completion, rows.completion + 1, generator)
    sequences = Sequences.from_rows(prompts * rows.count if rows.shared else prompts, completions)
    return Examples(sequences=sequences, counted=torch.ones(rows.count * rows.completion, dtype=torch.bool))
