"""Wrong values of the keys that shape samples and weigh pairs: one clear line each, as in test_bad_recipes.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlxf.config.changes import compare
from rlxf.config.load import load_config
from rlxf.core.errors import ConfigError
from tests.unit.config.recipes import recipe
from tests.unit.test_bad_recipes import Wrong, actor


def form(value: Any) -> dict[str, Any]:
    return {"rollout": {"structured_outputs": value}}


WRONG = [
    # sampling, and forms of completions
    Wrong({"rollout": {"min_p": 1.0}}, "rollout.min_p", "expected less than 1"),
    Wrong({"rollout": {"min_p": -0.1}}, "rollout.min_p", "expected at least 0"),
    Wrong({"rollout": {"repetition_penalty": 0}}, "rollout.repetition_penalty", "expected greater than 0"),
    Wrong({"rollout": {"stop": [""]}}, "rollout.stop", "expected a list of texts that are not empty"),
    Wrong({"rollout": {"stop": [7]}}, "rollout.stop", "expected a list of texts that are not empty"),
    Wrong({"rollout": {"stop_strings": ["a"]}}, "rollout.stop_strings", 'did you mean "rollout.stop"?'),
    Wrong(form("[0-9]"), "rollout.structured_outputs", "expected a mapping with one of regex, json, choice, grammar"),
    Wrong(form({"regex": "a", "choice": ["b"]}), "rollout.structured_outputs", "expected a mapping with one of regex"),
    Wrong(form({"regexp": "a"}), "rollout.structured_outputs", "expected a mapping with one of regex"),
    Wrong(form({"regex": "[0-"}), "rollout.structured_outputs", "regex to be a regular expression: unterminated"),
    Wrong(form({"grammar": " "}), "rollout.structured_outputs", "grammar to be a text that is not empty"),
    Wrong(form({"choice": []}), "rollout.structured_outputs", "choice to be a list of texts"),
    Wrong(form({"choice": [1, 2]}), "rollout.structured_outputs", "numbers need quotes"),
    Wrong(form({"json": "none.json"}), "rollout.structured_outputs", "a file that holds one: none.json: No such file"),
    Wrong(form({"json": "{bad"}), "rollout.structured_outputs", "expected json to hold a JSON schema"),
    Wrong(form({"json": []}), "rollout.structured_outputs", "a mapping that is not empty"),
    Wrong(
        {"rollout": {"engine": "hf", "structured_outputs": {"regex": "a"}}},
        "rollout.structured_outputs",
        "expected none with rollout.engine=hf, which cannot force a form; set rollout.engine=vllm",
    ),
    # losses that change from epoch to epoch, or weigh tokens and pairs
    Wrong(actor(dpo_beta=[]), "actor_rollout.dpo_beta", "one for each epoch, the last one for all later epochs"),
    Wrong(actor(dpo_beta=[0.1, 0]), "actor_rollout.dpo_beta", "= [0.1, 0]: expected greater than 0"),
    Wrong(actor(dpo_beta=[0.1, "x"]), "actor_rollout.dpo_beta", "expected a number, or a list of numbers, got text"),
    Wrong(actor(dpo_beta="0.1"), "actor_rollout.dpo_beta", "write it without quotes"),
    Wrong(actor(ld_alpha=1.5), "actor_rollout.ld_alpha", "expected at most 1"),
    Wrong(
        actor(ld_alpha=0.5, dpo_loss_type=["sigmoid", "sft"]),
        "actor_rollout.ld_alpha",
        "expected none with sft: LD-DPO is defined for losses that have a reference",
    ),
    Wrong(actor(ld_alpha=0.5, pref_ftx=1.0), "actor_rollout.ld_alpha", "expected none with pref_ftx = 1"),
    Wrong(actor(dpo_weighting="WPO"), "actor_rollout.dpo_weighting", "expected one of none, wpo"),
    Wrong(actor(use_weighting=True), "actor_rollout.use_weighting", 'did you mean "actor_rollout.dpo_weighting"?'),
    Wrong(
        actor(dpo_weighting="wpo", dpo_loss_type="aot"),
        "actor_rollout.dpo_weighting",
        "expected none with aot: the loss of a pair depends on other pairs",
    ),
    Wrong(
        actor(dpo_weighting="wpo", pref_ftx=0.1),
        "actor_rollout.dpo_weighting",
        "expected none with pref_ftx: WPO weighs",
    ),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.key}-{wrong.says[:30]}")
def test_a_wrong_value_gets_one_line_with_key_and_fix(wrong: Wrong) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe(**wrong.change))
    (line,) = caught.value.problems
    assert line.startswith(wrong.key)
    assert wrong.says in line


def test_a_beta_may_be_a_number_or_a_list_and_the_last_value_stays() -> None:
    config = load_config(recipe(actor_rollout={"dpo_beta": [0.3, 0.2, 0.1]})).actor_rollout
    assert [config.beta_after(epochs) for epochs in (0.0, 0.99, 1.0, 2.5, 3.0, 9.0)] == [0.3, 0.3, 0.2, 0.1, 0.1, 0.1]
    for value in (0.3, [0.3]):
        assert load_config(recipe(actor_rollout={"dpo_beta": value})).actor_rollout.dpo_beta == 0.3
    assert load_config(recipe(actor_rollout={"dpo_beta": 1})).actor_rollout.beta_after(7.0) == 1.0


def test_a_schema_is_read_from_its_file_when_the_recipe_is_loaded(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"answer": {"type": "integer"}}}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    for written in (str(tmp_path / "schema.json"), schema, json.dumps(schema)):
        config = load_config(recipe(**form({"json": written})))
        assert config.rollout.structured_outputs == {"json": schema}


def test_a_single_stop_text_is_a_list_of_one() -> None:
    assert load_config(recipe(rollout={"stop": "###"})).rollout.stop == ("###",)


def test_a_dumped_recipe_with_the_new_keys_is_the_same_recipe() -> None:
    keys = {"stop": ["a"], "min_p": 0.1, "repetition_penalty": 1.2, "structured_outputs": {"choice": ["a", "b"]}}
    config = load_config(recipe(rollout=keys, actor_rollout={"dpo_beta": [0.2, 0.1], "ld_alpha": 0.5}))
    assert load_config(config.dump()) == config


def test_a_checkpoint_of_an_earlier_version_sampled_and_weighed_as_the_defaults_say() -> None:
    config = load_config(recipe())
    before = config.dump()
    for section, keys in {
        "rollout": ("min_p", "repetition_penalty", "stop", "structured_outputs"),
        "actor_rollout": ("ld_alpha", "dpo_weighting"),
    }.items():
        for key in keys:
            del before[section][key]
    assert compare(before, config).curve == []
    changed = load_config(recipe(rollout={"min_p": 0.1}, actor_rollout={"ld_alpha": 0.5, "dpo_beta": [0.2, 0.1]}))
    assert compare(before, changed).curve == [
        "actor_rollout.dpo_beta 0.1 -> [0.2, 0.1]",
        "actor_rollout.ld_alpha null -> 0.5",
        "rollout.min_p 0.0 -> 0.1",
    ]


def test_a_recipe_that_says_256_sequences_keeps_them_and_a_run_that_goes_on_without_tells_it() -> None:
    """Earlier versions wrote 256 into config.yaml where nobody had set it."""
    config = load_config(recipe())
    assert config.rollout.max_num_seqs is None
    before = config.dump()
    before["rollout"]["max_num_seqs"] = 256
    assert load_config(before).rollout.max_num_seqs == 256
    changes = compare(before, config)
    assert (changes.curve, changes.layout) == ([], ["rollout.max_num_seqs 256 -> null"])
