"""The shipped tiny recipes on the real tiny world: online DPO learns, and its loss curve is the stored one."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tiny_learning import LORA, evaluations, missed
from tests.runs import tiny
from tests.runs.small import Finished

pytestmark = pytest.mark.timeout(900)  # building the world, 100 steps and busy cores

TOLERANCE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def _world() -> None:
    tiny.build_world()


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """All 100 steps."""
    return tiny.run_tiny(tmp_path_factory.mktemp("tiny") / "online")


def test_online_dpo_learns_what_the_truth_likes_and_stays_in_the_grammar(online: Finished) -> None:
    """One seed; benchmarks/tiny_learning.py runs ten, on Ray with vLLM, against the same bars."""
    found = evaluations(online.folder)
    assert [row["step"] for row in found] == [0, 20, 40, 60, 80, 100]
    assert found[0]["positive"] < 0.5  # it has something to learn
    assert found[0]["win_truth"] == pytest.approx(0.5, abs=0.1)
    assert missed(found[-1]) == []


@pytest.mark.slow
def test_adapters_learn_what_they_can(tmp_path: Path) -> None:
    """One seed; ``tiny_learning.py --recipe online_dpo_trainer_tiny_lora`` runs three."""
    done = tiny.run_tiny(tmp_path / "lora", recipe=LORA)
    first, *_, last = evaluations(done.folder)
    assert missed(last, LORA) == []
    assert last["reward"] > first["reward"] + 1.0
    assert (done.folder / "policy" / "adapter" / "adapter_config.json").is_file()


def test_the_loss_stays_where_it_is_when_online_dpo_is_healthy(online: Finished) -> None:
    late = online.losses[20:]
    assert 0.5 < sum(late) / len(late) < 0.69


def test_the_loss_curve_is_the_stored_one(online: Finished) -> None:
    stored = tiny.golden()
    if stored["models"] != tiny.model_files():
        pytest.skip("this type of CPU trains other models from the same recipe; the replay test below compares here")
    assert online.losses[: tiny.NUM_STEPS] == pytest.approx(stored["loss"], abs=TOLERANCE)


def test_the_stored_rollouts_give_the_stored_losses(tmp_path: Path) -> None:
    """On every machine: completions and scores are given, and the first policy differs in the sixth digit only."""
    found = tiny.replay(tmp_path / "replay")
    assert found.losses == pytest.approx(tiny.golden()["replay_loss"], abs=TOLERANCE)


def test_the_offline_recipe_runs(tmp_path: Path) -> None:
    done = tiny.run_tiny(tmp_path / "offline", "training.train_iters=2", recipe="offline_dpo_trainer_tiny")
    assert [row["step"] for row in done.rows] == [1, 2]
    assert done.losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert done.rows[1]["logps/chosen"] != done.rows[0]["logps/chosen"]
    assert (done.folder / "policy" / "model.safetensors").is_file()
