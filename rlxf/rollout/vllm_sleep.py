"""What runs inside vLLM's workers, so that a wake that ran out of memory can be tried again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

from rlxf.platform import PLATFORMS
from rlxf.rollout.waking import is_out_of_memory

Handle = tuple[int, int, int, Any]  # device, bytes, address, and where the physical memory is noted


def map_once(worker: object, allocator: str) -> None:
    """From now on a wake goes on where the one before it failed.

    vLLM 0.32 knows which of its allocations are mapped. The allocators of 0.23 map all of a tag again: over memory that
    is in use, and what was there before is lost to the device.

    Args:
        worker: vLLM's; not used.
        allocator: ``Platform.vllm_allocator``.
    """
    module: Any = sys.modules[resolve_name(allocator).__module__]
    if "is_asleep" not in module.AllocationData.__dataclass_fields__:
        module.create_and_map, module.unmap_and_release = _once(module.create_and_map, module.unmap_and_release)


def map_memory(worker: object, tag: str, platform: str) -> str | None:
    """The part of vLLM's ``wake_up`` that takes memory; what the device said if it has not enough.

    It does not raise that, because vLLM stops at the first worker that fails, and takes the answers of the others for
    those to the next call. ``wake_up`` has to follow: it finds the memory in place.

    Args:
        worker: vLLM's; not used.
        tag: of vLLM's allocations.
        platform: its name.
    """
    device = PLATFORMS[platform]()
    device.empty_cache()
    allocator: Any = resolve_name(device.vllm_allocator or "")
    try:
        allocator.get_instance().wake_up([tag])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return str(error)
    return None


def _once(
    create: Callable[[Handle], None], release: Callable[[Handle], None]
) -> tuple[Callable[[Handle], None], Callable[[Handle], None]]:
    woken: set[int] = set()  # addresses that a wake has mapped since the last sleep

    def create_once(handle: Handle) -> None:
        if handle[2] not in woken:
            create(handle)
            woken.add(handle[2])

    def release_and_forget(handle: Handle) -> None:
        release(handle)
        woken.discard(handle[2])

    return create_once, release_and_forget
