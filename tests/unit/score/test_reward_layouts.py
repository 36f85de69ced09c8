"""Every parallel layout of a reward model reads the scores where one process reads them."""

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
from torch import Tensor

from rlxf.assembly.roles import build_scorer
from rlxf.platform import Process, get_platform
from tests.ports import free_port
from tests.reward_world import KINDS, sampled, save_policy, tokenizer_of
from tests.settings import run_config
from tests.tiny_models import save_reward_model

KIND = KINDS["chatml"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "dp2": {},
}
POSITIONS = ("end_of_turn", "last_token")


def scores(folder: Path, process: Process, settings: dict[str, Any]) -> list[Tensor]:
    """By position, of both answers: by their ids and by their text; then by ids where only the short one fits."""
    config = run_config(folder / "policy", reward=folder / "rm", **settings)
    foreign = run_config(folder / "foreign", reward=folder / "rm", **settings)
    found = []
    for position in POSITIONS:
        for recipe, reverse, limit in ((config, False, 512), (foreign, True, 512), (config, False, 40)):
            reward = recipe.reward.model_copy(update={"read_at": position, "seq_length": limit})
            scorer = build_scorer(recipe.model_copy(update={"reward": reward}), get_platform("cpu"), process)
            found.append(scorer.score(sampled(KIND, tokenizer_of(KIND, reverse=reverse))))
    return found


def _child(rank: int, port: int, folder: Path, settings: dict[str, Any], out: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found = scores(folder, Process(rank=rank, world_size=2, master_port=port), settings)
    torch.save(found, out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("reward")
    save_policy(made / "policy", KIND)
    save_policy(made / "foreign", KIND, reverse=True)
    tokenizer = tokenizer_of(KIND)
    tokenizer.save_pretrained(save_reward_model(made / "rm", vocab_size=len(tokenizer)))
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Tensor]:
    return scores(folder, Process(), {})


def test_the_cases_differ(alone: list[Tensor]) -> None:
    end, end_of_text, end_short, last, *_ = alone
    torch.testing.assert_close(end, end_of_text, atol=5e-6, rtol=0)
    assert (end - last).abs().min() > 1e-3
    assert end_short.isnan().tolist() == [True, False]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_every_rank_the_scores_of_one_process(
    layout: str, folder: Path, alone: list[Tensor], tmp_path: Path
) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.get_context("forkserver").set_forkserver_preload(["tests.runs.warm"])
    arguments = (free_port(), folder, LAYOUTS[layout], tmp_path)
    mp.start_processes(_child, args=arguments, nprocs=2, start_method="forkserver")
    for rank in (0, 1):
        found: list[Tensor] = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for ours, expected in zip(found, alone, strict=True):
            torch.testing.assert_close(ours, expected, atol=5e-6, rtol=0, equal_nan=True)
