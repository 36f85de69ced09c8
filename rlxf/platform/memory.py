"""How much memory each phase of a process has taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rlxf.platform.base import Platform

_GIB = 2**30


def largest(peaks: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """By phase, the largest of several processes."""
    found: dict[str, int] = {}
    for one in peaks:
        found |= {phase: max(size, found.get(phase, 0)) for phase, size in one.items()}
    return found


class PhaseMemory:
    """The peak of ``Platform.max_memory_allocated`` in each phase of this process.

    A phase lasts from the end of the one before it, and the first one from the begin of the process. On a CPU, whose
    peak cannot be reset, it is the peak until then. What a sleeping vLLM has given back still counts, since torch does
    not see it go, and a vLLM of several devices has its memory in other processes.
    """

    def __init__(self, platform: Platform) -> None:
        self.peaks: dict[str, int] = {}  # bytes, by phase; of the largest one of that name
        self._platform = platform

    def end(self, phase: str) -> int:
        """A phase ends, and the next one begins; the peak of this one, bytes."""
        peak = self._platform.max_memory_allocated()
        self.peaks[phase] = max(peak, self.peaks.get(phase, 0))
        self._platform.reset_peak_memory()
        return peak

    def table(self) -> str:
        """A line for each phase, and one for the device now."""
        width = max((len(phase) for phase in self.peaks), default=0)
        lines = [f"  {phase:<{width}}  {peak / _GIB:8.2f} GiB at most" for phase, peak in self.peaks.items()]
        if total := self._platform.total_memory():
            free = self._platform.free_memory()
            lines.append(f"  device now: {free / _GIB:.2f} of {total / _GIB:.2f} GiB free, all processes together")
        return "\n".join(lines)
