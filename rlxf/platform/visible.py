"""Which devices of the machine a process has, by names that all processes of a cluster's node agree on."""

from __future__ import annotations

import os

from rlxf.platform.base import Platform


def visible_devices(platform: Platform) -> tuple[str, ...]:
    """In the order of their numbers in this process, as whoever started it named them. Empty: nobody did."""
    named = os.environ.get(platform.visible_devices_variable or "", "")
    return tuple(name.strip() for name in named.split(",") if name.strip())


def visible_device(platform: Platform, number: int) -> str | None:
    """The name of the device that has ``number`` in this process; None: not known."""
    names = visible_devices(platform)
    return names[number] if number < len(names) else None
