"""Which shape a role's model has: the folder's where it is there, the recipe's where it is not, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import transformers

from rlxf.config.changes import compare
from rlxf.config.config_json import FAMILIES, shape_of
from rlxf.config.load import load_config
from rlxf.config.schema import ModelConfig, RunConfig
from rlxf.config.typed import make_room
from rlxf.core.errors import ConfigError
from rlxf.placement.plan import make_plan
from rlxf.placement.text import describe
from tests.unit.config.recipes import LLAMA, compose, model_folder, recipe, reward_folder
from workers import cli

WIDE: dict[str, Any] = {"hidden_size": 256, "num_key_value_heads": 4, "vocab_size": 300, "tie_word_embeddings": False}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the small recipe finds everything, and foreign models."""
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "sft")
    reward_folder(tmp_path / "rm")
    model_folder(tmp_path / "wide", **WIDE)
    reward_folder(tmp_path / "deep", num_hidden_layers=6)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    return tmp_path


def unnamed(**changes: Any) -> dict[str, Any]:
    """The small recipe without a word about models."""
    raw = recipe(dry_run=False, **changes)
    del raw["model"]
    for role in ("actor_rollout", "ref", "reward"):
        raw[role].pop("model", None)
    return raw


def shape(config: RunConfig, role: str) -> ModelConfig:
    return config.model[getattr(config, role).model]


