"""Differences between the recipe of a checkpoint and the recipe that resumes it, sorted by their effect on the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlxf.config.folders import tokenizer_files
from rlxf.config.keys import ROLES
from rlxf.config.problems import show
from rlxf.config.schema import RunConfig

# Keys that change no number: where and how often a run writes, how long it waits, what it prints.
_HARMLESS_SECTIONS = ("log", "sync", "eval", "resilience", "health", "plan")
_HARMLESS = {
    *(f"training.{key}" for key in ("resume", "save_interval", "save_hf_interval", "async_save", "eval_interval")),
    "training.eval_only",
    *(f"training.{key}" for key in ("keep_latest", "keep_best", "keep_best_metric", "keep_best_mode")),
    *(f"training.{key}" for key in ("stage_timeout_s", "start_timeout_s", "trust_remote_code")),
    *("training.save_every_minutes", "training.stop_grace_s", "training.max_failed_saves"),
    *("actor_rollout.save", "rollout.gpu_memory_utilization", "rollout.cpu_kv_cache_gib"),
    *("actor_rollout.max_bad_rows", "reward.max_failures", "reward.workers", "reward.timeout_s"),
    *("actor_rollout.data_path", "rollout.replay_path"),  # their content is compared instead
    *("runtime", "dry_run", "rollout.engine"),  # the resulting engine is compared instead
    *("training.train_iters", "actor_rollout.ppo_mini_batch_size"),  # compared with what they depend on
    *(f"judge.{key}" for key in ("token_env", "concurrency", "tries", "timeout_s", "allow_link_local", "batch_size")),
    *(f"judge.{key}" for key in ("max_calls", "max_cost", "prompt_price", "completion_price", "verdicts")),
    *(f"{role}.model" for role in ROLES),  # a name; the shapes are compared
}
# Keys that only change how sums are split: the numbers are equal to float tolerance, but not bit for bit.
_LAYOUT_SECTIONS = ("resource_pool",)
_LAYOUT = {
    *("training.device", "training.cpu_linear", "actor_rollout.num_samples_per_step", "rollout.max_num_seqs"),
    *("rollout.stream_prompts", "rollout.dispatch"),
    *("actor_rollout.num_gpus_for_train", "actor_rollout.num_gpus_for_infer"),
    "actor_rollout.inference_tensor_model_parallel_size",
    *(
        f"{role}.{key}"
        for role in ROLES
        for key in (
            *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
            *("context_parallel_size", "sequence_parallel", "micro_batch_size", "max_tokens_per_micro_batch"),
            *("share_prompts", "recompute_granularity"),
        )
    ),
}
# Keys that decide which tensors a LoRA checkpoint holds.
_SHAPE = ("actor_rollout.lora_r", "actor_rollout.lora_target_modules")
# A key of a model's shape that only bounds the recipe; no tensor depends on it.
_NO_TENSOR = {"max_position_embeddings"}
# Earlier versions stored the recipe's shape, and compared only the other keys with the folder.
_NOT_HELD = {"vocab_size", "untie_embeddings_and_output_weights"}


# Keys that earlier versions did not have, with the value that says what they did.
SINCE: dict[str, Any] = {
    "rollout.lookahead": 0,
    "rollout.stream_prompts": None,
    "rollout.dispatch": "planned",
    "reward.sources": [],
    **dict.fromkeys(("judge.load", "judge.function", "judge.base_url")),
    "algorithm.score_threshold": None,
    "algorithm.max_pairs_per_prompt": None,
    "algorithm.max_length_ratio": None,
    "algorithm.margin_weight": 0.0,
    "actor_rollout.length_penalty": 0.0,
    "actor_rollout.overlong_tokens": 0,
    "actor_rollout.overlong_penalty": 0.0,
    "rollout.min_p": 0.0,
    "rollout.repetition_penalty": 1.0,
    "rollout.stop": [],
    "rollout.structured_outputs": None,
    "actor_rollout.ld_alpha": None,
    "actor_rollout.dpo_weighting": "none",
}

SHAPE_FROM = ("shape_from", "folder")  # key and value in driver.json


@dataclass(frozen=True, slots=True)
class Changes:
    """Each as ``key old -> new``."""

    shape: list[str] = field(default_factory=list)  # the policy's tensors do not fit
    curve: list[str] = field(default_factory=list)  # the run continues with another learning curve
    layout: list[str] = field(default_factory=list)  # the run continues with the same curve, to float tolerance


def compare(before: Mapping[str, Any], config: RunConfig, *, from_folder: bool = True) -> Changes:
    """The changes from a dumped recipe to ``config``; a key that one of the two does not have is left out.

    Args:
        before: the recipe that a run wrote into its folder or checkpoint.
        config: the recipe now.
        from_folder: the shapes in ``before`` are those of the model folders (``SHAPE_FROM``). Earlier versions wrote
            what the recipe said, and compared only a part of it with the folders.
    """
    changes, now = Changes(), config.dump()
    old, new = {**SINCE, **dict(flat(before))}, dict(flat(now))
    for key in old.keys() & new.keys():
        if old[key] == new[key] or key in _HARMLESS or key.startswith(tuple(f"{s}." for s in _HARMLESS_SECTIONS)):
            continue
        if key.endswith(".tokenizer_name_or_path") and _same_tokenizer(key.partition(".")[0], before, now):
            continue
        layout = key in _LAYOUT or key.startswith(tuple(f"{section}." for section in _LAYOUT_SECTIONS))
        kind = changes.shape if key in _SHAPE else changes.layout if layout else changes.curve
        kind.append(_said(key, old[key], new[key]))
    for role in ROLES:
        found = _shape_changes(before, now, role, from_folder=from_folder)
        (changes.shape if role == "actor_rollout" else changes.curve).extend(found)
    changes.curve.extend(_derived(before, now))
    for said in (changes.shape, changes.curve, changes.layout):
        said.sort()
    return changes


def _said(key: str, old: Any, new: Any) -> str:
    return f"{key} {show(old)} -> {show(new)}"


def flat(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """``section.key`` and value of every key but the models', which are compared role by role."""
    for section, values in recipe.items():
        if section == "model":
            continue
        if isinstance(values, Mapping):
            yield from ((f"{section}.{key}", value) for key, value in values.items())
        else:
            yield section, values


