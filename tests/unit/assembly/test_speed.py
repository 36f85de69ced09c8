"""A run's speed and its plan: what a row gets, ``plan.json``, a file of figures, and that nothing of it ends a run."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlxf.assembly import speed
from rlxf.assembly.planning import run_device
from rlxf.assembly.speed import start_speed
from rlxf.config.load import load_config
from rlxf.config.schema import RunConfig
from rlxf.core.errors import ConfigError
from rlxf.loop.speed import Speed, no_speed
from rlxf.planner import estimate as planner
from rlxf.planner.device import GIB, Device
from rlxf.planner.jobs import Jobs, jobs_of
from rlxf.planner.memory import Bar, Instant, PlaceMemory
from rlxf.planner.time import stages_of
from rlxf.platform import get_platform, probe
from tests.runs.small import World, make_world

PROBED = {"memory_gib": 16.0, "fp32_tflops": 0.1, "bf16_tflops": 0.2, "memory_gb_per_s": 20.0}
PLATFORM = get_platform("cpu")


def memory_of(jobs: Jobs, device: Device) -> tuple[PlaceMemory, ...]:
    """Two GiB for each role."""
    return tuple(
        PlaceMemory(
            place=place,
            bars=(Bar(name="training", instants=(Instant(name="backward", parts=parts),)),),
            utilization=None,
        )
        for place in jobs.places
        for parts in [{f"{role} weights": 2.0 * GIB for role in place.roles}]
    )


@pytest.fixture(autouse=True)
def _figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a machine that is the same wherever the tests run."""
    monkeypatch.setattr(probe, "probe_cpu", lambda linear: PROBED)
    monkeypatch.setattr(planner, "memory_of", memory_of)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def config(world: World, **changes: dict[str, Any]) -> RunConfig:
    return load_config({"runtime": "local", **world.recipe(**changes)})


TRAINED = 4 * 2 * 18.0  # tokens of a step with four pairs


def row_of(step: int, **changes: float) -> dict[str, float]:
    return {
        "timing/gen": 0.4, "timing/adv": 0.1, "timing/ref": 0.1, "timing/update_actor": 0.3, "timing/sync": 0.02,
        "timing/idle_train": 0.6, "timing/idle_infer": 0.5, "rollout/tokens_per_s": 12 * 10 / 0.4,
        "rollout/longest_over_mean": 1.2, "prompt_length/mean": 8.0, "response_length/mean": 10.0, "pair/kept": 4.0,
        "num_tokens": step * TRAINED, "memory/driver_rss_gib": 1.5, "memory/train_rss_gib": 2.5, **changes,
    }  # fmt: skip


def said(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == speed.__name__]


