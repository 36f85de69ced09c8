"""Checks that need several keys, or the machine. Without them runs would fail later, in a worker, less clearly.

Batch sizes need not divide each other: the last mini-batch may be short. Only what cannot work at all is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from rlxf.config.devices import DEVICES, find_device
from rlxf.config.evaluation import evaluation_problems, say_what_is_not_evaluated
from rlxf.config.folders import folder_problems
from rlxf.config.judging import judge_problems, warn_of_judge
from rlxf.config.lora import lora_problems, say_which_reference, warn_of_unused
from rlxf.config.losses import loss_problems, warn_of_other_stages
from rlxf.config.pairs import pair_problems
from rlxf.config.parallel import layout_problems, rollout_layout_problems
from rlxf.config.placement import placement_problems
from rlxf.config.planning import plan_problems
from rlxf.config.problems import Problem, show, wrong
from rlxf.config.read_position import warn_of_read_position
from rlxf.config.recording import holds_scores
from rlxf.config.reward_sources import source_problems
from rlxf.config.roles import ActorConfig, RoleConfig
from rlxf.config.schema import ModelConfig, RunConfig
from rlxf.config.trackers import tracker_problems
from rlxf.core.words import nearest

logger = logging.getLogger(__name__)


def check(config: RunConfig) -> list[Problem]:
    """All mistakes that no single value shows. A recipe without any may get warnings, in the log."""
    found = mistakes(config)
    if not found:
        _warn(config)
    return found


def mistakes(config: RunConfig) -> list[Problem]:
    """All mistakes that no single value shows."""
    return [problem for group in _GROUPS for problem in group(config)]


def _roles(config: RunConfig) -> Iterator[tuple[str, RoleConfig]]:
    """The roles of this run that hold a model."""
    yield "actor_rollout", config.actor_rollout
    if config.loads_reference:
        yield "ref", config.ref
    if config.scores:
        yield "reward", config.reward


def _shapes(config: RunConfig) -> Iterator[tuple[str, RoleConfig, ModelConfig]]:
    for name, role in _roles(config):
        shape = config.model.get(role.model)
        if shape is not None:
            yield name, role, shape


def _models(config: RunConfig) -> Iterator[Problem]:
    for name, role in _roles(config):
        if role.model and role.model not in config.model:
            near = nearest(role.model, config.model)
            hint = f'did you mean "{near}"?' if near else f"this recipe has {', '.join(config.model) or 'none'}"
            expected = f"expected a model of the recipe's defaults (`- model: [{role.model}]`); {hint}"
            yield wrong(f"{name}.model", role.model, expected, f"model.{role.model}")
    for model, shape in config.model.items():
        key = f"model.{model}.num_attention_heads"
        if shape.kv_channels is None and shape.hidden_size % shape.num_attention_heads:
            expected = f"expected a divisor of hidden_size = {shape.hidden_size}; else give kv_channels, the head size"
            yield wrong(key, shape.num_attention_heads, expected, f"model.{model}.hidden_size")
        if shape.num_attention_heads % shape.kv_heads:
            expected = f"expected a divisor of num_attention_heads = {shape.num_attention_heads}"
            yield wrong(f"model.{model}.num_query_groups", shape.num_query_groups, expected, key)


def _lengths(config: RunConfig) -> Iterator[Problem]:
    actor = config.actor_rollout
    keys = ("actor_rollout.seq_length", "actor_rollout.max_prompt_length", "actor_rollout.max_new_tokens")
    room = actor.seq_length - actor.max_prompt_length
    if room < 1 and config.rows != "examples":  # examples are only bounded as a whole
        expected = (
            f"expected at most {actor.seq_length - 1}: seq_length = {actor.seq_length} holds prompt and completion"
        )
        yield wrong(keys[1], actor.max_prompt_length, expected, *keys)
    elif config.samples and actor.max_new_tokens is not None and actor.max_new_tokens > room:
        expected = (
            f"expected at most {room}, which is seq_length - max_prompt_length = "
            f"{actor.seq_length} - {actor.max_prompt_length}; lower it, or raise actor_rollout.seq_length"
        )
        yield wrong(keys[2], actor.max_new_tokens, expected, *keys)
    for name, role, shape in _shapes(config):
        inherited = name != "actor_rollout" and (role.model, role.seq_length) == (actor.model, actor.seq_length)
        if role.seq_length > shape.max_position_embeddings and not inherited:
            expected = f"expected at most {shape.max_position_embeddings}, the longest sequence of model {role.model}"
            yield wrong(f"{name}.seq_length", role.seq_length, expected, f"model.{role.model}.max_position_embeddings")
        if name != "actor_rollout" and role.seq_length < actor.seq_length:
            expected = (
                f"expected at least actor_rollout.seq_length = {actor.seq_length}: it reads the actor's sequences"
            )
            yield wrong(f"{name}.seq_length", role.seq_length, expected, keys[0])


def _sampling(config: RunConfig) -> Iterator[Problem]:
    actor, rollout = config.actor_rollout, config.rollout
    if not config.samples:
        return
    if not actor.do_sample:
        expected = (
            f"expected true: greedy decoding makes the {actor.n_samples_per_prompt} completions of a prompt equal, "
            "so there is no pair to learn from"
        )
        yield wrong("actor_rollout.do_sample", actor.do_sample, expected)
    if rollout.top_k == 1:
        expected = "expected -1 (off) or at least 2: with 1 the completions of a prompt are all equal"
        yield wrong("rollout.top_k", rollout.top_k, expected)
    if rollout.structured_outputs is not None and config.engine == "hf":
        expected = "expected none with rollout.engine=hf, which cannot force a form; set rollout.engine=vllm"
        yield wrong("rollout.structured_outputs", rollout.structured_outputs, expected, "rollout.engine")


def _shaping(config: RunConfig) -> Iterator[Problem]:
    """The soft penalty of long completions needs its two keys, and room before the limit."""
    actor = config.actor_rollout
    tokens_key, penalty_key = "actor_rollout.overlong_tokens", "actor_rollout.overlong_penalty"
    if config.offline:
        return
    if actor.overlong_penalty and not actor.overlong_tokens:
        expected = f"expected 0 without {tokens_key}, the number of tokens over which it sets in; set that, too"
        yield wrong(penalty_key, actor.overlong_penalty, expected, tokens_key)
    elif actor.overlong_tokens and not actor.overlong_penalty:
        expected = f"expected 0 without {penalty_key}, the number that is subtracted; set that, too"
        yield wrong(tokens_key, actor.overlong_tokens, expected, penalty_key)
    elif actor.overlong_tokens > config.max_new_tokens > 0:
        expected = f"expected at most {config.max_new_tokens}, the longest completion (actor_rollout.max_new_tokens)"
        keys = ("actor_rollout.max_new_tokens", "actor_rollout.seq_length", "actor_rollout.max_prompt_length")
        yield wrong(tokens_key, actor.overlong_tokens, expected, *keys)


def _lookahead(config: RunConfig) -> Iterator[Problem]:
    """Sampling beside training needs something that samples, on devices that do not train."""
    ahead, key = config.rollout.lookahead, "rollout.lookahead"
    if not ahead:
        return
    if config.offline:
        expected = f"expected 0: training.stage = {config.training.stage} reads a file, and nothing is sampled ahead"
        yield wrong(key, ahead, expected, "training.stage")
    elif config.runtime == "ray" and {"train", "infer"} <= set(config.resource_pool.colocate):
        expected = (
            "expected 0, because resource_pool.colocate has train and infer: the engines cannot sample on a device "
            "while it trains; give them devices of their own, or set rollout.lookahead=0"
        )
        yield wrong(key, ahead, expected, "resource_pool.colocate")


def _devices(config: RunConfig) -> Iterator[Problem]:
    """Training and rollout devices against their pool."""
    actor, pool = config.actor_rollout, config.resource_pool
    size = sum(pool.actor_rollout)
    keys = ("actor_rollout.num_gpus_for_train", "actor_rollout.num_gpus_for_infer", "resource_pool.actor_rollout")
    if not config.samples or {"train", "infer"} <= set(pool.colocate):
        counts = [actor.num_gpus_for_train, *([actor.num_gpus_for_infer] if config.samples else [])]
        for key, count in zip(keys, counts, strict=False):
            if count > size:
                expected = (
                    f"expected at most {size}, the devices of resource_pool.actor_rollout = {list(pool.actor_rollout)}"
                )
                yield wrong(key, count, expected, keys[2])
    elif actor.num_gpus_for_train + actor.num_gpus_for_infer != size:
        text = (
            f"actor_rollout.num_gpus_for_train + num_gpus_for_infer = {actor.num_gpus_for_train} + "
            f"{actor.num_gpus_for_infer}: expected {size}, the devices of resource_pool.actor_rollout = "
            f"{list(pool.actor_rollout)}; change one of the three, or share with resource_pool.colocate=[train,infer]"
        )
        yield Problem(keys, text)
    repeated = {role for role in pool.colocate if pool.colocate.count(role) > 1}
    if repeated:
        yield wrong(
            "resource_pool.colocate", list(pool.colocate), f"expected each role once, not {', '.join(repeated)} twice"
        )


def _placement(config: RunConfig) -> Iterator[Problem]:
    if any(_devices(config)):
        return  # nothing can be placed on pools of the wrong size
    for key, text in placement_problems(config):
        yield Problem((key, "resource_pool.actor_rollout", "resource_pool.colocate"), text)


def _layouts(config: RunConfig) -> Iterator[Problem]:
    for name, role in _roles(config):
        yield from layout_problems(config, name, role, config.model.get(role.model))
    if config.samples:
        yield from rollout_layout_problems(config, config.model.get(config.actor_rollout.model))


def _batches(config: RunConfig) -> Iterator[Problem]:
    actor = config.actor_rollout
    ranks = actor.num_gpus_for_train // actor.devices_per_replica
    if config.training.global_batch_size < ranks:
        expected = (
            f"expected at least {ranks}: each of the {ranks} data-parallel ranks needs a pair "
            f"(num_gpus_for_train / {actor.devices_per_replica} devices of each)"
        )
        yield wrong(
            "training.global_batch_size",
            config.training.global_batch_size,
            expected,
            "actor_rollout.num_gpus_for_train",
        )


def _optimizer(config: RunConfig) -> Iterator[Problem]:
    actor = config.actor_rollout
    for name, role in _roles(config):
        both = role.bf16 and role.fp16
        if both and (name == "actor_rollout" or not (actor.bf16 and actor.fp16)):  # the others may inherit these
            expected = "expected false where bf16 is true: parameters have one type; set one of the two to false"
            yield wrong(f"{name}.fp16", True, expected, f"{name}.bf16")
    if actor.fp16 and actor.initial_loss_scale < actor.min_loss_scale:
        expected = f"expected at least actor_rollout.min_loss_scale = {actor.min_loss_scale:g}"
        yield wrong("actor_rollout.initial_loss_scale", actor.initial_loss_scale, expected)
    if actor.lr_warmup_iters and actor.lr_warmup_fraction:
        expected = f"actor_rollout.lr_warmup_fraction = {actor.lr_warmup_fraction} is set, too; keep one of them"
        yield wrong(
            "actor_rollout.lr_warmup_iters", actor.lr_warmup_iters, expected, "actor_rollout.lr_warmup_fraction"
        )
    if actor.lr_decay_style != "constant" and actor.min_lr > actor.lr:
        expected = f"expected at most actor_rollout.lr = {actor.lr:g}: the learning rate would rise; set both"
        yield wrong("actor_rollout.min_lr", actor.min_lr, expected, "actor_rollout.lr")


def _reward(config: RunConfig) -> Iterator[Problem]:
    reward = config.reward
    if config.offline:
        return
    yield from source_problems(config)
    if reward.sources:
        return
    if reward.load is not None and reward.function is not None:
        text = "reward.load and reward.function are both set: completions are scored by one of them; remove the other"
        yield Problem(("reward.load", "reward.function", "reward.sources"), text)
    if reward.load is not None or reward.function is not None or config.judge.kind is not None:
        return
    text = (
        "reward.load is required: a reward model's folder; or give reward.function, a Python file that scores, "
        "reward.sources, or a judge"
    )
    path = config.rollout.replay_path
    if config.samples:
        yield Problem(("reward.load", "reward.function", "reward.sources"), text)
    elif config.engine == "replay" and path is not None and holds_scores(path) is False:
        yield Problem(
            ("reward.load", "reward.function", "reward.sources"),
            f"{text}: rollout.replay_path = {show(path)} holds no scores",
        )


def _inputs(config: RunConfig) -> Iterator[Problem]:
    """What a run cannot start without."""
    actor, replay = config.actor_rollout, config.rollout.engine == "replay"
    if actor.load is None:
        yield Problem(("actor_rollout.load",), "actor_rollout.load is required: a Hugging Face folder with the policy")
    if actor.data_path is None and (config.samples or config.offline):
        yield Problem(
            ("actor_rollout.data_path",),
            f"actor_rollout.data_path is required: a file or a folder of {config.rows}, such as a .jsonl",
        )
    yield from _mixture(actor)
    if replay and config.rollout.replay_path is None:
        text = (
            "rollout.replay_path is required with rollout.engine=replay: rollouts.jsonl of a run with log.rollouts=true"
        )
        yield Problem(("rollout.replay_path",), text)
    if not replay and config.rollout.replay_path is not None:
        expected = "nothing reads it; add rollout.engine=replay, or remove it"
        yield wrong("rollout.replay_path", config.rollout.replay_path, expected, "rollout.engine")


def _mixture(actor: ActorConfig) -> Iterator[Problem]:
    weights, paths = actor.data_weights, actor.data_path or ()
    key = "actor_rollout.data_weights"
    if weights and len(weights) != len(paths):
        expected = f"expected one for each of the {len(paths)} paths of actor_rollout.data_path"
        yield wrong(key, list(weights), expected, "actor_rollout.data_path")
    elif weights and min(weights) < sum(weights) / 1000:
        yield wrong(
            key, list(weights), "expected at least a thousandth of their sum each; leave out the smallest source"
        )


def _engine(config: RunConfig) -> Iterator[Problem]:
    """Whether the rollout engine works on the device of this machine, or on the one that the recipe names."""
    if not config.samples:
        return
    actor = config.actor_rollout
    automatic = config.training.device == "auto"
    device = find_device() if automatic else config.training.device
    facts, here = DEVICES[device], f"{device} (which training.device=auto finds here)" if automatic else device
    size = actor.inference_tensor_model_parallel_size
    key = "actor_rollout.inference_tensor_model_parallel_size"
    if size > 1 and config.engine == "hf":
        yield wrong(key, size, "expected 1 with rollout.engine=hf, which does not split a model", "rollout.engine")
    planning = config.dry_run and automatic  # a plan for another machine; its device is not known here
    if size > 1 and config.engine == "vllm" and facts.vllm_is_one_process and not planning:
        yield wrong(key, size, f"expected 1: on {here} a vLLM engine is one process", "training.device")
    if config.engine == "vllm" and device == "cpu" and config.runtime == "local":
        expected = f"expected hf with runtime=local: on {here} vLLM must be alone in its process; or use runtime=ray"
        yield wrong("rollout.engine", "vllm", expected, "runtime", "training.device")
    shape, kernels = config.model.get(actor.model), facts.head_sizes
    if shape is None or config.engine != "vllm" or kernels is None or shape.head_size in kernels:
        return
    if shape.kv_channels is None and shape.hidden_size % shape.num_attention_heads:
        return  # there is no head size; that is reported already
    text = (
        f"model.{actor.model}: head size {shape.head_size}: vLLM on {here} has kernels for "
        f"{', '.join(map(str, kernels))}; choose another model, rollout.engine=hf, or another training.device"
    )
    keys = [f"model.{actor.model}.{name}" for name in ("kv_channels", "hidden_size", "num_attention_heads")]
    yield Problem((*keys, "rollout.engine", "training.device"), text)


def _local(config: RunConfig) -> Iterator[Problem]:
    """One process holds every role, so no role can be split."""
    actor, pool = config.actor_rollout, config.resource_pool
    if config.runtime != "local":
        return
    counts = {"actor_rollout.num_gpus_for_train": actor.num_gpus_for_train}
    if config.loads_reference:
        counts["resource_pool.ref"] = sum(pool.ref)
    if config.samples:
        counts["actor_rollout.num_gpus_for_infer"] = actor.num_gpus_for_infer
    if config.scores:
        counts["resource_pool.reward"] = sum(pool.reward)
    for key, count in counts.items():
        if count > 1:
            yield wrong(key, count, "expected 1 with runtime=local, which is one process; use runtime=ray", "runtime")


def _warn(config: RunConfig) -> None:
    if config.replays_scores and config.reward.listed:
        keys = "reward.sources has" if config.reward.sources else "reward.load and reward.function have"
        logger.warning("%s no effect: the scores in rollout.replay_path are used", keys)
    warn_of_unused(config)
    warn_of_judge(config)
    warn_of_other_stages(config)
    warn_of_read_position(config)
    say_which_reference(config)
    if config.needs_reference and config.ref.load != config.actor_rollout.load:
        logger.warning("ref.load differs from actor_rollout.load: the policy does not start at its reference")
    for name, role in _roles(config):
        if role.sequence_parallel and role.tensor_model_parallel_size == 1:
            logger.warning("%s.sequence_parallel has no effect: tensor_model_parallel_size is 1", name)
    say_what_is_not_evaluated(config)


_GROUPS: tuple[Callable[[RunConfig], Iterator[Problem]], ...] = (
    _inputs,
    _models,
    folder_problems,
    _lengths,
    _sampling,
    _shaping,
    _lookahead,
    _devices,
    _placement,
    _layouts,
    _batches,
    _optimizer,
    loss_problems,
    pair_problems,
    evaluation_problems,
    tracker_problems,
    lora_problems,
    _reward,
    judge_problems,
    plan_problems,
    _engine,
    _local,
)
