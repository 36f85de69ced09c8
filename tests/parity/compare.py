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


def excess(ours: float, theirs: float, largest: float = 0.0) -> float:
    """Distance of two numbers in units of what is allowed: the larger of 1e-5 relative and 1e-6 absolute.

    ``largest``: of the numbers that they are means of. These cancel, and a mean is as exact as they are.
    """
    return abs(ours - theirs) / max(RELATIVE * max(abs(theirs), largest), ABSOLUTE)


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
    problems = []
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        extremes = [abs(b[name]) for name in ("min_reward", "max_reward") if name in names]
        for name in names:
            found = excess(a[name], b[name], max(extremes, default=0.0) if name == "mean_reward" else 0.0)
            if not found <= 1:  # NaN must fail, too
                problems.append(f"step {step} {name}: {a[name]!r} against {b[name]!r}, {found:.1f} x the tolerance")
    assert not problems, "\n".join(problems)
