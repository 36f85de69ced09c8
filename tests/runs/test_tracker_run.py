"""A whole run in a tracker: the numbers of its files, and one run of the tracker however often it is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.runs.small import Recipe, World, run


def test_a_resumed_run_is_one_run_of_the_tracker(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    store = (tmp_path / "mlruns").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")

    def recipe(steps: int) -> Recipe:
        return world.recipe(
            training={"train_iters": steps, "eval_interval": 2},
            actor_rollout={"save": str(tmp_path / "ckpt")},
            eval={"num_prompts": 4},
            log={"report_to": ["mlflow"], "run_name": "mine"},
        )

    first, second = run(recipe(2), tmp_path / "first"), run(recipe(4), tmp_path / "second")
    client = MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("rlxf")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    driver = json.loads((tmp_path / "ckpt" / "iter_0000004" / "driver.json").read_text())
    assert driver["report"]["trackers"] == {"mlflow": found.info.run_id}
    rows = [*first.rows, *second.rows]
    for name in ("loss", "grad_norm", "reward/score/mean"):
        history = client.get_metric_history(found.info.run_id, name)
        assert [(metric.step, metric.value) for metric in history] == [(row["step"], row[name]) for row in rows]
    evaluated = client.get_metric_history(found.info.run_id, "eval/greedy_reward")
    assert [metric.step for metric in evaluated] == [0, 2, 4]
