"""Experiment trackers: real offline runs of each, read back; and what happens when one fails."""

from __future__ import annotations

import io
import math
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlxf.assembly.build_run import report_settings
from rlxf.config import trackers as checks
from rlxf.config.load import load_config
from rlxf.config.schema import LogConfig, RunConfig
from rlxf.core.errors import ConfigError, StopRequested
from rlxf.observe import trackers
from rlxf.observe.report import Reported, RunReport, make_report
from rlxf.observe.trackers import TrackerSink
from tests.unit.config.recipes import recipe
from tests.unit.small_run import small_config

STEPS = {1: {"loss": 0.75, "eval/kl": 1.5}, 2: {"loss": 0.1 + 0.2, "eval/kl": math.nan}}
BLOCK, HEADER = 32768, 7


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_MODE", "SWANLAB_MODE"):
        monkeypatch.setenv(name, "offline")
    for name in ("WANDB_SILENT", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def config(*names: str, **log: Any) -> RunConfig:
    wanted = {"report_to": names, "project": "small", "run_name": "first", "tensorboard": False, **log}
    return small_config(**{f"log__{key}": value for key, value in wanted.items()})


def report(run_dir: Path, recipe: RunConfig, earlier: Reported | None = None) -> RunReport:
    return make_report(report_settings(recipe), run_dir, Console(file=io.StringIO()), earlier)


def reported_by(made: RunReport) -> Reported:
    """What a checkpoint after step 2 holds of a report."""
    return Reported(step=2, final_step=2, trackers=made.describe()["trackers"])


def train(made: RunReport, steps: dict[int, dict[str, float]] = STEPS, *, to_the_end: bool = True) -> None:
    for step, metrics in steps.items():
        made.stepped(step, metrics)
    if to_the_end:
        made.finished(Path("policy"))
    made.close()


def records(path: Path) -> Iterator[bytes]:
    """The records of a LevelDB log, the file format of W&B and of SwanLab."""
    data, position, record = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        record += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # whole, or last part
            yield record
            record = b""


# Each gives [(step, name, value)], name and id of the runs that a tracker has left below a folder, oldest first.


def wandb_runs(folder: Path) -> list[tuple[str, str, list[tuple[int, str, float]]]]:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    runs = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime):
        name, rows = "", []
        for data in records(file):
            record = wandb_internal_pb2.Record.FromString(data)
            name = record.run.display_name or name
            for item in record.history.item:
                key = item.key or "/".join(item.nested_key)
                if not key.startswith("_"):
                    rows.append((record.history.step.num, key, float(item.value_json)))
        runs.append((name, file.stem.removeprefix("run-"), rows))
    return runs


def mlflow_runs(folder: Path) -> list[tuple[str, str, list[tuple[int, str, float]]]]:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("small")
    runs = []
    for run in client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"]):
        names = sorted(run.data.metrics, reverse=True)
        histories = [(name, client.get_metric_history(run.info.run_id, name)) for name in names]
        rows = [(metric.step, name, metric.value) for name, history in histories for metric in history]
        runs.append((run.info.run_name, run.info.run_id, rows))
    return runs


def swanlab_runs(folder: Path) -> list[tuple[str, str, list[tuple[int, str, float]]]]:
    pytest.importorskip("swanlab")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    runs = []
    for file in sorted(folder.glob("swanlab/run-*/*.swanlab"), key=lambda file: file.stat().st_mtime):
        name, rows = "", []
        for data in records(file):
            record = Record.FromString(data)
            name = record.start.name or name
            if record.HasField("scalar"):
                rows.append((record.scalar.step, record.scalar.key, record.scalar.value.number))
        runs.append((name, file.stem.removeprefix("run-"), rows))
    return runs


READERS = {"wandb": wandb_runs, "mlflow": mlflow_runs, "swanlab": swanlab_runs}
EXPECTED = {(1, "loss", 0.75), (1, "eval/kl", 1.5), (2, "loss", 0.1 + 0.2)}  # what is not finite is left out


