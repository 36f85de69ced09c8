"""``runtime=local``: the driver and every room in this process, for debuggers and breakpoints."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from rlxf.assembly.build_run import Roles
from rlxf.assembly.judge import open_function_judge
from rlxf.assembly.rewards import open_readers
from rlxf.assembly.roles import build_actor, build_engine, build_models, build_reference
from rlxf.assembly.start import clocked, prepared, run_prepared
from rlxf.config.schema import RunConfig
from rlxf.core.command import Typed
from rlxf.core.garbage import searched_seldom
from rlxf.core.stop import Stop
from rlxf.loop.run import Reference
from rlxf.platform import Platform, Process, get_platform
from rlxf.reference.adapter_off import AdapterOffReference
from rlxf.reference.none import NoReference
from rlxf.rollout.one_engine import OneEngine
from rlxf.schedule import OneAfterTheOther
from rlxf.sync.push import LocalSink
from rlxf.update.actor import MegatronActor


def launch(config: RunConfig, run_dir: Path, typed: Typed | None = None) -> None:
    """Run the recipe in this process; what it leaves is under ``run_dir``, and in ``actor_rollout.save`` if set.

    ``typed``: the command, for messages.
    """
    # megatron-core 0.16 calls collectives by names that torch 2.13 renames; remove with the next megatron-core.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    stop = Stop(grace_s=config.training.stop_grace_s, interrupt=True)
    with prepared(config, run_dir, stop, typed) as found:
        if found is None:
            return
        with (
            open_readers(found.config, stop) as readers,
            open_function_judge(found.config, stop) as judge,
            clocked(found, role_rows=True) as clock,
        ):
            with stop.interruptible(), searched_seldom():
                platform = get_platform(config.training.device, cpu_linear=config.training.cpu_linear)
                roles = replace(build_roles(found.config, platform), readers=readers, judge=judge)
            run_prepared(found, roles, platform=platform, clock=clock, stop=stop, lanes=OneAfterTheOther())


def build_roles(config: RunConfig, platform: Platform) -> Roles:
    """Every role of the recipe as one rank in this process."""
    process = Process()
    models = build_models(config, platform, process)
    engine = build_engine(config, platform) if config.samples else None
    actor = build_actor(config, platform, process)
    return Roles(
        actor=actor,
        reference=_reference(config, platform, process, actor),
        models=models,
        rollout=OneEngine(engine) if engine is not None else None,
        sink=LocalSink(actor, engine, platform=platform, loaded_alike=True) if engine is not None else None,
    )


def _reference(config: RunConfig, platform: Platform, process: Process, actor: MegatronActor) -> Reference:
    if not config.needs_reference:
        return NoReference()
    return AdapterOffReference(actor) if config.reference_is_base else build_reference(config, platform, process)
