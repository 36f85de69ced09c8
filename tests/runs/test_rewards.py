"""Runs with several sources of rewards at once: what is recorded, and that a killed run is the undisturbed one."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.runs.killed import Call, assert_same_run, run_in_child, undisturbed_run
from tests.runs.small import ROOT, Finished, Recipe, World, environment, run

RULE = """
def reward(prompts, completions, completion_ids, log_extra, log_metric, **columns):
    log_extra("tokens", [len(ids) for ids in completion_ids])
    log_metric("longest", max(map(len, completion_ids)))
    return [None if sum(ids) % 11 == 0 else float(sum(ids) % 5) for ids in completion_ids]
"""
STEPS = 4


class Service:
    """A reward service; the score depends on the texts alone. While ``down`` is set it answers 503."""

    def __init__(self) -> None:
        service = self
        self.down = threading.Event()
        self.requests = 0

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                service.requests += 1
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                scores = [len(set(str(text))) / 7 for text in asked["completions"]]
                self.send_response(503 if service.down.is_set() else 200)
                self.end_headers()
                self.wfile.write(json.dumps({"scores": scores}).encode())

            def log_message(self, *_: Any) -> None:
                return None

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/score"

    def close(self) -> None:
        self._server.shutdown()


@pytest.fixture
def service() -> Iterator[Service]:
    found = Service()
    yield found
    found.close()


def three_sources(world: World, service: Service, folder: Path, **training: Any) -> Recipe:
    """A rule, a model and a service, weights 1, .5 and .5; with lookahead, so that scored steps wait."""
    (folder / "rule.py").write_text(RULE)
    sources = [
        {"name": "rule", "function": str(folder / "rule.py"), "weight": 1, "missing": "leave_out"},
        {"name": "model", "load": str(world.folder / "reward"), "weight": 0.5, "scale": "running"},
        {"name": "service", "url": service.url, "weight": 0.5, "scale": "rank", "tries": 1, "batch_size": 5},
    ]
    return world.recipe(
        reward={"load": None, "model": None, "sources": sources, "workers": 1},
        training={"train_iters": STEPS, "save_interval": 1, **training},
        rollout={"lookahead": 1},
        log={"rollouts": True, "samples_interval": 1, "tensorboard": False},
    )


def test_what_each_source_says_is_in_the_metrics_and_the_records(
    world: World, service: Service, tmp_path: Path
) -> None:
    done = run(three_sources(world, service, tmp_path, eval_interval=2), tmp_path / "run")
    recorded = done.rollouts
    for step, row in enumerate(done.rows):
        said = [c for prompt in recorded if prompt["step"] == step + 1 for c in prompt["completions"]]
        for name in ("rule", "model", "service"):
            known = [c["scores"][name] for c in said if c["scores"][name] is not None]
            assert row[f"rewards/{name}/mean"] == pytest.approx(statistics.fmean(known), abs=1e-5)
            assert row[f"rewards/{name}/std"] == pytest.approx(statistics.stdev(known), abs=1e-5)
            assert row[f"rewards/{name}/missing"] == len(said) - len(known)
        assert row["rewards/rule/longest"] == max(c["extra"]["tokens"] for c in said)
        assert all(c["extra"]["tokens"] == len(c["token_ids"]) for c in said)
        assert row["score/missing"] == 0  # what the rule does not score is left out of the sum
    assert sum(row["rewards/rule/missing"] for row in done.rows) > 0
    first = [c for prompt in recorded if prompt["step"] == 1 for c in prompt["completions"]]
    assert [c["score"] for c in first] == pytest.approx(by_hand(first), abs=1e-5)
    samples = [json.loads(line) for line in (done.folder / "samples.jsonl").read_text().splitlines()]
    assert all(row["chosen_score"] > row["rejected_score"] for row in samples)
    assert all(set(row["chosen_scores"]) == {"rule", "model", "service"} for row in samples)
    evaluated = [row["eval/reward"] for row in done.rows if row.get("eval/reward") is not None]
    assert len(evaluated) == STEPS // 2


def by_hand(said: list[dict[str, Any]]) -> list[float]:
    """The sums of the first step, whose running scale is that of its own scores."""
    models = [c["scores"]["model"] for c in said]
    services = [c["scores"]["service"] for c in said]
    mean, deviation = statistics.fmean(models), statistics.stdev(models)
    ranks = [
        (sum(other < one for other in services) + (services.count(one) - 1) / 2) / (len(said) - 1) for one in services
    ]
    return [
        (c["scores"]["rule"] or 0.0) + 0.5 * (model - mean) / deviation + 0.5 * rank
        for c, model, rank in zip(said, models, ranks, strict=True)
    ]


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(Call("rlxf.update.actor:MegatronActor.update", 3), marks=pytest.mark.slow),
        pytest.param(Call("rlxf.score.sources:Rewards.score", 3, after=True), marks=pytest.mark.slow),
        Call("rlxf.checkpointing.run_folder:RunFolder.save_due", 2, after=True),
    ],
    ids=["in an update", "after scores", "after a checkpoint"],
)
def test_a_killed_run_is_the_undisturbed_one(moment: Call, world: World, service: Service, tmp_path: Path) -> None:
    recipe = three_sources(world, service, tmp_path)
    undisturbed = undisturbed_run(recipe, tmp_path / "undisturbed")
    assert run_in_child(recipe, tmp_path / "run", moment).code == -9
    ended = run_in_child(recipe, tmp_path / "run")
    assert ended.code == 0, ended.output
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_service_that_is_down_costs_scores_and_not_the_run(
    world: World, service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = three_sources(world, service, tmp_path)
    recipe["reward"]["max_failures"] = 12
    recipe["rollout"]["lookahead"] = 0
    recipe["actor_rollout"]["n_samples_per_prompt"] = 3
    score, steps = _scoring(), [0]

    def counted(rewards: Any, rollouts: Any) -> Any:
        steps[0] += 1
        (service.down.set if steps[0] == 2 else service.down.clear)()
        return score(rewards, rollouts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlxf.score.sources.Rewards.score", counted)
        done = run(recipe, tmp_path / "run")
    assert [row["rewards/service/missing"] for row in done.rows] == [0, 12, 0, 0]
    assert [row["score/missing"] for row in done.rows] == [0, 12, 0, 0]  # missing is no zero
    assert "loss" not in done.rows[1]
    assert all(math.isfinite(row["loss"]) for row in (done.rows[0], *done.rows[2:]))
    (said,) = [record.getMessage() for record in caplog.records if "max_failures" in record.getMessage()]
    assert said.startswith("step 2: ")
    assert "503" in said


def _scoring() -> Any:
    from rlxf.score.sources import Rewards

    return Rewards.score


@pytest.mark.slow
def test_a_finished_run_is_resumed_from_its_own_recipe(world: World, service: Service, tmp_path: Path) -> None:
    """``config.yaml`` of a run with sources is a recipe."""
    import yaml

    recipe = three_sources(world, service, tmp_path)
    done = run(recipe, tmp_path / "run")
    again = yaml.safe_load((done.folder / "config.yaml").read_text())
    assert Finished(run({**again, "runtime": "local"}, tmp_path / "again").folder).losses == done.losses


def test_two_runs_on_one_reward_server(world: World, tmp_path: Path) -> None:
    """``scripts/serve_reward.py`` scores for both of them at the same time, and each gets its own answers."""
    options = ("--load", str(world.folder / "reward"), "--port", "0")
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "serve_reward.py"), *options],
        env=environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[-1]
        reward = {"load": None, "model": None, "sources": [{"name": "server", "url": url}]}
        recipe = world.recipe(reward=reward, log={"rollouts": True})
        with ThreadPoolExecutor(2) as pool:
            ended = list(pool.map(lambda name: run_in_child(recipe, tmp_path / name), ("one", "two")))
        assert [end.code for end in ended] == [0, 0], ended
        one, two = (Finished(tmp_path / name) for name in ("one", "two"))
        assert one.numbers == two.numbers
    finally:
        server.terminate()
        assert server.wait(30) == 143
