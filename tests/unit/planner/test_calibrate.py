"""A device file from measured stages: with it the planner gives what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from rlxf.config.load import load_config
from rlxf.planner.calibrate import calibrated, device_text
from rlxf.planner.device import Device, DeviceFile
from rlxf.planner.jobs import jobs_of
from rlxf.planner.time import stages_of
from tests.unit.config.recipes import compose

SOURCE, DATE = "measured by run, step 3", "2026-11-26"
RECIPES = (
    *("online_dpo_trainer_llama32_1b", "online_dpo_trainer_llama3_8b", "online_dpo_trainer_llama3_8b_colocated"),
    *("online_dpo_trainer_tiny", "offline_dpo_trainer_llama3_8b", "sft_trainer_llama3_8b"),
)


def seconds(name: str, device: Device) -> dict[str, float]:
    jobs = jobs_of(load_config(compose(name, "dry_run=true", "training.device=cuda", "rollout.engine=vllm")))
    return {stage: one.seconds for stage, one in stages_of(jobs, device).items()}


def fitted(name: str, device: Device, measured: Mapping[str, float]) -> Device:
    jobs = jobs_of(load_config(compose(name, "dry_run=true", "training.device=cuda", "rollout.engine=vllm")))

    def planned(other: Device) -> dict[str, float]:
        return {stage: one.seconds for stage, one in stages_of(jobs, other).items()}

    return calibrated(device, planned, measured, source=SOURCE, date=DATE)


@pytest.mark.parametrize("factors", [(3.0, 2.0, 1.7, 4.0), (0.7, 0.8, 0.9, 0.5), (30.0, 0.9, 8.0, 0.2)])
@pytest.mark.parametrize("name", RECIPES)
def test_a_plan_with_the_file_gives_the_measured_seconds(
    tmp_path: Path, name: str, factors: tuple[float, float, float, float]
) -> None:
    gen, frozen, update, push = factors
    device = Device.load("h100-80")
    by_stage = {"gen": gen, "adv": frozen, "ref": frozen, "update_actor": update, "sync": push}
    measured = {stage: by_stage[stage] * planned for stage, planned in seconds(name, device).items()}
    path = tmp_path / "mine.yaml"
    path.write_text(device_text(fitted(name, device, measured), "measured"))
    again = seconds(name, Device.load(str(path)))
    for stage in ("gen", "update_actor", "sync"):
        if stage in measured:
            assert again[stage] == pytest.approx(measured[stage], rel=0.05), stage
    both = [stage for stage in ("adv", "ref") if stage in measured]  # one figure for the two of them
    assert sum(again[stage] for stage in both) == pytest.approx(sum(measured[stage] for stage in both), rel=0.05)


def test_a_device_that_only_differs_in_what_is_measured_is_found(tmp_path: Path) -> None:
    """Every stage by itself, when the measured ones are of such a device."""
    truth = Device.load("h100-80").with_figures(
        "made", DATE, train_share=0.31, forward_share=0.22, token_ms=2.5, push_s=1.5
    )
    name = "online_dpo_trainer_llama32_1b"
    measured = seconds(name, truth)
    found = fitted(name, Device.load("h100-80"), measured)
    assert seconds(name, found) == pytest.approx(measured, rel=1e-4)
    assert found.train_share == pytest.approx(0.31, rel=1e-4)
    assert found.forward_share == pytest.approx(0.22, rel=1e-4)
    assert found.push_s == pytest.approx(1.5, rel=1e-4)
    assert found.token_s == pytest.approx(2.5e-3, rel=1e-4)


def test_other_figures_keep_their_sources(tmp_path: Path) -> None:
    name, device = "online_dpo_trainer_llama32_1b", Device.load("h100-80")
    measured = {stage: 1.5 * value for stage, value in seconds(name, device).items()}
    path = tmp_path / "mine.yaml"
    path.write_text(device_text(fitted(name, device, measured), "h100-80, measured"))
    found = Device.load(str(path)).file
    assert path.read_text().startswith("# h100-80, measured\n")
    changed = [key for key in DeviceFile.model_fields if getattr(found, key) != getattr(device.file, key)]
    assert set(changed) == {"train_share", "forward_share", "token_ms", "push_s"}
    for key in changed:
        figure = getattr(found, key)
        assert (figure.source, figure.date) == (SOURCE, DATE)


def test_stages_that_were_not_measured_leave_their_figures_alone() -> None:
    name, device = "online_dpo_trainer_llama32_1b", Device.load("h100-80")
    assert fitted(name, device, {}) == device
    only = fitted(name, device, {"update_actor": 2 * seconds(name, device)["update_actor"]})
    assert only.file.model_copy(update={"train_share": device.file.train_share}) == device.file
    assert only.train_share < device.train_share
