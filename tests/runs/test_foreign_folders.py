"""Model folders from elsewhere on top of shipped recipes: the folders, a data path, and no word about their shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from rlxf.assembly.local import launch
from rlxf.config.config_json import read_settings, shape_of
from rlxf.config.load import load_config
from rlxf.config.schema import ModelConfig
from rlxf.observe.formulas import read_jsonl
from tests.data_world import write_rows
from tests.runs.small import ROOT, ray_gpt
from tests.tiny_models import save_causal_lm, save_reward_model
from tests.unit.config.recipes import composed
from tests.unit.tools.convert.helpers import run as convert
from workers import cli

# What a test adds to save time.
SMALL = (
    "training.train_iters=1",
    "training.global_batch_size=2",
    "actor_rollout.ppo_mini_batch_size=2",
    "actor_rollout.micro_batch_size=2",
)
# A shape that no file of configs/rlxf/model has, and one for each family.
SHAPES: dict[str, dict[str, Any]] = {
    "llama_tied": {"kind": "llama", "tied": True, "num_hidden_layers": 3},
    "llama_untied": {"kind": "llama", "tied": False, "num_key_value_heads": 1},
    "qwen2": {"kind": "qwen2", "tied": True, "hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3},
    "qwen3": {"kind": "qwen3", "tied": False, "intermediate_size": 160, "head_dim": 64},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data of its own, and nothing that a recipe names."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"say {number}"} for number in range(6)])
    pairs = [{"prompt": f"say {n}", "chosen": f"well, {n}", "rejected": f"no {n}"} for n in range(100)]
    write_rows(tmp_path / "pairs.jsonl", pairs)  # of which some recipes set one in a hundred aside
    return tmp_path


def foreign(folder: Path) -> Path:
    """The foreign model of the folder's name."""
    return save_causal_lm(folder, **SHAPES[folder.name])


def reward_model(folder: Path) -> Path:
    """Of another family and shape than any policy."""
    return save_reward_model(folder, "qwen3", num_hidden_layers=1, num_key_value_heads=4)


def train(recipe: str, *keys: str) -> Path:
    """What ``ray_gpt.py --config-name RECIPE runtime=local KEYS`` does, in this process; the run's folder."""
    command = cli.read_command(["runtime=local", *SMALL, *keys])
    assert command.problems == []
    raw = cli.plain(composed(recipe, command.arguments), [])
    run_dir = Path("run").absolute()
    run_dir.mkdir()
    launch(load_config(raw, typed=command.keys), run_dir)
    assert [row["step"] for row in read_jsonl(run_dir / "metrics.jsonl")] == [1]
    return run_dir


def dumped_shape(run_dir: Path, role: str) -> ModelConfig:
    """Of the model that ``config.yaml`` names for a role."""
    dumped = yaml.safe_load((run_dir / "config.yaml").read_text())
    return ModelConfig(**dumped["model"][dumped[role]["model"]])


def assert_same_shape(run_dir: Path, folder: Path) -> None:
    """The policy has the folder's shape and family, transformers loads it, and ``config.yaml`` holds the shape."""
    begun, ended = read_settings(folder), read_settings(run_dir / "policy")
    assert ended["model_type"] == begun["model_type"]
    assert shape_of(ended) == shape_of(begun) == dumped_shape(run_dir, "actor_rollout")
    policy, info = transformers.AutoModelForCausalLM.from_pretrained(run_dir / "policy", output_loading_info=True)
    assert not info["missing_keys"]
    assert policy.config.num_hidden_layers == begun["num_hidden_layers"]


def test_a_tied_llama_and_a_reward_model(here: Path) -> None:
    folder, scorer = foreign(here / "llama_tied"), reward_model(here / "scorer")
    keys = (f"actor_rollout.load={folder}", f"ref.load={folder}", f"reward.load={scorer}")
    run_dir = train("online_dpo_trainer_tiny", *keys, "actor_rollout.data_path=prompts.jsonl")
    assert_same_shape(run_dir, folder)
    assert dumped_shape(run_dir, "reward") == shape_of(read_settings(scorer))


def test_an_untied_llama_and_a_reward_model_in_place_of_the_recipes_function(here: Path) -> None:
    folder, scorer = foreign(here / "llama_untied"), reward_model(here / "scorer")
    keys = (f"actor_rollout.load={folder}", f"ref.load={folder}", f"reward.load={scorer}")
    run_dir = train("online_dpo_trainer_smollm2_135m", *keys, "actor_rollout.data_path=prompts.jsonl")
    assert_same_shape(run_dir, folder)


def test_a_qwen2_and_a_reward_function_in_place_of_the_recipes_model(here: Path) -> None:
    folder = foreign(here / "qwen2")
    function = ROOT / "examples" / "rewards" / "concise.py"
    keys = (f"actor_rollout.load={folder}", f"ref.load={folder}", f"reward.function={function}")
    more = ("actor_rollout.data_path=prompts.jsonl", "training.device=cpu")  # whatever this machine has
    run_dir = train("online_dpo_trainer_llama32_1b", *keys, *more)
    assert_same_shape(run_dir, folder)


def test_a_qwen3_on_pairs(here: Path) -> None:
    folder = foreign(here / "qwen3")
    keys = (f"actor_rollout.load={folder}", f"ref.load={folder}", "actor_rollout.data_path=pairs.jsonl")
    assert_same_shape(train("offline_dpo_trainer_tiny", *keys), folder)


def test_a_distributed_checkpoint_of_megatron(here: Path) -> None:
    folder = foreign(here / "qwen3")
    convert(folder, here / "mcore")
    assert not list((here / "mcore").glob("*.safetensors"))
    keys = ("actor_rollout.load=mcore", "ref.load=mcore", "actor_rollout.data_path=pairs.jsonl")
    assert_same_shape(train("offline_dpo_trainer_smollm2_135m_lora", *keys), folder)


def test_a_reward_model_that_is_trained_on(here: Path) -> None:
    folder = reward_model(here / "scorer")
    run_dir = train("reward_trainer_tiny", "actor_rollout.load=scorer", "actor_rollout.data_path=pairs.jsonl")
    assert shape_of(read_settings(run_dir / "policy")) == shape_of(read_settings(folder))
    assert dumped_shape(run_dir, "actor_rollout") == shape_of(read_settings(folder))
    kind = transformers.AutoModelForSequenceClassification
    policy, info = kind.from_pretrained(run_dir / "policy", output_loading_info=True)
    assert not info["missing_keys"]
    assert policy.config.num_labels == 1


@pytest.mark.slow
def test_the_command_trains_a_foreign_folder_and_says_so_in_one_line(here: Path) -> None:
    folder = foreign(here / "llama_untied")
    write_rows(here / "examples.jsonl", [{"prompt": f"say {n}", "completion": f"well, {n}"} for n in range(100)])
    keys = (f"actor_rollout.load={folder}", f"actor_rollout.data_path={here / 'examples.jsonl'}", "runtime=local")
    done = ray_gpt("--config-name", "sft_trainer_tiny", *keys, *SMALL, f"hydra.run.dir={here / 'run'}")
    assert done.returncode == 0, done.stderr[-4000:]
    said = [line for line in done.stderr.splitlines() if "decides the shape" in line]
    assert len(said) == 1
    assert "num_query_groups = 1 (model.tiny: 3)" in said[0]
    assert_same_shape(here / "run", folder)
