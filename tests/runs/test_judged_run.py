"""Runs that a judge decides: its pairs, what it is asked after a kill, and judges together with scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlxf.core.errors import ScoreError, TrainingError
from tests.runs.killed import Call, assert_same_run, run_in_child, undisturbed_run
from tests.runs.small import Recipe, World, run

# Prefers the answer with more different characters; writes down what it is asked.
JUDGE = """
from pathlib import Path

def judge(prompts, first, second, topic, **columns):
    assert len(prompts) == len(first) == len(second) == len(topic)
    with Path(__file__).with_name("asked").open("a") as file:
        file.writelines(f"{q!r}\\n" for q in zip(prompts, first, second))
    if Path(__file__).with_name("down").exists():
        raise ConnectionError("no judge")
    return [0.5 + (len(set(a)) - len(set(b))) / 100 for a, b in zip(first, second)]
"""
STEPS = 4


def judged(world: World, folder: Path, **changes: dict[str, Any]) -> Recipe:
    (folder / "judge.py").write_text(JUDGE)
    changes["training"] = {"train_iters": STEPS, "save_interval": 1} | changes.get("training", {})
    return world.recipe(
        **{
            "reward": {"load": None, "model": None, "workers": 1},
            "judge": {"function": str(folder / "judge.py")},
            "log": {"rollouts": True, "samples_interval": 1, "tensorboard": False, "report": False},
            "rollout": {"lookahead": 1},
            **changes,
        }
    )


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def test_a_judge_alone_decides_pairs_and_the_best_checkpoint(world: World, tmp_path: Path) -> None:
    training = {"eval_interval": 2, "save_interval": 2, "keep_best": 1, "keep_latest": 1}
    done = run(judged(world, tmp_path, training=training), tmp_path / "run")
    for row in done.rows:
        assert row["judge/position_flip"] == 0
        assert row["judge/missing"] == 0
        assert not {"objective/scores", "score/missing", "reward/score/mean", "eval/reward"} & row.keys()
    evaluated = [row["eval/win_rate"] for row in done.rows if row.get("eval/win_rate") is not None]
    assert len(evaluated) == STEPS // 2
    samples = [json.loads(line) for line in (done.folder / "samples.jsonl").read_text().splitlines()]
    assert samples
    assert all(len(set(row["chosen"])) > len(set(row["rejected"])) for row in samples)
    assert len(asked(tmp_path)) == len(set(asked(tmp_path)))  # nothing is asked twice


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(Call("rlxf.update.actor:MegatronActor.update", 3), marks=pytest.mark.slow),
        Call("rlxf.judge.process:ProcessJudge.compare", 4, after=True),
        pytest.param(Call("rlxf.checkpointing.run_folder:RunFolder.save_due", 2, after=True), marks=pytest.mark.slow),
    ],
    ids=["in an update", "after verdicts", "after a checkpoint"],
)
def test_a_killed_run_is_the_undisturbed_one_and_asks_nothing_twice(moment: Call, world: World, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    undisturbed = undisturbed_run(judged(world, tmp_path / "one"), tmp_path / "undisturbed")
    recipe = judged(world, tmp_path)
    assert run_in_child(recipe, tmp_path / "run", moment).code == -9
    ended = run_in_child(recipe, tmp_path / "run")
    assert ended.code == 0, ended.output
    counted = ("judge/asked", "judge/cached")  # what was asked before the kill is known after it
    for name in ("metrics.jsonl", "summary.json"):
        for folder in (tmp_path / "run", undisturbed.folder):
            drop(folder / name, counted)
    assert_same_run(tmp_path / "run", undisturbed)
    assert sorted(asked(tmp_path)) == sorted(asked(tmp_path / "one"))


def drop(path: Path, names: tuple[str, ...]) -> None:
    """Take some metrics out of a file of a run."""

    def without(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: without(item) for key, item in value.items() if key not in names}

    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    path.write_text("".join(json.dumps(without(json.loads(line))) + "\n" for line in lines))


def test_scores_are_reported_beside_a_judge(world: World, tmp_path: Path) -> None:
    reward = {"load": str(world.folder / "reward"), "model": "small", "workers": 0}
    done = run(judged(world, tmp_path, reward=reward), tmp_path / "run")
    alone = run(judged(world, tmp_path), tmp_path / "alone")
    assert done.losses == alone.losses  # the judge decides
    assert all("rewards/reward/mean" in row and "objective/scores" in row for row in done.rows)


@pytest.mark.parametrize("pairing", ["all", "best_worst", "random"])
def test_every_pairing_takes_a_tournament(world: World, tmp_path: Path, pairing: str) -> None:
    recipe = judged(world, tmp_path, algorithm={"pairing": pairing, "min_score_margin": 0.015})
    recipe["judge"]["tournament"] = "all"
    done = run(recipe, tmp_path / "run")
    assert all(row["pair/margin"] > 0.015 for row in done.rows if row["pair/kept"])
    assert (max(row["pair/kept"] for row in done.rows) > 4) == (pairing == "all")


def test_a_judge_that_fails_costs_a_step_or_the_run(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = judged(world, tmp_path)
    (tmp_path / "down").write_text("")
    with pytest.raises(ScoreError, match=r"^step 1: .*judge.py:\d+: ConnectionError: no judge; 12 completions"):
        run(recipe, tmp_path / "run")
    recipe["reward"]["max_failures"] = 36  # with one step ahead
    recipe["algorithm"] = {"max_empty_steps": 2}
    with pytest.raises(TrainingError, match="2 steps in a row gave no pair"):
        run(recipe, tmp_path / "again")
    assert "12 of reward.max_failures = 36" in caplog.text
