"""The numbers of all rules in one table, each with its source. ``docs/health.md`` shows it."""

from __future__ import annotations

from dataclasses import dataclass

OWN_RUNS = "recorded runs (`benchmarks/verdicts.py`)"


@dataclass(frozen=True, slots=True)
class Threshold:
    """One number that a rule compares with."""

    rule: str
    name: str
    value: float
    meaning: str  # what is compared with it
    source: str


THRESHOLDS = (
    Threshold(
        "over_optimised",
        "kl",
        0.35,
        "KL to the reference, nats a token, at least",
        f"{OWN_RUNS}; at a large KL a better proxy is a worse true reward: 2210.10760, for DPO 2406.02900",
    ),
    Threshold(
        "over_optimised",
        "far",
        1.0,
        "the same: the rule then holds whatever the answers' variety, at least",
        "a token is e times as probable as before",
    ),
    Threshold(
        "over_optimised",
        "rise",
        0.5,
        "rise of the mean score, in standard deviations of the first scores, at least",
        OWN_RUNS,
    ),
    Threshold("over_optimised", "distinct", 0.8, "distinct answers, of those at the start, at most", OWN_RUNS),
    Threshold("over_optimised", "entropy", 0.9, "entropy a token, of that at the start, at most", OWN_RUNS),
    Threshold(
        "over_optimised",
        "win_errors",
        3,
        "without scores: standard errors of `eval/win_rate` above one half, at least",
        "normal distribution",
    ),
    Threshold(
        "length_exploitation",
        "correlation",
        0.5,
        "`score/length_correlation`, at least (brevity: minus this, at most)",
        OWN_RUNS,
    ),
    Threshold(
        "length_exploitation",
        "drift",
        1.25,
        "length, of that at the start, at least (brevity: 1 over this, at most)",
        OWN_RUNS,
    ),
    Threshold("eos_lost", "cut", 0.3, "share of completions without an end, at least", OWN_RUNS),
    Threshold("eos_lost", "cut_grown", 0.1, "the same, where it has grown by as much since the start", OWN_RUNS),
    Threshold("collapsed", "distinct", 0.5, "distinct completions, of those at the start, at most", OWN_RUNS),
    Threshold(
        "collapsed", "entropy", 0.2, "without that metric: entropy a token, of that at the start, at most", OWN_RUNS
    ),
    Threshold(
        "useless_reward", "rows", 3, "steps in a row with one and the same score for all, at least", "definition"
    ),
    Threshold(
        "useless_reward",
        "at_max",
        0.9,
        "saturated: share of completions that have the step's highest score, at least",
        OWN_RUNS,
    ),
    Threshold(
        "useless_reward",
        "agreement",
        0.55,
        "judged pairs in which the better-scored answer won, at most",
        "0.5 is chance",
    ),
    Threshold("useless_reward", "steps", 30, "noise: steps so far, at least", "two windows and a warm-up"),
    Threshold(
        "useless_reward", "accuracy", 0.06, "noise: distance of `rewards/accuracies` from one half, at most", OWN_RUNS
    ),
    Threshold(
        "useless_reward",
        "rise",
        0.2,
        "noise: rise of the mean score, in standard deviations of the first scores, at most",
        OWN_RUNS,
    ),
    Threshold("useless_reward", "kl", 0.02, "noise: KL to the reference, nats a token, at least", OWN_RUNS),
    Threshold("useless_reward", "far", 0.35, "noise: the same, at most", "that of `over_optimised`"),
    Threshold(
        "ties_rising",
        "ties",
        0.3,
        "`pair/tie_rate`, at least",
        "DAPO 2503.14476: prompts with equal rewards give no gradient",
    ),
    Threshold("ties_rising", "risen", 0.2, "its rise since the start, at least", OWN_RUNS),
    Threshold("reference_too_near", "kl", 0.002, "KL to the reference, nats a token, at most", OWN_RUNS),
    Threshold(
        "reference_too_near",
        "rise",
        0.1,
        "rise of the mean score, in standard deviations of the first scores, at most",
        OWN_RUNS,
    ),
    Threshold("reference_too_near", "steps", 50, "steps so far, at least; in shorter runs half of all", OWN_RUNS),
    Threshold(
        "reference_too_far",
        "kl",
        1.0,
        "KL to the reference, nats a token, at least",
        "each token is e times as probable as before; ",
    ),
    Threshold(
        "reference_too_far",
        "margin",
        4.0,
        "`rewards/margins`, at least",
        "the gradient's factor is sigmoid(-4) = 0.018 (2305.18290, section 4)",
    ),
    Threshold("reference_too_far", "accuracy", 0.95, "`rewards/accuracies`, at least", OWN_RUNS),
    Threshold(
        "rate_too_high",
        "loss",
        1.15,
        "loss, of that of the first step, at least",
        "a loss above the first one is worse than no training",
    ),
    Threshold("rate_too_high", "accuracy", 0.45, "`rewards/accuracies`, at most", "0.5 is chance"),
    Threshold("rate_too_high", "margin", -0.1, "with it `rewards/margins`, at most", OWN_RUNS),
    Threshold("rate_too_high", "ties", 0.75, "silent where `pair/tie_rate` is at least", "few pairs are noise"),
    Threshold("rate_too_high", "norm", 8.0, "gradient norm, of that at the start, at least", OWN_RUNS),
    Threshold(
        "stale_engine",
        "absolute",
        0.1,
        "`rollout/logp_diff_mean`, nats a token, at least",
        "probabilities that differ by a tenth",
    ),
    Threshold("stale_engine", "least", 0.002, "`rollout/logp_diff_mean`, nats a token, at least", OWN_RUNS),
    Threshold("stale_engine", "grown", 5.0, "the same, of that of the first step, at least", OWN_RUNS),
    Threshold("staleness_hurts", "ess", 0.3, "`offpolicy/ess`, at most", OWN_RUNS),
    Threshold("staleness_hurts", "accuracy", 0.55, "`rewards/accuracies`, at most", OWN_RUNS),
    Threshold(
        "staleness_hurts",
        "loss",
        1.15,
        "or loss, of that of the first step, at least",
        "a loss above the first one is worse than no training",
    ),
    Threshold(
        "offline_collapse",
        "fall",
        0.1,
        "fall of the log-prob of chosen and of rejected, of the reference's, at least",
        f"{OWN_RUNS}; 2402.13228, 2405.14734",
    ),
    Threshold("offline_collapse", "accuracy", 0.6, "`rewards/accuracies`, at least", OWN_RUNS),
    Threshold(
        "evaluation_too_small", "prompts", 30, "evaluation prompts, at most", "normal approximation of a share's error"
    ),
    Threshold(
        "evaluation_too_small",
        "error",
        0.04,
        "standard error of `eval/win_rate`, at least",
        "fewer than 160 prompts tell no difference below 8 %",
    ),
    Threshold("evaluation_too_small", "errors", 2.0, "difference to the start in standard errors, at most", "95 %"),
    Threshold("data_repeated", "sft", 4.0, "sft: epochs, more than", "2305.16264"),
    Threshold("data_repeated", "preferences", 3.0, "dpo, rm: epochs, more than", "2310.16944"),
    Threshold("one_engine_bounds", "imbalance", 1.3, "`rollout/imbalance`, at least", OWN_RUNS),
    Threshold("one_engine_bounds", "tail", 0.3, "`rollout/tail_s` of `timing/gen`, at least", OWN_RUNS),
    Threshold("pool_idle", "busy_pools", 0.75, "idle share of the trainer's and engines' devices, at least", OWN_RUNS),
    Threshold("pool_idle", "other_pools", 0.95, "idle share of the other devices, at least", OWN_RUNS),
)

_VALUES = {(one.rule, one.name): one.value for one in THRESHOLDS}


def limit(rule: str, name: str) -> float:
    """The number called ``name`` of a rule."""
    return _VALUES[rule, name]


def table() -> list[str]:
    """The table as lines of Markdown."""
    lines = ["| rule | number | compared with it | source |", "|---|---|---|---|"]
    return lines + [f"| `{one.rule}` | {one.value:g} | {one.meaning} | {one.source} |" for one in THRESHOLDS]
