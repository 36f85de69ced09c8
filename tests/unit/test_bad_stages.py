"""Mistakes in the keys of stages, losses, references and precision: one line each, with the key and the fix."""

from __future__ import annotations

import pytest

from rlxf.config.load import load_config
from rlxf.core.errors import ConfigError
from tests.unit.config.recipes import recipe
from tests.unit.test_bad_recipes import Wrong, actor

WRONG = [
    Wrong(actor(dpo_loss_type=["sigmoid", "sigmoid"]), "actor_rollout.dpo_loss_type", "expected each loss once"),
    Wrong(actor(dpo_loss_type=[]), "actor_rollout.dpo_loss_type", "at least 1"),
    Wrong(
        actor(dpo_loss_type=["sigmoid", "sft"], dpo_loss_weights=[1.0]),
        "actor_rollout.dpo_loss_weights",
        "expected 2 numbers, one for each of sigmoid, sft",
    ),
    Wrong(actor(dpo_loss_weights=[0.0]), "actor_rollout.dpo_loss_weights", "at least one weight above 0"),
    Wrong(actor(dpo_loss_type="exo_pair"), "actor_rollout.dpo_label_smoothing", "expected more than 0"),
    Wrong(
        actor(dpo_loss_type="nca_pair", f_divergence_type="forward_kl"),
        "actor_rollout.f_divergence_type",
        "expected reverse_kl with nca_pair",
    ),
    Wrong(
        actor(dpo_loss_type="simpo", dpo_logp_reduction="sum"),
        "actor_rollout.dpo_logp_reduction",
        "expected auto with simpo",
    ),
    Wrong(
        actor(dpo_loss_type=["sigmoid", "aot"], dpo_logp_reduction="mean"),
        "actor_rollout.dpo_logp_reduction",
        "expected auto with aot, which reads log-probabilities of whole completions",
    ),
    Wrong(
        actor(dpo_loss_type="sft", f_divergence_type="js_divergence"),
        "actor_rollout.f_divergence_type",
        "expected reverse_kl with sft",
    ),
    Wrong({"ref": {"precompute_ref_log_probs": True}}, "ref.precompute_ref_log_probs", "an online run are not known"),
    Wrong(
        {"ref": {"ref_update_interval": 5}} | actor(lora_r=4),
        "ref.ref_update_interval",
        "expected 0: the reference is the actor with its adapters off",
    ),
    Wrong(
        {"training": {"stage": "sft"}, "ref": {"ref_update_interval": 5}},
        "ref.ref_update_interval",
        "expected 0: the reference takes no part in this run",
    ),
    Wrong(
        {"training": {"stage": "rm"}, "ref": {"precompute_ref_log_probs": True}},
        "ref.precompute_ref_log_probs",
        "expected false: the reference takes no part in this run",
    ),
    Wrong(actor(bf16=True, fp16=True), "actor_rollout.fp16", "parameters have one type"),
    Wrong(actor(fp16=True, initial_loss_scale=0.5), "actor_rollout.initial_loss_scale", "expected at least"),
    Wrong({"critic": {"model": "tiny"}}, "critic", "there is no critic here"),
    Wrong(actor(num_experts=8), "actor_rollout.num_experts", "mixture-of-experts models are not supported"),
    Wrong({"training": {"use_moe": True}}, "training.use_moe", "mixture-of-experts models are not supported"),
    Wrong(actor(moe_router_topk=2), "actor_rollout.moe_router_topk", "mixture-of-experts models are not supported"),
    Wrong(
        {"training": {"stage": "sfft"}, "resource_pool": {"actor_rollout": [9]}},  # which an online run would not fill
        "training.stage",
        'did you mean "sft"?',
    ),
    Wrong({"training": {"stage": ["sft"]}}, "training.stage", "expected one of ray_online_dpo, dpo, sft, rm"),
    Wrong({"training": {"stage": "ray_ppo"}}, "training.stage", "policy gradients are not trained here"),
    Wrong({"training": {"stage": "simpo"}}, "training.stage", "set training.stage=dpo"),
    Wrong({"training": {"epochs": 0}}, "training.epochs", "expected greater than 0"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.key} {wrong.says[:20]}")
def test_a_wrong_recipe_gets_one_line_with_key_and_fix(wrong: Wrong) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe(**wrong.change))
    (line,) = caught.value.problems
    assert wrong.key in line.split(": ")[0]
    assert wrong.says in line


@pytest.mark.parametrize(
    "keys",
    [
        {"dpo_loss_type": ["sigmoid", "sft"], "f_divergence_type": "js_divergence"},
        {"dpo_loss_type": ["hinge", "simpo"], "dpo_logp_reduction": "mean"},
    ],
    ids=str,
)
def test_losses_that_go_together_are_accepted(keys: dict[str, object]) -> None:
    load_config(recipe(**actor(**keys)))


def test_a_loss_key_that_the_stage_does_not_read_is_named(caplog: pytest.LogCaptureFixture) -> None:
    load_config(recipe(training={"stage": "sft"}, actor_rollout={"dpo_loss_type": "simpo", "margin_key": "m"}))
    assert (
        "these keys have no effect with training.stage = sft: actor_rollout.dpo_loss_type, actor_rollout.margin_key"
        in caplog.text
    )
    caplog.clear()
    load_config(recipe(training={"stage": "rm"}, actor_rollout={"margin_key": "m"}))
    assert "no effect" not in caplog.text
