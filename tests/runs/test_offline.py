"""Offline DPO through the same driver: preference files of every kind that is documented."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data_world import write_rows
from tests.runs.small import Finished, World, run

WORDS = ("red", "green", "blue", "white", "black", "brown")


def strings() -> list[dict[str, Any]]:
    return [
        {"prompt": f"{word} or not? ", "chosen": f"yes, {word}", "rejected": f"no {i}"} for i, word in enumerate(WORDS)
    ]


def chats() -> list[dict[str, Any]]:
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in strings()
    ]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def offline(world: World, data: Path, folder: Path, **actor: Any) -> Finished:
    recipe = world.recipe(
        training={"stage": "dpo", "train_iters": 10, "global_batch_size": len(WORDS), "seq_length": 96},
        actor_rollout={"data_path": str(data), "max_prompt_length": 64, "ppo_mini_batch_size": len(WORDS), **actor},
        log={"tensorboard": False, "samples_interval": 1},
        reward={"model": None, "load": None},
    )
    return run(recipe, folder / "run")


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Finished]:
    """The run on rows of a kind in a file of a type, made once."""
    made: dict[tuple[str, str], Finished] = {}

    def get(kind: str, suffix: str) -> Finished:
        if (kind, suffix) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}_{suffix}")
            rows = strings() if kind == "strings" else chats()
            write = write_rows if suffix == "jsonl" else write_parquet
            made[kind, suffix] = offline(world, write(folder / f"pairs.{suffix}", rows), folder)
        return made[kind, suffix]

    return get


@pytest.mark.parametrize("kind", ["strings", "chats"])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_loss_falls_from_log_two(runs: Callable[[str, str], Finished], kind: str, suffix: str) -> None:
    done = runs(kind, suffix)
    assert done.losses[0] == pytest.approx(math.log(2))  # policy and reference are still the same model
    assert done.losses[-1] < 0.2
    assert done.rows[-1]["rewards/accuracies"] == 1.0


@pytest.mark.parametrize("kind", ["strings", "chats"])
def test_the_file_type_does_not_matter(runs: Callable[[str, str], Finished], kind: str) -> None:
    assert runs(kind, "jsonl").numbers == runs(kind, "parquet").numbers


def test_chats_are_other_tokens_than_strings(runs: Callable[[str, str], Finished]) -> None:
    assert runs("chats", "jsonl").rows[0]["num_tokens"] > runs("strings", "jsonl").rows[0]["num_tokens"]


def test_an_offline_run_samples_nothing_and_scores_nothing(runs: Callable[[str, str], Finished]) -> None:
    done = runs("strings", "jsonl")
    names = {name for row in done.rows for name in row}
    assert not {name for name in names if name.startswith(("rollout/", "pair/", "reward/", "response_length/"))}
    assert not (done.folder / "samples.jsonl").exists()
    assert done.rows[-1]["epoch"] == 10.0


def test_swapped_sides_teach_the_opposite(world: World, runs: Callable[[str, str], Finished], tmp_path: Path) -> None:
    rows = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in strings()]
    swapped = offline(world, write_rows(tmp_path / "pairs.jsonl", rows), tmp_path)
    right = runs("strings", "jsonl")
    assert right.rows[-1]["logps/chosen"] > right.rows[0]["logps/chosen"]
    assert swapped.rows[-1]["logps/rejected"] < swapped.rows[0]["logps/rejected"]
    assert swapped.rows[0]["logps/rejected"] == pytest.approx(right.rows[0]["logps/chosen"])
