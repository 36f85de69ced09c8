"""Each rule on synthetic curves: what must raise it, and what must not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from rlxf.health import RULES, Health, RunFacts
from rlxf.health.rules import EVALUATED, STEPPED
from tests.unit.health.curves import (
    FACTS,
    OFFLINE,
    STEPS,
    Change,
    evaluation,
    follow,
    healthy,
    healthy_offline,
    raised,
    rows,
)


def to(start: float, end: float) -> Callable[[int], float]:
    """A straight line over the run."""
    return lambda step: start + (end - start) * min(step / STEPS, 1.0)


def after(step: int, first: float, then: float) -> Callable[[int], float]:
    return lambda now: then if now > step else first


DEVICES = replace(FACTS, on_cpu=False)
SFT = RunFacts(stage="sft", num_steps=STEPS, has_reward=False)
FAR = {"objective/kl": to(0, 18)}  # a nat a token at 18 tokens

# Rule -> changes of a healthy run that must raise it, each with the facts of the run.
RAISING: dict[str, list[tuple[Change, RunFacts]]] = {
    "over_optimised": [
        ({"objective/kl": to(0, 12), "rollout/distinct": to(1, 0.5)}, FACTS),
        ({"objective/kl": to(0, 12), "objective/entropy": to(20, 8)}, FACTS),
        (
            {"objective/kl": to(0, 12), "objective/entropy": to(20, 8), "score/std": None, "rollout/distinct": None},
            FACTS,
        ),
        (
            {"objective/kl": to(0, 12), "rollout/distinct": to(1, 0.5), "objective/scores": None},
            replace(FACTS, has_judge=True, has_reward=False),
        ),
    ],
    "length_exploitation": [
        ({"score/length_correlation": 0.9, "response_length/mean": to(16, 30)}, FACTS),
        ({"score/length_correlation": -0.9, "response_length/mean": to(16, 6)}, FACTS),
    ],
    "eos_lost": [
        ({"val/contain_eos_token": to(1, 0.4)}, FACTS),
        ({"val/contain_eos_token": 0.3}, FACTS),
        ({"val/contain_eos_token": to(0.97, 0.8)}, FACTS),
    ],
    "collapsed": [
        ({"rollout/distinct": to(1, 0.2)}, FACTS),
        ({"rollout/distinct": None, "objective/entropy": to(20, 1)}, FACTS),
    ],
    "useless_reward": [
        ({"score/std": 0.0, "pair/tie_rate": 1.0}, FACTS),
        ({"score/std": None, "pair/tie_rate": 1.0}, FACTS),
        ({"score/at_max": to(0.7, 1.0)}, FACTS),
        ({"judge/agrees_with_scores": 0.5}, replace(FACTS, has_judge=True)),
        ({"judge/agrees_with_scores": 0.1}, replace(FACTS, has_judge=True)),
        ({"rewards/accuracies": 0.5, "objective/scores": 0.1}, FACTS),
        ({"rewards/accuracies": 0.5, "objective/scores": to(0.1, 0.4)}, FACTS),
    ],
    "ties_rising": [({"pair/tie_rate": to(0, 0.8)}, FACTS)],
    "reference_too_near": [
        ({"objective/kl": 0.001, "objective/scores": 0.1}, FACTS),
        ({"objective/kl": 0.001, "objective/scores": 0.1}, replace(FACTS, num_steps=0)),
    ],
    "reference_too_far": [(FAR | {"objective/kl": to(0, 40)}, FACTS)],
    "rate_too_high": [
        ({"loss": after(1, 0.693, 1.2)}, FACTS),
        ({"rewards/accuracies": 0.3, "rewards/margins": -0.5}, FACTS),
        ({"grad_norm": after(12, 1, 60)}, FACTS),
    ],
    "stale_engine": [
        ({"rollout/logp_diff_mean": to(3e-7, 0.02)}, FACTS),
        ({"rollout/logp_diff_mean": 0.3}, FACTS),
    ],
    "staleness_hurts": [
        ({"sync/version_lag": 8.0, "offpolicy/ess": 0.05, "rewards/accuracies": 0.5}, replace(FACTS, lookahead=8)),
        ({"sync/version_lag": 8.0, "offpolicy/ess": 0.05, "loss": after(1, 0.693, 0.9)}, replace(FACTS, lookahead=8)),
    ],
    "evaluation_too_small": [({}, replace(FACTS, num_eval_prompts=16))],
    "one_engine_bounds": [({"rollout/imbalance": 1.8, "rollout/tail_s": 0.7}, FACTS)],
    "pool_idle": [
        ({"timing/idle_train": 0.9}, DEVICES),
        ({"timing/idle_ref": 0.99}, DEVICES),
        ({"timing/idle_train": 0.95, "timing/idle_infer": 0.95}, replace(DEVICES, sharing=("train", "infer"))),
    ],
}
# The same for the stages that read a file.
RAISING_OFFLINE: dict[str, list[tuple[Change, RunFacts]]] = {
    "offline_collapse": [
        (
            {
                "rewards/chosen": to(0, -0.4), "rewards/rejected": to(0, -0.8), "logps/chosen": -24.0,
                "logps/rejected": -28.0,
            },
            OFFLINE,
        )
    ],
    "data_repeated": [({"epoch": to(0, 8)}, OFFLINE), ({"epoch": to(0, 8)}, SFT)],
    "reference_too_far": [({"rewards/margins": to(0, 9), "rewards/accuracies": to(0.5, 1.0)}, OFFLINE)],
    "rate_too_high": [({"loss": after(1, 0.693, 2.0)}, SFT)],
}  # fmt: skip
CASES = [
    pytest.param(name, change, facts, base, id=f"{name} {number}")
    for cases, base in ((RAISING, healthy), (RAISING_OFFLINE, healthy_offline))
    for name, found in cases.items()
    for number, (change, facts) in enumerate(found)
]

# Changes that look like a fault and are none.
INNOCENT: list[tuple[Change, RunFacts]] = [
    ({}, FACTS),
    ({"response_length/mean": to(16, 30)}, FACTS),  # longer, and the score does not follow the length
    ({"score/length_correlation": 0.9}, FACTS),  # follows it, and answers are no longer
    ({"objective/kl": to(0, 12)}, FACTS),  # far, as various as before
    ({"objective/kl": to(0, 12), "rollout/distinct": to(1, 0.6), "objective/scores": to(0.2, 0.9)}, FACTS),  # no better
    (
        {
            "objective/kl": to(0, 12), "rollout/distinct": to(1, 0.6), "objective/scores": None, "eval/win_rate": 0.55,
            "eval/win_rate_se": 0.03,
        },
        replace(FACTS, has_judge=True, has_reward=False),
    ),
    ({"rollout/distinct": None, "objective/entropy": to(20, 12)}, FACTS),
    ({"pair/tie_rate": to(0, 0.27)}, FACTS),
    ({"pair/tie_rate": to(0.35, 0.45)}, FACTS),
    ({"objective/kl": 0.001}, FACTS),  # near, and scores rise
    ({"rewards/margins": to(0, 9)}, FACTS),  # of a part of the pairs
    ({"rewards/margins": -0.5}, FACTS),
    ({"rollout/logp_diff_mean": to(3e-7, 5e-5)}, FACTS),
    ({"eval/win_rate": 0.9, "eval/win_rate_se": 0.05}, FACTS),  # few prompts, and a difference that shows
    ({"rollout/distinct": 0.2}, FACTS),  # short answers that were the same from the start
    ({"pair/tie_rate": 0.4}, FACTS),
    ({"val/contain_eos_token": 0.8}, FACTS),
    ({"rollout/logp_diff_mean": 0.02}, FACTS),  # bf16
    ({"grad_norm": lambda step: 50.0 if step == 30 else 1.0}, FACTS),  # one row
    ({"loss": lambda step: 3.0 if step == 30 else 0.62}, FACTS),
    ({"score/at_max": lambda step: 1.0 if step in (30, 31) else 0.05}, FACTS),
    ({"loss": after(1, 0.693, 1.2), "pair/tie_rate": 0.9}, FACTS),  # of a few pairs
    ({"rewards/accuracies": 0.5}, FACTS),  # scores rise
    ({"rewards/accuracies": 0.5, "objective/scores": 0.1, "objective/kl": to(0, 0.1)}, FACTS),  # has not begun to learn
    ({"score/length_correlation": -0.9, "response_length/mean": to(16, 30)}, FACTS),
    ({"sync/version_lag": 8.0, "offpolicy/ess": 0.05}, FACTS),  # old, and still learning
    ({"offpolicy/ess": 0.05, "rewards/accuracies": 0.55}, FACTS),  # no lag
    ({"timing/idle_train": 0.95, "timing/idle_ref": 0.99}, replace(FACTS, on_cpu=True)),
    ({"timing/idle_train": 0.95}, replace(FACTS, local=True)),
    ({"timing/idle_ref": 0.99}, replace(FACTS, sharing=("train", "ref"))),  # the trainer works on its devices
    ({"rollout/imbalance": 1.8}, FACTS),
    ({"rollout/tail_s": 0.9}, FACTS),  # one engine, and a long answer
    ({"epoch": to(0, 40)}, FACTS),  # online prompts
    ({"judge/agrees_with_scores": 0.85}, replace(FACTS, has_judge=True)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "facts", "base"), CASES)
def test_a_fault_raises_its_rule(
    name: str, change: Change, facts: RunFacts, base: Callable[[int], dict[str, float | None]]
) -> None:
    assert name in raised(follow(change, facts, base))


@pytest.mark.parametrize(("change", "facts"), INNOCENT)
def test_what_only_looks_like_a_fault_raises_nothing(change: Change, facts: RunFacts) -> None:
    assert raised(follow(change, facts)) == set()


@pytest.mark.parametrize("facts", [OFFLINE, SFT])
def test_a_healthy_run_on_a_file_raises_nothing(facts: RunFacts) -> None:
    assert raised(follow({}, facts, healthy_offline)) == set()


def test_log_probs_that_fall_while_nothing_is_learned_are_no_offline_collapse() -> None:
    fall = {"rewards/chosen": -0.4, "rewards/rejected": -0.4, "logps/chosen": -24.0, "logps/rejected": -24.0}
    assert raised(follow({**fall, "rewards/accuracies": 0.5}, OFFLINE, healthy_offline)) == set()


def test_every_rule_has_a_case() -> None:
    assert {*RAISING, *RAISING_OFFLINE} == set(RULES)


@pytest.mark.parametrize("missing", [*STEPPED, *EVALUATED])
def test_a_healthy_run_without_a_metric_raises_nothing(missing: str) -> None:
    assert raised(follow({missing: None}, steps=40)) == set()


@pytest.mark.parametrize(("name", "change", "facts", "base"), CASES)
def test_a_rule_whose_metrics_are_missing_says_nothing(
    name: str, change: Change, facts: RunFacts, base: Callable[[int], dict[str, float | None]]
) -> None:
    nothing: Change = dict.fromkeys([*STEPPED, *EVALUATED])
    assert raised(follow(nothing, replace(facts, num_eval_prompts=0), base)) == set()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_raise_nothing(value: float) -> None:
    for facts in (FACTS, OFFLINE, RunFacts()):
        assert raised(follow(dict.fromkeys([*STEPPED, *EVALUATED], value), facts)) == set()


@pytest.mark.parametrize(("name", "change", "facts", "base"), CASES)
def test_a_few_unknown_rows_change_nothing(
    name: str, change: Change, facts: RunFacts, base: Callable[[int], dict[str, float | None]]
) -> None:
    """A step without pairs has no loss."""
    health = Health(facts)
    health.add_evaluation(0, evaluation(0))
    for step, row in rows(change, base):
        unknown = {key: math.nan for key in row if not key.startswith("eval/")}
        health.add(step, row if step % 5 else row | unknown)
    assert name in raised(health)


def test_short_runs_raise_what_needs_no_window_only() -> None:
    for name, found in RAISING.items():
        for change, facts in found:
            few = raised(follow(change, facts, steps=5))
            assert few <= {"useless_reward"}, name
    assert raised(follow({"score/std": 0.0}, steps=3)) == {"useless_reward"}
