"""What a key of the command line takes out of a recipe's file, because the two cannot both be meant."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rlxf.config.normalise import Section
from rlxf.core.data_files import indexed_files


def make_room(recipe: Section, typed: Collection[str]) -> list[str]:
    """Take keys of the file out of ``recipe``; what to say about each once the recipe is found to be right."""
    return [*_scorer(recipe, typed), *_evaluation(recipe, typed)]


def _scorer(recipe: Section, typed: Collection[str]) -> list[str]:
    """A typed ``reward.load`` or ``reward.function`` is instead of the other one."""
    reward = recipe.get("reward", {})
    given = [key for key in ("load", "function") if f"reward.{key}" in typed and key in reward]
    if len(given) != 1 or not {"load", "function"} <= reward.keys():
        return []
    other = "load" if given == ["function"] else "function"
    del reward[other]
    if other == "load" and "reward.model" not in typed:
        reward.pop("model", None)
    return [f"reward.{given[0]} is on the command line: reward.{other} of the recipe is left out"]


def _evaluation(recipe: Section, typed: Collection[str]) -> list[str]:
    """A recipe is evaluated on data of its own. Where they are not here, a run on other data goes without them.

    The recipe's metrics judge its own data, and go with them. A plan keeps both: it lists what is missing.
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
