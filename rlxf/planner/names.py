"""Which file of figures fits a device, by the name that its driver gives it."""

from __future__ import annotations

import re

from rlxf.planner.device import Device, device_names

_SAME = re.compile(r"hbm\d*e?|sxm\d*|\d+gb")  # words of a name that say nothing about speed; its memory is compared


def fitting_device(kind: str, name: str) -> Device | None:
    """The device whose title fits a name such as ``NVIDIA H100 80GB HBM3``; None: no file is about it.

    Every word of the name must be in the title: ``NVIDIA H100 PCIe`` is slower than what ``NVIDIA H100, 80 GB`` says.
    """
    found = [device for known in device_names() if (device := Device.load(known)).kind == kind]
    fits = [device for device in found if _fits(name, device.file.title)]
    return fits[0] if len(fits) == 1 else None


def _fits(name: str, title: str) -> bool:
    ours, theirs = _words(name), _words(title)
    model = next((word for word in theirs if re.search(r"\d", word) and re.search(r"[a-z]", word)), None)
    sizes = {word for word in ours if re.fullmatch(r"\d+gb", word)}
    others = [word for word in ours if not _SAME.fullmatch(word)]
    return model in ours and sizes <= set(theirs) and all(word in theirs for word in others)


def _words(text: str) -> list[str]:
    joined = re.sub(r"(\d+)\s*GB\b", r"\1gb", text, flags=re.IGNORECASE)
    return re.findall(r"[a-z0-9]+", joined.lower())
