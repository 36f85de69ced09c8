"""The parts of device.py that are whole runs: on Ray with all roles on one device, after faults, resumed, with LoRA."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import random_world
from benchmarks.device_numbers import Bench, Job, run_recipe, started, tiny_arguments
from rlxf.observe.formulas import read_jsonl
from tests.cluster.faults import Fault
from tests.runs.small import CLOCKED

Row = dict[str, Any]

STEPS = 6
COMMON = (
    *(f"training.train_iters={STEPS}", "rollout.engine=hf", "log.rollouts=true", "log.report=false"),
    *("log.tensorboard=false", "training.save_interval=3", "resilience.max_recoveries=20"),
)
ONE_DEVICE = (
    *("runtime=ray", "resource_pool.colocate=[train,infer,ref,reward]"),
    *("resource_pool.actor_rollout=1", "resource_pool.ref=1", "resource_pool.reward=1"),
)
PROCESSES = 4  # of a run on Ray: those of the roles; the driver waits for them
LOST = {
    "engine, sampling": Fault(role="infer", method="generate", call=2),
    "engine, in a push": Fault(role="infer", method="receive", call=3),
    "trainer, in an update": Fault(role="train", method="update", call=5),
}


def colocated(bench: Bench) -> dict[str, Any]:
    """Through Ray by each transport that one device has, beside one process; then with a lost engine and trainer."""
    name = bench.platform.name
    begins: dict[str, Callable[[], Job]] = {"one process": partial(run_recipe, bench, "alone", name, COMMON)}
    ways = ("auto", "shared_memory", "object_store", *(() if bench.is_cpu else ("ipc",)))
    for way in ways[:1] if bench.small else ways:
        options = (*COMMON, *ONE_DEVICE, f"sync.transport={way}")
        begins[way] = partial(run_recipe, bench, f"ray {way}", name, options)
    lost = dict([*LOST.items()][-1:]) if bench.small else LOST
    for case, fault in lost.items():
        begins[case] = partial(faulty, bench, case, (*COMMON, *ONE_DEVICE), fault)
    found: dict[str, Any] = {}
    rows = finished(begins, found, processes=PROCESSES)
    alone, expected = bench.scratch / "alone", rows.pop("one process")
    for case, (folder, own) in rows.items():
        if own and expected[1]:
            found[case] |= compared(own, expected[1])
            found[case]["same_completions"] = completions(folder) == completions(alone)
            found[case] |= {name: own[-1][name] for name in own[-1] if name.startswith(("sync/", "memory/"))}
        if case in lost:
            found[case]["faults"] = len(list(plan_of(bench, case).glob("*.done")))
    return found


def variants(bench: Bench) -> dict[str, Any]:
    """In one process on the device and on the CPU: sampling ahead, LoRA, QLoRA, fp16, bf16, a resumed run."""
    lora = ("actor_rollout.lora_r=16", "actor_rollout.lora_alpha=32", "resource_pool.ref=null")
    cases: dict[str, tuple[str, ...]] = {
        "as it is": (),
        "lookahead 1": ("rollout.lookahead=1",),
        "streamed": ("rollout.stream_prompts=4",),
        "moving reference": ("ref.ref_update_interval=2",),
        "lora": lora,
        "qlora": (*lora, "actor_rollout.qlora=true", "actor_rollout.bf16=true"),
        "fp16": ("actor_rollout.fp16=true", "actor_rollout.initial_loss_scale=1024"),
        "bf16": ("actor_rollout.bf16=true",),
    }
    if bench.small:
        cases = {case: cases[case] for case in ("as it is", "lora", "fp16")}
    found: dict[str, Any] = {}
    devices = tuple(dict.fromkeys((bench.platform.name, "cpu")))
    begins = {
        f"{case}, {device}": partial(run_recipe, bench, f"{case} {device}", device, (*COMMON, *options))
        for case, options in cases.items()
        for device in devices
    }
    rows = finished(begins, found, processes=1)
    for case in cases:
        there, here = (rows[f"{case}, {device}"][1] for device in (bench.platform.name, "cpu"))
        if there and here:
            found[case] = compared(there, here, "loss", "grad_norm", "response_length/mean")
    whole, expected = rows[f"as it is, {bench.platform.name}"]
    if expected:
        found["resumed"] = resumed(bench, whole, expected)
    return found


def resumed(bench: Bench, whole: Path, expected: Sequence[Row]) -> dict[str, Any]:
    """A run that goes on from the checkpoint of the third step of a run, beside the run itself: both on the device."""
    checkpoint = whole / "checkpoints" / "iter_0000003"
    options = (*COMMON, f"training.resume={checkpoint}")
    found: dict[str, Any] = {}
    rows = ended(run_recipe(bench, "again", bench.platform.name, options), found, "again")
    return compared(rows, expected[3:]) if rows else found


def large(bench: Bench) -> dict[str, Any]:
    """Steps at 1B in bf16 through Ray, all roles on one device: seconds of a push and of each phase, and memory."""
    shape = bench.shape("1b")
    world = random_world.build(
        bench.scratch / "large", shape, num_prompts=64, dtype=torch.bfloat16, device=bench.device
    )
    recipe = bench.scratch / "large.yaml"
    recipe.write_text(json.dumps(large_recipe(world, bench)))
    found: dict[str, Any] = {}
    bench.platform.empty_cache()  # the run's processes need it
    for transport in ("auto", "shared_memory"):
        folder = bench.scratch / f"large_{transport}"
        options = (f"hydra.run.dir={folder}", f"sync.transport={transport}")
        arguments = ["ray_gpt.py", "--config-dir", str(recipe.parent), "--config-name", "large", *options]
        rows = ended((started(arguments, bench.platform.name), folder), found, transport)
        shutil.rmtree(folder, ignore_errors=True)
        if rows:
            shown = ("sync/", "memory/", "timing/", "rollout/logp_diff", "loss")
            found[transport] |= {name: rows[-1][name] for name in rows[-1] if name.startswith(shown)}
            found[transport]["push_s"] = [row.get("sync/seconds") for row in rows]
    return found


def large_recipe(world: random_world.World, bench: Bench) -> dict[str, Any]:
    role = {"model": "large", "load": str(world.policy), "max_tokens_per_micro_batch": 8192}
    return {
        "defaults": ["rlxf_schema", "_self_"],
        "model": {"large": world.shape.section() | {"untie_embeddings_and_output_weights": False}},
        "training": {
            "stage": "ray_online_dpo", "device": bench.platform.name, "global_batch_size": 16, "train_iters": 4,
            "seq_length": 256, "save_interval": 0, "save_every_minutes": 0, "bf16": not bench.is_cpu,
        },
        "actor_rollout": role | {
            "data_path": str(world.prompts), "max_prompt_length": 128, "max_new_tokens": 16, "ppo_mini_batch_size": 16,
            "lr": 1e-6,
        },
        "ref": role,
        "reward": role | {"load": str(world.reward)},
        "rollout": {"engine": "hf"},
        "resource_pool": {"actor_rollout": 1, "ref": 1, "reward": 1, "colocate": ["train", "infer", "ref", "reward"]},
        "log": {"tensorboard": False, "report": False},
    }  # fmt: skip


def faulty(bench: Bench, case: str, options: Sequence[str], fault: Fault) -> Job:
    """A run of the quick start's recipe whose worker meets a fault."""
    folder, plan = bench.scratch / case.replace(" ", "_").replace(",", ""), plan_of(bench, case)
    plan.mkdir()
    (plan / "plan.json").write_text(json.dumps([asdict(fault)]))
    (plan / "metrics.jsonl").symlink_to(folder / "metrics.jsonl")
    arguments = tiny_arguments(folder, bench.platform.name, options)
    return started(["-m", "tests.cluster.faults", str(plan / "plan.json"), *arguments], bench.platform.name), folder


