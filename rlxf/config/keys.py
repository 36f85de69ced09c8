"""Which keys a recipe may hold, the older names that are understood, and the nearest key to a wrong one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from rlxf.config.judge import JudgeConfig
from rlxf.config.kinds import Strict
from rlxf.config.plan import PlanConfig
from rlxf.config.roles import ActorConfig, ReferenceConfig, RewardConfig
from rlxf.config.schema import (
    AlgorithmConfig,
    EvalConfig,
    HealthConfig,
    LogConfig,
    ModelConfig,
    ResilienceConfig,
    ResourcePoolConfig,
    RolloutConfig,
    RunConfig,
    SyncConfig,
    TrainingConfig,
)
from rlxf.config.stages import stage_names
from rlxf.core.words import nearest

ROLES: dict[str, type[Strict]] = {"actor_rollout": ActorConfig, "ref": ReferenceConfig, "reward": RewardConfig}
SECTIONS: dict[str, type[Strict]] = {
    "training": TrainingConfig,
    **ROLES,
    "rollout": RolloutConfig,
    "sync": SyncConfig,
    "algorithm": AlgorithmConfig,
    "judge": JudgeConfig,
    "resource_pool": ResourcePoolConfig,
    "resilience": ResilienceConfig,
    "eval": EvalConfig,
    "log": LogConfig,
    "health": HealthConfig,
    "plan": PlanConfig,
}
TOP_LEVEL = tuple(RunConfig.model_fields)
ROLE_KEYS = frozenset(key for role in ROLES.values() for key in role.model_fields)
REFERENCE_LAYOUT = "actor_rollout_ref"  # the reference implementation nests actor_rollout and ref in this section

# Older or misplaced name -> the key that it sets.
ALIASES: dict[tuple[str, str], tuple[str, str]] = {
    ("training", "shuffle"): ("training", "shuffle_minibatch"),
    ("actor_rollout", "shuffle"): ("actor_rollout", "shuffle_minibatch"),
    ("algorithm", "missing_eos_penalty"): ("actor_rollout", "missing_eos_penalty"),
    ("actor_rollout", "refer_model_iter"): ("ref", "refer_model_iter"),
    ("training", "log_interval"): ("log", "interval"),
    ("training", "ref_model"): ("ref", "load"),
    ("actor_rollout", "ref_model"): ("ref", "load"),
}

# Key -> the old path of a library file that recipes name, and the module that replaces it.
MOVED_FILES: dict[tuple[str, str], tuple[str, str]] = {
    ("eval", "metrics"): ("rlxf/tiny/truth.py", "rlxf.tools.tiny.truth"),
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keys of reference recipes that nothing here reads: accepted, and named once in a warning. In this order: keys that
# online DPO does not need; features that are always on, or that the platform decides; values that are in the model
# folder's config.json; ways of padding, preprocessing and restoring that do not exist here.
_LEGACY_ROLE = _words(
    """
    clip_ratio entropy_coeff

    use_kv_cache use_mcore_models use_mc2 use_flash_attn use_fused_rmsnorm use_fused_swiglu use_fused_rotary_pos_emb
    use_distributed_optimizer overlap_grad_reduce overlap_param_gather reuse_fp32_param
    no_masked_softmax_fusion masked_softmax_fusion no_gradient_accumulation_fusion attention_softmax_in_fp32
    distributed_backend distributed_timeout_minutes transformer_impl
    recompute_method recompute_num_layers

    use_rotary_position_embeddings position_embedding_type rotary_base rope_scaling_type rope_scaling_factor
    low_freq_factor high_freq_factor original_max_position_embeddings rope_scaling_low_freq_factor
    rope_scaling_high_freq_factor rope_scaling_original_max_position_embeddings group_query_attention
    make_vocab_size_divisible_by disable_bias_linear add_qkv_bias attention_dropout hidden_dropout init_method_std
    normalization norm_epsilon swiglu

    tokenizer_type tokenizer_not_use_fast is_instruction_dataset is_pairwise_dataset variable_seq_lengths
    pad_to_multiple_of finetune no_load_optim no_load_rng no_save_optim no_save_rng no_shared_storage
    eval_iters lora_fusion
    """
)
LEGACY: dict[str, frozenset[str]] = {
    "training": _LEGACY_ROLE,
    "model": _LEGACY_ROLE,
    "actor_rollout": _LEGACY_ROLE,
    **dict.fromkeys(("ref", "reward"), _LEGACY_ROLE | {"split"}),  # of the actor's data
    "algorithm": _words(
        "gamma lam adv_estimator kl_penalty kl_ctrl kl_coef kl_target kl_horizon clip_ratio entropy_coeff"
    ),
}

_NO_EXPERTS = "mixture-of-experts models are not supported; the families are those of docs/architecture.md"
# Keys of features that this version does not have: only the value that switches them off is accepted.
NOT_YET: dict[str, Any] = {
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "num_experts": None,
    "use_moe": False,
}
WHY_NOT_YET = dict.fromkeys(NOT_YET, _NO_EXPERTS)
# Sections and stages of reference recipes that mean another algorithm, and what to do instead.
REFUSED_SECTIONS = {
    "critic": "there is no critic here: DPO compares completions and needs no value function; remove the section",
    "megatron_training": "the sections of this program are training, actor_rollout, ref and reward; docs/migration.md "
    "lists the keys",
}
_ONLINE = ", ".join(stage_names(online=True))
_POLICY_GRADIENT = f"policy gradients are not trained here; the online stage is {_ONLINE}, which needs no critic"
REFUSED_STAGES = {
    **dict.fromkeys(("ray_ppo", "ray_grpo", "trl_ppo", "ppo", "grpo"), _POLICY_GRADIENT),
    **dict.fromkeys(("simpo", "orpo"), "is a loss here: set training.stage=dpo and actor_rollout.dpo_loss_type to it"),
    "online_dpo": "is called ray_online_dpo",
    "prm": "process reward models are not trained here; rm trains an outcome reward model on pairs",
    "pretrain": "pre-training is not done here; sft trains on examples, its data_path may be GeneralPretrainHandler's",
}

# What other programs call our keys.
_SYNONYMS: dict[str, str] = {
    "beta": "actor_rollout.dpo_beta",
    "loss_type": "actor_rollout.dpo_loss_type",
    "label_smoothing": "actor_rollout.dpo_label_smoothing",
    "learning_rate": "actor_rollout.lr",
    "lr_scheduler_type": "actor_rollout.lr_decay_style",
    "warmup_steps": "actor_rollout.lr_warmup_iters",
    "warmup_ratio": "actor_rollout.lr_warmup_fraction",
    "max_grad_norm": "actor_rollout.clip_grad",
    "max_length": "actor_rollout.seq_length",
    "max_steps": "training.train_iters",
    "num_train_epochs": "training.epochs",
    "total_epochs": "training.epochs",
    "total_training_steps": "training.train_iters",
    "per_device_train_batch_size": "actor_rollout.micro_batch_size",
    "gradient_accumulation_steps": "actor_rollout.ppo_mini_batch_size",
    "accumulation_steps": "actor_rollout.ppo_mini_batch_size",
    "gradient_checkpointing": "actor_rollout.recompute_granularity",
    "grad_clip": "actor_rollout.clip_grad",
    "model_name_or_path": "actor_rollout.load",
    "reward_model_path": "reward.load",
    "reward_weights": "reward.sources",
    "reward_funcs": "reward.sources",
    "use_vllm": "rollout.engine",
    "vllm_mode": "resource_pool.colocate",
    "vllm_tensor_parallel_size": "actor_rollout.inference_tensor_model_parallel_size",
    "output_dir": "actor_rollout.save",
    "dataset_name": "actor_rollout.data_path",
    "train_files": "actor_rollout.data_path",
    "val_files": "eval.data_path",
    "truncation_mode": "actor_rollout.prompt_overflow",
    "max_completion_length": "actor_rollout.max_new_tokens",
    "max_response_length": "actor_rollout.max_new_tokens",
    "soft_punish_cache": "actor_rollout.overlong_tokens",
    "overlong_buffer": "actor_rollout.overlong_tokens",
    "use_weighting": "actor_rollout.dpo_weighting",
    "stop_strings": "rollout.stop",
    "stop_sequences": "rollout.stop",
    "guided_decoding_regex": "rollout.structured_outputs",
    "vllm_guided_decoding_regex": "rollout.structured_outputs",
    "vllm_structured_outputs_regex": "rollout.structured_outputs",
    "structured_outputs_regex": "rollout.structured_outputs",
    "rpo_alpha": "actor_rollout.dpo_loss_weights",
    "gamma_beta_ratio": "actor_rollout.simpo_gamma",
    "sync_ref_model": "ref.ref_update_interval",
    "ref_model_sync_steps": "ref.ref_update_interval",
    "num_generations": "actor_rollout.n_samples_per_prompt",
    "mini_batch_size": "actor_rollout.ppo_mini_batch_size",
    "batch_size": "training.global_batch_size",
    "train_batch_size": "training.global_batch_size",
    "save_steps": "training.save_interval",
    "save_freq": "training.save_interval",
    "eval_steps": "training.eval_interval",
    "test_freq": "training.eval_interval",
    "logging_steps": "log.interval",
    "use_wandb": "log.report_to",
    "project_name": "log.project",
    "experiment_name": "log.run_name",
    "logger": "log.report_to",
    "resume_from_checkpoint": "training.resume",
    "resume_mode": "training.resume",
    "save_total_limit": "training.keep_latest",
    "max_actor_ckpt_to_keep": "training.keep_latest",
    "save_top_k": "training.keep_best",
    "load_best_model_at_end": "training.keep_best",
    "metric_for_best_model": "training.keep_best_metric",
    "greater_is_better": "training.keep_best_mode",
    "tp": "actor_rollout.tensor_model_parallel_size",
    "lora_rank": "actor_rollout.lora_r",
    "target_modules": "actor_rollout.lora_target_modules",
    "load_in_4bit": "actor_rollout.qlora",
    "padded_vocab_size": "model.<name>.vocab_size",
    "num_hidden_layers": "model.<name>.num_layers",
    "intermediate_size": "model.<name>.ffn_hidden_size",
    "num_key_value_heads": "model.<name>.num_query_groups",
    "head_dim": "model.<name>.kv_channels",
}


def keys_of(section: str) -> frozenset[str]:
    """The keys that a section may hold; ``training`` and ``model.<name>`` also hold defaults for the roles."""
    if section == "model":
        return frozenset(ModelConfig.model_fields) | (ROLE_KEYS - {"model"})
    own = frozenset(SECTIONS[section].model_fields)
    return own | ROLE_KEYS if section == "training" else own


def is_legacy(section: str, key: str) -> bool:
    return key in LEGACY.get(section, ())


def is_not_yet(section: str, key: str) -> bool:
    return (key in NOT_YET or key.startswith("moe_")) and section in ("training", "model", *ROLES)


def is_known(path: Sequence[str]) -> bool:
    """Whether a recipe may hold this key, such as ``("actor_rollout", "lr")``; a whole section is known, too."""
    path = plain_layout(path)
    if len(path) == 1:
        return path[0] in TOP_LEVEL or path[0] == REFERENCE_LAYOUT
    section, *rest = path
    if section == "model":
        rest = rest[1:]
        if not rest:
            return True
    elif section not in SECTIONS:
        return False
    key = rest[0]
    if is_legacy(section, key):
        return True
    known = (
        key in keys_of(section)
        or (section, key) in ALIASES
        or is_not_yet(section, key)
        or (section, key) == ("model", "padded_vocab_size")
    )
    return known and len(rest) == 1


def plain_layout(path: Sequence[str]) -> tuple[str, ...]:
    """The path of a key of the reference layout in ours."""
    nested = len(path) > 1 and path[0] == REFERENCE_LAYOUT and path[1] in ("actor_rollout", "ref")
    return tuple(path[1:] if nested else path)


def unknown_key(path: Sequence[str]) -> str:
    """The message about an unknown key: the nearest valid key, the keys of its section, or why it is refused."""
    path = plain_layout(path)
    section, key = path[0], path[-1]
    if section in REFUSED_SECTIONS:
        return REFUSED_SECTIONS[section]
    if section in SECTIONS or section == "model":
        return "unknown key" + _within(path, section, key)
    if len(path) == 1:
        return "unknown key" + _hint(_place(key) or nearest(key, TOP_LEVEL) or _close_place(key))
    near = nearest(section, [*SECTIONS, "model"])
    renamed = (near, *path[1:]) if near else ()
    hint = ".".join(renamed) if renamed and is_known(renamed) else _place(key) or near or _close_place(key)
    return f"unknown section {section!r}" + (_hint(hint) or f"; known: {', '.join(TOP_LEVEL)}")


def _within(path: Sequence[str], section: str, key: str) -> str:
    """The hint for a wrong key of a section that exists."""
    depth = 3 if section == "model" else 2
    if len(path) > depth:
        return f"; nothing is nested below {'.'.join(path[:depth])}"
    prefix = ".".join(path[:-1])
    here = nearest(key, keys_of(section))
    hint = _place(key) or (f"{prefix}.{here}" if here else None) or _close_place(key)
    if hint is None:
        return f"; {prefix} holds {', '.join(sorted(keys_of(section)))}"
    return _hint(hint.replace("model.<name>", prefix) if section == "model" else hint)


def _hint(key: str | None) -> str:
    return f'; did you mean "{key}"?' if key else ""


@cache
def _places() -> Mapping[str, str]:
    """Each key -> its full name; a key of several roles is the actor's."""
    places = {key: f"model.<name>.{key}" for key in ModelConfig.model_fields}
    for section in (
        "judge",
        "health",
        "log",
        "eval",
        "resilience",
        "resource_pool",
        "algorithm",
        "sync",
        "rollout",
        "reward",
        "ref",
        "training",
        "actor_rollout",
    ):
        places |= {key: f"{section}.{key}" for key in SECTIONS[section].model_fields}
    return places


def _place(key: str) -> str | None:
    """The full name of the key that is meant by a key in the wrong section, or by another program's name for it."""
    return _SYNONYMS.get(key) or _places().get(key)


def _close_place(key: str) -> str | None:
    near = nearest(key, _places())
    return _places()[near] if near else None
