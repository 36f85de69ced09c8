"""The tiny world as a folder: made once, made anew when it must be, never half made."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest
import torch
import transformers

from rlxf.core.errors import ConfigError, StageTimeout, TrainingError
from rlxf.tools.tiny import assets, world
from rlxf.tools.tiny.recipe import Recipe

SHAPE = (
    "model.tiny.hidden_size=32",
    "model.tiny.ffn_hidden_size=64",
    "model.tiny.num_attention_heads=1",
    "model.tiny.num_query_groups=1",
)
SMALL = Recipe(
    num_texts=400,
    hidden_size=32,
    ffn_size=64,
    num_heads=1,
    policy_overrides=(*SHAPE, "training.train_iters=3", "training.global_batch_size=8"),
    reward_overrides=(*SHAPE, "training.train_iters=2", "training.global_batch_size=4"),
    num_reward_pairs=20,
    num_held_out_pairs=10,
    num_eval_prompts=8,
    num_preferences=6,
    max_new_tokens=4,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("worlds") / "tiny"
    assert assets.ensure(folder, SMALL)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the world that a test may damage."""
    import shutil

    return Path(shutil.copytree(made, tmp_path / "tiny"))


def test_folder_holds_what_the_recipes_name(made: Path) -> None:
    names = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    wanted = {
        f"{model}/{file}" for model in ("sft", "rm") for file in ("config.json", "model.safetensors", "tokenizer.json")
    }
    wanted |= {"init/model.safetensors", "sft.jsonl", "reward_pairs.jsonl", "reward_eval_pairs.jsonl"}
    wanted |= {"prompts.jsonl", "eval_prompts.jsonl", "preferences.jsonl", "report.json", "manifest.json"}
    assert wanted <= names
    listed = set(json.loads((made / "manifest.json").read_text())["files"])
    made_from_them = {name for name in names if name.startswith("four_heads/")}
    assert listed == names - {"manifest.json"} - made_from_them


def test_models_load_for_their_roles(made: Path) -> None:
    policy = transformers.AutoModelForCausalLM.from_pretrained(made / "sft")
    reward, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        made / "rm", output_loading_info=True
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(made / "rm")
    assert policy.config.tie_word_embeddings
    assert policy.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    assert reward.config.num_labels == 1
    assert not info["missing_keys"]  # the score head was saved, not made up
    assert tokenizer("review of the silver dragon :")["input_ids"][0] == tokenizer.bos_token_id == 1


@torch.no_grad()
@pytest.mark.parametrize("name", ["sft", "rm"])
def test_another_head_of_zeros_changes_nothing(made: Path, name: str) -> None:
    kind = transformers.AutoModelForCausalLM if name == "sft" else transformers.AutoModelForSequenceClassification
    models = [kind.from_pretrained(folder / name).eval() for folder in (made, made / "four_heads")]
    assert [model.config.num_attention_heads for model in models] == [SMALL.num_heads, SMALL.num_heads + 1]
    tokens = torch.randint(3, 200, (2, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(models[1](tokens).logits, models[0](tokens).logits, atol=1e-6, rtol=0)


def test_models_with_another_head_are_made_again_when_they_are_gone(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder / "four_heads")
    assert not assets.ensure(folder, SMALL)
    assert (folder / "four_heads" / "rm" / "model.safetensors").is_file()


def test_prompts_are_of_training_and_evaluation_of_held_out_titles(made: Path) -> None:
    train = [json.loads(line)["prompt"] for line in (made / "prompts.jsonl").read_text().splitlines()]
    held_out = [json.loads(line)["prompt"] for line in (made / "eval_prompts.jsonl").read_text().splitlines()]
    assert train == [world.prompt(title) for title in world.TRAIN_TITLES]
    assert len(held_out) == SMALL.num_eval_prompts
    assert not set(train) & set(held_out)


def test_second_call_makes_nothing(made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert not assets.ensure(made, SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*")}


@pytest.mark.slow
def test_fresh_makes_an_equal_world_and_leaves_nothing_of_older_ones(made: Path, folder: Path, tmp_path: Path) -> None:
    (folder / "note.txt").write_text("of an older world")
    (folder / "prompts.jsonl").unlink()
    leftover = tmp_path / ".tiny.partial"  # of a build that was killed
    leftover.mkdir()
    (leftover / "half").write_text("")
    assert assets.ensure(folder, SMALL, fresh=True)
    assert not (folder / "note.txt").exists()
    assert assets.why_stale(folder, SMALL) is None
    for name in ("sft/model.safetensors", "rm/model.safetensors", "sft/tokenizer.json", "preferences.jsonl"):
        assert (made / name).read_bytes() == (folder / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "prompts.jsonl").unlink(), "prompts.jsonl is missing"),
        (lambda folder: (folder / "prompts.jsonl").write_text("{}\n"), "prompts.jsonl has changed"),
        (lambda folder: (folder / "sft" / "model.safetensors").write_bytes(b""), "sft/model.safetensors has changed"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "it was made by another recipe"),
    ],
)
def test_a_damaged_world_is_found(folder: Path, damage: object, reason: str) -> None:
    assert callable(damage)
    damage(folder)
    assert assets.why_stale(folder, SMALL) == reason


def test_another_recipe_is_another_world(folder: Path) -> None:
    other = Recipe(version=SMALL.version + 1)
    assert assets.why_stale(folder, other) == "it was made by another recipe"


def test_build_that_dies_leaves_the_old_world(folder: Path) -> None:
    impossible = Recipe(num_texts=400, num_heads=5)  # 96 is not a multiple of 5: fails in the middle of the build
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(Exception, match="5"):
        assets.ensure(folder, impossible)
    assert (folder / "manifest.json").read_bytes() == before
    assert assets.why_stale(folder, SMALL) is None
    assert assets.ensure(folder, SMALL) is False


def test_a_build_that_another_process_does_not_end_is_waited_for_only_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "LIMIT_S", 0.5)
    (tmp_path / ".tiny.lock").write_text("process 4711 on node1\n")
    said: list[str] = []
    with (tmp_path / ".tiny.lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StageTimeout, match=r"process 4711 on node1 has built the tiny world for 0\.5 s"):
            assets.ensure(tmp_path / "tiny", SMALL, say=said.append)
    assert said == ["waiting for process 4711 on node1, which builds the tiny world"]


def test_a_stage_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "LIMIT_S", 0.2)
    with pytest.raises(TrainingError, match=r"sft_trainer_tiny was ended after 0\.2 s"):
        assets._train(tmp_path, SMALL, "sft_trainer_tiny", "sft", ())


def test_folder_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="not a tiny world"):
        assets.ensure(tmp_path / "mine", SMALL, fresh=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_report_says_what_it_cost_and_how_good_it_is(made: Path) -> None:
    report = assets.read_report(made)
    assert 0 <= report["reward_accuracy"] <= 1
    assert set(report["first_policy"]) == {"positive", "valid", "finished"}
    assert report["cpu_seconds"]["all"] == pytest.approx(
        sum(value for name, value in report["cpu_seconds"].items() if name != "all"), abs=0.01
    )
