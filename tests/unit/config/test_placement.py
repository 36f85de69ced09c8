"""Which devices each role takes, and whether a cluster's nodes can hold them."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlxf.assembly.data import needs_scorer
from rlxf.config.folders import missing_paths
from rlxf.config.load import load_config
from rlxf.core.errors import ConfigError
from rlxf.placement.plan import GroupPlan, NodeResources, Plan, assign, crowded, fit, make_plan
from rlxf.placement.text import describe, describe_crossing, node_sizes
from tests.data_world import write_rows
from tests.unit.config.recipes import compose, recipe


def plan_of(**changes: Any) -> Plan:
    return make_plan(load_config(recipe(**changes)))


def taken(plan: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {role.role: (role.group, role.bundles) for role in plan.roles}


def nodes(*free: int, resource: str = "CPU") -> list[NodeResources]:
    return [NodeResources(name=f"n{i}", total={resource: 8}, free={resource: count}) for i, count in enumerate(free)]


def test_each_role_has_devices_of_its_own() -> None:
    plan = plan_of()
    assert taken(plan) == {
        "train": ("actor_rollout", (0,)),
        "infer": ("actor_rollout", (1,)),
        "ref": ("ref", (0,)),
        "reward": ("reward", (0,)),
    }
    assert plan.num_devices == 4


def test_training_takes_the_first_nodes_of_the_actor_pool() -> None:
    actor = {"num_gpus_for_train": 4, "num_gpus_for_infer": 4}
    plan = plan_of(actor_rollout=actor, resource_pool={"actor_rollout": [4, 4]}, training={"global_batch_size": 8})
    group = plan.group("actor_rollout")
    assert {group.node_of(bundle) for bundle in taken(plan)["train"][1]} == {0}
    assert {group.node_of(bundle) for bundle in taken(plan)["infer"][1]} == {1}


def test_one_device_is_enough_for_everything() -> None:
    plan = plan_of(resource_pool={"actor_rollout": 1, "colocate": ["train", "infer", "ref", "reward"]})
    assert set(taken(plan).values()) == {("actor_rollout", (0,))}
    assert plan.num_devices == 1


def test_colocated_training_and_rollout_share_their_pool() -> None:
    pool = {"actor_rollout": [2], "colocate": ["train", "infer"]}
    plan = plan_of(actor_rollout={"num_gpus_for_train": 2, "num_gpus_for_infer": 2}, resource_pool=pool)
    assert taken(plan)["train"] == taken(plan)["infer"] == ("actor_rollout", (0, 1))
    assert plan.num_devices == 4


def test_an_engine_of_two_devices_can_share_both_with_the_trainer() -> None:
    actor = {"num_gpus_for_train": 4, "num_gpus_for_infer": 4, "inference_tensor_model_parallel_size": 2}
    pool = {"actor_rollout": [4], "ref": [4], "colocate": ["train", "infer", "ref"]}
    plan = plan_of(training={"device": "npu"}, actor_rollout=actor, resource_pool=pool)
    assert {taken(plan)[role] for role in ("train", "infer", "ref")} == {("actor_rollout", (0, 1, 2, 3))}
    assert plan.num_devices == 5


def test_an_engine_that_shares_its_devices_stays_on_one_node() -> None:
    actor = {"num_gpus_for_train": 4, "num_gpus_for_infer": 4, "inference_tensor_model_parallel_size": 2}
    pool = {"actor_rollout": [3, 1], "colocate": ["train", "infer"]}
    with pytest.raises(ConfigError, match=r"= 2: one engine would span two nodes of resource_pool\.actor_rollout"):
        plan_of(training={"device": "npu"}, actor_rollout=actor, resource_pool=pool)


def test_reference_and_reward_can_share_with_each_other() -> None:
    plan = plan_of(resource_pool={"ref": [2, 1], "reward": [1, 2], "colocate": ["ref", "reward"]})
    shared = plan.group("ref+reward")
    assert shared.nodes == (2, 2)
    assert taken(plan)["ref"] == ("ref+reward", (0, 1, 2))
    assert taken(plan)["reward"] == ("ref+reward", (0, 2, 3))


def test_the_reference_can_share_with_rollout_alone() -> None:
    plan = plan_of(resource_pool={"colocate": ["infer", "ref"]})
    assert taken(plan)["ref"] == taken(plan)["infer"] == ("actor_rollout", (1,))
    assert taken(plan)["reward"] == ("reward", (0,))


def test_a_role_that_does_not_fit_where_it_shares_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"resource_pool\.ref = \[2\]: expected at most \[1\], the devices of train"):
        plan_of(resource_pool={"ref": [2], "colocate": ["train", "ref"]})


def test_offline_needs_neither_rollout_nor_reward_devices() -> None:
    plan = plan_of(training={"stage": "dpo"}, resource_pool={"actor_rollout": [2]})
    assert set(taken(plan)) == {"train", "ref"}
    assert plan.group("actor_rollout").nodes == (1,)


LORA = {"lora_r": 8}


def test_with_lora_the_reference_needs_no_device() -> None:
    plan = plan_of(actor_rollout=LORA)
    assert set(taken(plan)) == {"train", "infer", "reward"}
    assert plan.num_devices == 3
    plan = plan_of(actor_rollout=LORA, resource_pool={"actor_rollout": 1, "colocate": ["train", "infer", "ref"]})
    assert taken(plan)["train"] == taken(plan)["infer"] == ("actor_rollout", (0,))
    config = load_config(recipe(actor_rollout=LORA))
    assert "ref     tiny   actor_rollout  0" in describe(config, make_plan(config))
    assert "none: the actor with its adapters off" in describe(config, make_plan(config))


@pytest.mark.parametrize("ref", [{"load": "another"}, {"bf16": True}])
def test_with_lora_another_reference_is_a_model_of_its_own(ref: dict[str, Any]) -> None:
    assert taken(plan_of(actor_rollout=LORA, ref=ref))["ref"] == ("ref", (0,))


def test_the_plan_counts_4_bit_weights_of_the_trainer_alone() -> None:
    config = load_config(compose("online_dpo_trainer_llama3_8b_lora", "dry_run=true", "actor_rollout.qlora=true"))
    rows = {line.split()[0]: line for line in describe(config, make_plan(config)).splitlines() if line}
    # 6.98e9 linear weights at 4.5 bits and 1.05e9 others at 16 bits, over four devices; all at 16 bits in each engine.
    assert rows["train"].endswith("1.4 GiB nf4 and bf16")
    assert rows["infer"].endswith("15.0 GiB bf16")


def test_a_layout_of_a_reference_that_is_not_there_is_no_mistake() -> None:
    plan_of(actor_rollout=LORA, ref={"tensor_model_parallel_size": 3})
    with pytest.raises(ConfigError, match=r"ref\.tensor_model_parallel_size = 3"):
        plan_of(ref={"tensor_model_parallel_size": 3})


def test_a_reward_function_needs_no_device() -> None:
    raw = recipe()
    raw["reward"] = {"function": "reward.py"}
    assert set(taken(make_plan(load_config(raw)))) == {"train", "infer", "ref"}


def test_a_replay_has_no_rollout_devices() -> None:
    plan = plan_of(rollout={"engine": "replay", "replay_path": "r.jsonl"}, actor_rollout={"num_gpus_for_infer": 7})
    assert "infer" not in taken(plan)
    assert "reward" in taken(plan)  # nobody knows what is in a file that is not there


@pytest.mark.parametrize("score", [0.5, None])
def test_a_replay_with_scores_needs_no_reward_model(
    tmp_path: Path, score: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt_ids": [5], "completions": [{"token_ids": [6], "score": score}] * 2, "policy_version": 0}
    path = write_rows(tmp_path / "rollouts.jsonl", [row])
    config = load_config(recipe(rollout={"engine": "replay", "replay_path": str(path)}))
    plan = make_plan(config)
    assert ("reward" in taken(plan)) == config.scores == needs_scorer(config) == (score is None)
    assert plan.num_devices == (2 if score else 3)
    assert ("reward.load and reward.function have no effect" in caplog.text) == (score is not None)
    missing = [named.key for named in missing_paths(config)]
    assert ("reward.load" in missing) == (score is None)


@pytest.mark.parametrize(
    ("device", "name", "resource"),
    [("npu", None, "NPU"), ("cuda", None, "GPU"), ("cpu", None, "CPU"), ("cpu", "NPU", "NPU")],
)
def test_the_ray_resource_is_the_devices_unless_the_recipe_names_one(device: str, name: str, resource: str) -> None:
    assert plan_of(training={"device": device}, resource_pool={"resource_name": name}).resource == resource


def test_a_plan_that_fits_says_nothing() -> None:
    assert fit(plan_of(), nodes(4)) == []
    assert fit(plan_of(), nodes(2, 1, 1)) == []


def test_an_entry_of_a_pool_is_not_split_over_nodes() -> None:
    text = "\n".join(fit(plan_of(), nodes(1, 1, 1, 1)))
    assert "asked 4 CPU (actor_rollout [2], ref [1], reward [1])" in text
    assert "an entry of a pool must fit on one node" in text


def test_a_misfit_lists_asked_has_and_free_per_node() -> None:
    lines = fit(plan_of(), nodes(1, 2))
    assert "asked 4 CPU" in lines[0]
    assert "has 16, free 3" in lines[0]
    assert lines[1:3] == ["  node n0: has 8 CPU, free 1", "  node n1: has 8 CPU, free 2"]
    assert "other jobs hold the rest" in lines[3]


def test_a_cluster_without_the_resource_is_told_apart() -> None:
    lines = fit(plan_of(training={"device": "npu"}), nodes(8))
    assert "no node declares NPU" in lines[-1]


@pytest.mark.parametrize(
    ("pools", "actor", "key", "count"),
    [
        ({"ref": [14]}, {}, "ref", 17),
        ({"reward": [13, 13]}, {}, "reward", 29),
        ({"actor_rollout": [30]}, {"num_gpus_for_train": 16, "num_gpus_for_infer": 14}, "actor_rollout", 32),
        ({"ref": [4], "reward": [4], "actor_rollout": [5], "colocate": ["train", "infer", "ref", "reward"]},
         {"num_gpus_for_train": 5, "num_gpus_for_infer": 5}, "actor_rollout", 18),
    ],
)  # fmt: skip
def test_more_than_eight_processes_a_core_are_too_many(
    pools: dict[str, Any], actor: dict[str, Any], key: str, count: int
) -> None:
    config = load_config(recipe(resource_pool=pools, actor_rollout=actor))
    text = crowded(config.resource_pool, make_plan(config), cores=2)
    assert text is not None
    assert text.startswith(f"resource_pool.{key} = {pools[key]}: the recipe asks for {count} worker processes")
    assert crowded(config.resource_pool, make_plan(config), cores=4) is None


def test_eight_processes_a_core_are_allowed() -> None:
    config = load_config(recipe(resource_pool={"ref": [13]}))
    assert crowded(config.resource_pool, make_plan(config), cores=2) is None


def test_an_engine_of_several_devices_is_one_process() -> None:
    actor = {"num_gpus_for_train": 1, "num_gpus_for_infer": 16, "inference_tensor_model_parallel_size": 4}
    config = load_config(recipe(training={"device": "npu"}, actor_rollout=actor, resource_pool={"actor_rollout": [17]}))
    assert (
        crowded(config.resource_pool, make_plan(config), cores=1) is None
    )  # 7: 4 engines beside train, ref and reward


def groups(*pools: tuple[int, ...]) -> Plan:
    named = tuple(GroupPlan(name=f"g{i}", nodes=pool) for i, pool in enumerate(pools))
    return Plan(resource="CPU", groups=named, roles=())


def test_a_placement_is_found_where_the_obvious_order_fails() -> None:
    # largest first into the tightest node: 4+3 | 3+2+2 is the only way to pack these
    plan = groups((3, 3), (2, 2), (4,))
    found = assign(plan, nodes(7, 7))
    assert found is not None
    load = {"n0": 0, "n1": 0}
    for (name, index), node in found.items():
        load[node] += plan.group(name).nodes[index]
    assert load == {"n0": 7, "n1": 7}


ENTRIES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@given(ENTRIES, st.lists(ENTRIES, max_size=2), st.lists(st.integers(0, 6), min_size=1, max_size=4))
@example((2, 1), [(3,), (2,)], [3, 3, 2])  # train and sample on one node, and the rest still finds room
@example((1, 1), [(3,)], [3, 2])
@example((2, 2), [(4,)], [4, 2, 2])  # one node would hold the first two, but the last needs all of it
@settings(max_examples=150, deadline=None)
def test_assign_agrees_with_trying_every_placement(
    actor: tuple[int, ...], others: list[tuple[int, ...]], free: list[int]
) -> None:
    """It places what can be placed, and training and sampling on as few nodes as any placement does."""
    pools = {"actor_rollout": actor, **{f"g{i}": pool for i, pool in enumerate(others)}}
    plan = Plan(resource="CPU", groups=tuple(GroupPlan(name=n, nodes=pool) for n, pool in pools.items()), roles=())
    sizes = [size for pool in pools.values() for size in pool]
    fewest = None
    for where in product(range(len(free)), repeat=len(sizes)):
        load = [sum(s for s, at in zip(sizes, where, strict=True) if at == node) for node in range(len(free))]
        if all(taken <= room for taken, room in zip(load, free, strict=True)):
            used = len(set(where[: len(actor)]))
            fewest = used if fewest is None else min(used, fewest)
    found = assign(plan, nodes(*free))
    assert (found is not None) == (fewest is not None)
    if found is not None:
        assert len({node for (name, _), node in found.items() if name == "actor_rollout"}) == fewest
        for index, room in enumerate(free):
            assert sum(pools[name][i] for (name, i), node in found.items() if node == f"n{index}") <= room


def test_training_and_sampling_take_one_node_where_the_tightest_fit_would_take_two() -> None:
    plan = plan_of(resource_pool={"actor_rollout": [1, 1], "ref": [1], "reward": [1]})
    found = assign(plan, nodes(1, 1, 2))
    assert found is not None
    assert found["actor_rollout", 0] == found["actor_rollout", 1] == "n2"


def test_a_plan_says_when_weights_travel_between_machines() -> None:
    plan = plan_of(resource_pool={"actor_rollout": [1, 1], "ref": [1], "reward": [1]})
    assert describe_crossing(plan, nodes(1, 1, 2)) == ""
    assert describe_crossing(plan, nodes(1, 1, 1, 1)) == (
        "new weights travel between machines: train on n0; infer on n1\n"
    )
    assert describe_crossing(plan, nodes(1)) == ""  # there is no placement, which is said elsewhere
    pool = {"actor_rollout": [1, 1], "colocate": ["train", "infer"]}
    shared = plan_of(actor_rollout={"num_gpus_for_train": 2, "num_gpus_for_infer": 2}, resource_pool=pool)
    assert describe_crossing(shared, nodes(1, 1, 1, 1)) == ""  # each engine has a part of the trainer beside it
    assert describe_crossing(plan_of(training={"stage": "dpo"}), nodes(8)) == ""


def test_the_preference_for_few_nodes_costs_no_time_on_a_large_cluster() -> None:
    named = [("actor_rollout", (3,) * 12), ("ref", (5,) * 20), ("reward", (1,) * 24)]
    plan = Plan(resource="CPU", groups=tuple(GroupPlan(name=n, nodes=pool) for n, pool in named), roles=())
    begin = time.monotonic()
    assert assign(plan, nodes(*[8] * 40)) is not None
    assert assign(plan, nodes(*[8] * 20)) is not None  # every node is full: no choice is left
    assert assign(plan, nodes(*[8] * 19)) is None
    assert time.monotonic() - begin < 5.0


def test_a_hopeless_search_ends_quickly() -> None:
    assert assign(groups(*[(3,)] * 24), nodes(*[8] * 11)) is None


def test_needed_machines_are_counted_by_packing() -> None:
    assert node_sizes(groups((4, 4), (4,), (4,)), 8) == [8, 8]
    assert node_sizes(groups((1,), (1,), (2,)), 8) == [4]


def test_the_printed_plan_names_devices_missing_files_and_ray_start() -> None:
    config = load_config(recipe(training={"device": "npu"}))
    text = describe(config, make_plan(config))
    assert "actor_rollout.load" in text
    assert "./sft" in text
    assert """ray start --head --port 6344 --resources='{"NPU": 4}'""" in text
    assert "scripts/cluster_up.sh" in text


def test_the_printed_plan_of_a_large_recipe_has_a_line_for_the_other_nodes() -> None:
    actor = {"num_gpus_for_train": 8, "num_gpus_for_infer": 8}
    config = load_config(
        recipe(training={"device": "npu"}, actor_rollout=actor, resource_pool={"actor_rollout": [8, 8]})
    )
    text = describe(config, make_plan(config))
    assert "3 machines with 8 devices each" in text
    assert """ray start --address="IP_ADDRESS:6344" --resources='{"NPU": 8}'""" in text


def test_a_made_up_resource_has_its_ray_start_line() -> None:
    config = load_config(recipe(resource_pool={"resource_name": "XPU"}))
    assert """--resources='{"XPU": 4}'""" in describe(config, make_plan(config))


@pytest.mark.parametrize(
    ("device", "engine", "colocate", "expected"),
    [
        ("cpu", "vllm", ["train", "infer"], ["turns: train and infer", "vLLM has no sleep on a CPU"]),
        ("cpu", "hf", ["train", "infer", "ref"], ["turns: train and infer", "always with their memory: ref\n"]),
        ("npu", "vllm", ["train", "infer", "ref", "reward"], ["turns: train and infer", "memory: ref and reward\n"]),
        ("cpu", "vllm", ["ref", "reward"], []),
        ("cpu", "vllm", [], []),
    ],
)
def test_the_printed_plan_says_who_sleeps(device: str, engine: str, colocate: list[str], expected: list[str]) -> None:
    pool = {"actor_rollout": 1 if "infer" in colocate else 2, "colocate": colocate}
    config = load_config(recipe(training={"device": device}, rollout={"engine": engine}, resource_pool=pool))
    text = describe(config, make_plan(config))
    said = ["turns: train and infer", "always with their memory:", "vLLM has no sleep on a CPU"]
    assert all(line in text for line in expected)
    assert sum(line in text for line in said) == len(expected)


@pytest.mark.parametrize(("lookahead", "takes_turns"), [(0, True), (1, False)])
def test_one_process_that_samples_ahead_takes_no_turns(lookahead: int, takes_turns: bool) -> None:
    """Its engine has sampled the next step, too, when the update begins."""
    pool = {"actor_rollout": 1, "colocate": ["train", "infer"]}
    config = load_config(recipe(runtime="local", rollout={"lookahead": lookahead}, resource_pool=pool))
    assert config.takes_turns == takes_turns
