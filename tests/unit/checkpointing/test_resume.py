"""Which checkpoint a run takes over, which it refuses, and what it says of a recipe that has changed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rlxf.checkpointing.manifest import write_manifest
from rlxf.checkpointing.resume import Resume, find_resume, is_complete
from rlxf.checkpointing.run_folder import RunFolder
from rlxf.checkpointing.store import LATEST
from rlxf.config import curve
from rlxf.config.changes import compare
from rlxf.config.curve import CurveChange
from rlxf.config.schema import RunConfig
from rlxf.core.errors import CheckpointError
from rlxf.core.files import file_sizes
from rlxf.loop.run import UNSAVED, State
from tests.settings import MODEL
from tests.unit.small_run import SmallActor, small_config

SHAPE = MODEL.model_dump()


def config(run_dir: Path, **changes: Any) -> RunConfig:
    data = run_dir / "prompts.jsonl"
    if not data.exists():
        data.write_text('{"prompt": "a"}\n')
    return small_config(**{"actor_rollout__data_path": str(data), "model__bigram": SHAPE, **changes})


def save(run_dir: Path, *steps: int, **changes: Any) -> list[Path]:
    """The checkpoints of a run after these steps."""
    recipe, saved = config(run_dir, **changes), list[Path]()
    report = {"start": {"loss": 0.7}, "end": {"loss": 0.5, "eval/reward": None}}

    def describe(state: State) -> dict[str, Any]:
        return {"prompt_ids": [state.step], "report": report, "baseline": None}

    folder = RunFolder(recipe, run_dir, SmallActor(recipe, []), describe=describe, saved=saved.append)
    for step in steps:
        folder.save_checkpoint(State(step=step, policy_version=step - 1, metrics={"loss": float("nan")}))
    return saved


def find(run_dir: Path, **changes: Any) -> Resume:
    found = find_resume(config(run_dir, **changes), run_dir)
    assert found is not None
    return found


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def test_a_new_run_begins_at_the_beginning(tmp_path: Path) -> None:
    assert find_resume(config(tmp_path), tmp_path) is None
    assert find_resume(config(tmp_path, training__resume="never"), tmp_path) is None


def test_the_newest_checkpoint_is_taken_with_the_drivers_state(tmp_path: Path) -> None:
    _, newest = save(tmp_path, 2, 3)
    resume = find(tmp_path)
    assert resume.folder == newest
    assert (resume.state.step, resume.state.policy_version) == (3, 2)
    assert resume.state.metrics["loss"] != resume.state.metrics["loss"]  # NaN, through JSON's null
    assert resume.row_ids == [3]
    assert resume.reported.start == {"loss": 0.7}
    assert resume.reported.end["eval/reward"] != resume.reported.end["eval/reward"]
    assert resume.run_folder == tmp_path


def test_a_state_of_revision_de81d37_has_no_failed_scores(tmp_path: Path) -> None:
    (folder,) = save(tmp_path, 2)
    driver = json.loads((folder / "driver.json").read_text())
    (folder / "driver.json").write_text(json.dumps(driver | {"failed_scores": 7}))
    write_manifest(folder)
    assert find(tmp_path).state.failed_scores == 7
    del driver["failed_scores"]
    (folder / "driver.json").write_text(json.dumps(driver))
    write_manifest(folder)
    assert find(tmp_path).state.failed_scores == 0


def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, damaged = save(tmp_path, 2, 3)
    flip(damaged / "logits.pt")
    assert find(tmp_path).folder == good
    assert "damaged checkpoint" in caplog.text
    assert "iter_0000003: logits.pt has changed since it was written" in caplog.text


def test_none_whole_is_never_a_start_at_the_beginning(tmp_path: Path) -> None:
    for folder in save(tmp_path, 2, 3):
        (folder / "driver.json").unlink()
    with pytest.raises(CheckpointError, match="is complete"):
        find(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "iter_0000002")
    shutil.rmtree(tmp_path / "checkpoints" / "iter_0000003")
    assert (tmp_path / "checkpoints" / LATEST).exists()
    with pytest.raises(CheckpointError, match="is complete"):
        find(tmp_path)


def test_never_does_not_mix_two_runs(tmp_path: Path) -> None:
    save(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"holds iter_0000002 of an earlier run, .*training\.resume=auto"):
        find(tmp_path, training__resume="never")


@pytest.mark.parametrize("named", ["checkpoints/iter_0000003", "checkpoints", "."])
def test_a_checkpoint_can_be_named_by_its_folder_or_its_runs(tmp_path: Path, named: str) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    _, newest = save(tmp_path / "old", 2, 3)
    recipe = config(tmp_path / "old", training__resume=str(tmp_path / "old" / named))
    resume = find_resume(recipe, tmp_path / "new")
    assert resume is not None
    assert resume.folder == newest


def test_a_named_one_must_be_whole(tmp_path: Path) -> None:
    _, damaged = save(tmp_path, 2, 3)
    flip(damaged / "logits.pt")
    with pytest.raises(CheckpointError, match=r"iter_0000003: logits\.pt .* name another one"):
        find(tmp_path, training__resume=str(damaged))
    with pytest.raises(CheckpointError, match="no such folder"):
        find(tmp_path, training__resume=str(tmp_path / "iter_0000009"))
    with pytest.raises(CheckpointError, match=r"no checkpoint .* in this folder"):
        find(tmp_path, training__resume=str(damaged.parent.parent / "elsewhere"))


def test_a_named_one_with_newer_ones_beside_it_is_refused(tmp_path: Path) -> None:
    older, _ = save(tmp_path, 2, 3)
    with pytest.raises(CheckpointError, match=r"would save beside .*iter_0000003.*training\.resume=auto"):
        find(tmp_path, training__resume=str(older))
    elsewhere = str(tmp_path / "elsewhere")
    assert find(tmp_path, training__resume=str(older), actor_rollout__save=elsewhere).folder == older


def test_other_data_is_refused_naming_both(tmp_path: Path) -> None:
    save(tmp_path, 2)
    moved = tmp_path / "moved.jsonl"
    shutil.copy(tmp_path / "prompts.jsonl", moved)
    find(tmp_path, actor_rollout__data_path=str(moved))  # the same rows at another place
    moved.write_text('{"prompt": "b"}\n')
    with pytest.raises(CheckpointError) as caught:
        find(tmp_path, actor_rollout__data_path=str(moved))
    for part in ("prompts.jsonl (16 bytes", "moved.jsonl (16 bytes", "actor_rollout.save"):
        assert part in str(caught.value)


def test_another_shape_of_model_is_refused_naming_both(tmp_path: Path) -> None:
    save(tmp_path, 2)
    wider = {**SHAPE, "ffn_hidden_size": SHAPE["ffn_hidden_size"] * 2}
    with pytest.raises(CheckpointError, match=r"model\.bigram\.ffn_hidden_size \d+ -> \d+"):
        find(tmp_path, model__bigram=wider)


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlxf.checkpointing.run_folder.FORMAT", 2)
    save(tmp_path, 2)
    with pytest.raises(CheckpointError, match="written by another version"):
        find(tmp_path)


def test_a_change_of_the_recipe_is_said_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    save(tmp_path, 2)
    find(tmp_path)
    assert "changed" not in caplog.text
    find(tmp_path, log__interval=7, training__save_interval=1, training__eval_interval=3, training__train_iters=9)
    assert "changed" not in caplog.text
    find(tmp_path, actor_rollout__lr=0.25, ref__tensor_model_parallel_size=2)
    assert "the recipe has changed since iter_0000002: actor_rollout.lr 0.5 -> 0.25; the run continues" in caplog.text
    assert "ref.tensor_model_parallel_size 1 -> 2; the run continues within float tolerance" in caplog.text


def before_curves(*checkpoints: Path) -> None:
    """Make checkpoints those of a version that did not number its curves yet."""
    for folder in checkpoints:
        driver = json.loads((folder / "driver.json").read_text())
        del driver["curve"]
        (folder / "driver.json").write_text(json.dumps(driver))
        write_manifest(folder)


OLD_VERSION = "iter_0000002 was written by an earlier version of this program, and these have changed since: "


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ({}, "sampling seeds"),
        ({"actor_rollout__lr_decay_style": "linear"}, "sampling seeds, learning rate of decaying schedules"),
        ({"training__stage": "dpo", "actor_rollout__lr_decay_style": "cosine"}, "learning rate of decaying schedules"),
        ({"training__stage": "dpo"}, ""),  # samples nothing, and its rate is the same in every step
    ],
)
def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_what_moved_the_curve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recipe: dict[str, Any], names: str
) -> None:
    before_curves(*save(tmp_path, 2, **recipe))
    assert find(tmp_path, **recipe).state.step == 2
    assert (f"{OLD_VERSION}{names}; the run continues" in caplog.text) == bool(names)
    assert bool(caplog.text) == bool(names)


def test_a_run_that_trains_no_further_has_no_curve_to_warn_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before_curves(*save(tmp_path, 2, training__train_iters=2))
    find(tmp_path, training__train_iters=2)
    find(tmp_path, training__train_iters=2, training__eval_only=True)
    assert caplog.text == ""
    resume = find(tmp_path, training__train_iters=3)
    assert OLD_VERSION in caplog.text
    assert resume.changes == []  # of the recipe: a complete run stays complete


def test_a_change_that_is_added_later_is_told_to_today_s_checkpoints(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 2)
    later = CurveChange(curve.CURVE + 1, "another loss", lambda config: True)
    monkeypatch.setattr(curve, "CURVE_CHANGES", (*curve.CURVE_CHANGES, later))
    find(tmp_path)
    assert f"{OLD_VERSION}another loss; the run continues" in caplog.text


@pytest.mark.parametrize(
    ("change", "moved", "layout"),
    [
        ({"training__seed": 8}, ["training.seed 7 -> 8"], []),
        ({"training__global_batch_size": 4}, ["training.global_batch_size 8 -> 4"], []),
        ({"ref__load": "/elsewhere"}, ['ref.load null -> "/elsewhere"'], []),
        ({"rollout__temperature": 0.5}, ["rollout.temperature 1.0 -> 0.5"], []),
        ({"rollout__engine": "vllm"}, ['rollout.engine "hf" -> "vllm"'], []),
        ({"rollout__engine": "hf"}, [], []),  # what runtime=local takes by itself
        ({"training__train_iters": 9}, [], []),
        (
            {"training__train_iters": 9, "actor_rollout__lr_decay_style": "cosine"},
            [
                'actor_rollout.lr_decay_style "constant" -> "cosine"',
                "training.train_iters (the learning-rate schedule ends there) 0 -> 9",
            ],
            [],
        ),
        (
            {"actor_rollout__num_gpus_for_train": 2},
            ["actor_rollout.ppo_mini_batch_size x data-parallel ranks 1 -> 2"],
            ["actor_rollout.num_gpus_for_train 1 -> 2"],
        ),
        (
            {"actor_rollout__num_gpus_for_train": 2, "actor_rollout__tensor_model_parallel_size": 2},
            [],
            ["actor_rollout.num_gpus_for_train 1 -> 2", "actor_rollout.tensor_model_parallel_size 1 -> 2"],
        ),
        ({"actor_rollout__micro_batch_size": 2}, [], ["actor_rollout.micro_batch_size 1 -> 2"]),
        ({"actor_rollout__share_prompts": False}, [], ["actor_rollout.share_prompts true -> false"]),
        ({"resource_pool__ref": [2]}, [], ["resource_pool.ref [1] -> [2]"]),
        ({"sync__verify_interval": 3, "eval__num_prompts": 3, "training__keep_latest": 2}, [], []),
    ],
)
def test_what_a_change_does_to_a_run(change: dict[str, Any], moved: list[str], layout: list[str]) -> None:
    changes = compare(small_config(model__bigram=SHAPE).dump(), small_config(model__bigram=SHAPE, **change))
    assert changes.curve == moved
    assert changes.layout == layout
    assert changes.shape == []


def test_a_model_may_have_another_name_but_not_another_shape() -> None:
    before = small_config(model__bigram=SHAPE).dump()
    renamed = small_config(model__other=SHAPE, actor_rollout__model="other", ref__model="other")
    assert compare(before, renamed) == compare(before, small_config(model__bigram=SHAPE))
    deeper = {**SHAPE, "num_layers": SHAPE["num_layers"] + 1}
    changed = compare(before, small_config(model__bigram=SHAPE, model__deep=deeper, ref__model="deep"))
    assert changed.shape == []
    assert changed.curve == [f"model.deep.num_layers {SHAPE['num_layers']} -> {SHAPE['num_layers'] + 1}"]


def test_adapters_of_another_rank_or_place_do_not_fit() -> None:
    before = small_config(model__bigram=SHAPE, actor_rollout__lora_r=8).dump()
    for change, said in (
        ({"lora_r": 4}, ["actor_rollout.lora_r 8 -> 4"]),
        ({"lora_r": 0}, ["actor_rollout.lora_r 8 -> 0"]),
        ({"lora_r": 8, "lora_alpha": 1.0}, []),
    ):
        keys = {f"actor_rollout__{key}": value for key, value in change.items()}
        assert compare(before, small_config(model__bigram=SHAPE, **keys)).shape == said


def write_policy(run_dir: Path, *, notes_files: bool = True, steps: int = 4) -> Path:
    """What a run of so many steps leaves at its end."""
    policy = run_dir / "policy"
    (policy / "adapter").mkdir(parents=True)
    (policy / "config.json").write_text("{}\n")
    (policy / "tokenizer.json").write_text('{"tokens": 3}\n')
    for file in (policy / "model.safetensors", policy / "adapter" / "adapter_model.safetensors"):
        save_file({"weight": torch.zeros(5, 3)}, file)
    files = {"policy_files": file_sizes(policy)} if notes_files else {}  # an older revision did not
    (run_dir / "summary.json").write_text(json.dumps({"steps": steps, **files}))
    return policy


def test_a_run_is_complete_when_its_policy_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    save(tmp_path, 4)
    assert not is_complete(find(tmp_path), config(tmp_path), tmp_path)  # killed before the policy was written
    write_policy(tmp_path)
    assert is_complete(find(tmp_path), config(tmp_path), tmp_path)
    assert is_complete(find(tmp_path), config(tmp_path), tmp_path / "another")
    assert "complete: 4 of 4 steps" in caplog.text
    other = {"actor_rollout__lr": 0.25}  # a sweep that saves into one folder: its second run must not end at once
    with pytest.raises(CheckpointError, match=r"complete, and the recipe has changed .*lr 0\.5 -> 0\.25"):
        is_complete(find(tmp_path, **other), config(tmp_path, **other), tmp_path)
    assert not is_complete(find(tmp_path), config(tmp_path, training__train_iters=5), tmp_path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def fill_with_zeros(path: Path) -> None:
    """What some file systems make of a file that was not synced."""
    path.write_bytes(bytes(path.stat().st_size))


FILES = ["model.safetensors", "adapter/adapter_model.safetensors", "config.json", "tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_run_whose_policy_is_damaged_is_not_complete(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 4)
    damage(write_policy(tmp_path) / name)
    assert not is_complete(find(tmp_path), config(tmp_path), tmp_path)
    assert f"{tmp_path / 'policy'}: " in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize("damage", [cut, fill_with_zeros, Path.unlink])
def test_so_is_one_whose_files_were_not_noted(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 4)
    policy = write_policy(tmp_path, notes_files=False)
    assert is_complete(find(tmp_path), config(tmp_path), tmp_path)
    damage(policy / "model.safetensors")
    if damage is Path.unlink:
        damage(policy / "adapter" / "adapter_model.safetensors")
    assert not is_complete(find(tmp_path), config(tmp_path), tmp_path)


def rewrite_driver(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "driver.json"
    driver = json.loads(path.read_text())
    change(driver)
    path.write_text(json.dumps(driver))
    write_manifest(folder)


@pytest.mark.parametrize("name", [item.name for item in fields(State) if item.name not in UNSAVED])
def test_a_field_that_an_older_revision_did_not_write_takes_its_default(tmp_path: Path, name: str) -> None:
    (folder,) = save(tmp_path, 3)
    expected = find(tmp_path).state
    rewrite_driver(folder, lambda driver: driver.pop(name))
    assert find(tmp_path).state == replace(expected, **{name: getattr(State(), name)})


@pytest.mark.parametrize("name", ["run_folder", "prompt_ids", "report", "baseline"])
def test_what_a_report_needs_may_be_missing(tmp_path: Path, name: str) -> None:
    (folder,) = save(tmp_path, 3)
    rewrite_driver(folder, lambda driver: driver.pop(name, None))
    found = find(tmp_path)
    assert found.state.step == 3
    assert found.run_folder == tmp_path
    assert found.baseline is None
    if name == "report":
        assert found.reported.start == found.reported.end == {}


@pytest.mark.parametrize("content", [b"", b"[]", b"\x80\x04", b"{", b"null"])
def test_a_drivers_file_that_says_nothing_is_named(tmp_path: Path, content: bytes) -> None:
    (folder,) = save(tmp_path, 3)
    (folder / "driver.json").write_bytes(content)
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=r"driver\.json: cannot be read"):
        find(tmp_path)
