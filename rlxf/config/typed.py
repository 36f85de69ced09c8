"""Keys of a recipe's file that a key on the command line replaces, because the two exclude each other."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rlxf.config.judge import OWN_KEYS
from rlxf.config.keys import ROLES
from rlxf.config.normalise import Section
from rlxf.config.stages import stage_names
from rlxf.core.data_files import indexed_files


def make_room(recipe: Section, typed: Collection[str]) -> list[str]:
    """Remove replaced keys from ``recipe``. Returns a note for each, to log once the recipe has passed its checks."""
    rules = (_scorer, _judge, _evaluation, _lookahead, _budget)
    return [note for rule in rules for note in rule(recipe, typed)]


def _budget(recipe: Section, typed: Collection[str]) -> list[str]:
    """A typed ``micro_batch_size`` replaces the section's token budget, with which it would have no effect.

    Not with a virtual pipeline, which needs a budget.
    """
    notes = []
    for name in ("training", *ROLES):
        section, budget = recipe.get(name, {}), f"{name}.max_tokens_per_micro_batch"
        given = f"{name}.micro_batch_size"
        virtual = (recipe.get(where, {}).get("virtual_pipeline_model_parallel_size") for where in ("training", name))
        if given in typed and budget not in typed and section.get("max_tokens_per_micro_batch") and not any(virtual):
            del section["max_tokens_per_micro_batch"]
            notes.append(f"{given} is on the command line: {budget} of the recipe is left out")
    return notes


def _lookahead(recipe: Section, typed: Collection[str]) -> list[str]:
    """A typed layout in which train and infer share devices, or a typed stage of a file, replaces the lookahead."""
    rollout = recipe.get("rollout", {})
    if "rollout.lookahead" in typed or not rollout.get("lookahead"):
        return []
    shared = recipe.get("resource_pool", {}).get("colocate")
    if "resource_pool.colocate" in typed and isinstance(shared, list) and {"train", "infer"} <= {*map(str, shared)}:
        reason = "resource_pool.colocate is on the command line, with train and infer"
    elif "training.stage" in typed and recipe["training"]["stage"] in stage_names(online=False):
        reason = "training.stage is on the command line, and reads a file"
    else:
        return []
    del rollout["lookahead"]
    return [f"{reason}: rollout.lookahead of the recipe is left out"]


def _scorer(recipe: Section, typed: Collection[str]) -> list[str]:
    """A typed ``reward.load``, ``reward.function`` or ``reward.sources`` replaces the others."""
    reward, keys = recipe.get("reward", {}), ("load", "function", "sources")
    given = [key for key in keys if f"reward.{key}" in typed and key in reward]
    others = [key for key in keys if key in reward and key not in given]
    if len(given) != 1 or not others:
        return []
    for other in others:
        del reward[other]
    if "load" in others and "reward.model" not in typed:
        reward.pop("model", None)
    left = " and ".join(f"reward.{other}" for other in others)
    return [f"reward.{given[0]} is on the command line: {left} of the recipe is left out"]


def _judge(recipe: Section, typed: Collection[str]) -> list[str]:
    """A typed ``judge.load``, ``judge.function`` or ``judge.base_url`` replaces the others, and what only they read."""
    judge = recipe.get("judge", {})
    given = [key for key in OWN_KEYS if f"judge.{key}" in typed and key in judge]
    others = [key for key in OWN_KEYS if key in judge and key not in given]
    if len(given) != 1 or not others:
        return []
    for other in others:
        for key in (other, *OWN_KEYS[other]):
            if key == other or f"judge.{key}" not in typed:
                judge.pop(key, None)
    left = " and ".join(f"judge.{other}" for other in others)
    return [f"judge.{given[0]} is on the command line: {left} of the recipe is left out"]


def _evaluation(recipe: Section, typed: Collection[str]) -> list[str]:
    """Remove the recipe's evaluation data if the user types other training data and the evaluation data do not exist.

    The recipe's ``eval.metrics`` judge these data, so they are removed as well. A dry run keeps both, to list what is
    missing.
    """
    evaluation = recipe.get("eval", {})
    section = "actor_rollout" if "data_path" in recipe.get("actor_rollout", {}) else "training"  # whose value counts
    if f"{section}.data_path" not in typed or "eval.data_path" in typed or recipe.get("dry_run"):
        return []
    paths = evaluation.get("data_path")
    listed = [paths] if isinstance(paths, str) else paths
    if not isinstance(listed, list) or not listed or not all(isinstance(path, str) for path in listed):
        return []
    if any(path.exists() or indexed_files(path) for path in (Path(text).expanduser() for text in listed)):
        return []
    dropped = ["data_path", *(["metrics"] if "metrics" in evaluation and "eval.metrics" not in typed else [])]
    for key in dropped:
        del evaluation[key]
    keys, are = " and ".join(f"eval.{key}" for key in dropped), "is" if len(dropped) == 1 else "are"
    return [
        f"{section}.data_path is on the command line: {keys} of the recipe, whose data are not here, {are} left out"
    ]
