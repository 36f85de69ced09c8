"""Rules on what the policy answers: its distance from the reference against its score, length, end and variety."""

from __future__ import annotations

import math

from rlxf.health.curves import RunCurves
from rlxf.health.thresholds import limit

KL, ENTROPY, LENGTH = "objective/kl", "objective/entropy", "response_length/mean"
SCORES, SPREAD, MARGIN = "objective/scores", "score/std", "objective/scores_margin"
DISTINCT, ENDED = "rollout/distinct", "val/contain_eos_token"
CORRELATION, LONGER = "score/length_correlation", "pair/length_difference"


def kl_per_token(run: RunCurves) -> float:
    """Nats; NaN offline, where no completion is sampled."""
    return run.steps.now(KL) / run.steps.now(LENGTH) if run.facts.online else math.nan


def share_of_start(run: RunCurves, name: str) -> float:
    """What a metric is now, as a share of what it was at the start; NaN where it was not above 0."""
    before = run.steps.before(name)
    return run.steps.now(name) / before if before > 0 else math.nan


def entropy_of_start(run: RunCurves) -> float:
    """Entropy a token, as a share of that at the start."""
    length = share_of_start(run, LENGTH)
    return share_of_start(run, ENTROPY) / length if length > 0 else math.nan


def score_rise(run: RunCurves) -> float:
    """How much the mean score has risen since the start, in standard deviations of the first scores.

    Runs of earlier versions have no ``score/std``: there the scale is the mean difference of a prompt's best and worst.
    """
    spread = run.steps.before(SPREAD)
    scale = spread if spread > 0 else run.steps.before(MARGIN)
    return (run.steps.now(SCORES) - run.steps.before(SCORES)) / scale if scale > 0 else math.nan


def over_optimised(run: RunCurves) -> str | None:
    def bound(name: str) -> float:
        return limit("over_optimised", name)

    kl, rise = kl_per_token(run), score_rise(run)
    wins, error = run.evaluations.newest("eval/win_rate"), run.evaluations.newest("eval/win_rate_se")
    scored = rise >= bound("rise")
    judged = not run.facts.has_reward and wins - 0.5 > bound("win_errors") * error
    if not kl >= bound("kl") or not (scored or judged):
        return None
    distinct, entropy = share_of_start(run, DISTINCT), entropy_of_start(run)
    poorer = distinct <= bound("distinct") or entropy <= bound("entropy")
    if not (poorer or kl >= bound("far")):
        return None
    better = f"the mean score has risen by {rise:.1f} standard deviations" if scored else f"the win rate is {wins:.3f}"
    rest = {"distinct answers": distinct, "entropy a token": entropy}
    parts = [f"{name} {share:.0%} of the start" for name, share in rest.items() if share == share]
    return ", ".join([f"{better}, at a KL of {kl:.2f} nats a token", *parts])


def length_exploitation(run: RunCurves) -> str | None:
    def bound(name: str) -> float:
        return limit("length_exploitation", name)

    correlation, drift = run.steps.now(CORRELATION), share_of_start(run, LENGTH)
    longer = correlation >= bound("correlation") and drift >= bound("drift")
    shorter = correlation <= -bound("correlation") and drift * bound("drift") <= 1
    if not (longer or shorter):
        return None
    return (
        f"score and length correlate by {correlation:.2f} within a prompt, and completions are {drift:.2f} times as "
        f"long as at the start ({run.steps.now(LENGTH):.0f} tokens)"
    )


def eos_lost(run: RunCurves) -> str | None:
    cut, at_first = 1 - run.steps.now(ENDED), 1 - run.steps.before(ENDED)
    grown = cut - at_first >= limit("eos_lost", "cut_grown")
    if not (cut >= limit("eos_lost", "cut") or grown):
        return None
    since = f", {at_first:.0%} at the start" if at_first == at_first else ""
    most = f" (max_new_tokens={run.facts.max_new_tokens})" if run.facts.max_new_tokens else ""
    return f"{cut:.0%} of the completions have no end{most}{since}"


def collapsed(run: RunCurves) -> str | None:
    distinct, entropy = share_of_start(run, DISTINCT), entropy_of_start(run)
    if distinct <= limit("collapsed", "distinct"):
        now, before = run.steps.now(DISTINCT), run.steps.before(DISTINCT)
        return f"{now:.0%} of a step's completions differ, {before:.0%} at the start"
    if math.isnan(distinct) and entropy <= limit("collapsed", "entropy"):
        return f"the entropy a token is {entropy:.0%} of that at the start"
    return None
