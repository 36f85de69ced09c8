"""Taking a sleeping engine's memory again, on a device that others use as well."""

from __future__ import annotations

import logging
from collections.abc import Callable

from rlxf.core.errors import SyncError
from rlxf.platform.base import Platform
from rlxf.platform.memory import PhaseMemory

log = logging.getLogger(__name__)


def take_memory(allocate: Callable[[], None], what: str, platform: Platform, memory: PhaseMemory) -> None:
    """Call ``allocate``. If the device has not enough memory, free what this process does not use, and call it again.

    Args:
        allocate: after a failure it must go on where it was, and take nothing twice.
        what: is to be allocated; for the message.
        platform: the device.
        memory: the phases of this process until now.

    Raises:
        SyncError: there is not enough memory. It shows the phases, and names the keys to change.
    """
    try:
        allocate()
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.warning("the device has no memory for %s (%s); trying once more", what, _first_line(error))
    platform.empty_cache()
    try:
        allocate()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise SyncError(
            f"the rollout engine cannot wake: no memory for {what} on a device that it shares ({_first_line(error)}). "
            "Lower rollout.gpu_memory_utilization or rollout.max_num_seqs, or take roles out of "
            f"resource_pool.colocate. What this process has used in each phase:\n{memory.table()}"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """torch has a class of its own; vLLM's allocators raise a RuntimeError that says so."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
