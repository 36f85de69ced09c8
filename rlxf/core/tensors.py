"""Small tensors on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values``, made on the host, on a device.

    The host does not wait: a plain copy ends only when the device has done everything it was asked for before.
    """
    if values.device == device or device.type == "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
