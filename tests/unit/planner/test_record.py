"""``plan.json``: what it says of memory, by the metrics that measure it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from rlxf.config.load import load_config
from rlxf.planner import estimate as planner
from rlxf.planner.device import GIB, Device
from rlxf.planner.estimate import Estimate, estimate
from rlxf.planner.jobs import Jobs, Place, jobs_of
from rlxf.planner.measured import Compared
from rlxf.planner.memory import Bar, Instant, PlaceMemory
from rlxf.planner.record import Measured, measured_memory, process_bytes, record, table
from tests.unit.config.recipes import compose

GPU = Device.load("h100-80")


def place(name: str, devices: int, **instants: Mapping[str, float]) -> PlaceMemory:
    """GiB of parts, by instant."""
    roles = tuple(
        role for role in ("train", "infer", "ref", "reward") if any(role in str(i) for i in instants.values())
    )
    found = [
        Instant(name=key, parts={part: size * GIB for part, size in parts.items()}) for key, parts in instants.items()
    ]
    return PlaceMemory(
        place=Place(name=name, roles=roles, devices=devices),  # type: ignore[arg-type]
        bars=(Bar(name="training", instants=tuple(found)),),
        utilization=None,
    )


SHARED = place(
    "actor_rollout",
    4,
    backward={"contexts": 2, "push buckets": 1, "train weights": 10, "train activations": 30, "infer graphs": 1},
    sampling={"contexts": 2, "train weights": 10, "infer weights": 12, "infer cache": 40},
)
REF = place("ref", 2, **{"log-probs": {"contexts": 1, "ref weights": 8, "ref forward pass": 2}})


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> Estimate:
    monkeypatch.setattr(planner, "memory_of", lambda jobs, device: (SHARED, REF))
    return estimate(jobs(), GPU)


def jobs() -> Jobs:
    return jobs_of(load_config(compose("online_dpo_trainer_llama32_1b", "dry_run=true", "training.device=cuda")))


def on_cpu(found: Estimate, *, local: bool = False) -> Estimate:
    cpu = Device.load("cpu").with_figures("test", "2026-11-26", memory_gib=100.0, context_gib=0.5)
    return replace(found, device=cpu, jobs=replace(found.jobs, local=local))


def gib(sizes: Mapping[str, float]) -> dict[str, float]:
    return {name: size / GIB for name, size in sizes.items()}


def test_a_role_has_what_its_parts_have_at_the_worst_of_its_own_instants(found: Estimate) -> None:
    assert gib(process_bytes(found)) == {
        "memory/train_device_gib": 40,
        "memory/infer_device_gib": 52,
        "memory/ref_device_gib": 10,
    }


def test_on_a_cpu_a_process_has_its_share_and_the_program(found: Estimate) -> None:
    assert gib(process_bytes(on_cpu(found))) == {
        "memory/train_rss_gib": 10.5,
        "memory/infer_rss_gib": 13.5,
        "memory/ref_rss_gib": 5.5,
    }
    assert gib(process_bytes(on_cpu(found, local=True))) == {"memory/driver_rss_gib": 10 + 13 + 5 + 0.5}


def test_memory_is_compared_where_a_row_has_it(found: Estimate) -> None:
    rows = [{"memory/train_device_gib": 32.0, "timing/gen": 1.0}, {"memory/train_device_gib": 50.0}]
    assert measured_memory(found, rows) == {"memory/train_device_gib": Compared(planned=40, measured=50)}


def test_places_without_room_are_named(found: Estimate) -> None:
    assert found.shortages() == []
    small = replace(found, device=GPU.with_figures("test", "2026-11-26", memory_gib=60.0))
    said = "train+infer: training, sampling needs 64.0 GiB by estimate; h100-80 has 60.0"
    assert small.shortages() == [said]
    assert on_cpu(found).shortages() == []
    tight = on_cpu(found).device.with_figures("test", "2026-11-26", memory_gib=70.0)
    said = "all processes together need 75.0 GiB by estimate; cpu has 70.0"  # each place alone would fit
    assert replace(on_cpu(found), device=tight).shortages() == [said]


def test_every_metric_has_one_planned_number(found: Estimate) -> None:
    measured = Measured(
        steps=(2, 3),
        work=found.jobs.work,
        seconds={"gen": Compared(planned=2.0, measured=4.0)},
        memory={"memory/train_device_gib": Compared(planned=40, measured=50)},
    )

    def names(value: object) -> list[str]:
        if not isinstance(value, Mapping):
            return []
        return [*map(str, value), *(name for item in value.values() for name in names(item))]

    for content in (record(found), record(found, measured)):
        metrics = [name for name in names(content) if "/" in name]
        assert sorted(metrics) == sorted(set(metrics)) == sorted(content["metrics"])
    assert record(found)["metrics"]["timing/gen"] == found.stages["gen"].seconds
    assert content["metrics"]["timing/gen"] == 2.0
    assert content["measured"]["stages"]["gen"] == {"planned_s": 2.0, "measured_s": 4.0, "ratio": 0.5}
    assert measured.ratios == {"plan/gen_ratio": 0.5, "plan/memory_train_ratio": 0.8}
    assert [line.split() for line in table(measured).splitlines()] == [
        ["stage", "planned", "measured", "planned/measured"],
        ["gen", "2", "s", "4", "s", "0.50"],
        ["memory", "train", "40.00", "GiB", "50.00", "GiB", "0.80"],
    ]
