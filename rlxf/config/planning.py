"""Whether the keys of the planner fit each other and the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlxf.config.problems import Problem, wrong
from rlxf.config.schema import RunConfig


def plan_problems(config: RunConfig) -> Iterator[Problem]:
    """What is wrong with ``plan.*``. Whether there is such a device is seen when the plan is made."""
    plan, actor = config.plan, config.actor_rollout
    if plan.devices is not None and not config.dry_run:
        yield wrong("plan.devices", plan.devices, "expected dry_run=true beside it: a search does not train", "dry_run")
    if plan.devices is not None and config.runtime == "local":
        expected = "expected runtime=ray: with runtime=local all is in one process, and there is nothing to lay out"
        yield wrong("plan.devices", plan.devices, expected, "runtime")
    if plan.write is not None and plan.devices is None:
        expected = "expected plan.devices beside it, such as plan.devices=16x910b-64: the best layout is written"
        yield wrong("plan.write", plan.write, expected, "plan.devices")
    elif plan.write is not None and Path(plan.write).suffix not in (".yaml", ".yml"):
        yield wrong("plan.write", plan.write, "expected the name of a .yaml file: it is a recipe")
    if plan.prompt_tokens is not None and plan.prompt_tokens >= actor.seq_length:
        expected = f"expected less than actor_rollout.seq_length = {actor.seq_length}: it is the mean of the prompts"
        yield wrong("plan.prompt_tokens", plan.prompt_tokens, expected, "actor_rollout.seq_length")
    longest = actor.seq_length - 1 if config.offline else config.max_new_tokens
    if plan.completion_tokens is not None and plan.completion_tokens > longest > 0:
        expected = f"expected at most {longest}, the longest completion: it is the mean of the completions"
        yield wrong("plan.completion_tokens", plan.completion_tokens, expected, "actor_rollout.max_new_tokens")
