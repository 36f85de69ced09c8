"""Jobs that tests of the planner's seconds work with."""

from __future__ import annotations

from typing import Any

from rlxf.planner.jobs import EngineJob, ForwardJob, Jobs, Layout, Pass, Place, Shape, TrainJob, Work

SHAPE_1B = Shape(
    layers=16, hidden=2048, ffn=8192, heads=32, kv_heads=8, head_size=64, vocab=128256, tied=True
)  # fmt: skip
WORK = Work(prompts=128, samples=2, prompt_tokens=256.0, completion_tokens=512.0, pairs=128.0)
BUDGET = Pass(tokens=8192, rows=8192, sequences=2, budget=True)


def train_job(**changes: Any) -> TrainJob:
    values: dict[str, Any] = {
        "shape": SHAPE_1B, "layout": Layout(), "precision": "bf16", "recompute": "none", "lora": None,
        "largest": BUDGET, "share_prompts": True, "mini_batch": 32, "epochs": 1, "bucket_bytes": 2**28,
        "refers": False,
    }  # fmt: skip
    return TrainJob(**values | changes)


def engine_job(**changes: Any) -> EngineJob:
    values: dict[str, Any] = {
        "shape": SHAPE_1B, "kind": "vllm", "engines": 1, "tp": 1, "precision": "bf16", "max_length": 1024,
        "slots": None, "utilization": None, "cpu_cache_bytes": 0,
    }  # fmt: skip
    return EngineJob(**values | changes)


def forward_job(**changes: Any) -> ForwardJob:
    values: dict[str, Any] = {
        "role": "ref", "name": "ref", "shape": SHAPE_1B, "layout": Layout(), "precision": "bf16",
        "largest": BUDGET, "share_prompts": True,
    }  # fmt: skip
    return ForwardJob(**values | changes)


def jobs(*places: Place, **changes: Any) -> Jobs:
    """All four roles, on devices of their own unless ``places`` says otherwise."""
    from dataclasses import replace

    apart = tuple(Place(name=role, roles=(role,), devices=1) for role in ("train", "infer", "ref", "reward"))
    values: dict[str, Any] = {
        "train": train_job(), "engine": engine_job(), "reference": forward_job(),
        "rewards": (forward_job(role="reward", name="model", shape=replace(SHAPE_1B, scores=True)),),
        "work": WORK, "places": places or apart, "lookahead": 0, "chunks": 1, "takes_turns": False, "local": False,
    }  # fmt: skip
    return Jobs(**values | changes)
