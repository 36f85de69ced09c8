"""The tokenizer beside a saved policy is the one that its prompts came from, and nothing of another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlxf.assembly.roles import build_actor, policy_tokenizer
from rlxf.models.tokenizer import load_tokenizer
from rlxf.platform import Process, get_platform
from tests.data_world import chat_tokenizer
from tests.settings import run_config
from tests.tiny_models import byte_tokenizer, save_causal_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose own tokenizer has a chat template."""
    folder = save_causal_lm(tmp_path_factory.mktemp("assemble") / "model")
    chat_tokenizer().save_pretrained(folder)
    assert (folder / "chat_template.jinja").is_file()
    return folder


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with other special tokens and no chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "!", "eos_token": "</s>"})
    folder = tmp_path_factory.mktemp("assemble") / "tokenizer"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_policy_is_saved_with_the_tokenizer_that_the_recipe_names(
    folder: Path, named: Path, tmp_path: Path, stage: str
) -> None:
    config = run_config(folder, stage=stage, tokenizer_name_or_path=str(named))
    build_actor(config, get_platform("cpu"), Process()).save_hf(tmp_path / "policy")
    saved, wanted = load_tokenizer(tmp_path / "policy"), policy_tokenizer(config)
    assert saved.get_vocab() == wanted.get_vocab()
    assert (saved.pad_token, saved.eos_token, saved.chat_template) == ("!", "</s>", None)
    assert not (tmp_path / "policy" / "chat_template.jinja").exists()
    assert "</s>" in saved.convert_ids_to_tokens(
        json.loads((tmp_path / "policy" / "generation_config.json").read_text())["eos_token_id"]
    )
    padding = json.loads((tmp_path / "policy" / "config.json").read_text())["pad_token_id"]
    assert padding == (wanted.pad_token_id if stage == "rm" else 0)  # where transformers reads a padded row's score


def test_a_policy_without_a_named_tokenizer_keeps_its_own(folder: Path, tmp_path: Path) -> None:
    config = run_config(folder, stage="sft")
    build_actor(config, get_platform("cpu"), Process()).save_hf(tmp_path / "policy")
    assert load_tokenizer(tmp_path / "policy").chat_template == load_tokenizer(folder).chat_template
    names = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "policy").iterdir()} == names
