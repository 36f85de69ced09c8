"""A checkpoint that revision de81d37 wrote: what is in it, and that a run goes on from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlxf.assembly.roles import build_actor
from rlxf.checkpointing.fingerprint import fingerprint
from rlxf.checkpointing.manifest import find_problems
from rlxf.checkpointing.resume import find_resume
from rlxf.config.load import load_config
from rlxf.observe.formulas import read_jsonl
from rlxf.platform import Process, get_platform
from tests.runs.small import Finished, Recipe, replay_of
from tests.runs.small import run as run_in_new_folder
from tests.stored import STORED, StoredRun, digests, unpack

UNDISTURBED = Finished(STORED / "undisturbed")


@pytest.fixture
def stored(tmp_path: Path) -> StoredRun:
    return unpack(tmp_path / "stored")


def go_on(recipe: Recipe, stored: StoredRun) -> Finished:
    """The same command again, in the same run folder."""
    from rlxf.assembly.local import launch

    launch(load_config({"runtime": "local", **recipe}), stored.folder / "run")
    return Finished(stored.folder / "run")


def test_the_stored_files_are_those_that_were_written() -> None:
    assert find_problems(STORED / "checkpoints" / "iter_0000003") == []


def test_its_state_is_the_one_that_was_saved(stored: StoredRun) -> None:
    """Weights, moments and the pickled random states, bit for bit; fields that it does not have take defaults."""
    config = load_config({"runtime": "local", **stored.recipe})
    found = find_resume(config, stored.folder / "run")
    assert found is not None
    assert (found.state.step, found.state.policy_version, found.state.num_tokens) == (3, 3, 383)
    assert found.state.owed == ()
    actor = build_actor(config, get_platform("cpu", cpu_linear="mkl"), Process())
    actor.load_checkpoint(found.folder)
    assert digests(actor) == json.loads((STORED / "state.json").read_text())


def test_a_recipe_that_names_no_model_goes_on_from_it_unchanged(stored: StoredRun) -> None:
    """The checkpoint's recipe names one, whose head size is unset."""
    recipe = stored.recipe
    del recipe["model"]
    for role in ("actor_rollout", "ref", "reward"):
        del recipe[role]["model"]
    found = find_resume(load_config({"runtime": "local", **recipe}), stored.folder / "run")
    assert found is not None
    assert found.changes == []


def test_a_run_goes_on_from_it(stored: StoredRun) -> None:
    before = read_jsonl(stored.folder / "run" / "metrics.jsonl")
    evaluations = read_jsonl(stored.folder / "run" / "eval.jsonl")
    finished = go_on(stored.recipe, stored)
    assert [row["step"] for row in finished.rows] == [1, 2, 3, 4, 5, 6]
    assert finished.rows[:3] == before
    assert [row["step"] for row in finished.rollouts] == [step for step in range(1, 7) for _ in range(4)]
    found = read_jsonl(finished.folder / "eval.jsonl")
    assert found[:2] == evaluations
    assert [row["step"] for row in found] == [0, 3, 6]
    assert all(row["data/dropped"] == 1 for row in finished.rows[2:])
    assert finished.weights.keys()
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert (summary["steps"], summary["start"]["eval/reward"]) == (6, evaluations[0]["eval/reward"])
    assert (stored.folder / "checkpoints" / "iter_0000006").is_dir()


def test_on_the_recorded_completions_it_trains_as_that_revision_did(stored: StoredRun) -> None:
    """The losses after the checkpoint: they come from its weights and moments."""
    recording = stored.folder / "undisturbed" / "rollouts.jsonl"
    recipe = replay_of(stored.recipe, recording)
    recipe["training"] |= {"eval_interval": 0, "resume": str(stored.checkpoint)}
    recipe["sync"] = {"verify_first": 0}
    recipe["actor_rollout"]["save"] = str(stored.folder / "elsewhere")
    stored.rewrite_driver(data=fingerprint([str(recording)]), row_ids=[8, 9, 10, 11])
    found = run_in_new_folder(recipe, stored.folder / "replayed")
    assert [row["step"] for row in found.rows] == [4, 5, 6]
    assert found.losses == pytest.approx(UNDISTURBED.losses[3:], rel=1e-4)
    for mine, theirs in zip(found.rows, UNDISTURBED.rows[3:], strict=True):
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
