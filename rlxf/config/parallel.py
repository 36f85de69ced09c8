"""Whether a role's parallel sizes fit its devices, its model, and each other."""

from __future__ import annotations

from collections.abc import Iterator

from rlxf.config.problems import Problem, wrong
from rlxf.config.roles import RoleConfig
from rlxf.config.schema import ModelConfig, RunConfig


def layout_problems(config: RunConfig, name: str, role: RoleConfig, shape: ModelConfig | None) -> Iterator[Problem]:
    """What is wrong with one role's layout; ``shape`` is None if the model is unknown, which another check reports."""
    yield from _devices(config, name, role)
    yield from _virtual(name, role)
    if shape is not None:
        yield from _tensor(f"{name}.tensor_model_parallel_size", role.tensor_model_parallel_size, role.model, shape)
        yield from _pipeline(name, role, shape)


def rollout_layout_problems(config: RunConfig, shape: ModelConfig | None) -> Iterator[Problem]:
    """What is wrong with the split of the rollout engines."""
    actor = config.actor_rollout
    key, size = "actor_rollout.inference_tensor_model_parallel_size", actor.inference_tensor_model_parallel_size
    if actor.num_gpus_for_infer % size:
        expected = f"expected a divisor of actor_rollout.num_gpus_for_infer = {actor.num_gpus_for_infer}"
        yield wrong(key, size, expected, "actor_rollout.num_gpus_for_infer")
    if shape is not None:
        yield from _heads(key, size, actor.model, shape)


def _devices(config: RunConfig, name: str, role: RoleConfig) -> Iterator[Problem]:
    pool = config.resource_pool
    train = "actor_rollout.num_gpus_for_train", config.actor_rollout.num_gpus_for_train
    owners = {"actor_rollout": train, "ref": ("resource_pool.ref", sum(pool.ref))}
    owners["reward"] = ("resource_pool.reward", sum(pool.reward))
    owner, count = owners[name]
    if count % role.devices_per_replica == 0:
        return
    sizes = {
        f"{name}.tensor_model_parallel_size": role.tensor_model_parallel_size,
        f"{name}.pipeline_model_parallel_size": role.pipeline_model_parallel_size,
        f"{name}.context_parallel_size": role.context_parallel_size,
    }
    split = {key: size for key, size in sizes.items() if size > 1}
    expected = f"expected a divisor of the {count} devices of {owner}"
    if len(split) == 1:
        key, size = next(iter(split.items()))
        yield wrong(key, size, expected, owner)
        return
    product = " times ".join(f"{key} = {size}" for key, size in split.items())
    yield Problem((*split, owner), f"{product} makes {role.devices_per_replica} devices: {expected}")


def _tensor(key: str, size: int, model: str, shape: ModelConfig) -> Iterator[Problem]:
    yield from _heads(key, size, model, shape)
    if shape.ffn_hidden_size % size:
        expected = f"expected a divisor of model.{model}.ffn_hidden_size = {shape.ffn_hidden_size}"
        yield wrong(key, size, expected, f"model.{model}.ffn_hidden_size")


def _heads(key: str, size: int, model: str, shape: ModelConfig) -> Iterator[Problem]:
    if shape.num_attention_heads % size:
        expected = f"expected a divisor of model.{model}.num_attention_heads = {shape.num_attention_heads}"
        yield wrong(key, size, expected, f"model.{model}.num_attention_heads")
    elif shape.kv_heads % size and size % shape.kv_heads:
        expected = f"expected a divisor or a multiple of model.{model}.num_query_groups = {shape.kv_heads}"
        yield wrong(key, size, expected, f"model.{model}.num_query_groups")


def _pipeline(name: str, role: RoleConfig, shape: ModelConfig) -> Iterator[Problem]:
    pieces = role.pipeline_model_parallel_size * role.virtual_pipeline_model_parallel_size
    if shape.num_layers % pieces:
        key = f"{name}.pipeline_model_parallel_size"
        virtual = role.virtual_pipeline_model_parallel_size
        times = f", times virtual_pipeline_model_parallel_size = {virtual}," if virtual > 1 else ""
        expected = f"expected{times} a divisor of model.{role.model}.num_layers = {shape.num_layers}"
        yield wrong(key, role.pipeline_model_parallel_size, expected, f"model.{role.model}.num_layers")


def _virtual(name: str, role: RoleConfig) -> Iterator[Problem]:
    """Interleaved stages pass tensors of one length only. With varying lengths they wait for each other for ever."""
    size, key = role.virtual_pipeline_model_parallel_size, f"{name}.virtual_pipeline_model_parallel_size"
    budget = f"{name}.max_tokens_per_micro_batch"
    if size == 1:
        return
    if role.pipeline_model_parallel_size == 1:
        yield wrong(key, size, "expected 1 without pipeline parallelism", f"{name}.pipeline_model_parallel_size")
        return
    longest = 2 * role.seq_length
    if role.max_tokens_per_micro_batch is None:
        reason = "interleaved stages hang if they exchange tensors of different lengths"
        yield wrong(key, size, f"expected 1, or {budget} as the one length of all micro-batches: {reason}", budget)
    elif role.max_tokens_per_micro_batch < longest:
        expected = f"expected at least 2 * seq_length = {longest}, the longest pair, with {key} = {size}"
        yield wrong(budget, role.max_tokens_per_micro_batch, expected, f"{name}.seq_length")
