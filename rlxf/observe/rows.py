"""Rows of the final table, for the screen and for the page of a run. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

# Read together, because each of them alone can look good in a run that has gone wrong.
EVAL_ROWS = (
    ("reward score", "eval/reward"),
    ("reward score, greedy", "eval/greedy_reward"),
    ("reward score before penalties", "eval/raw_reward"),
    ("reward score before penalties, greedy", "eval/greedy_raw_reward"),
    ("win rate against the initial policy", "eval/win_rate"),
    ("win rate against the initial policy, greedy", "eval/greedy_win_rate"),
    ("win rate against the previous evaluation", "eval/win_rate_previous"),
    ("win rate against the reference answers", "eval/win_rate_reference"),
    ("win rate against the reference answers, greedy", "eval/greedy_win_rate_reference"),
    ("verdicts that change with the order", "eval/judge/position_flip"),
    ("KL to the reference, nats", "eval/kl"),
    ("completion length, tokens", "eval/length"),
    ("EOS rate", "eval/eos_rate"),
    ("share of distinct answers", "eval/distinct"),
    ("held-out loss", "eval/loss"),
    ("held-out accuracy", "eval/accuracy"),
    ("held-out implicit reward accuracy", "eval/rewards/accuracies"),
    ("held-out implicit reward margin", "eval/rewards/margins"),
)
TRAINING_ROWS = (
    ("training reward score", "objective/scores"),
    ("tie rate", "pair/tie_rate"),
    ("dropped pairs", "pair/dropped"),
    ("score margin of the pairs", "pair/margin"),
    ("loss", "loss"),
    ("reward model's accuracy", "accuracy"),
    ("reward model's margin", "margin"),
    ("implicit reward accuracy", "rewards/accuracies"),
    ("implicit reward margin", "rewards/margins"),
    ("KL on the training pairs, nats", "objective/kl"),
)
# These metrics are in files only; the final table leaves them out.
_JUDGED = ("asked", "cached", "missing", "ties", "calls", "prompt_tokens", "completion_tokens", "cost")
_UNSHOWN = (
    *("eval/greedy_win_rate_previous", "eval/greedy_length", "eval/greedy_eos_rate"),
    *(f"eval/judge/{name}" for name in _JUDGED),
)
_BEFORE_PENALTY = ("eval/raw_reward", "eval/greedy_raw_reward")  # equal to the rewards where there is no penalty
# Of pairs that the policy did not sample: no estimate of the KL.
_OFFLINE_TITLES = {"objective/kl": "mean log-ratio on the pairs, nats"}


def table_rows(names: Iterable[str], *, online: bool, has_penalty: bool) -> list[tuple[str, str]]:
    """Title and metric of each row, with what the stage or ``eval.metrics`` adds to the usual evaluation.

    Args:
        names: the metrics that the run has, in order.
        online: whether the policy samples what it trains on.
        has_penalty: completions can lose some of their score, such as those without EOS.
    """
    unshown = {*_UNSHOWN, *(() if has_penalty else _BEFORE_PENALTY)}
    present = tuple(names)
    known = {name for _, name in EVAL_ROWS} | unshown
    known |= {name for name in present if name.endswith("_se") and name.removesuffix("_se") in present}
    added = [name for name in present if name.startswith("eval/") and name not in known]
    kind = "" if online else "held-out "
    training = [(_OFFLINE_TITLES.get(name, title) if kind else title, name) for title, name in TRAINING_ROWS]
    usual = [row for row in EVAL_ROWS if row[1] not in unshown]
    return [*usual, *((kind + name.removeprefix("eval/"), name) for name in added), *training]
