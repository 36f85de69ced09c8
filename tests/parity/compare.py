"""How far two trainers' metrics may be apart, and what is said when they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

RELATIVE, ABSOLUTE = 1e-5, 1e-6
NAMES = (
    "loss",
    "logps/chosen",
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "grad_norm",
)


def excess(ours: float, theirs: float) -> float:
    """Distance of two numbers in units of what is allowed: the larger of 1e-5 relative and 1e-6 absolute."""
    return abs(ours - theirs) / max(RELATIVE * abs(theirs), ABSOLUTE)


def worst(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """For each metric its largest `excess` over all steps; above 1 is a failure."""
    return {name: max(excess(a[name], b[name]) for a, b in zip(ours, theirs, strict=True)) for name in NAMES}


def assert_parity(
    ours: Sequence[Mapping[str, float]],
    theirs: Sequence[Mapping[str, float]],
    *,
    steps: int,
    names: Sequence[str] = NAMES,
) -> None:
    """Fail with every number that is too far apart."""
    assert len(ours) == len(theirs) == steps, f"{len(ours)} and {len(theirs)} steps, expected {steps}"
    problems = [
        f"step {step} {name}: {a[name]!r} against {b[name]!r}, {excess(a[name], b[name]):.1f} x the tolerance"
        for step, (a, b) in enumerate(zip(ours, theirs, strict=True))
        for name in names
        if not excess(a[name], b[name]) <= 1  # NaN must fail, too
    ]
    assert not problems, "\n".join(problems)
