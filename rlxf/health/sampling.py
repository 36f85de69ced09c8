"""Rules on the engines and the pools: whether the right weights sample, and whether devices work."""

from __future__ import annotations

import math

from rlxf.health.curves import RunCurves
from rlxf.health.rewards import ACCURACY
from rlxf.health.thresholds import limit
from rlxf.health.training import LOSS

DRIFT, LAG, ESS = "rollout/logp_diff_mean", "sync/version_lag", "offpolicy/ess"
IMBALANCE, TAIL, GEN = "rollout/imbalance", "rollout/tail_s", "timing/gen"


def stale_engine(run: RunCurves) -> str | None:
    drift, first = run.steps.now(DRIFT), run.steps.first(DRIFT)
    grown = max(limit("stale_engine", "least"), limit("stale_engine", "grown") * first)
    if not (drift >= limit("stale_engine", "absolute") or drift >= grown):
        return None
    return (
        f"engine and trainer give the same token log-probs that differ by {drift:.2g} nats on average; in the first "
        f"step by {first:.2g}"
    )


def staleness_hurts(run: RunCurves) -> str | None:
    lag, ess, accuracy = run.steps.now(LAG), run.steps.now(ESS), run.steps.now(ACCURACY)
    loss, first = run.steps.typical(LOSS), run.steps.first(LOSS)
    begins = math.isnan(run.steps.before(ACCURACY))  # nothing is learned yet
    learns = not (accuracy <= limit("staleness_hurts", "accuracy") or loss >= limit("staleness_hurts", "loss") * first)
    if begins or learns or not (lag > 0 and ess <= limit("staleness_hurts", "ess")):
        return None
    return (
        f"samples are {lag:.1f} updates old and count as {ess:.0%} of their number; the policy prefers the better side "
        f"in {accuracy:.0%} of the pairs, and the loss is {loss:.3f}"
    )


def one_engine_bounds(run: RunCurves) -> str | None:
    imbalance, seconds = run.steps.now(IMBALANCE), run.steps.now(GEN)
    tail = run.steps.now(TAIL) / seconds if seconds > 0 else 0.0
    if not (imbalance >= limit("one_engine_bounds", "imbalance") and tail >= limit("one_engine_bounds", "tail")):
        return None
    return (
        f"one engine samples {imbalance:.2f} times the mean of all, and less than half of the slots are busy in "
        f"{tail:.0%} of the sampling"
    )


def pool_idle(run: RunCurves) -> str | None:
    """On a CPU, and in one process, a role that waits keeps no device from others."""
    if run.facts.on_cpu or run.facts.local:
        return None
    found = []
    for pool in run.facts.pools:
        idle = [run.steps.now(f"timing/idle_{role}") for role in pool]
        least = 1 - sum(1 - share for share in idle if share == share)  # roles of a pool may work at the same time
        kind = "busy_pools" if {"train", "infer"} & {*pool} else "other_pools"
        if any(share == share for share in idle) and least >= limit("pool_idle", kind):
            found.append(f"{' + '.join(pool)} {least:.0%}")
    return f"devices are idle: {', '.join(found)} of the time" if found else None