@pytest.mark.parametrize("name", READERS)
def test_a_tracker_holds_the_numbers_of_every_step(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    train(report(tmp_path, config(name)))
    ((title, _, rows),) = READERS[name](tmp_path)
    assert title == "first"
    assert sorted(rows) == sorted(EXPECTED)


@pytest.mark.parametrize("name", READERS)
def test_a_resumed_run_goes_on_in_the_trackers_run(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    first = report(tmp_path, config(name))
    ids = first.describe()["trackers"]
    train(first, to_the_end=False)
    again = report(tmp_path, config(name), reported_by(first))
    assert again.describe()["trackers"] == ids
    train(again, {3: {"loss": 0.25}})
    runs = READERS[name](tmp_path)
    assert {run_id for _, run_id, _ in runs} == set(ids.values())
    assert sorted(row for _, _, rows in runs for row in rows) == sorted({*EXPECTED, (3, "loss", 0.25)})


@pytest.mark.parametrize("name", READERS)
def test_signals_stay_the_runs_own(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    made = report(tmp_path, config(name))
    assert [signal.getsignal(number) for number in numbers] == before
    train(made)
    assert [signal.getsignal(number) for number in numbers] == before


def test_mlflow_knows_the_recipe_and_how_the_run_ended(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    made = report(tmp_path, config("mlflow"))
    run_id = made.describe()["trackers"]["mlflow"]
    client = MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    assert client.get_run(run_id).info.status == "RUNNING"
    train(made, to_the_end=False)
    assert client.get_run(run_id).info.status == "FAILED"
    again = report(tmp_path, config("mlflow"), reported_by(made))
    assert client.get_run(run_id).info.status == "RUNNING"
    train(again, {})
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["training.seed"] == "7"
    assert found.data.params["actor_rollout.lr"] == "0.5"


def test_mlflow_goes_where_its_variable_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "elsewhere").as_uri())
    train(report(tmp_path / "run", config("mlflow")))
    assert not (tmp_path / "run" / "mlruns").exists()
    assert list((tmp_path / "elsewhere").glob("*/*/metrics/loss"))


def test_tensorboard_is_a_tracker_too_and_is_written_once(tmp_path: Path) -> None:
    train(report(tmp_path, config("tensorboard", tensorboard=True)))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    train(report(tmp_path / "off", config(tensorboard=False)))
    assert not (tmp_path / "off" / "tensorboard").exists()


class Fails:
    """A tracker whose server goes away."""

    id = "7"

    def __init__(self, config: LogConfig, recipe: dict[str, Any], run_dir: Path, run_id: str | None) -> None:
        return None

    def log(self, step: int, metrics: dict[str, float]) -> None:
        raise ConnectionError("no route to host")

    def finish(self, *, complete: bool) -> None:
        raise ConnectionError("no route to host")


def test_a_tracker_that_fails_later_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(trackers._START, "wandb", Fails)
    train(report(tmp_path, config("wandb")))
    assert caplog.text.count("the run continues without this tracker") == 1
    assert "3 calls failed; metrics.jsonl has every number" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_stop_inside_a_tracker_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Fails, step: int, metrics: dict[str, float]) -> None:
        raise StopRequested("now")

    monkeypatch.setattr(Fails, "log", stop)
    monkeypatch.setitem(trackers._START, "wandb", Fails)
    with pytest.raises(StopRequested):
        TrackerSink("wandb", config("wandb").log, {}, tmp_path).write(1, {"loss": 1.0})


def test_a_tracker_that_cannot_start_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> Any:
        raise PermissionError("api_key not configured")

    monkeypatch.setitem(trackers._START, "wandb", refuse)
    with pytest.raises(ConfigError, match=r"log\.report_to: wandb could not be started: PermissionError: api_key"):
        TrackerSink("wandb", config("wandb").log, {}, tmp_path)
    with pytest.raises(ConfigError, match=r"wandb login.*WANDB_MODE=offline, or leave wandb out"):
        TrackerSink("wandb", config("wandb").log, {}, tmp_path)


@pytest.mark.parametrize("name", checks.PACKAGES)
def test_a_missing_package_is_found_before_anything_is_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda module: None)
    package = {"mlflow": "mlflow-skinny"}.get(name, name)
    with pytest.raises(ConfigError) as caught:
        load_config(recipe(dry_run=False, log={"report_to": name}))
    assert (
        f"log.report_to = {name}: the package is not installed; pip install {package}, or leave {name} out"
        in caught.value.problems
    )
    assert load_config(recipe(log={"report_to": name})).dry_run  # perhaps a plan for another machine


@pytest.mark.parametrize(("value", "names"), [("none", ()), ("wandb", ("wandb",)), (["mlflow", "wandb"],) * 2])
def test_trackers_are_named_alone_or_in_a_list(value: Any, names: Any) -> None:
    assert load_config(recipe(log={"report_to": value})).log.report_to == tuple(names)


def test_an_evaluation_alone_is_a_run_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str | None] = []

    class Notes(Fails):
        def __init__(self, config: LogConfig, recipe: dict[str, Any], run_dir: Path, run_id: str | None) -> None:
            given.append(run_id)

    monkeypatch.setitem(trackers._START, "wandb", Notes)
    first = report(tmp_path, config("wandb"))
    only = config("wandb").model_copy(update={"training": config().training.model_copy(update={"eval_only": True})})
    report(tmp_path, only, reported_by(first))
    report(tmp_path, config("wandb"), reported_by(first))
    assert given == [None, None, "7"]
