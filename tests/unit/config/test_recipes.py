"""Every recipe of the repository composes, holds known keys only, and can be planned without an accelerator."""

from __future__ import annotations

import pytest

from rlxf.config.defaults import unset_recipe
from rlxf.config.keys import ROLES, SECTIONS
from rlxf.config.load import load_config
from rlxf.placement.plan import NodeResources, fit, make_plan
from rlxf.placement.text import describe, num_parameters
from rlxf.planner.estimate import device_of, estimate_of
from tests.unit.config.recipes import NAMES, compose
from workers.cli import RECIPES

EXPECTED = {
    *(f"online_dpo_trainer_{model}" for model in ("tiny", "smollm2_135m", "llama32_1b", "llama3_8b", "qwen25_7b")),
    "online_dpo_trainer_qwen3_8b",
    *(f"online_dpo_trainer_{model}_lora" for model in ("tiny", "llama3_8b")),
    *(f"online_dpo_trainer_llama3_8b_{kind}" for kind in ("8gpu", "colocated", "colocated_16")),
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


TWO_MACHINES = ("llama3_8b", "qwen25_7b", "qwen3_8b", "llama3_8b_colocated_16")


@pytest.mark.parametrize("name", [f"online_dpo_trainer_{name}" for name in TWO_MACHINES])
def test_an_8b_recipe_fits_two_nodes_of_eight_npus_and_no_less(name: str) -> None:
    plan = make_plan(load_config(compose(name, "dry_run=true", "training.device=npu")))
    assert plan.resource == "NPU"
    nodes = [NodeResources(name=f"n{i}", total={"NPU": 8}, free={"NPU": 8}) for i in range(2)]
    assert fit(plan, nodes) == []
    assert fit(plan, nodes[:1])


@pytest.mark.parametrize("kind", ["lora", "8gpu", "colocated"])
def test_the_other_8b_recipes_fit_one_node_of_eight(kind: str) -> None:
    plan = make_plan(
        load_config(compose(f"online_dpo_trainer_llama3_8b_{kind}", "dry_run=true", "training.device=npu"))
    )
    assert fit(plan, [NodeResources(name="n", total={"NPU": 8}, free={"NPU": 8})]) == []
    assert plan.num_devices == 8


@pytest.mark.parametrize(("kind", "count"), [("colocated", 8), ("colocated_16", 16)])
def test_every_device_of_a_colocated_recipe_has_all_four_roles(kind: str, count: int) -> None:
    config = load_config(compose(f"online_dpo_trainer_llama3_8b_{kind}", "dry_run=true"))
    separate = load_config(compose("online_dpo_trainer_llama3_8b", "dry_run=true"))
    plan = make_plan(config)
    assert {role.role: role.bundles for role in plan.roles} == dict.fromkeys(
        ("train", "infer", "ref", "reward"), tuple(range(count))
    )
    assert (config.rollout.lookahead, config.rollout.stream_prompts) == (0, None)
    actor, rows = config.actor_rollout, separate.actor_rollout.ppo_mini_batch_size  # the batches are the same
    assert actor.ppo_mini_batch_size * (count // actor.devices_per_replica) == rows
    assert config.training == separate.training


@pytest.mark.parametrize("name", [name for name in NAMES if "tiny" not in name])
def test_a_recipe_fits_the_device_that_it_is_planned_for(name: str) -> None:
    config = load_config(compose(name, "dry_run=true"))
    device, _ = device_of(config)
    if device.is_cpu:  # what this machine has does not matter here
        device = device.with_probe(
            {"memory_gib": 16.0, "fp32_tflops": 0.1, "bf16_tflops": 0.1, "memory_gb_per_s": 10.0}
        )
    estimate = estimate_of(config, device)
    assert estimate.fits, estimate.fullest
    assert estimate.pace.seconds > 0


DEVICE_SIZED = [name for name in NAMES if any(size in name for size in ("_8b", "_7b", "_1b"))]


@pytest.mark.parametrize("name", DEVICE_SIZED)
def test_a_recipe_for_devices_bounds_its_memory_and_its_disk(name: str) -> None:
    config = load_config(compose(name, "dry_run=true"))
    assert "not yet run on hardware" in RECIPES.joinpath(f"{name}.yaml").read_text().partition("defaults:")[0].lower()
    assert (config.training.keep_latest, config.training.async_save) == (2, True)
    sections = {"train": config.actor_rollout, "ref": config.ref, "reward": config.reward}
    for role in make_plan(config).roles:
        if role.role == "infer":
            assert role.axes["TP"] == 1  # an engine fits into one device
            continue
        section = sections[role.role]
        budget = section.max_tokens_per_micro_batch
        assert budget == (16384 if "_1b" in name else 8192) >= 2 * section.seq_length
        assert section.sequence_parallel == (section.tensor_model_parallel_size > 1)


def test_the_1b_recipe_fits_one_node_of_four() -> None:
    plan = make_plan(load_config(compose("online_dpo_trainer_llama32_1b", "dry_run=true", "training.device=npu")))
    assert fit(plan, [NodeResources(name="n", total={"NPU": 4}, free={"NPU": 4})]) == []


@pytest.mark.parametrize(
    ("recipe", "model", "billions"),  # as the models' authors publish them
    [
        ("online_dpo_trainer_llama3_8b", "llama3-8b", 8.03),
        ("online_dpo_trainer_llama32_1b", "llama32-1b", 1.236),
        ("online_dpo_trainer_qwen25_7b", "qwen25-7b", 7.62),
        ("online_dpo_trainer_qwen3_8b", "qwen3-8b", 8.19),
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