def plan_of(bench: Bench, case: str) -> Path:
    """The folder of the faults of that run."""
    return bench.scratch / f"plan_{case.replace(' ', '_').replace(',', '')}"


def finished(
    begins: Mapping[str, Callable[[], Job]], found: dict[str, Any], *, processes: int
) -> dict[str, tuple[Path, list[Row]]]:
    """Folder and rows of each run; as many at a time as there are cores for their ``processes``."""
    at_once, cases, rows = max(1, (os.cpu_count() or 1) // processes), list(begins), {}
    for first in range(0, len(cases), at_once):
        jobs = {case: begins[case]() for case in cases[first : first + at_once]}
        rows |= {case: (job[1], ended(job, found, case)) for case, job in jobs.items()}
    return rows


def ended(job: Job, found: dict[str, Any], case: str) -> list[Row]:
    """The rows of a run's steps, empty if it failed; how it ended is in ``found[case]``."""
    process, folder = job
    said, _ = process.communicate()
    if process.returncode:
        found[case] = {"FAILED": said[-2500:]}
        print(f"--- {case}\n{said[-2500:]}", flush=True)
        return []
    rows = read_jsonl(folder / "metrics.jsonl")
    found[case] = {"s_per_step": rows[-1].get("timing/all"), "last_loss": rows[-1]["loss"]}
    shown = {
        name: value for name, value in rows[-1].items() if name.startswith(("loss", "sync/", "memory/", "timing/"))
    }
    print(f"[{case}] {shown}", flush=True)  # also if a later run takes longer than the part may
    return rows


def compared(rows: Sequence[Row], expected: Sequence[Row], *names: str) -> dict[str, Any]:
    """How far two runs' numbers are apart; ``names``: these only, else all that no clock measured."""
    apart: dict[str, float] = {}
    for row, other in zip(rows, expected, strict=True):
        for name in names or row.keys() & other.keys():
            if not name.startswith(CLOCKED) and isinstance(row.get(name), float | int):
                apart[name] = max(apart.get(name, 0.0), abs(row[name] - other[name]))
    worst = max(apart, key=lambda name: apart[name])
    return {"loss_apart": apart["loss"], "most_apart": worst, "by": apart[worst]}


def completions(folder: Path) -> list[list[int]]:
    """The tokens of all completions, in their order; log-probs differ in their last bits between runs on a GPU."""
    prompts = read_jsonl(folder / "rollouts.jsonl")
    return [completion["token_ids"] for prompt in prompts for completion in prompt["completions"]]


PARTS: Mapping[str, Callable[[Bench], dict[str, Any]]] = {
    "colocated": colocated,
    "variants": variants,
    "large": large,
}
