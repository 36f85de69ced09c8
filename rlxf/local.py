"""``runtime=local``: the driver and every room in this process, for debuggers and breakpoints."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from rich.console import Console

from rlxf.assemble import build_actor, build_engine, build_reference, build_scorer
from rlxf.clock import Clock
from rlxf.config.schema import RunConfig
from rlxf.driver import train
from rlxf.evaluate import evaluate_only
from rlxf.platform import Platform, Process, get_platform
from rlxf.prepare import Roles, build_run, load_data, needs_scorer, with_epochs
from rlxf.reference.adapter_off import AdapterOffReference
from rlxf.reference.none import NoReference
from rlxf.report import make_report
from rlxf.resume import find_resume, is_complete, policy_source
from rlxf.run import Reference
from rlxf.run_folder import owned_checkpoints, save_config
from rlxf.stop import Stop
from rlxf.sync.push import LocalSink
from rlxf.update.actor import Actor


def launch(config: RunConfig, run_dir: Path) -> None:
    """Run the recipe in this process; what it leaves is under ``run_dir``, and in ``actor_rollout.save`` if set."""
    # megatron-core 0.16 calls collectives by names that torch 2.13 renames; remove with the next megatron-core.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    stop = Stop(interrupt=True)
    with stop.installed(), owned_checkpoints(config, run_dir):
        with stop.abandonable():
            config, data = with_epochs(config)
            resume = find_resume(config, run_dir)
            if resume is not None and is_complete(resume, config, run_dir):
                return
            data = data or load_data(config)
            save_config(config, run_dir)
            platform = get_platform(config.training.device, cpu_linear=config.training.cpu_linear)
            roles = build_roles(config, platform)
        report = make_report(config, run_dir, Console(), resume)
        try:
            run = build_run(
                config, run_dir, data, roles,
                platform=platform, report=report, clock=Clock(), stop=stop, resume=resume,
            )  # fmt: skip
            evaluate_only(run, policy_source(config, resume)) if config.training.eval_only else train(run)
            data.say_dropped()
        finally:
            report.close()


def build_roles(config: RunConfig, platform: Platform) -> Roles:
    """Every role of the recipe as one rank in this process."""
    process = Process()
    scorer = build_scorer(config, platform, process) if needs_scorer(config) else None
    engine = build_engine(config, platform) if config.samples else None
    actor = build_actor(config, platform, process)
    return Roles(
        actor=actor,
        reference=_reference(config, platform, process, actor),
        scorer=scorer,
        rollout=engine,
        sink=LocalSink(engine) if engine is not None else None,
    )


def _reference(config: RunConfig, platform: Platform, process: Process, actor: Actor) -> Reference:
    if not config.needs_reference:
        return NoReference()
    return AdapterOffReference(actor) if config.reference_is_base else build_reference(config, platform, process)