def _same_tokenizer(role: str, *recipes: Mapping[str, Any]) -> bool:
    """Whether two recipes give a role the same tokenizer: the same folder, or two folders with the same files."""
    first, second = (recipe[role]["tokenizer_name_or_path"] or recipe[role]["load"] for recipe in recipes)
    if first == second or first is None or second is None:
        return bool(first == second)
    return tokenizer_files(Path(first)) == tokenizer_files(Path(second)) != {}


def _shape_changes(before: Mapping[str, Any], now: Mapping[str, Any], role: str, *, from_folder: bool) -> Iterator[str]:
    old, new = (_explicit(recipe["model"].get(recipe[role]["model"], {})) for recipe in (before, now))
    skip = _NO_TENSOR | (set() if from_folder else _NOT_HELD)
    for key in old.keys() & new.keys() - skip:
        if old[key] != new[key]:
            yield _said(f"model.{now[role]['model']}.{key}", old[key], new[key])


def _explicit(shape: Mapping[str, Any]) -> dict[str, Any]:
    """A dumped shape, its unset keys filled in."""
    heads, width = shape.get("num_attention_heads"), shape.get("hidden_size")
    if not heads or not width:
        return dict(shape)
    groups, head_size = shape.get("num_query_groups") or heads, shape.get("kv_channels") or width // heads
    return {**shape, "num_query_groups": groups, "kv_channels": head_size}


def _derived(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Changes of values that follow from several keys."""
    for name, value_of in _DERIVED.items():
        old, new = value_of(before), value_of(now)
        if old != new:
            yield _said(name, old, new)


def _engine(recipe: Mapping[str, Any]) -> Any:
    return recipe["rollout"]["engine"] or ("vllm" if recipe["runtime"] == "ray" else "hf")


def _mini_batch(recipe: Mapping[str, Any]) -> int:
    """Pairs per optimizer step on all data-parallel ranks."""
    actor = recipe["actor_rollout"]
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    ranks = actor["num_gpus_for_train"]
    for size in sizes:
        ranks //= actor.get(size) or 1
    return int(actor["ppo_mini_batch_size"] * ranks)


def _length_of_schedule(recipe: Mapping[str, Any]) -> int:
    """The number of steps, if the learning rate of a step depends on it."""
    actor = recipe["actor_rollout"]
    depends = actor["lr_decay_style"] != "constant" or actor["lr_warmup_fraction"]
    return int(recipe["training"]["train_iters"]) if depends else 0


_DERIVED = {
    "rollout.engine": _engine,
    "actor_rollout.ppo_mini_batch_size x data-parallel ranks": _mini_batch,
    "training.train_iters (the learning-rate schedule ends there)": _length_of_schedule,
}
