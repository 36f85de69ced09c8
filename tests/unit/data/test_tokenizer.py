"""Which ids end a completion, and what a folder without a usable tokenizer says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlxf.errors import ModelError
from rlxf.models.tokenizer import eos_token_ids, load_tokenizer
from tests.data_world import chat_tokenizer
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
