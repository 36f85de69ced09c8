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


def test_the_page_claims_no_hardware() -> None:
    """Beyond what docs/platforms.md reports: parts of the CUDA lane, with an older torch."""
    assert cells("npu")[-1] == "**not yet run on hardware**"
    assert cells("cuda")[-1].startswith("**not yet run on hardware** with these versions")
