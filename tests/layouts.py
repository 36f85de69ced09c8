"""Run the product's actor, reference and reward model on several processes, and keep what they computed.

A server process imports torch and megatron once and forks the ranks, which saves each of them ten seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.assembly.roles import build_actor, build_reference, load_role
from rlxf.config.schema import RunConfig
from rlxf.core.types import Batch, ReferencedPairs
from rlxf.loop.run import Reference
from rlxf.models.backend import sequence_scores
from rlxf.models.batching import MicroBatchLimits
from rlxf.platform import Process, get_platform
from rlxf.reference.adapter_off import AdapterOffReference
from rlxf.reference.none import NoReference
from rlxf.update.actor import MegatronActor
from tests.ranks import on_ranks
from tests.settings import random_examples, random_pairs, random_reward_pairs, run_config

NUM_STEPS = 3
NUM_PAIRS = 7  # odd on purpose: no size divides it


def train(folder: Path, reward: Path | None, process: Process, settings: dict[str, Any]) -> dict[str, Any]:
    """Metrics, evaluation, log-probs, scores and weights of a few steps, on this rank; weights on rank 0 only.

    ``settings`` are those of ``run_config``, and ``steps``, ``start`` and ``checkpoint``: folders to go on from and to
    leave behind.
    """
    steps, start, checkpoint = (settings.get(key) for key in ("steps", "start", "checkpoint"))
    settings = {key: value for key, value in settings.items() if key not in ("steps", "start", "checkpoint")}
    config = run_config(folder, reward=reward, **settings)
    platform = get_platform("cpu")
    actor = build_actor(config, platform, process)
    make = _batches(config, actor, process)
    metrics = []
    if start:
        actor.load_checkpoint(Path(start))
    for step in steps or range(NUM_STEPS):
        metrics.append(actor.update(make(step), step))
    if checkpoint:
        actor.save_checkpoint(Path(checkpoint))
    names = [name for name, _ in actor.model.exported_shapes()]
    rows = random_pairs(5, seed=9).chosen
    scores, logps = torch.zeros(0), torch.zeros(0)
    if actor.model.reward:
        scores = sequence_scores(actor.model, rows, MicroBatchLimits.of(config.actor_rollout))
    else:
        logps = actor.token_logps(rows)
    if reward is not None:
        scores = sequence_scores(
            load_role(config, "reward", platform, process), rows, MicroBatchLimits.of(config.reward)
        )
    return {
        "metrics": metrics,
        "evaluation": actor.evaluate(make(NUM_STEPS)),
        "logps": logps,
        "scores": scores,
        "weights": {name: value.clone() for name, value in actor.model.export(names)},
        "adapters": {name: value.detach().clone() for name, value in _export_adapters(actor)},
    }


def _batches(config: RunConfig, actor: MegatronActor, process: Process) -> Callable[[int], Batch]:
    """What the stage of ``config`` trains on in a step; the same on every rank."""
    stage = config.training.stage
    if stage == "sft":
        return lambda step: random_examples(NUM_PAIRS, seed=step)
    if stage == "rm":
        return lambda step: random_reward_pairs(NUM_PAIRS, seed=step)
    reference: Reference = NoReference()
    if config.reference_is_base:
        reference = AdapterOffReference(actor)
    elif config.needs_reference:
        reference = build_reference(config, get_platform("cpu"), process)

    def referenced_pairs(step: int) -> ReferencedPairs:
        pairs = random_pairs(NUM_PAIRS, seed=step)
        return ReferencedPairs(pairs=pairs, reference=reference.logps(pairs))

    return referenced_pairs


def _export_adapters(actor: MegatronActor) -> Iterator[tuple[str, Tensor]]:
    from rlxf.models.megatron.adapters import export_adapters

    return export_adapters(actor.model)


def _child(
    rank: int, world_size: int, port: int, folder: Path, reward: Path | None, settings: dict[str, Any], out: Path
) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    process = Process(rank=rank, world_size=world_size, master_port=port)
    result = train(folder, reward, process, settings)
    if rank == 0:
        torch.save(result, out)
    dist.barrier()
    dist.destroy_process_group()


def train_on(
    folder: Path, world_size: int, out: Path, *, reward: Path | None = None, **settings: Any
) -> dict[str, Any]:
    """What rank 0 of ``world_size`` fresh processes computed."""
    on_ranks(_child, world_size, folder, reward, settings, out)
    loaded: dict[str, Any] = torch.load(out, weights_only=True)
    return loaded