def problem_of(raw: dict[str, Any], *typed: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(raw, typed=typed)
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


# The folder decides


def test_a_recipe_need_not_name_a_model(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        config = load_config(unnamed(actor_rollout={"load": "wide"}, ref={"load": "wide"}, reward={"load": "deep"}))
    assert not caplog.records
    assert (config.actor_rollout.model, config.ref.model, config.reward.model) == ("wide", "wide", "deep")
    assert set(config.model) == {"wide", "deep"}
    assert shape(config, "actor_rollout") == ModelConfig(
        num_layers=2,
        hidden_size=256,
        ffn_hidden_size=192,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=64,
        vocab_size=300,
        max_position_embeddings=512,
        untie_embeddings_and_output_weights=True,
    )
    assert (shape(config, "reward").num_layers, shape(config, "reward").vocab_size) == (6, 260)


def test_a_model_of_the_recipes_file_gives_way_to_the_folder_in_one_line(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = recipe(dry_run=False, actor_rollout={"load": "wide"}, ref={"load": "wide"}, reward={"load": "deep"})
    with caplog.at_level(logging.INFO):
        config = load_config(raw)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        "the folder decides the shape; ./wide has hidden_size = 256 (model.tiny: 128), num_query_groups = 4 "
        "(model.tiny: 2), kv_channels = 64 (model.tiny: 32), vocab_size = 300 (model.tiny: 260), "
        "untie_embeddings_and_output_weights = true (model.tiny: false); ./deep has num_layers = 6 (model.tiny: 2)"
    )
    assert shape(config, "ref").hidden_size == 256
    assert shape(config, "reward").num_layers == 6
    assert "tiny" not in config.model  # it is nobody's shape


def test_a_model_that_says_what_the_folder_says_keeps_its_name(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        config = load_config(recipe(dry_run=False))
    assert not caplog.records
    assert {role.model for role in (config.actor_rollout, config.ref, config.reward)} == {"tiny"} == set(config.model)


def test_a_name_that_the_recipe_does_not_have_is_a_mistake_all_the_same(files: Path) -> None:
    raw = recipe(dry_run=False, actor_rollout={"model": "tinny"}, ref={"model": None})
    assert problem_of(raw).startswith('actor_rollout.model = "tinny": expected a model of the recipe')


def test_an_unnamed_reward_model_has_its_own_shape(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = recipe(dry_run=False, reward={"load": "deep", "model": None})
    with caplog.at_level(logging.INFO):
        config = load_config(raw)
    assert not caplog.records  # the recipe says nothing about it
    assert (config.actor_rollout.model, config.reward.model) == ("tiny", "deep")
    assert shape(config, "reward").num_layers == 6


def test_keys_that_a_models_section_lacks_are_the_folders(files: Path) -> None:
    raw = recipe(dry_run=False, model={"tiny": {"num_layers": None, "vocab_size": None}})
    assert shape(load_config(raw), "actor_rollout").num_layers == 2
    raw["dry_run"], raw["reward"]["load"] = True, "missing"
    with pytest.raises(ConfigError, match=r"model\.tiny\.num_layers is required"):  # by the reward model's plan
        load_config(raw)


def test_two_folders_of_one_name_are_two_models(files: Path) -> None:
    (files / "a").mkdir()
    reward_folder(files / "a" / "wide", num_hidden_layers=3)
    config = load_config(unnamed(actor_rollout={"load": "wide"}, ref={"load": "wide"}, reward={"load": "a/wide"}))
    assert (config.actor_rollout.model, config.reward.model) == ("wide", "wide_2")
    assert (shape(config, "actor_rollout").num_layers, shape(config, "reward").num_layers) == (2, 3)


def test_a_name_with_a_dot_is_a_key_all_the_same(files: Path) -> None:
    model_folder(files / "qwen2.5-mine", model_type="qwen2")
    config = load_config(unnamed(actor_rollout={"load": "qwen2.5-mine"}, ref={"load": "qwen2.5-mine"}))
    assert config.actor_rollout.model == "qwen2_5-mine"
    assert load_config(config.dump()) == config


def test_the_dump_holds_the_resolved_shapes_and_loads_to_itself(files: Path) -> None:
    config = load_config(recipe(dry_run=False, actor_rollout={"load": "wide"}, ref={"load": "wide"}))
    dumped = config.dump()
    assert dumped["model"][dumped["actor_rollout"]["model"]]["hidden_size"] == 256
    assert None not in dumped["model"]["tiny"].values()  # of the reward model: as the folder has it
    assert load_config(dumped) == config


def test_a_checkpoint_has_the_shape_of_the_model_that_it_began_with(files: Path) -> None:
    checkpoint = files / "ckpt" / "iter_0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").touch()
    (files / "ckpt" / "latest_checkpointed_iteration.txt").write_text("3")
    driver = {"config": {"actor_rollout": {"load": str(files / "wide")}}}
    (checkpoint / "driver.json").write_text(json.dumps(driver))
    config = load_config(unnamed(actor_rollout={"load": "ckpt"}, ref={"load": "ckpt"}))
    assert shape(config, "actor_rollout").hidden_size == 256


# The command line


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (
            "actor_rollout.model",
            'actor_rollout.model = "tiny": actor_rollout.load = "./wide" has hidden_size = 256 (tiny: 128), ',
        ),
        ("training.model", 'training.model = "tiny": actor_rollout.load = "./wide" has hidden_size = 256'),
        ("model", 'actor_rollout.model = "tiny": actor_rollout.load = "./wide" has'),
        (
            "model.tiny.hidden_size",
            'model.tiny.hidden_size = 128: expected 256, as actor_rollout.load = "./wide" has it; leave the key out: '
            "the folder decides the shape",
        ),
        ("model.tiny.vocab_size", "model.tiny.vocab_size = 260: expected 300"),
    ],
)
def test_a_typed_model_that_differs_is_an_error(files: Path, typed: str, says: str) -> None:
    raw = recipe(dry_run=False, actor_rollout={"load": "wide"}, reward={"model": None})
    raw["ref"] = {}
    if typed == "training.model":
        raw["training"]["model"] = raw["actor_rollout"].pop("model")
        raw["reward"] = {"function": "reward.py"}
        (files / "reward.py").touch()
    line = problem_of(raw, typed)
    assert line.startswith(says)
    assert "leave the" in line


def test_typed_keys_that_fit_are_accepted(files: Path) -> None:
    """As a foreign folder needed them in earlier versions."""
    load_config(recipe(dry_run=False), typed=["actor_rollout.model", *(f"model.tiny.{key}" for key in LLAMA)])
    longer = recipe(dry_run=False, model={"tiny": {"max_position_embeddings": 128, "vocab_size": 256}})
    load_config(longer, typed=["actor_rollout.model", "model"])  # models of one size differ in these


def test_the_command_line_says_which_keys_were_typed() -> None:
    words = [
        "+model.tiny.num_layers=3",
        "actor_rollout_ref.ref.model=tiny",
        "model=[tiny]",
        "-cn",
        "x",
    ]
    assert cli.read_command(words).keys >= {"model.tiny.num_layers", "ref.model", "model"}


def test_a_typed_scorer_takes_the_place_of_the_recipes(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    (files / "reward.py").touch()
    both = recipe(dry_run=False, reward={"function": "reward.py"})
    with caplog.at_level(logging.INFO):
        config = load_config(both, typed=["reward.function"])
    assert (config.reward.load, config.reward.model) == (None, None)
    assert caplog.messages == ["reward.function is on the command line: reward.load of the recipe is left out"]
    assert load_config(both, typed=["reward.load"]).reward.function is None
    for typed in ([], ["reward.load", "reward.function"]):
        with pytest.raises(ConfigError, match="are both set"):
            load_config(both, typed=typed)


def test_a_recipes_evaluation_of_data_that_are_not_here_does_not_stop_other_data(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = {"data_path": "eval.jsonl", "metrics": "truth.py"}
    raw = recipe(dry_run=False, training={"eval_interval": 5}, eval=evaluation)
    with pytest.raises(ConfigError, match=r"eval\.data_path = .*no such file"):
        load_config(raw)
    with caplog.at_level(logging.INFO):
        config = load_config(raw, typed=["actor_rollout.data_path"])
    assert (config.eval.data_path, config.eval.metrics) == (None, None)
    assert "eval.data_path and eval.metrics of the recipe, whose data are not here, are left out" in caplog.text
    with pytest.raises(ConfigError, match=r"eval\.data_path = .*no such file"):
        load_config(raw, typed=["actor_rollout.data_path", "eval.data_path"])
    (files / "eval.jsonl").touch()
    (files / "truth.py").touch()
    assert load_config(raw, typed=["actor_rollout.data_path"]).eval.data_path == (str(files / "eval.jsonl"),)


def test_training_data_path_is_other_data_where_the_actor_has_none_of_its_own(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = recipe(dry_run=False, training={"eval_interval": 5}, eval={"data_path": "eval.jsonl"})
    with pytest.raises(ConfigError, match=r"eval\.data_path = .*no such file"):
        load_config(raw, typed=["training.data_path"])  # the actor's own path decides: these are the recipe's data
    raw["training"]["data_path"] = raw["actor_rollout"].pop("data_path")
    with caplog.at_level(logging.INFO):
        config = load_config(raw, typed=["training.data_path"])
    assert config.eval.data_path is None
    assert "training.data_path is on the command line: eval.data_path of the recipe" in caplog.text
    with pytest.raises(ConfigError, match=r"eval\.data_path = .*no such file"):
        load_config(raw, typed=["training.data_path", "eval.data_path"])


def test_a_typed_layout_on_shared_devices_takes_the_place_of_the_recipes_lookahead(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = ["train", "infer", "ref", "reward"]
    raw = recipe(dry_run=False, runtime="ray", rollout={"lookahead": 1}, resource_pool={"colocate": shared})
    with pytest.raises(ConfigError, match=r"rollout\.lookahead = 1: expected 0, because resource_pool\.colocate has"):
        load_config(raw)
    with caplog.at_level(logging.INFO):
        config = load_config(raw, typed=["resource_pool.colocate"])
    assert config.rollout.lookahead == 0
    assert "resource_pool.colocate is on the command line, with train and infer: rollout.lookahead" in caplog.text
    with pytest.raises(ConfigError, match=r"rollout\.lookahead = 1"):
        load_config(raw, typed=["resource_pool.colocate", "rollout.lookahead"])
    raw["resource_pool"] = {"colocate": ["ref", "reward"]}
    assert load_config(raw, typed=["resource_pool.colocate"]).rollout.lookahead == 1


def test_a_typed_micro_batch_size_takes_the_place_of_the_recipes_token_budget(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = {"micro_batch_size": 4, "max_tokens_per_micro_batch": 256}
    raw = recipe(dry_run=False, actor_rollout=both, ref=both)
    assert load_config(raw).actor_rollout.max_tokens_per_micro_batch == 256
    with caplog.at_level(logging.INFO):
        config = load_config(raw, typed=["actor_rollout.micro_batch_size"])
    assert config.actor_rollout.max_tokens_per_micro_batch is None
    assert config.ref.max_tokens_per_micro_batch == 256
    assert "actor_rollout.micro_batch_size is on the command line: actor_rollout.max_tokens_per_mic" in caplog.text
    typed = ["actor_rollout.micro_batch_size", "actor_rollout.max_tokens_per_micro_batch"]
    assert load_config(raw, typed=typed).actor_rollout.max_tokens_per_micro_batch == 256
    both |= {"virtual_pipeline_model_parallel_size": 2}  # such a pipeline needs the budget
    assert make_room({"actor_rollout": both}, typed[:1]) == []
    assert both["max_tokens_per_micro_batch"] == 256


# A plan without folders


def test_a_plan_takes_the_recipes_model_where_the_folder_is_not_here() -> None:
    config = load_config(recipe())
    assert shape(config, "actor_rollout").hidden_size == 128
    assert "tiny" in describe(config, make_plan(config))


def test_a_plan_without_folder_and_model_names_both_ways_out(files: Path) -> None:
    raw = unnamed(actor_rollout={"load": "gone"}, ref={"load": "gone"}, reward={"load": "gone_too"}) | {"dry_run": True}
    line = problem_of(raw)
    assert line.startswith(
        'actor_rollout.load = "./gone": no such folder, and the recipe names no model to plan with; '
    )
    assert "put the folder there, or name a shape: +model=NAME actor_rollout.model=NAME" in line
    assert problem_of(raw | {"model": recipe()["model"]}).endswith("or name a shape: actor_rollout.model=tiny")
    raw["dry_run"] = False
    with pytest.raises(ConfigError) as caught:
        load_config(raw)
    keys = [line.split(" = ")[0] for line in caught.value.problems]
    assert keys == ["actor_rollout.load", "ref.load", "reward.load"]  # the missing folders, once each


def test_the_second_way_out_is_one(tmp_path: Path) -> None:
    """A recipe of one's own that names no model, planned with a shape of configs/rlxf/model."""
    (tmp_path / "mine.yaml").write_text(
        "training: {stage: sft}\nactor_rollout: {load: gone, data_path: gone.jsonl}\ndry_run: true\n"
    )
    words = ("+model=llama3-8b", "actor_rollout.model=llama3-8b", "hydra.searchpath=[file://" + str(cli.RECIPES) + "]")
    config = load_config(compose("mine", *words, folder=tmp_path))
    assert shape(config, "actor_rollout").num_layers == 32


def test_the_models_of_a_plan_without_folders_are_the_actors(files: Path) -> None:
    raw = unnamed(ref={"load": "gone"}, reward={"load": "gone"}) | {"dry_run": True}
    config = load_config(raw)
    assert (config.actor_rollout.model, config.ref.model, config.reward.model) == ("sft",) * 3


# What a folder may not be


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mistral"}, 'model_type = "mistral"; expected one of llama, qwen2, qwen3'),
        ({"model_type": None}, "model_type = null; expected one of llama, qwen2, qwen3"),
        ({"hidden_size": None}, "its config.json has no hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0; expected a whole number, at least 1"),
        ({"vocab_size": "many"}, 'vocab_size = "many"; expected a whole number, at least 1'),
        ({"num_attention_heads": 3}, "num_attention_heads = 3; expected a divisor of hidden_size = 128"),
        ({"num_attention_heads": 3, "head_dim": 32}, "expected a divisor of hidden_size = 128"),  # transformers' Llama
        (
            {"model_type": "qwen2", "num_attention_heads": 3, "num_key_value_heads": 1},
            "num_attention_heads = 3; expected a divisor (or a head_dim) for hidden_size = 128",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3; expected a divisor of num_attention_heads = 4"),
    ],
)
def test_a_folder_that_cannot_be_trained_is_one_line(files: Path, changes: dict[str, Any], says: str) -> None:
    model_folder(files / "other", **changes)
    line = problem_of(unnamed(actor_rollout={"load": "other"}, ref={"load": "other"}))
    assert line.startswith('actor_rollout.load = "./other": its config.json ')
    assert says in line


def test_a_reward_model_of_another_family_is_named_by_its_own_key(files: Path) -> None:
    reward_folder(files / "other", model_type="gemma")
    line = problem_of(unnamed(reward={"load": "other"}))
    assert line.startswith('reward.load = "./other": its config.json says model_type = "gemma"')


def test_a_longer_sequence_than_the_folder_knows_is_refused(files: Path) -> None:
    model_folder(files / "short", max_position_embeddings=48)
    line = problem_of(unnamed(actor_rollout={"load": "short"}, ref={"load": "short"}))
    assert line.startswith("actor_rollout.seq_length = 64: expected at most 48, the longest sequence of model short")


def test_a_layout_that_the_folders_heads_do_not_allow_is_refused(files: Path) -> None:
    actor = {"load": "wide", "num_gpus_for_train": 3, "tensor_model_parallel_size": 3}
    line = problem_of(unnamed(actor_rollout=actor, ref={"load": "wide"}, resource_pool={"actor_rollout": 4}))
    assert "tensor_model_parallel_size = 3: expected a divisor of model.wide.num_attention_heads = 4" in line


def test_a_reference_has_the_policys_vocabulary(files: Path) -> None:
    raw = unnamed(ref={"load": "wide"})
    line = problem_of(raw)
    assert line.startswith('ref.load = "./wide": its model has 300 tokens, the policy (actor_rollout.load) has 260; ')
    for folder in ("sft", "wide"):  # one vocabulary, filled up to two sizes
        (files / folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    load_config(raw)
    (files / "wide" / "tokenizer.json").write_text('{"model": {"vocab": {"b": 0}}}')
    assert problem_of(raw) == line


# Against transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_leaves_out_is_what_transformers_takes(family: str) -> None:
    said = {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 64, "num_attention_heads": 64}
    ours = shape_of({"model_type": family, "vocab_size": 7, **said})
    theirs = transformers.AutoConfig.for_model(family, vocab_size=7, **said)
    assert ours.num_query_groups == theirs.num_key_value_heads
    assert ours.kv_channels == (getattr(theirs, "head_dim", None) or 4)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.untie_embeddings_and_output_weights is not theirs.tie_word_embeddings
    nothing = shape_of({"model_type": family, "vocab_size": 7, **said, "num_key_value_heads": None})
    theirs = transformers.AutoConfig.for_model(family, **said, num_key_value_heads=None)
    assert nothing.num_query_groups == theirs.num_key_value_heads == 64


def test_the_families_are_those_that_are_trained() -> None:
    from rlxf.models.megatron.families import FAMILIES as TRAINED

    assert set(FAMILIES) == set(TRAINED)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_linear_scaling_stretches_the_positions(key: str) -> None:
    assert shape_of(LLAMA | {key: {"rope_type": "linear", "factor": 4.0}}).max_position_embeddings == 2048
    assert shape_of(LLAMA | {key: {"type": "linear", "factor": 4}}).max_position_embeddings == 2048
    assert shape_of(LLAMA | {key: {"rope_type": "llama3", "factor": 32.0}}).max_position_embeddings == 512


# A run that goes on


def test_a_dump_of_an_earlier_version_has_the_shape_of_its_folder(files: Path) -> None:
    """It holds what the recipe said: keys unset, and an embedding that nothing held against the folder."""
    now = load_config(recipe(dry_run=False))
    before = now.dump()
    before["model"] = {"old": {**before["model"]["tiny"], "kv_channels": None, "vocab_size": 512}}
    for role in ("actor_rollout", "ref", "reward"):
        before[role]["model"] = "old"
    before["model"]["old"]["untie_embeddings_and_output_weights"] = True
    for head_size in (None, before["model"]["old"]["hidden_size"] // before["model"]["old"]["num_attention_heads"]):
        before["model"]["old"]["kv_channels"] = head_size
        changes = compare(before, now, from_folder=False)
        assert (changes.shape, changes.curve, changes.layout) == ([], [], [])
    before["model"]["old"]["num_query_groups"] = None
    assert compare(before, now, from_folder=False).shape == ["model.tiny.num_query_groups 4 -> 2"]


def test_another_vocabulary_is_another_shape(files: Path) -> None:
    now = load_config(recipe(dry_run=False))
    before = now.dump()
    before["model"]["tiny"]["vocab_size"] = 512
    assert compare(before, now).shape == ["model.tiny.vocab_size 512 -> 260"]


def test_a_tokenizer_that_is_the_folders_own_may_be_named_or_not(files: Path) -> None:
    now = load_config(recipe(dry_run=False))
    before = now.dump()
    before["actor_rollout"]["tokenizer_name_or_path"] = str(files / "sft")
    before["reward"]["tokenizer_name_or_path"] = str(files / "sft")  # the same files as the reward model's own
    assert compare(before, now).curve == []
    (files / "sft" / "tokenizer.json").write_text('{"model": 1}')
    assert [line.split()[0] for line in compare(before, now).curve] == ["reward.tokenizer_name_or_path"]
