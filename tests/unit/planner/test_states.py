"""Bytes of states by formula against the tensors of real models: equal, on the rank that holds most."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rlxf.planner.states import StateBytes, state_bytes, trained_state_bytes
from tests.planner_ranks import Case, states_on

TP2 = {"tensor_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
PP2 = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
CP2 = {"context_parallel_size": 2}
SP = {"sequence_parallel": True}
VP2 = {"virtual_pipeline_model_parallel_size": 2, "max_tokens_per_micro_batch": 160}
BF16 = {"bf16": True}
LORA: dict[str, Any] = {"lora_r": 3}
FEW = {"lora_r": 1, "lora_target_modules": ["linear_qkv", "linear_fc2"]}
ODD = {"hidden_size": 96}  # a vocabulary of 259 rows of it is no multiple of 64, let alone of a bucket's unit

# Head norms of 32 numbers leave gaps in a buffer; a vocabulary of 259 is padded.
TWO = [
    Case(name="tp2", settings=TP2, tied=True),
    Case(name="pp2-tied", settings=PP2, kind="qwen3", tied=True, sizes=ODD),
    Case(name="pp2-bf16", settings=PP2 | BF16, kind="qwen2"),
    Case(name="dp2", settings={}, kind="qwen3", sizes=ODD),
    Case(name="cp2-bf16", settings=CP2 | BF16),
    Case(name="tp2-sp-bf16", settings=TP2 | SP | BF16, kind="qwen3"),
    Case(name="lora-dp2-bf16", settings=LORA | BF16, kind="qwen2", tied=True),
    Case(name="qlora-tp2", settings=FEW | TP2 | {"qlora": True}, tied=True),
    Case(name="pp2-vp2", settings=PP2 | VP2, kind="qwen3", tied=True, sizes=ODD),
    Case(name="reward-dp2-bf16", settings=BF16, kind="qwen3", tied=True, stage="rm"),
    Case(name="reward-lora-dp2", settings=LORA, kind="qwen3", sizes=ODD, stage="rm"),
]
FOUR = [
    Case(name="tp4-two-kv-heads", settings=TP4, kind="qwen2", tied=True),
    Case(name="dp4-bf16", settings=BF16, kind="qwen3", sizes=ODD),
    Case(name="pp4", settings=PP4 | BF16),
    Case(name="pp4-lora", settings=PP4 | FEW | BF16, kind="qwen3", sizes=ODD),
    Case(name="pp2-dp2-tied", settings=PP2 | BF16, kind="qwen3", tied=True, sizes=ODD),
    Case(name="cp2-dp2", settings=CP2, kind="qwen2"),
    Case(name="tp2-pp2-vp2", settings=TP2 | PP2 | VP2 | BF16, kind="qwen3", tied=True),
    Case(name="lora-tp2-cp2", settings=LORA | TP2 | CP2 | SP | BF16, kind="qwen3", tied=True),
    Case(name="reward-pp2-dp2", settings=PP2, kind="qwen3", stage="rm"),
    Case(name="reward-lora-pp2", settings=LORA | PP2, stage="rm"),
]


def _check(cases: list[Case], root: Path, world_size: int) -> None:
    found = states_on(cases, world_size, root)
    wrong = {}
    for case in cases:
        job = case.job(root, world_size)
        ranks = [(state.pop("frozen"), StateBytes(**state)) for state in found[case.name]]
        most = max((state for _, state in ranks), key=lambda state: state.total)
        if trained_state_bytes(job) != most:
            wrong[case.name] = (asdict(trained_state_bytes(job)), asdict(most))
        frozen = max(weights for weights, _ in ranks)
        if case.stage != "rm" and state_bytes(job.shape, job.layout, job.precision).weights != frozen:
            wrong[f"{case.name}, frozen"] = (asdict(state_bytes(job.shape, job.layout, job.precision)), frozen)
    assert not wrong


def test_states_are_those_of_two_real_ranks(tmp_path: Path) -> None:
    _check(TWO, tmp_path, 2)


@pytest.mark.slow
def test_states_are_those_of_four_real_ranks(tmp_path: Path) -> None:
    _check(FOUR, tmp_path, 4)
