"""Checks of the keys of the preference losses: what belongs together."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from rlxf.config.kinds import REFERENCE_FREE
from rlxf.config.problems import Problem, wrong
from rlxf.config.roles import ActorConfig
from rlxf.config.schema import RunConfig

logger = logging.getLogger(__name__)

_PREFERENCE = ("dpo_", "f_", "discopop_", "simpo_", "pref_", "ld_")  # keys of the preference losses begin so
_REWARD = ("margin_key", "center_rewards_coefficient")
_SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo")
# Losses of the difference of two scores. Only for these are f-divergences and length normalisation defined.
_DIVERGENCE = ("sigmoid", "hinge", "ipo", "robust", "exo_pair", "discopop", "sigmoid_norm")
_AVERAGED = ("sigmoid_norm", "simpo", "orpo", "sft")  # divide by the length by definition
_WHOLE = ("aot", "aot_unpaired", "kto_pair")  # of a pair they depend on the other pairs of its mini-batch
_TYPE = "actor_rollout.dpo_loss_type"


def loss_problems(config: RunConfig) -> Iterator[Problem]:
    """All mistakes in the loss keys that no single value shows."""
    yield from _reference(config)
    if config.objective != "preference":
        return
    actor = config.actor_rollout
    names = actor.dpo_loss_type
    if len(set(names)) < len(names):
        yield wrong(_TYPE, list(names), "expected each loss once; give it a weight in dpo_loss_weights")
    weights, key = actor.dpo_loss_weights, "actor_rollout.dpo_loss_weights"
    if weights is not None and len(weights) != len(names):
        yield wrong(key, list(weights), f"expected {len(names)} numbers, one for each of {', '.join(names)}", _TYPE)
    elif weights is not None and not any(weights):
        yield wrong(key, list(weights), "expected at least one weight above 0: nothing would be trained")
    yield from _smoothing(config)
    divergence = actor.f_divergence_type
    # sft may be added to a loss with an f-divergence, because sft has no reference.
    plain = [name for name in names if name not in _DIVERGENCE and (name != "sft" or len(names) == 1)]
    if divergence != "reverse_kl" and plain:
        expected = f"expected reverse_kl with {', '.join(plain)}: defined for {', '.join(_DIVERGENCE)}"
        yield wrong("actor_rollout.f_divergence_type", divergence, expected, _TYPE)
    if actor.dpo_logp_reduction == "sum" and (own := [name for name in names if name in _AVERAGED]):
        expected = f"expected auto with {', '.join(own)}, which reads log-probabilities per token"
        yield wrong("actor_rollout.dpo_logp_reduction", "sum", expected, _TYPE)
    summed = [name for name in names if name not in (*_DIVERGENCE, *_AVERAGED)]
    if actor.dpo_logp_reduction == "mean" and summed:
        expected = f"expected auto with {', '.join(summed)}, which reads log-probabilities of whole completions"
        yield wrong("actor_rollout.dpo_logp_reduction", "mean", expected, _TYPE)
    yield from _variants(actor)


def _variants(actor: ActorConfig) -> Iterator[Problem]:
    """LD-DPO and WPO are defined for losses of whole pairs that read log-probabilities of actor and reference."""
    names, alpha = actor.dpo_loss_type, actor.ld_alpha
    key, free = "actor_rollout.ld_alpha", [name for name in names if name in REFERENCE_FREE]
    if alpha is not None and free:
        expected = f"expected none with {', '.join(free)}: LD-DPO is defined for losses that have a reference"
        yield wrong(key, alpha, expected, _TYPE)
    elif alpha is not None and actor.pref_ftx:
        expected = f"expected none with pref_ftx = {actor.pref_ftx:g}, whose SFT term counts every token"
        yield wrong(key, alpha, expected, "actor_rollout.pref_ftx")
    key = "actor_rollout.dpo_weighting"
    if actor.dpo_weighting == "none":
        return
    if whole := [name for name in names if name in _WHOLE]:
        expected = f"expected none with {', '.join(whole)}: the loss of a pair depends on other pairs there"
        yield wrong(key, actor.dpo_weighting, expected, _TYPE)
    elif "sft" in names or actor.pref_ftx:
        why, also = ("dpo_loss_type sft", _TYPE) if "sft" in names else ("pref_ftx", "actor_rollout.pref_ftx")
        expected = f"expected none with {why}: WPO weighs preferences, and an SFT term is none"
        yield wrong(key, actor.dpo_weighting, expected, also)


def warn_of_other_stages(config: RunConfig) -> None:
    """Names loss keys that a recipe sets and this stage does not read."""
    stage, objective = config.training.stage, config.objective
    unread = [key for key in ActorConfig.model_fields if key.startswith(_PREFERENCE) and objective != "preference"]
    unread += _REWARD if objective != "reward" else ()
    found = [f"actor_rollout.{key}" for key in unread if key in config.actor_rollout.model_fields_set]
    if found:
        logger.warning("these keys have no effect with training.stage = %s: %s", stage, ", ".join(found))


def _smoothing(config: RunConfig) -> Iterator[Problem]:
    actor, key = config.actor_rollout, "actor_rollout.dpo_label_smoothing"
    names, smoothing = actor.dpo_loss_type, actor.dpo_label_smoothing
    unread = [name for name in names if name not in _SMOOTHED]
    if smoothing and len(unread) == len(names):
        expected = f"expected 0 with dpo_loss_type={','.join(names)}: smoothing is defined for {', '.join(_SMOOTHED)}"
        yield wrong(key, smoothing, expected, _TYPE)
    if not smoothing and "exo_pair" in names:
        expected = "expected more than 0 with dpo_loss_type=exo_pair, which takes its logarithm; the paper has 0.001"
        yield wrong(key, smoothing, expected, _TYPE)


def _reference(config: RunConfig) -> Iterator[Problem]:
    ref = config.ref
    precompute, interval = "ref.precompute_ref_log_probs", "ref.ref_update_interval"
    reason = None
    if not config.loads_reference:
        reason = "is the actor with its adapters off" if config.reference_is_base else "takes no part in this run"
    if ref.ref_update_interval and reason:
        yield wrong(interval, ref.ref_update_interval, f"expected 0: the reference {reason}")
    if ref.precompute_ref_log_probs and (reason or not config.offline):
        why = f"the reference {reason}" if reason else "the pairs of an online run are not known before it"
        yield wrong(precompute, True, f"expected false: {why}")
    elif ref.precompute_ref_log_probs and ref.ref_update_interval:
        yield wrong(precompute, True, f"expected false with {interval} = {ref.ref_update_interval}: it moves", interval)
