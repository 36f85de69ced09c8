"""Rules on the reward: whether its scores say anything."""

from __future__ import annotations

from rlxf.health.answers import SPREAD, kl_per_token, score_rise
from rlxf.health.curves import KEPT, RunCurves
from rlxf.health.thresholds import limit

TIES, AT_MAX, ACCURACY = "pair/tie_rate", "score/at_max", "rewards/accuracies"
AGREES = "judge/agrees_with_scores"


def useless_reward(run: RunCurves) -> str | None:
    if not run.facts.online:
        return None
    return _constant(run) or _saturated(run) or _contradicted(run) or _noise(run)


def _constant(run: RunCurves) -> str | None:
    """In the newest steps all completions had one and the same score."""
    rows = int(limit("useless_reward", "rows"))
    spread = run.steps.known(SPREAD, rows)
    equal = len(spread) == rows and max(spread) == 0
    tied = not run.facts.has_judge and min(run.steps.known(TIES, rows), default=0.0) == 1
    if not equal and not (tied and len(run.steps.known(TIES, rows)) == rows):
        return None
    what = "all completions have the same score" if equal else "all scores of each prompt are equal"
    return f"{what} in the last {rows} steps"


def _saturated(run: RunCurves) -> str | None:
    at_max = run.steps.now(AT_MAX)
    if not at_max >= limit("useless_reward", "at_max"):
        return None
    return f"{at_max:.0%} of a step's completions have the highest score of all"


def _contradicted(run: RunCurves) -> str | None:
    agreement = run.steps.now(AGREES)
    if not agreement <= limit("useless_reward", "agreement"):
        return None
    return f"the judge prefers the better-scored answer in {agreement:.0%} of the pairs; 50% is chance"


def _noise(run: RunCurves) -> str | None:
    """The policy moves, and neither learns which of two answers scores better nor scores better.

    A policy that has gone far does neither, too, whatever the reward is.
    """
    if run.steps.num_rows < limit("useless_reward", "steps"):
        return None
    accuracy, rise, kl = run.steps.now(ACCURACY, KEPT), score_rise(run), kl_per_token(run)
    near_chance = abs(accuracy - 0.5) <= limit("useless_reward", "accuracy")
    moved = limit("useless_reward", "kl") <= kl <= limit("useless_reward", "far")
    if not (near_chance and moved and rise <= limit("useless_reward", "rise")):
        return None
    return (
        f"the policy has moved by {kl:.2f} nats a token, but scores have changed by {rise:+.2f} standard deviations, "
        f"and it prefers the better-scored side in {accuracy:.0%} of the pairs"
    )


def ties_rising(run: RunCurves) -> str | None:
    ties, before = run.steps.now(TIES), run.steps.before(TIES)
    if not (ties >= limit("ties_rising", "ties") and ties - before >= limit("ties_rising", "risen")):
        return None
    what = "comparisons are ties" if run.facts.has_judge else "prompts have equal scores only"
    return f"{ties:.0%} of the {what}, {before:.0%} at the start"
