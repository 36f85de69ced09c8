"""Merging a recipe: precedence, unset keys, older names, and all mistakes in one report."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rlxf.config.load import load_config
from rlxf.config.roles import ActorConfig
from rlxf.config.schema import RunConfig
from rlxf.core.errors import ConfigError
from rlxf.tools.tiny import truth
from tests.unit.config.recipes import LLAMA, recipe


def test_a_role_wins_over_training_and_training_over_its_model() -> None:
    everywhere = {
        "model": {"tiny": {"clip_grad": 3.0}},
        "training": {"clip_grad": 2.0},
        "actor_rollout": {"clip_grad": 1.5},
    }
    for expected in (1.5, 2.0, 3.0):
        assert load_config(recipe(**everywhere)).actor_rollout.clip_grad == expected
        everywhere.popitem()
    assert load_config(recipe()).actor_rollout.clip_grad == ActorConfig.model_fields["clip_grad"].default


def test_a_role_default_never_beats_a_value_of_training() -> None:
    default = ActorConfig.model_fields["dpo_beta"].default
    config = load_config(recipe(training={"dpo_beta": default + 1, "bf16": True}))
    assert config.actor_rollout.dpo_beta == default + 1
    assert (config.actor_rollout.bf16, config.ref.bf16, config.reward.bf16) == (True, True, True)


def test_null_is_unset_at_every_level() -> None:
    raw = recipe(training={"lr": 3e-5})
    raw["actor_rollout"] |= {"lr": None, "micro_batch_size": None}
    raw |= {"rollout": {"temperature": None}, "log": None}
    config = load_config(raw)
    assert config.actor_rollout.lr == 3e-5
    assert config.actor_rollout.micro_batch_size == 1
    assert config.rollout.temperature == 1.0
    assert config.log.interval == 1


def test_the_frozen_models_take_what_they_lack_from_the_actor() -> None:
    raw = recipe(actor_rollout={"seq_length": 128, "micro_batch_size": 7, "bf16": True}, training={"seq_length": None})
    raw["ref"] = raw["reward"] = {}
    raw["reward"] = {"load": "rm"}
    config = load_config(raw)
    assert (config.ref.model, config.reward.model) == ("tiny", "tiny")
    assert config.ref.load == config.actor_rollout.load != config.reward.load
    for role in (config.ref, config.reward):
        assert (role.seq_length, role.micro_batch_size, role.bf16) == (128, 7, True)


def test_a_frozen_model_keeps_its_own_values() -> None:
    config = load_config(recipe(actor_rollout={"micro_batch_size": 7}, ref={"micro_batch_size": 2, "load": "base"}))
    assert config.ref.micro_batch_size == 2
    assert Path(config.ref.load or "").name == "base"


def test_a_reward_function_needs_no_model() -> None:
    raw = recipe()
    raw["reward"] = {"function": "reward.py"}
    config = load_config(raw)
    assert (config.reward.model, config.reward.load) == (None, None)


def test_the_reference_layout_is_the_plain_one_with_two_sections_inside_another() -> None:
    plain = recipe(actor_rollout={"lr": 1e-4})
    nested = {key: value for key, value in plain.items() if key not in ("actor_rollout", "ref")}
    nested["actor_rollout_ref"] = {"actor_rollout": plain["actor_rollout"], "ref": plain["ref"]}
    assert load_config(nested) == load_config(plain)


def test_where_both_layouts_set_a_key_the_plain_one_wins() -> None:
    raw = recipe(actor_rollout={"lr": 1e-4, "dpo_beta": None})
    raw["actor_rollout"]["dpo_beta"] = None
    raw["actor_rollout_ref"] = {"actor_rollout": {"lr": 9.0, "dpo_beta": 0.3}}
    actor = load_config(raw).actor_rollout
    assert (actor.lr, actor.dpo_beta) == (1e-4, 0.3)


def test_older_names_set_the_key_that_they_mean(caplog: pytest.LogCaptureFixture) -> None:
    raw = recipe(actor_rollout={"shuffle": True}, algorithm={"missing_eos_penalty": 2.0})
    raw["model"]["tiny"]["padded_vocab_size"] = raw["model"]["tiny"].pop("vocab_size")
    config = load_config(raw)
    assert config.actor_rollout.shuffle_minibatch is True
    assert config.actor_rollout.missing_eos_penalty == 2.0
    assert config.model["tiny"].vocab_size == 260
    assert "actor_rollout.shuffle is read as actor_rollout.shuffle_minibatch" in caplog.text


def test_a_file_of_the_library_is_found_where_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    raw = recipe(eval={"metrics": "./rlxf/tiny/truth.py"})
    assert load_config(raw).eval.metrics == truth.__file__
    assert "eval.metrics = ./rlxf/tiny/truth.py has moved; the module rlxf.tools.tiny.truth is used" in caplog.text
    own = tmp_path / "rlxf/tiny/truth.py"
    own.parent.mkdir(parents=True)
    own.touch()  # a file that is there is the one that was meant
    assert str(load_config(raw).eval.metrics).endswith("/rlxf/tiny/truth.py")


def test_the_default_of_a_composed_recipe_does_not_contradict_an_older_name() -> None:
    raw = recipe(training={"log_interval": 3}, log={"interval": 1})
    assert load_config(raw).log.interval == 3
    raw = recipe(training={"log_interval": 3}, log={"interval": 2})
    with pytest.raises(ConfigError, match=r"training\.log_interval = 3: log\.interval = 2 has another value"):
        load_config(raw)


def test_an_older_name_may_repeat_the_key_but_not_contradict_it() -> None:
    both = recipe(actor_rollout={"missing_eos_penalty": 2.0}, algorithm={"missing_eos_penalty": 2.0})
    assert load_config(both).actor_rollout.missing_eos_penalty == 2.0
    both["algorithm"]["missing_eos_penalty"] = 1.0
    with pytest.raises(ConfigError, match=r"algorithm\.missing_eos_penalty = 1\.0: actor_rollout\.missing_eos_penalty"):
        load_config(both)


def test_unused_keys_of_the_reference_are_named_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    legacy: dict[str, Any] = {
        "training": {"distributed_backend": "nccl", "no_load_optim": True},
        "actor_rollout": {"clip_ratio": 0.2, "entropy_coeff": 0.001, "use_kv_cache": True, "use_mc2": True},
        "algorithm": {
            "gamma": 1.0,
            "lam": 0.95,
            "adv_estimator": "gae",
            "kl_penalty": "kl",
            "kl_ctrl": {"kl_coef": 0.1},
        },
        "model": {"tiny": {"use_mc2": True, "use_flash_attn": True, "rotary_base": 500000}},
    }
    with caplog.at_level(logging.WARNING):
        assert load_config(recipe(**legacy)) == load_config(recipe())
    (record,) = caplog.records
    keys = [f"{s}.{k}" for s, section in legacy.items() if s != "model" for k in section]
    for key in [*keys, *(f"model.tiny.{k}" for k in legacy["model"]["tiny"])]:
        assert key in record.getMessage()


def test_the_reference_is_the_named_checkpoint_of_a_run(tmp_path: Path) -> None:
    run, model = tmp_path / "ckpt", tmp_path / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(LLAMA))
    (model / "model.safetensors").touch()
    for key in ({"ref": {"load": str(run), "refer_model_iter": 1}}, {"ref": {"load": str(run)}, **_from_actor(1)}):
        assert load_config(recipe(**key)).ref.load == str(run / "iter_0000001")
    # A model folder is the same whatever a run has trained since.
    assert load_config(recipe(ref={"load": str(model), "refer_model_iter": 1})).ref.load == str(model)


def _from_actor(number: int) -> dict[str, Any]:
    return {"actor_rollout": {"refer_model_iter": number}}


def test_a_recipe_without_older_names_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    load_config(recipe())
    assert not caplog.records


def test_another_reference_than_the_first_policy_is_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    load_config(recipe(ref={"load": "base"}))
    assert "ref.load differs from actor_rollout.load" in caplog.text


def test_yaml_integers_are_numbers_and_lists_are_pools() -> None:
    config = load_config(recipe(actor_rollout={"clip_grad": 1}, resource_pool={"actor_rollout": [1, 1], "ref": 1}))
    assert config.actor_rollout.clip_grad == 1.0
    assert isinstance(config.actor_rollout.clip_grad, float)
    assert (config.resource_pool.actor_rollout, config.resource_pool.ref) == ((1, 1), (1,))


def test_paths_are_relative_to_the_folder_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(recipe(actor_rollout={"load": "./a", "save": "~/b", "data_path": "/c/d.jsonl"}))
    assert config.actor_rollout.load == str(tmp_path / "a")
    assert config.actor_rollout.save == str(Path.home() / "b")
    assert config.actor_rollout.data_path == ("/c/d.jsonl",)
    assert load_config(recipe(training={"resume": "never"})).training.resume == "never"
    assert load_config(recipe(training={"resume": "./c"})).training.resume == str(tmp_path / "c")


def test_the_name_of_an_installed_module_stands_for_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_mine").mkdir()
    (tmp_path / "of_mine" / "rule.py").touch()
    monkeypatch.chdir(tmp_path)
    assert load_config(recipe(eval={"metrics": "rlxf.tools.tiny.truth"})).eval.metrics == truth.__file__
    scored = recipe(reward={"load": None, "model": None, "function": "of_mine.rule"})
    with pytest.raises(
        ConfigError, match=r'"./of_mine.rule": .* ends in .py, or the name of a module that is installed'
    ):
        load_config(scored)  # what lies in the current folder is named by its path
    monkeypatch.syspath_prepend(tmp_path)
    assert load_config(scored).reward.function == str(tmp_path / "of_mine" / "rule.py")
    scored["reward"]["function"] = "of_mine/rule.py"
    assert load_config(scored).reward.function == str(tmp_path / "of_mine" / "rule.py")


def test_a_run_goes_on_by_itself_and_keeps_every_checkpoint() -> None:
    training = load_config(recipe()).training
    assert (training.resume, training.keep_latest, training.keep_best, training.save_hf_interval) == ("auto", 0, 0, 0)
    assert (training.async_save, training.keep_best_metric, training.keep_best_mode) == (False, None, None)


def test_a_dumped_config_loads_to_itself() -> None:
    config = load_config(recipe(training={"lr": 1e-3}, resource_pool={"colocate": ["ref", "reward"]}))
    assert load_config(config.dump()) == config


def test_every_mistake_is_in_one_report() -> None:
    raw = recipe(
        training={"bf16": "yes", "stage": "ppo"},
        actor_rollout={"lrr": 1, "dpo_beta": 0, "do_sample": False},
        model={"tiny": {"num_layers": None}},
        resource_pool={"actor_rollout": [4]},
        nonsense={},
    )
    with pytest.raises(ConfigError) as caught:
        load_config(raw, earlier=["log.foo = 1: unknown key"])
    keys = [line.split(" ")[0] for line in caught.value.problems]
    assert sorted(keys) == [
        "actor_rollout.do_sample",
        "actor_rollout.dpo_beta",
        "actor_rollout.lrr",
        "actor_rollout.num_gpus_for_train",
        "log.foo",
        "model.tiny.num_layers",
        "nonsense",
        "training.bf16",  # once, though three roles inherit it
        "training.stage",
    ]


def test_a_wrong_value_causes_no_second_message() -> None:
    raw = recipe(actor_rollout={"max_prompt_length": "many", "min_lr": "low", "lr_decay_style": "cosine"})
    with pytest.raises(ConfigError) as caught:
        load_config(raw)
    assert len(caught.value.problems) == 2


def test_a_config_is_frozen() -> None:
    config: RunConfig = load_config(recipe())
    with pytest.raises(ValueError, match="frozen"):
        config.training.seed = 2  # type: ignore[misc]
