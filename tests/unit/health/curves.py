"""Synthetic runs: a healthy one, row by row, and what is changed in it to make a rule hold."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

from rlxf.health import Health, RunFacts

Change = Mapping[str, float | Callable[[int], float | None] | None]
STEPS = 60
FACTS = RunFacts(num_steps=STEPS, max_new_tokens=32, num_eval_prompts=256)
OFFLINE = RunFacts(stage="dpo", num_steps=STEPS, has_reward=False)


def healthy(step: int) -> dict[str, float | None]:
    """An online step that gets better slowly, with the noise of small batches."""
    noise = random.Random(step)
    done = min(step / STEPS, 1.0)

    def near(value: float, share: float = 0.05) -> float:
        return value * (1 + share * noise.uniform(-1, 1))

    return {
        "loss": near(0.62) if step > 1 else 0.6931,
        "grad_norm": near(0.9, 0.3),
        "beta": 0.2,
        "epoch": step / 3,
        "objective/kl": near(4.0 * done, 0.2),
        "objective/entropy": near(20.0 + 4 * done),
        "objective/scores": near(0.2 + 5.0 * done),
        "objective/scores_margin": near(4.0),
        "score/std": near(3.5),
        "score/at_max": near(0.02),
        "score/length_correlation": near(0.2, 0.5),
        "pair/length_difference": near(1.0, 0.5),
        "pair/tie_rate": near(0.02),
        "rollout/distinct": min(near(0.98, 0.02), 1.0),
        "response_length/mean": near(16.0 + 2 * done),
        "val/contain_eos_token": min(near(0.99, 0.01), 1.0),
        "rewards/accuracies": near(0.68, 0.2) if step > 10 else near(0.48, 0.2),
        "rewards/margins": near(0.3 * done, 0.5),
        "rollout/logp_diff_mean": near(3e-7),
        "rollout/imbalance": 1.0,
        "rollout/tail_s": 0.1,
        "timing/gen": 1.0,
        "sync/version_lag": 0.0,
        "offpolicy/ess": 0.99,
        "timing/idle_train": near(0.6),
        "timing/idle_infer": near(0.5),
        "timing/idle_ref": near(0.9, 0.02),
        "timing/idle_reward": near(0.9, 0.02),
    }


def healthy_offline(step: int) -> dict[str, float | None]:
    """A step of offline DPO whose chosen answers become more probable."""
    done = min(step / STEPS, 1.0)
    return {
        "loss": 0.6931 - 0.1 * done,
        "grad_norm": 0.5,
        "beta": 0.1,
        "epoch": 0.9 * done,
        "objective/kl": 0.5 * done,
        "rewards/accuracies": 0.5 + 0.25 * done,
        "rewards/margins": 0.3 * done,
        "rewards/chosen": 0.1 * done,
        "rewards/rejected": -0.2 * done,
        "logps/chosen": -20.0 + done,
        "logps/rejected": -20.0 - 2 * done,
    }


def evaluation(step: int, *, wins: float | None = None, error: float = 0.03) -> dict[str, float | None]:
    """Of 256 prompts, in step with ``healthy``."""
    share = 0.5 + 0.4 * min(step / STEPS, 1.0) if wins is None else wins
    return {"eval/win_rate": share, "eval/win_rate_se": error, "eval/reward": 5 * share, "eval/reward_se": 0.2}


def rows(
    change: Change | None = None,
    base: Callable[[int], dict[str, float | None]] = healthy,
    steps: int = STEPS,
    every: int = 20,
) -> Iterator[tuple[int, dict[str, float | None]]]:
    """The rows of a run. A change is a value, a function of the step, or None: the metric is missing."""
    for step in range(1, steps + 1):
        row = base(step) | (evaluation(step) if step % every == 0 and base is healthy else {})
        for name, new in (change or {}).items():
            if new is None:
                row.pop(name, None)
            else:
                row[name] = new(step) if callable(new) else new
        yield step, row


def raised(health: Health) -> set[str]:
    return {verdict.name for verdict in health.verdicts}


def follow(
    change: Change | None = None,
    facts: RunFacts = FACTS,
    base: Callable[[int], dict[str, float | None]] = healthy,
    steps: int = STEPS,
) -> Health:
    """A run of such rows, whose initial evaluation is a draw."""
    health = Health(facts)
    if base is healthy:
        health.add_evaluation(0, evaluation(0))
    for step, row in rows(change, base, steps):
        health.add(step, row)
    return health
