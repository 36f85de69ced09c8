"""docs/install.md says what the lock files pin and what a run sets."""

from __future__ import annotations

import re
from pathlib import Path

from rlxf.platform import PLATFORMS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")


def pins(lane: str) -> dict[str, str]:
    """Package -> version of a lane's file."""
    lines = (ROOT / "locks" / f"{lane}.txt").read_text().splitlines()
    return dict(
        re.fullmatch(r"([\w.-]+)==([\w.+-]+).*", line).groups() for line in lines if re.match(r"[\w.-]+==", line)
    )  # type: ignore[union-attr,misc]


def cells(start: str) -> list[str]:
    """The cells of the row of a table that begins so."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_versions_are_those_of_the_locks() -> None:
    npu = pins("npu")
    for names in ("torch, torch-npu", "vllm, vllm-ascend", "triton-ascend", "transformers, megatron-core"):
        assert cells(names)[1] == ", ".join(npu[name] for name in names.split(", "))
    assert cells("npu")[2:4] == [
        f"{npu['torch']} with torch-npu {npu['torch-npu']}",
        f"{npu['vllm']} with vllm-ascend {npu['vllm-ascend']}",
    ]
    for lane, vllm in (("cpu", None), ("cuda", "vllm")):
        assert cells(lane)[2] == pins(lane)["torch"]
        assert vllm is None or cells(lane)[3] == pins(lane)[vllm]


def test_the_environment_of_workers_is_what_the_page_says() -> None:
    npu = PLATFORMS["npu"]()
    said: dict[str, str] = {}
    for line in PAGE.splitlines():
        if "| the run" in line:
            names, values, _ = (cell.strip() for cell in line.strip("|").split("|"))
            said |= dict(zip(re.findall(r"`(\w+)`", names), values.split(", "), strict=True))
    expected = npu.worker_environment(1) | npu.rollout_environment(1, 1)
    own = {"VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL"}  # nothing depends on them
    assert said == {name: value for name, value in expected.items() if name not in own}


def test_the_commands_for_ascend_are_those_of_the_lock() -> None:
    header = (ROOT / "locks" / "npu.txt").read_text().partition("# What pip")[0]
    commands = re.findall(r"^#   (.*)$", header, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        assert command in PAGE
    (build,) = [command for command in commands if "--no-binary vllm" in command]
    assert "--no-build-isolation" in build  # else pip downloads another torch for it
    assert commands.index(build) > commands.index(next(c for c in commands if "setuptools<81" in c))


def test_the_page_names_what_the_wheels_need() -> None:
    ascend = PAGE.partition("## Ascend\n")[2].partition("\n## ")[0]
    for needed in ("910B", "A3 (910C)", "glibc 2.34", "PIP_EXTRA_INDEX_URL"):
        assert needed in ascend
    assert "://" not in ascend  # indexes move: those who run them say where they are
    nvidia = PAGE.partition("## NVIDIA\n")[2].partition("\n## ")[0]
    for needed in ("CUDA 13", "580"):
        assert needed in nvidia
    for option in ("--ipc=host", "--shm-size", "/dev/shm"):
        assert option in PAGE


def test_the_page_claims_no_hardware() -> None:
    """Beyond what docs/platforms.md reports: parts of the CUDA lane, with an older torch."""
    assert cells("npu")[-1] == "**not yet run on hardware**"
    assert cells("cuda")[-1].startswith("**not yet run on hardware** with these versions")