def plan_json(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return found


def started(world: World, folder: Path, num_tokens: int = 0, **changes: dict[str, Any]) -> Speed:
    return start_speed(config(world, **changes), folder, PLATFORM, num_tokens)


def test_the_plan_is_there_before_the_first_step(world: World, tmp_path: Path) -> None:
    started(world, tmp_path)
    plan = plan_json(tmp_path)
    assert "estimate" in plan["note"]
    assert plan["device"]["kind"] == "cpu"
    assert plan["device"]["figures"]["fp32_tflops"]["value"] == 0.1
    assert plan["device"]["figures"]["train_share"]["source"]
    assert plan["work"]["completion_tokens"] == 12
    assert set(plan["stages"]) == {"gen", "adv", "ref", "update_actor", "sync"}
    assert plan["metrics"]["timing/gen"] == plan["stages"]["gen"]["seconds"] > 0
    (place,) = [place for place in plan["places"] if place["roles"] == ["train"]]
    assert place["bars"]["training"] == {"worst": "backward", "bytes": 2 * GIB, "parts": {"train weights": 2 * GIB}}
    assert "measured" not in plan


def test_after_the_third_step_the_measured_numbers_stand_beside_it(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = started(world, tmp_path)
    slow = row_of(3, **{"timing/gen": 0.8, "rollout/tokens_per_s": 12 * 10 / 0.8})
    rows = [run(1, row_of(1, **{"timing/gen": 9.0})), run(2, row_of(2)), run(3, slow)]
    assert not [name for row in rows[:2] for name in row if name.startswith("plan/")]
    settings = config(world)
    device, _ = run_device(settings, PLATFORM)
    jobs = jobs_of(settings)
    plan = plan_json(tmp_path)
    assert plan["measured"]["steps"] == [2, 3]
    gen = plan["measured"]["stages"]["gen"]
    assert gen["measured_s"] == pytest.approx(0.6)
    work = replace(jobs.work, prompt_tokens=8.0, completion_tokens=10.0, longest=1.2, pairs=4.0)
    assert gen["planned_s"] == pytest.approx(stages_of(jobs, device, work)["gen"].seconds, rel=1e-3)
    assert plan["metrics"]["timing/gen"] == gen["planned_s"] < plan["stages"]["gen"]["seconds"]
    assert rows[2]["plan/gen_ratio"] == pytest.approx(gen["planned_s"] / 0.6)
    assert run(4, row_of(4))["plan/gen_ratio"] == rows[2]["plan/gen_ratio"]
    (record,) = said(caplog)
    assert f"{rows[2]['plan/gen_ratio']:.2f}" in record.getMessage()
    assert "estimate" in record.getMessage()


@pytest.mark.parametrize("owes", [False, True])
def test_a_resumed_run_counts_its_own_rows(world: World, tmp_path: Path, owes: bool) -> None:
    run = started(world, tmp_path, num_tokens=round(5 * TRAINED))
    if owes:  # the row of the step before
        assert run(5, {"timing/eval": 0.0, "num_tokens": 5 * TRAINED, "response_length/mean": 10.0}) == {}
    found = [run(step, row_of(step)) for step in (6, 7, 8)]
    assert found[0]["speed/update_actor_tokens_per_s"] == pytest.approx(TRAINED / 0.3)
    assert [any(name.startswith("plan/") for name in row) for row in found] == [False, False, True]
    assert plan_json(tmp_path)["measured"]["steps"] == [7, 8]


def test_the_file_of_figures_gives_what_was_measured(world: World, tmp_path: Path) -> None:
    path = tmp_path / "here.yaml"
    path.write_text(Path("configs/rlxf/device/h100-80.yaml").read_text())  # an older one is replaced
    run = started(world, tmp_path / "my_run", plan={"calibrate": str(path)})
    for step in (1, 2, 3):
        run(step, row_of(step))
    device = Device.load(str(path))
    assert (device.kind, device.file.train_share.source) == ("cpu", "measured by my_run, step 3")
    assert device.file.fp32_tflops.value == 0.1
    again = started(world, tmp_path / "again", plan={"device": str(path)})
    ratios = [again(step, row_of(step)) for step in (1, 2, 3)][-1]
    for stage in ("gen", "update_actor", "sync"):
        assert ratios[f"plan/{stage}_ratio"] == pytest.approx(1, abs=0.05), stage


@pytest.mark.parametrize("broken", ["jobs_of", "estimate", "memory_of", "run_device"])
def test_a_plan_that_fails_is_one_line_and_no_more(
    world: World, tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConfigError("no figures for this", "and another line")

    monkeypatch.setattr(planner if broken == "memory_of" else speed, broken, fails)
    run = started(world, tmp_path)
    (record,) = said(caplog)
    assert "no figures for this" in record.getMessage()
    assert "another line" not in record.getMessage()
    rows = [run(step, row_of(step)) for step in (1, 2, 3, 4)]
    assert all(("speed/gen_tokens_per_s" in row) == (broken != "jobs_of") for row in rows)
    assert not [name for row in rows for name in row if name.endswith("_mfu") or name.startswith("plan/")]
    assert len(said(caplog)) == 1


def test_rows_that_cannot_be_read_are_one_line_and_no_more(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = started(world, tmp_path)
    row = row_of(1)
    del row["prompt_length/mean"]
    assert [run(1, row), run(2, row_of(2))] == [{}, {}]
    assert len(said(caplog)) == 1


def test_a_run_that_only_evaluates_has_no_plan(world: World, tmp_path: Path) -> None:
    assert started(world, tmp_path, training={"eval_only": True}, eval={"num_prompts": 4}) is no_speed
    assert not (tmp_path / "plan.json").exists()


def test_memory_that_does_not_suffice_is_a_warning(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(probe, "probe_cpu", lambda linear: {**PROBED, "memory_gib": 1.0})
    run = started(world, tmp_path)
    (record,) = said(caplog)
    assert "need 8.0 GiB by estimate; cpu has 1.0" in record.getMessage()
    assert run(1, row_of(1))["speed/gen_mfu"] > 0


def test_figures_of_another_kind_of_device_are_not_used(world: World) -> None:
    device, exact = run_device(config(world, plan={"device": "h100-80"}), PLATFORM)
    assert (device.kind, exact) == ("cpu", True)
