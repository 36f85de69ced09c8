"""Which ids end a completion, and what a folder without a usable tokenizer says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlxf.assembly.data import load_data, with_epochs
from rlxf.config.schema import RunConfig
from rlxf.core.errors import ConfigError, ModelError
from rlxf.models.tokenizer import eos_token_ids, load_tokenizer
from tests.data_world import chat_tokenizer, recipe, write_rows
from tests.tiny_models import BOS, EOS


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_saved_tokenizer_keeps_its_rule_and_its_template(tmp_path: Path) -> None:
    chat_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("a")["input_ids"][0] == BOS
    assert tokenizer.chat_template == chat_tokenizer().chat_template


def test_the_eos_ids_of_all_three_places_count(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": [9, 7]})
    write(tmp_path, "config.json", {"eos_token_id": 8})
    assert eos_token_ids(tmp_path, chat_tokenizer()) == (EOS, 7, 8, 9)


def test_tokens_of_a_recipe_end_completions_too(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    letter = tokenizer.convert_tokens_to_ids("a")
    assert eos_token_ids(tmp_path, tokenizer, ("a",)) == (EOS, letter)
    with pytest.raises(ModelError, match=r"has no token '<\|eot_id\|>', which should end completions"):
        eos_token_ids(tmp_path, tokenizer, ("<|eot_id|>",))


def with_template(folder: Path, **actor: Any) -> RunConfig:
    tokenizer = chat_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>"]})
    tokenizer.save_pretrained(folder)
    rows = write_rows(folder / "a.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}])
    return recipe(
        actor_rollout={"model": "tiny", "load": str(folder), "data_path": str(rows), "max_prompt_length": 128, **actor}
    )


def test_a_recipe_names_the_chat_template(tmp_path: Path) -> None:
    config, data = with_epochs(with_template(tmp_path, prompt_type="llama3"))
    assert config.actor_rollout.eos_tokens == ("<|eot_id|>",)
    data = data or load_data(config)
    prompt = data.tokenizer.decode(data.training.next_batch(0).prompts.rows()[0])
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    assert prompt.endswith(f"{header.format('user')}hi<|eot_id|>{header.format('assistant')}")
    ids = eos_token_ids(tmp_path, data.tokenizer, config.actor_rollout.eos_tokens)
    assert data.tokenizer.convert_ids_to_tokens(list(ids)) == ["</s>", "<|eot_id|>"]


def test_a_recipe_may_do_without_the_tokens_of_the_template(tmp_path: Path) -> None:
    config, _ = with_epochs(with_template(tmp_path, prompt_type="llama3", eos_tokens=[]))
    assert config.actor_rollout.eos_tokens == ()


def test_a_template_that_does_not_fit_the_tokenizer_is_told_before_the_run(tmp_path: Path) -> None:
    config, _ = with_epochs(with_template(tmp_path, prompt_type="chatml"))
    with pytest.raises(ModelError, match=r"has no token '<\|im_end\|>', which should end completions"):
        load_data(config)


def test_a_recipe_without_a_template_keeps_the_tokenizers(tmp_path: Path) -> None:
    config, _ = with_epochs(with_template(tmp_path))
    assert config.actor_rollout.eos_tokens is None
    assert load_data(config).tokenizer.chat_template == chat_tokenizer().chat_template


def test_an_unknown_chat_template_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'"lama3" is not the name of a chat template\. Did you mean "llama3"'):
        load_data(with_template(tmp_path, prompt_type="lama3"))


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_one_place_is_enough(name: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.eos_token = None
    write(tmp_path, name, {"eos_token_id": 5})
    assert eos_token_ids(tmp_path, tokenizer) == (5,)


def test_no_eos_at_all_is_an_error(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.eos_token = None
    write(tmp_path, "config.json", {"eos_token_id": None})
    with pytest.raises(ModelError, match=r'add "eos_token_id" to generation_config\.json'):
        eos_token_ids(tmp_path, tokenizer)


@pytest.mark.parametrize(
    "content", ["{", [1], {"eos_token_id": "</s>"}, {"eos_token_id": [True]}, {"eos_token_id": -1}]
)
def test_a_damaged_config_is_named(content: Any, tmp_path: Path) -> None:
    write(tmp_path, "config.json", content)
    with pytest.raises(ModelError, match=r"config\.json: "):
        eos_token_ids(tmp_path, chat_tokenizer())


def test_folders_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    write(tmp_path, "tokenizer.json", "{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_code_of_a_folder_does_not_run_unless_allowed(tmp_path: Path) -> None:
    chat_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write(
        tmp_path,
        "tokenizer_config.json",
        config | {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"},
    )
    write(tmp_path, "evil.py", f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    with pytest.raises(ModelError, match=r"training\.trust_remote_code=true"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()
