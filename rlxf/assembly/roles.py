"""Building each role's room from a recipe, for the process that holds it.

A room's imports are inside its function, so that a process imports only what it holds.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlxf.config.config_json import read_settings, shape_of
from rlxf.config.roles import RewardConfig, RoleConfig
from rlxf.config.schema import RunConfig
from rlxf.core.errors import ConfigError
from rlxf.platform.base import Platform, Process

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlxf.models.backend import RoleName
    from rlxf.models.batching import MicroBatchLimits
    from rlxf.models.megatron.model import MegatronModel
    from rlxf.reference.frozen import FrozenReference
    from rlxf.rollout.engine import EngineSettings, RolloutEngine
    from rlxf.score.scorer import ModelScorer, SampledBy, Scorer, ScorerParts
    from rlxf.update.actor import MegatronActor
    from rlxf.update.objective import ObjectiveSettings


def build_actor(config: RunConfig, platform: Platform, process: Process) -> MegatronActor:
    """One rank of the actor.

    Raises:
        ModelError: ``actor_rollout.load`` does not hold a model of the recipe's stage.
    """
    from rlxf.update import OBJECTIVES
    from rlxf.update.actor import ActorSettings, MegatronActor
    from rlxf.update.objective import ObjectiveContext

    actor, training = config.actor_rollout, config.training
    model = load_role(config, "actor_rollout", platform, process)
    limits = limits_of(actor)
    if config.rows == "examples":  # an example is one sequence where a pair is two
        limits = replace(limits, num_sequences=actor.micro_batch_size)
    context = ObjectiveContext(model=model, limits=limits)
    objective = OBJECTIVES[config.objective](objective_settings(config), context)
    settings = ActorSettings(
        optimizer=actor,
        lora=actor,
        limits=limits,
        num_steps=training.train_iters,
        seed=training.seed,
        bucket_bytes=config.sync.bucket_mb * 2**20,
        ld_alpha=actor.ld_alpha,
    )
    own = actor.tokenizer_name_or_path or actor.prompt_type or actor.eos_tokens
    return MegatronActor(
        model, objective, settings, save_tokenizer=partial(save_policy_tokenizer, config) if own else None
    )


def objective_settings(config: RunConfig) -> ObjectiveSettings:
    """What an objective must know of its run."""
    from rlxf.update.objective import ObjectiveSettings

    return ObjectiveSettings(
        config=config.actor_rollout,
        offline=config.offline,
        has_reference=config.needs_reference,
        margin_weight=config.algorithm.margin_weight,
    )


def build_reference(config: RunConfig, platform: Platform, process: Process) -> FrozenReference:
    """One rank of the reference.

    Raises:
        ModelError: ``ref.load`` does not hold a causal language model.
    """
    from rlxf.reference.frozen import FrozenReference

    model = load_role(config, "ref", platform, process)
    moves = config.ref.ref_update_interval > 0
    return FrozenReference(model, limits_of(config.ref), moves=moves, ld_alpha=config.actor_rollout.ld_alpha)


def build_models(config: RunConfig, platform: Platform, process: Process) -> dict[str, ModelScorer]:
    """One rank of each reward model, by the name of its source.

    Raises:
        ModelError: a folder does not hold a reward model.
    """
    from rlxf.score import SCORERS

    parts = {name: _scorer_parts(config, section, platform, process) for name, section in config.reward_models.items()}
    # What the entry `model` builds scores texts, too.
    return {name: cast("ModelScorer", SCORERS["model"](part)) for name, part in parts.items()}


def build_scorer(config: RunConfig, platform: Platform, process: Process) -> Scorer:
    """One rank of the reward model of ``reward.load``, or the scores of a replay.

    Raises:
        ModelError: ``reward.load`` does not hold a reward model.
    """
    from rlxf.score import SCORERS

    return SCORERS[config.scorer](_scorer_parts(config, config.reward, platform, process))


def _scorer_parts(config: RunConfig, reward: RewardConfig, platform: Platform, process: Process) -> ScorerParts:
    from rlxf.models.tokenizer import load_tokenizer
    from rlxf.score import ScorerParts

    trust = config.training.trust_remote_code
    return ScorerParts(
        config=reward,
        limits=limits_of(reward),
        recording=config.rollout.replay_path,
        policy=partial(sampled_by, config),
        load_model=partial(load_role, config, "reward", platform, process, section=reward),
        load_tokenizer=lambda: load_tokenizer(_tokenizer_folder(reward, "reward"), trust_remote_code=trust),
    )


def sampled_by(config: RunConfig) -> SampledBy:
    """The policy, as far as a scorer knows it."""
    from rlxf.models.tokenizer import declared_eos_ids
    from rlxf.score.scorer import SampledBy

    actor, tokenizer = config.actor_rollout, policy_tokenizer(config)
    return SampledBy(tokenizer, declared_eos_ids(actor.load, tokenizer, actor.eos_tokens))


def build_engine(
    config: RunConfig, platform: Platform, process: Process | None = None, *, stale: bool = False
) -> RolloutEngine:
    """One rollout engine. ``process`` plays no part: engines do not know of each other.

    ``stale``: it samples only after a push; one that takes the place of another must not sample from the folder.
    """
    from rlxf.rollout import ENGINES

    settings = engine_settings(config)
    if settings.rollout.gpu_memory_utilization is None:
        update = {"gpu_memory_utilization": _share_of_memory(config, platform)}
        settings = replace(settings, rollout=settings.rollout.model_copy(update=update))
    return ENGINES[config.engine](replace(settings, stale=stale), platform)


_MOST = 0.95  # of a device's memory, for an engine whose plan does not fit: vLLM then says what is missing


def _share_of_memory(config: RunConfig, platform: Platform) -> float | None:
    """What an engine takes of this device if the recipe leaves it open: what the other roles of the device leave.

    None: there is no vLLM engine on a device with a memory of its own.
    """
    from rlxf.assembly.planning import run_device
    from rlxf.planner.jobs import jobs_of
    from rlxf.planner.memory import utilization_of

    memory = platform.total_memory()
    if not memory:
        return None
    device, _ = run_device(config, platform)
    share = utilization_of(jobs_of(config), device.with_memory(memory))
    return None if share is None else min(share, _MOST)


def engine_settings(config: RunConfig) -> EngineSettings:
    """What a recipe's rollout engine is started with."""
    from rlxf.rollout.engine import EngineSettings

    actor, folder = config.actor_rollout, policy_folder(config)
    return EngineSettings(
        model=folder,
        tokenizer=actor.tokenizer_name_or_path or folder,
        dtype=actor.dtype,
        max_length=actor.seq_length,
        eos_tokens=actor.eos_tokens,
        prompts_per_call=actor.num_samples_per_step,
        num_devices=actor.inference_tensor_model_parallel_size,
        colocated=config.takes_turns,
        rollout=config.rollout,
        trust_remote_code=config.training.trust_remote_code,
    )


