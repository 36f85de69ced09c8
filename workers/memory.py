"""What is known of the memory of a worker that has died: the kernel may have killed it for want of memory."""

from __future__ import annotations

from dataclasses import dataclass

from rlxf.observe.memory import as_text


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryAtEnd:
    """The last that was seen of a worker's memory."""

    role: str
    figures: tuple[tuple[float, int], ...]  # seconds before its death was noticed, resident bytes; the last one last
    limit: int  # bytes that its machine, or its container, has
    kills: int  # processes that the kernel has killed on its machine since the worker's last sign of life

    def sentence(self, *, said_by_ray: bool = False) -> str:
        """For people. ``said_by_ray``: Ray says that it has killed the worker because its node was full."""
        if self.kills or said_by_ray:
            seen = ", ".join(f"{as_text(rss)} {seconds:.1f} s before" for seconds, rss in self.figures)
            whole = f"the limit of its node is {as_text(self.limit)}"
            return f"killed for want of memory (OOM): the memory of {self.role} was {seen}; {whole}"
        seconds, rss = self.figures[-1]
        return f"its memory was {as_text(rss)} at the last sign of life, {seconds:.1f} s before"
