"""What a rule says of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rlxf.health.curves import RunCurves

PAGE = "docs/health.md"


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A rule that holds, or has held, in a run."""

    name: str  # such as "over_optimised": what ``health.stop_on`` takes
    title: str  # for people: "Over-optimised"
    step: int  # complete steps when it first held
    last: int  # the newest step at which it held
    seen: str  # what was seen at that step, with numbers
    why: str  # why it matters
    advice: str  # what to do
    anchor: str  # its section of the documentation: "docs/health.md#over-optimised"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A pure function of a run's curves, and what people must know when it holds."""

    name: str
    title: str
    look: Callable[[RunCurves], str | None]  # what is seen, with numbers; None: the rule does not hold
    why: str
    advice: str
    of_evaluations: bool = False  # it reads evaluations, so it is asked after each of them and not after each step

    @property
    def anchor(self) -> str:
        return f"{PAGE}#{self.title.lower().replace(' ', '-')}"

    def verdict(self, seen: str, *, first: int, last: int) -> Verdict:
        return Verdict(
            name=self.name,
            title=self.title,
            step=first,
            last=last,
            seen=seen,
            why=self.why,
            advice=self.advice,
            anchor=self.anchor,
        )