def load_role(
    config: RunConfig, role: RoleName, platform: Platform, process: Process, *, section: RoleConfig | None = None
) -> MegatronModel:
    """This rank's share of a role's model. ``section``: what it is loaded by; without it the recipe's."""
    from rlxf.models.backend import LoadSettings, load_model

    actor, training = config.actor_rollout, config.training
    sections: dict[RoleName, RoleConfig] = {"actor_rollout": actor, "ref": config.ref, "reward": config.reward}
    section, is_actor = section or sections[role], role == "actor_rollout"
    trained_as_reward = is_actor and config.objective == "reward"
    settings = LoadSettings(
        role=role,
        shape=config.model.get(section.model) if section.model else shape_of(read_settings(Path(str(section.load)))),
        seed=training.seed,
        timeout_s=training.stage_timeout_s,
        trust_remote_code=training.trust_remote_code,
        reward=role == "reward" or trained_as_reward,
        new_head=trained_as_reward,
        recompute=actor.recompute_granularity if is_actor else "none",
        lora=actor if is_actor else None,
    )
    return load_model(section, settings, platform, process)


def limits_of(role: RoleConfig) -> MicroBatchLimits:
    """How much one forward pass of a role takes; pieces of a virtual pipeline pass on tensors of one size."""
    from rlxf.models.batching import MicroBatchLimits

    return MicroBatchLimits.of(role, fixed_length=role.virtual_pipeline_model_parallel_size > 1)


def _tokenizer_folder(role: RoleConfig, name: str) -> str:
    folder = role.tokenizer_name_or_path or role.load
    if folder is None:
        raise ConfigError(f"{name}.tokenizer_name_or_path: expected a tokenizer folder, got none")
    return folder


def policy_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer: prompts, completions and decoded texts are in its tokens.

    Raises:
        ConfigError: ``actor_rollout.prompt_type`` names no chat template.
    """
    from rlxf.data.templates import chat_template
    from rlxf.models.tokenizer import load_tokenizer

    actor = config.actor_rollout
    template = chat_template(actor.prompt_type).jinja if actor.prompt_type else None
    folder = actor.tokenizer_name_or_path or policy_folder(config)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.training.trust_remote_code)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def save_policy_tokenizer(config: RunConfig, folder: Path) -> None:
    """Write the tokenizer that the policy was trained with, its chat template and its EOS into a model folder.

    It takes the place of the one that is there. ``generate`` then stops where a turn of that template ends, and a
    reward model's score is read before that tokenizer's padding.
    """
    from rlxf.models.hf_folder import remove_tokenizer
    from rlxf.models.tokenizer import eos_token_ids, padding_id

    actor = config.actor_rollout
    tokenizer = policy_tokenizer(config)
    remove_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    eos_ids = eos_token_ids(policy_folder(config), tokenizer, actor.eos_tokens)
    _change(folder / "generation_config.json", {"eos_token_id": list(eos_ids)})
    padding = padding_id(folder) if actor.tokenizer_name_or_path and config.objective == "reward" else None
    if padding is not None:
        _change(folder / "config.json", {"pad_token_id": padding})


def _change(file: Path, changes: dict[str, Any]) -> None:
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(settings | changes, indent=2) + "\n", encoding="utf-8")


def policy_folder(config: RunConfig) -> str:
    """The model folder that the policy starts from."""
    if config.actor_rollout.load is None:
        raise ConfigError("actor_rollout.load is not set; expected a Hugging Face folder with the policy")
    return config.actor_rollout.load
