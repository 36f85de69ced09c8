"""Every recipe of the repository composes, holds known keys only, and can be planned without an accelerator."""

from __future__ import annotations

import pytest

from rlxf.config.defaults import unset_recipe
from rlxf.config.keys import ROLES, SECTIONS
from rlxf.config.load import load_config
from rlxf.placement.plan import NodeResources, fit, make_plan
from rlxf.placement.text import describe, num_parameters
from tests.unit.config.recipes import NAMES, compose

EXPECTED = {
    *(f"online_dpo_trainer_{model}" for model in ("tiny", "smollm2_135m", "llama32_1b", "llama3_8b", "qwen25_7b")),
    *(f"online_dpo_trainer_{model}_lora" for model in ("tiny", "llama3_8b")),
    *(f"online_dpo_trainer_tiny_{layout}" for layout in ("tp2", "pp2", "dp2")),
    *(f"offline_dpo_trainer_{model}" for model in ("tiny", "llama3_8b")),
}


def test_the_promised_recipes_are_there() -> None:
    assert set(NAMES) >= EXPECTED


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_valid_and_has_a_plan(name: str, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(compose(name, "dry_run=true"))
    plan = make_plan(config)
    text = describe(config, plan)
    for role in plan.roles:
        assert role.role in text
    assert not caplog.records  # no legacy key, no older name


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_takes_each_tokenizer_from_its_model_folder(name: str) -> None:
    """Else a folder of one's own would be trained with the tokenizer of the recipe's."""
    raw = compose(name)
    assert {raw[section].get("tokenizer_name_or_path") for section in ("training", *ROLES)} == {None}


@pytest.mark.parametrize("name", NAMES)
def test_a_composed_recipe_shows_every_key(name: str) -> None:
    raw = compose(name)
    unset = unset_recipe()
    assert set(raw) == set(unset)
    for section in SECTIONS:
        assert set(raw[section]) >= set(unset[section])


def test_the_empty_recipe_leaves_role_keys_unset() -> None:
    unset = unset_recipe()
    for role in ROLES:
        assert set(unset[role].values()) == {None}
    assert unset["rollout"]["temperature"] == 1.0
    assert unset["training"]["stage"] is None


@pytest.mark.parametrize("name", ["online_dpo_trainer_llama3_8b", "online_dpo_trainer_qwen25_7b"])
def test_an_8b_recipe_fits_two_nodes_of_eight_npus_and_no_less(name: str) -> None:
    plan = make_plan(load_config(compose(name, "dry_run=true", "training.device=npu")))
    assert plan.resource == "NPU"
    nodes = [NodeResources(name=f"n{i}", total={"NPU": 8}, free={"NPU": 8}) for i in range(2)]
    assert fit(plan, nodes) == []
    assert fit(plan, nodes[:1])


def test_the_8b_recipe_with_lora_fits_one_node_of_eight() -> None:
    plan = make_plan(load_config(compose("online_dpo_trainer_llama3_8b_lora", "dry_run=true", "training.device=npu")))
    assert fit(plan, [NodeResources(name="n", total={"NPU": 8}, free={"NPU": 8})]) == []


def test_the_1b_recipe_fits_one_node_of_four() -> None:
    plan = make_plan(load_config(compose("online_dpo_trainer_llama32_1b", "dry_run=true", "training.device=npu")))
    assert fit(plan, [NodeResources(name="n", total={"NPU": 4}, free={"NPU": 4})]) == []


@pytest.mark.parametrize(
    ("recipe", "model", "billions"),  # as the models' authors publish them
    [
        ("online_dpo_trainer_llama3_8b", "llama3-8b", 8.03),
        ("online_dpo_trainer_llama32_1b", "llama32-1b", 1.236),
        ("online_dpo_trainer_qwen25_7b", "qwen25-7b", 7.62),
        ("online_dpo_trainer_smollm2_135m", "smollm2-135m", 0.1345),
    ],
)
def test_model_shapes_give_the_published_number_of_parameters(recipe: str, model: str, billions: float) -> None:
    shape = load_config(compose(recipe, "dry_run=true")).model[model]
    assert num_parameters(shape) / 1e9 == pytest.approx(billions, rel=2e-3)


def test_the_tiny_recipe_is_the_measured_one() -> None:
    config = load_config(compose("online_dpo_trainer_tiny", "dry_run=true"))
    actor = config.actor_rollout
    assert (config.training.global_batch_size, config.training.train_iters) == (32, 100)
    assert (actor.lr, actor.min_lr, actor.lr_decay_style, actor.lr_warmup_iters) == (6.2e-4, 1e-4, "cosine", 15)
    assert (actor.n_samples_per_prompt, config.max_new_tokens, actor.missing_eos_penalty) == (2, 32, 5.0)
    assert (actor.dpo_beta, actor.clip_grad, config.rollout.temperature) == (0.2, 1.0, 1.0)
    assert num_parameters(config.model["tiny"]) == 277_920
