"""The search: what it finds is a recipe, fits, and nothing that is easily tried is faster."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from rlxf.config.load import load_config
from rlxf.config.placement import make_plan
from rlxf.config.schema import RunConfig
from rlxf.placement.plan import NodeResources, assign
from rlxf.planner.device import Device
from rlxf.planner.estimate import estimate_of
from rlxf.planner.options import splits
from rlxf.planner.overrides import changed, typed
from rlxf.planner.recipe import write_recipe
from rlxf.planner.search import Found, search
from rlxf.planner.text import search_table
from tests.unit.config.recipes import compose

NAME = "online_dpo_trainer_llama32_1b"
DEVICE = Device.load("910b-64")
_ROOM = 0.95 * DEVICE.memory  # a search leaves a twentieth


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config(compose(NAME, "dry_run=true"))


@pytest.fixture(scope="module")
def found(config: RunConfig) -> list[Found]:
    return search(config, DEVICE, 8)


def test_all_that_is_found_can_be_typed_fits_and_is_estimated_as_a_recipe_is(found: list[Found]) -> None:
    assert len(found) == 5
    assert [one.estimate.pace.seconds for one in found] == sorted(one.estimate.pace.seconds for one in found)
    node = NodeResources(name="n", total={"NPU": 8}, free={"NPU": 8})
    for one in found:
        again = load_config(compose(NAME, "dry_run=true", "training.device=npu", *typed(one.overrides)))
        estimate = estimate_of(again, DEVICE)
        assert estimate.fullest.worst[1].total < _ROOM
        assert estimate.pace == one.estimate.pace
        assert estimate.jobs.num_devices <= 8
        assert assign(make_plan(again), [node]) is not None


def test_batches_and_losses_stay_those_of_the_recipe(config: RunConfig, found: list[Found]) -> None:
    actor = config.actor_rollout
    rows = actor.ppo_mini_batch_size * (actor.num_gpus_for_train // actor.devices_per_replica)
    for one in found:
        new = one.config.actor_rollout
        assert new.ppo_mini_batch_size * (new.num_gpus_for_train // new.devices_per_replica) == rows
        assert one.config.training == config.training
        assert (new.lr, new.dpo_beta, new.n_samples_per_prompt) == (
            actor.lr,
            actor.dpo_beta,
            actor.n_samples_per_prompt,
        )


def test_no_layout_of_a_brute_force_is_faster(config: RunConfig) -> None:
    best = search(config, DEVICE, 8, most=1)[0].estimate.pace.seconds
    tried = [estimate for estimate in map(_estimate, _brute(config, 8)) if estimate.fullest.worst[1].total < _ROOM]
    assert len(tried) > 100
    assert best <= min(estimate.pace.seconds for estimate in tried) * (1 + 1e-9)


def _estimate(config: RunConfig) -> Any:
    return estimate_of(config, DEVICE)


def _brute(config: RunConfig, devices: int) -> Iterator[RunConfig]:
    """Layouts of four pools, and of all on the same devices, made without the search."""
    rows = config.actor_rollout.ppo_mini_batch_size * config.actor_rollout.num_gpus_for_train
    counts = (1, 2, 4, 8)
    for train, infer, ref, reward, tp, wide, ahead in product(counts, counts, counts, counts, (1, 2), (1, 2), (0, 1)):
        together = train == infer == ref == reward == devices and not ahead
        if (not together and train + infer + ref + reward > devices) or train % tp or infer % wide:
            continue
        pool = train if together else train + infer
        made = changed(
            config,
            {
                "actor_rollout.num_gpus_for_train": train,
                "actor_rollout.num_gpus_for_infer": infer,
                "actor_rollout.tensor_model_parallel_size": tp,
                "actor_rollout.sequence_parallel": tp > 1,
                "actor_rollout.ppo_mini_batch_size": rows // (train // tp),
                "actor_rollout.inference_tensor_model_parallel_size": wide,
                "resource_pool.actor_rollout": splits(pool, 8),
                "resource_pool.ref": splits(ref, 8),
                "resource_pool.reward": splits(reward, 8),
                "resource_pool.colocate": ("train", "infer", "ref", "reward") if together else (),
                "rollout.lookahead": ahead,
                "rollout.stream_prompts": None if together else config.rollout.stream_prompts,
                "rollout.gpu_memory_utilization": None,
            },
        )
        if made is not None:
            yield made
            for recompute in ("full",):
                more = changed(made, {"actor_rollout.recompute_granularity": recompute})
                assert more is not None
                yield more


def test_more_devices_are_never_slower(config: RunConfig) -> None:
    seconds = [search(config, DEVICE, count, most=1)[0].estimate.pace.seconds for count in (4, 8, 16)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[2] < 0.6 * seconds[0]


def test_nothing_is_found_where_nothing_fits(config: RunConfig) -> None:
    small = DEVICE.with_memory(2 * 2**30)
    assert search(config, small, 8) == []
    text = search_table([], estimate_of(config, small), 8)
    assert "no layout fits into 8 devices" in text


def test_a_written_recipe_is_what_was_found(config: RunConfig, found: list[Found], tmp_path: Path) -> None:
    path = tmp_path / "best.yaml"
    write_recipe(path, NAME, {"training.seed": 7}, found[0])
    write_recipe(path, NAME, {"training.seed": 7}, found[0])  # its own file is replaced
    again = load_config(compose("best", "dry_run=true", folder=_with_recipes(path)))
    assert again.training.seed == 7
    assert estimate_of(again, DEVICE).pace == found[0].estimate.pace
    assert "Not yet run." in path.read_text()
    assert again.plan.device == "910b-64"


def _with_recipes(path: Path) -> Path:
    """A folder with the recipe and those that it begins with."""
    from rlxf.core.places import RECIPES

    for source in RECIPES.iterdir():
        target = path.parent / source.name
        if not target.exists():
            target.symlink_to(source)
    return path.parent


def test_one_device_is_enough_if_roles_share_it(config: RunConfig) -> None:
    one = search(config, DEVICE, 1, most=1)[0]
    assert one.estimate.jobs.num_devices == 1
    assert set(one.together) == {"train", "infer", "ref", "reward"}


@pytest.mark.parametrize(
    "name", ["offline_dpo_trainer_llama3_8b", "sft_trainer_llama3_8b", "online_dpo_trainer_llama3_8b_lora"]
)
def test_stages_and_adapters_without_some_of_the_roles(name: str) -> None:
    config = load_config(compose(name, "dry_run=true"))
    found = search(config, DEVICE, 8, most=2)
    assert found
    for one in found:
        assert set(one.estimate.jobs.devices) == set(estimate_of(config, DEVICE).jobs.devices)
        load_config(compose(name, "dry_run=true", *typed(one.overrides)))


def test_the_roles_of_a_cpu_have_one_memory() -> None:
    figures = {"memory_gib": 4.0, "fp32_tflops": 0.1, "bf16_tflops": 0.1, "memory_gb_per_s": 10.0}
    cpu = Device.load("cpu").with_probe(figures).with_cores(2)
    tiny = load_config(compose("online_dpo_trainer_tiny", "dry_run=true", "training.device=cpu"))
    estimate = estimate_of(tiny, cpu)
    each = [place.worst[1].total for place in estimate.memory]
    assert len(each) == 4
    assert estimate.fits == (sum(each) <= cpu.memory)
    assert {estimate.room(place) for place in estimate.memory} == {cpu.memory - sum(each)}
    for one in search(tiny, cpu, 4):
        assert sum(place.worst[1].total for place in one.estimate.memory) <= 0.95 * cpu.memory
