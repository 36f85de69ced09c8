"""What benchmarks/planner.py rests on: shares that are found again, and a file that takes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import planner, planner_regret, planner_stages, random_world
from benchmarks.planner_stages import Case, Measured
from rlxf.planner.device import Device
from rlxf.planner.time import GEN

SHARES = {"train_share": 0.62, "pass_ms": 0.8, "forward_share": 0.71, "decode_share": 0.44, "memory_share": 0.55}
FIGURES = {"fp32_tflops": [0.1], "bf16_tflops": [0.2], "memory_gb_per_s": [20.0], "memory_gib": [16.0]}
CASES = tuple(
    replace(case, size="2.5M", name=str(number)) for number, case in enumerate(planner_stages.CASES) if case.ranks == 1
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, random_world.World]:
    folder = tmp_path_factory.mktemp("planner")
    return {"2.5M": random_world.build(folder, planner_stages.SHAPES["2.5M"], num_prompts=8)}


def as_if_measured(case: Case, world: random_world.World, slower: float = 1.0) -> Measured:
    """By a core with these shares."""
    device = Measured(seconds={}, figures=FIGURES).device(SHARES)
    stages = planner_stages.predicted(case, world, device)
    seconds = {name: [planner_stages.core_seconds(stages[name]) * slower] for name in planner_stages.STAGES}
    return Measured(seconds=seconds, figures=FIGURES)


def test_shares_come_from_two_cases_and_hold_in_the_others(worlds: dict[str, random_world.World]) -> None:
    measured = {case.name: as_if_measured(case, worlds["2.5M"]) for case in CASES}
    shares = planner_stages.fit(CASES, measured, worlds)
    assert shares == pytest.approx(SHARES, rel=1e-3)
    compared = planner_stages.compare(CASES, measured, worlds, shares)
    assert planner_stages.worst(compared)[1] < 1e-3
    late = next(case for case in CASES if case.barred and not case.fits)
    measured[late.name] = as_if_measured(late, worlds["2.5M"], slower=1.5)
    name, error = planner_stages.worst(planner_stages.compare(CASES, measured, worlds, shares))
    assert name.startswith(late.name)
    assert error == pytest.approx(1 / 3, rel=1e-2)


def test_the_planner_is_told_the_lengths_that_are_run() -> None:
    case = Case(name="uneven", prompts=16, workload="lognormal")
    lengths, work = case.lengths().lengths(0), case.work()
    assert work.completion_tokens == pytest.approx(lengths.mean())
    assert work.longest * work.completion_tokens == pytest.approx(lengths.max())
    assert work.prompt_tokens * 16 == pytest.approx(sum(map(len, case.prompt_rows())))


def test_layouts_are_recipes_that_the_planner_reads(worlds: dict[str, random_world.World]) -> None:
    device = Device.load("cpu").with_probe({key: values[0] for key, values in FIGURES.items()})
    device = device.with_figures("test", "2026-11-26", **SHARES).with_cores(2)
    found = {layout.name: planner_regret.predicted(layout, worlds["2.5M"], device) for layout in planner_regret.LAYOUTS}
    assert len(found) == 12
    assert found["four roles, one ahead"]["step_s"] < found["four roles"]["step_s"]
    assert found["one process"]["step_s"] == pytest.approx(sum(found["one process"]["stages_s"].values()))
    assert found["four roles, one ahead"]["stages_s"][GEN] == found["one process"]["stages_s"][GEN]


def test_regret_is_that_of_the_first_choice() -> None:
    found = {
        name: {"step_s": predicted, "measured_s": measured}
        for name, predicted, measured in (("a", 1.0, 2.2), ("b", 1.1, 2.0), ("c", 3.0, 5.0))
    }
    verdict = planner_regret.regret(found)
    assert (verdict["first_choice"], verdict["fastest"]) == ("a", "b")
    assert verdict["regret"] == pytest.approx(0.1)
    assert verdict["rank_correlation"] == pytest.approx(0.5)


def test_shares_are_written_into_the_file_of_a_device(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(planner.CPU_FILE.read_text())
    before = Device.load(str(path))
    planner.apply(SHARES, path)
    after = Device.load(str(path))
    assert {key: getattr(after.file, key).value for key in SHARES} == pytest.approx(SHARES, rel=1e-2)
    assert after.file.train_share.source == planner.SOURCE
    assert after.file.engine_slots == before.file.engine_slots
