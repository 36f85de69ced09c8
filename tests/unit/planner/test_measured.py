"""What the rows of a run say about speed, and how a plan compares with them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlxf.config.load import load_config
from rlxf.planner.device import Device
from rlxf.planner.jobs import Jobs, Place, jobs_of
from rlxf.planner.measured import (
    Row,
    StepWork,
    busy,
    compare,
    median_seconds,
    planned_seconds,
    speeds,
    work_of_row,
)
from rlxf.planner.names import fitting_device
from rlxf.planner.time import stages_of
from tests.unit.config.recipes import compose

DEVICE = Device.load("h100-80")
PROMPT, COMPLETION = 300.0, 100.0


def jobs(name: str = "online_dpo_trainer_llama32_1b", *changes: str) -> Jobs:
    return jobs_of(load_config(compose(name, "dry_run=true", "training.device=cuda", *changes)))


ONLINE = jobs("online_dpo_trainer_llama32_1b", "actor_rollout.ppo_epochs=2")


def row_of(**changes: float) -> dict[str, float]:
    """A step that kept a pair of every second prompt."""
    completions = ONLINE.work.completions
    return {
        "timing/gen": 4.0, "timing/adv": 2.0, "timing/ref": 1.0, "timing/update_actor": 5.0, "timing/sync": 0.5,
        "rollout/tokens_per_s": completions * COMPLETION / 4.0, "rollout/longest_over_mean": 3.0,
        "prompt_length/mean": PROMPT, "response_length/mean": COMPLETION, "pair/kept": ONLINE.work.prompts / 2,
        **changes,
    }  # fmt: skip


def worked(row: Row, new_tokens: float, jobs: Jobs = ONLINE) -> StepWork:
    work = work_of_row(jobs, row, new_tokens)
    assert work is not None
    return work


PAIRS = ONLINE.work.prompts / 2
TRAINED = PAIRS * 2 * (PROMPT + 120) * ONLINE.train.epochs  # the completions of pairs are longer than the others


def test_a_row_says_what_its_step_worked_on() -> None:
    work = worked(row_of(), TRAINED)
    assert (work.sampled.prompts, work.sampled.samples) == (ONLINE.work.prompts, ONLINE.work.samples)
    assert (work.sampled.prompt_tokens, work.sampled.completion_tokens) == (PROMPT, COMPLETION)
    assert (work.sampled.longest, work.sampled.pairs) == (3.0, PAIRS)
    assert work.trained == replace(work.sampled, completion_tokens=120.0)


def test_tokens_and_operations_per_second_are_those_of_the_stage() -> None:
    work = worked(row_of(), TRAINED)
    stages = work.stages(ONLINE, DEVICE)
    found = speeds(ONLINE, row_of(), work, stages, DEVICE)
    completions = ONLINE.work.completions
    assert found["speed/gen_tokens_per_s"] == pytest.approx(completions * COMPLETION / 4)
    assert found["speed/adv_tokens_per_s"] == pytest.approx(completions * (PROMPT + COMPLETION) / 2)
    assert found["speed/ref_tokens_per_s"] == pytest.approx(PAIRS * 2 * (PROMPT + 120) / 1)
    assert found["speed/update_actor_tokens_per_s"] == pytest.approx(TRAINED / 5)
    trained = stages_of(ONLINE, DEVICE, work.trained)["update_actor"]
    peak = 989e12
    assert found["speed/update_actor_mfu"] == pytest.approx(trained.flops / 5 / trained.devices / peak)
    assert found["speed/gen_mfu"] == pytest.approx(stages["gen"].flops / 4 / stages["gen"].devices / peak)
    assert stages["update_actor"] != stages_of(ONLINE, DEVICE, work.sampled)["update_actor"]
    halved = speeds(ONLINE, row_of(), work, stages, DEVICE, cores=2)
    assert halved["speed/gen_mfu"] == pytest.approx(found["speed/gen_mfu"] / 2)
    assert not [name for name in speeds(ONLINE, row_of(), work, stages, None) if name.endswith("_mfu")]


def test_an_mfu_is_the_work_over_the_time_and_not_above_what_the_plan_reaches() -> None:
    """A step that took exactly as long as planned has no more than the share of the peak that the plan assumes."""
    work = worked(row_of(), TRAINED)
    stages = work.stages(ONLINE, DEVICE)
    row = row_of(**{f"timing/{name}": stage.seconds for name, stage in stages.items()})
    found = speeds(ONLINE, row, work, stages, DEVICE)
    assert 0.01 < found["speed/update_actor_mfu"] <= DEVICE.train_share
    assert 0.01 < found["speed/ref_mfu"] <= DEVICE.forward_share


def test_a_step_without_a_pair_has_sampled_and_scored_only() -> None:
    row = {name: value for name, value in row_of().items() if name not in ("timing/ref", "timing/update_actor")}
    work = worked(row | {"pair/kept": 0.0}, 0.0)
    assert work.trained is None
    assert set(work.tokens) == {"gen", "adv"}
    assert set(work.stages(ONLINE, DEVICE)) == {"gen", "adv", "sync"}


def test_a_row_that_an_earlier_process_still_owed_says_nothing() -> None:
    assert work_of_row(ONLINE, {"timing/eval": 0.0, "timing/all": 0.1, "response_length/mean": 8.0}, 0.0) is None


@pytest.mark.parametrize(
    ("name", "sides", "stages"),
    [
        ("offline_dpo_trainer_llama3_8b", 2, {"ref", "update_actor"}),
        ("reward_trainer_llama3_8b", 2, {"update_actor"}),
        ("sft_trainer_llama3_8b", 1, {"update_actor"}),
    ],
)
def test_offline_rows_share_their_tokens_as_the_plan_does(name: str, sides: int, stages: set[str]) -> None:
    offline = jobs(name)
    rows = offline.work.prompts
    row = {"timing/ref": 1.0, "timing/update_actor": 2.0}
    work = worked(row, offline.train.epochs * rows * sides * 200.0, offline)
    assert work.trained is not None
    assert work.trained.prompt_tokens + work.trained.completion_tokens == pytest.approx(200)
    assert work.trained.prompt_tokens / work.trained.completion_tokens == pytest.approx(
        offline.work.prompt_tokens / offline.work.completion_tokens
    )
    assert set(work.tokens) == stages == set(work.stages(offline, DEVICE))
    found = speeds(offline, row, work, work.stages(offline, DEVICE), DEVICE)
    assert found["speed/update_actor_tokens_per_s"] == pytest.approx(offline.train.epochs * rows * sides * 200 / 2)


IDLE = {"timing/idle_train": 0.5, "timing/idle_infer": 0.25, "timing/idle_ref": 0.9, "timing/idle_reward": 0.6}


def test_device_seconds_are_weighted_by_the_devices_of_each_pool() -> None:
    places = (
        Place(name="actor_rollout", roles=("train",), devices=6),
        Place(name="actor_rollout", roles=("infer",), devices=2),
        Place(name="ref+reward", roles=("ref", "reward"), devices=4),
    )
    found = busy(replace(ONLINE, places=places, local=False), IDLE)
    assert found["speed/busy_actor_rollout"] == pytest.approx((6 * 0.5 + 2 * 0.75) / 8)
    assert found["speed/busy_ref_reward"] == pytest.approx(0.1 + 0.4)
    assert found["speed/busy"] == pytest.approx((6 * 0.5 + 2 * 0.75 + 4 * 0.5) / 12)


def test_roles_on_the_same_devices_are_never_busier_than_all_the_time() -> None:
    places = (Place(name="actor_rollout", roles=("train", "infer", "reward"), devices=8),)
    found = busy(replace(ONLINE, places=places, local=False), IDLE)
    assert found == {"speed/busy": 1.0, "speed/busy_actor_rollout": 1.0}


def test_one_process_is_one_device() -> None:
    row = {"timing/idle_train": 0.7, "timing/idle_infer": 0.8}
    assert busy(replace(ONLINE, local=True), row) == {"speed/busy": pytest.approx(0.5)}
    assert busy(replace(ONLINE, local=True), {}) == {}


def test_medians_of_rows_stand_against_the_plan_of_their_own_lengths() -> None:
    works = [worked(row_of(), TRAINED), worked(row_of(**{"response_length/mean": 2 * COMPLETION}), 2 * TRAINED)]
    planned = planned_seconds(ONLINE, DEVICE, works)
    each = [work.stages(ONLINE, DEVICE)["gen"].seconds for work in works]
    assert planned["gen"] == pytest.approx(sum(each) / 2)
    measured = median_seconds([row_of(), row_of(**{"timing/gen": 8.0, "timing/sync": 0.0})])
    assert measured == {"gen": 6.0, "adv": 2.0, "ref": 1.0, "update_actor": 5.0, "sync": 0.5}
    found = compare(planned, measured)
    assert found["gen"].ratio == pytest.approx(planned["gen"] / 6)
    assert set(compare(planned, {"gen": 6.0, "ref": 0.0})) == {"gen"}


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("cuda", "NVIDIA H100 80GB HBM3", "h100-80"),
        ("cuda", "NVIDIA H200", "h200-141"),
        ("cuda", "NVIDIA A100-SXM4-80GB", "a100-80"),
        ("cuda", "NVIDIA A100-SXM4-40GB", None),
        ("cuda", "NVIDIA H100 PCIe", None),
        ("cuda", "NVIDIA GeForce RTX 4090", None),
        ("npu", "Ascend 910B 64GB", "910b-64"),
        ("npu", "Ascend 910B 32GB", "910b-32"),
        ("npu", "Ascend 910C 64GB", "910c"),
        ("npu", "Ascend310P3", None),
        ("cpu", "", None),
    ],
)
def test_the_name_of_a_device_finds_its_file(kind: str, name: str, expected: str | None) -> None:
    found = fitting_device(kind, name)
    assert (found.name if found else None) == expected
