"""Rules on the update: how far the policy goes from the reference, and how steadily."""

from __future__ import annotations

import math

from rlxf.health.answers import kl_per_token, score_rise
from rlxf.health.curves import RunCurves
from rlxf.health.rewards import ACCURACY, TIES
from rlxf.health.thresholds import limit

MARGINS, LOSS, NORM, BETA = "rewards/margins", "loss", "grad_norm", "beta"


def reference_too_near(run: RunCurves) -> str | None:
    kl, rise = kl_per_token(run), score_rise(run)
    steps = limit("reference_too_near", "steps")
    enough = min(steps, run.facts.num_steps / 2) if run.facts.num_steps else steps
    near = abs(kl) <= limit("reference_too_near", "kl") and rise <= limit("reference_too_near", "rise")
    if run.steps.num_rows < enough or not near:
        return None
    return (
        f"after {run.steps.step} steps the KL is {kl:.4f} nats a token, and scores have changed by {rise:+.2f} "
        "standard deviations"
    )


def reference_too_far(run: RunCurves) -> str | None:
    kl, margins, accuracy = kl_per_token(run), run.steps.now(MARGINS), run.steps.now(ACCURACY)
    if kl >= limit("reference_too_far", "kl"):
        return f"the KL is {kl:.2f} nats a token"
    if margins >= limit("reference_too_far", "margin") and accuracy >= limit("reference_too_far", "accuracy"):
        return (
            f"implicit margins are {margins:.1f} and {accuracy:.0%} of the pairs are ranked right: a pair's gradient "
            f"has {_sigmoid(-margins):.2%} of its full size"
        )
    return None


def rate_too_high(run: RunCurves) -> str | None:
    if run.steps.now(TIES) >= limit("rate_too_high", "ties"):
        return None  # the few pairs that are left are noise
    loss, first = run.steps.typical(LOSS), run.steps.first(LOSS)
    if first > 0 and loss >= limit("rate_too_high", "loss") * first:
        return f"the loss is {loss:.3f}, above that of the first step, {first:.3f}"
    accuracy, margins = run.steps.now(ACCURACY), run.steps.now(MARGINS)
    if accuracy <= limit("rate_too_high", "accuracy") and margins <= limit("rate_too_high", "margin"):
        return f"the policy prefers the better side in {accuracy:.0%} of the pairs, by a mean margin of {margins:.2f}"
    norm, before = run.steps.typical(NORM), run.steps.before(NORM)
    if before > 0 and norm >= limit("rate_too_high", "norm") * before:
        return f"the gradient norm is {norm:.3g}, {norm / before:.1f} times that at the start"
    return None


def offline_collapse(run: RunCurves) -> str | None:
    if run.facts.stage != "dpo":
        return None
    chosen, rejected = _fall(run, "chosen"), _fall(run, "rejected")
    accuracy = run.steps.now(ACCURACY)
    least = limit("offline_collapse", "fall")
    if not (min(chosen, rejected) >= least and accuracy >= limit("offline_collapse", "accuracy")):
        return None
    return (
        f"chosen answers have lost {chosen:.0%} and rejected ones {rejected:.0%} of their log-prob under the "
        f"reference, while {accuracy:.0%} of the pairs are ranked right"
    )


def _fall(run: RunCurves, side: str) -> float:
    """How much the log-prob of a side has fallen, as a share of its size under the reference."""
    beta = run.steps.now(BETA)
    change = run.steps.now(f"rewards/{side}") / beta if beta > 0 else math.nan
    reference = run.steps.now(f"logps/{side}") - change
    return change / reference if reference < 0 else math.nan


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
