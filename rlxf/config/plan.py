"""The keys of the planner."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator

from rlxf.config.fields import LocalPath
from rlxf.config.kinds import Positive, Rate, Strict

CLUSTER = "cluster"  # in place of a number of devices: those of the running cluster
_DEVICES = re.compile(r"([1-9][0-9]{0,5})x(\S+)")


def _as_devices(value: Any) -> Any:
    """``16x910b-64`` or ``cluster``. A value that is no text is left to pydantic."""
    if isinstance(value, str) and value != CLUSTER and _DEVICES.fullmatch(value) is None:
        raise ValueError("a number of devices and their kind, such as 16x910b-64, or cluster")
    return value


def _as_device(value: Any) -> Any:
    """A name, or the absolute path of a file: workers run in other folders."""
    if isinstance(value, str) and value.endswith((".yaml", ".yml")):
        return str(Path(value).expanduser().absolute())
    return value


def split_devices(value: str) -> tuple[int, str]:
    """``16x910b-64`` as ``(16, "910b-64")``; of a value that was checked and is not ``cluster``."""
    found = _DEVICES.fullmatch(value)
    assert found is not None
    return int(found[1]), found[2]


class PlanConfig(Strict):
    """The planner: what a recipe costs, by estimate, and which layout costs least. See docs/planner.md."""

    device: Annotated[str, BeforeValidator(_as_device)] | None = None
    """Kind of device to plan for: a name of `configs/rlxf/device`, such as `910b-64`, or a file like those. Unset: by
    `training.device`, `910b-64` for npu, `h100-80` for cuda, and this machine for cpu."""
    devices: Annotated[str, BeforeValidator(_as_devices)] | None = None
    """With `dry_run=true`: search the best layouts for so many devices, such as `16x910b-64`, or `cluster` for those of
    the Ray cluster that is running. Unset: only the recipe's own layout is planned."""
    write: Annotated[str, LocalPath("output")] | None = None
    """With `plan.devices`: file to write the best recipe to."""
    calibrate: Annotated[str, LocalPath("output")] | None = None
    """File to which a run writes the figures of its devices that it measured, for `plan.device` of the next plan."""
    price: Rate = 0.0
    """Price of one device for an hour, in dollars. Above 0, the plan says what 1,000 driver steps cost. 0: the price in
    the file of the device, if it has one."""
    prompt_tokens: Positive | None = None
    """Mean length of a prompt that the plan's seconds are for, in tokens. Unset: `max_prompt_length`. Memory is always
    planned for the longest sequences."""
    completion_tokens: Positive | None = None
    """Mean length of a completion that the plan's seconds are for, in tokens. Unset: the longest completion."""
