"""A reference that moves on several processes: the weights of one process, bit for bit, saved, loaded and moved on."""

from __future__ import annotations

import multiprocessing
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rlxf.assembly.roles import build_reference
from rlxf.models.hf_folder import HfWeights
from rlxf.platform import Process, get_platform
from rlxf.reference.frozen import FrozenReference
from rlxf.sync.plan import TensorSpec, plan_buckets
from tests.ports import free_port
from tests.settings import run_config
from tests.tiny_models import save_causal_lm

SPLIT = {"tp2": {"tensor_model_parallel_size": 2}, "pp2": {"pipeline_model_parallel_size": 2}}


def moved(folder: Path, policy: Path, out: Path, process: Process, layout: dict[str, Any]) -> None:
    """Three small moves; the weights are written after two, and after the third of a reference that loaded those."""
    config = run_config(folder, bf16=True, **layout)
    config = config.model_copy(update={"ref": config.ref.model_copy(update={"ref_update_interval": 1})})
    weights = HfWeights(policy)
    specs = [TensorSpec(name, weights.shape(name), "bfloat16") for name in sorted(weights.names())]
    buckets = plan_buckets(specs, 2**17)

    def move(reference: FrozenReference) -> None:
        for bucket in buckets:
            payload = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
            for name, view in bucket.views(payload):
                view.copy_(weights.read(name))
            reference.mix(bucket, payload, 1e-3)

    first, second = (build_reference(config, get_platform("cpu"), process) for _ in range(2))
    move(first)
    move(first)
    first.save(out / "two")
    second.load(out / "two")
    move(second)
    second.save(out / "three")


def _child(rank: int, port: int, folder: Path, policy: Path, out: Path, layout: dict[str, Any]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    moved(folder, policy, out, Process(rank=rank, world_size=2, master_port=port), layout)
    dist.destroy_process_group()


@pytest.mark.parametrize("name", SPLIT)
def test_every_layout_moves_as_one_process(tmp_path: Path, name: str) -> None:
    folder = save_causal_lm(tmp_path / "model", "qwen2", tied=name == "pp2")
    policy = save_causal_lm(tmp_path / "policy", "qwen2", tied=name == "pp2", seed=9)
    moved(folder, policy, tmp_path / "one", Process(), {})
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.runs.warm"])
    arguments = (free_port(), folder, policy, tmp_path / "split", SPLIT[name])
    mp.start_processes(_child, args=arguments, nprocs=2, start_method="forkserver")
    start = HfWeights(folder)
    for step in ("two", "three"):
        one, split = HfWeights(tmp_path / "one" / step), HfWeights(tmp_path / "split" / step)
        assert one.names() == split.names() == start.names()
        for tensor in one.names():
            assert one.read(tensor).dtype == torch.float32
            assert torch.equal(one.read(tensor), split.read(tensor)), tensor
            assert not torch.equal(one.read(tensor), start.read(tensor)), tensor
