"""The file: whole in itself, small enough, without secrets, and safe whatever the texts hold."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.made_run import Made, make_run
from rlxf.report import page
from rlxf.report.content import RunPage
from rlxf.report.make import Page
from rlxf.report.read import RunReader
from rlxf.report.texts import MAX_CHARACTERS, Pairs
from tests.unit.report.pages import data_of

ASSETS = Path(page.__file__).parent / "assets"
HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> \x00\x1b[31m\u202eabc\u2028\u2029\ud800"


def made_page(*folders: Path) -> str:
    output = folders[0] / "report.html"
    Page(folders, output).write()
    return output.read_text(encoding="utf-8")


def test_the_plotting_library_is_the_recorded_file_with_its_licence() -> None:
    library = (ASSETS / page.LIBRARY).read_bytes()
    assert hashlib.sha256(library).hexdigest() == page.LIBRARY_SHA256
    assert f'version:"{page.LIBRARY_VERSION}"'.encode() in library.replace(b"t.version=", b"version:")
    assert "Apache License" in (ASSETS / "echarts.LICENSE").read_text()
    assert "Apache ECharts" in (ASSETS / "echarts.NOTICE").read_text()
    assert "Copyright" in (ASSETS / "echarts.LICENSE-d3").read_text()


def test_the_page_names_no_place_on_a_network(tmp_path: Path) -> None:
    text = made_page(make_run(tmp_path, Made(steps=20)))
    own = text.replace(page._inline(page.asset(page.LIBRARY)), "")
    assert re.findall(r"https?://[^\s\"']+", own) == ["http://www.w3.org/2000/svg"] * own.count("http://")
    assert not re.search(r"<(link|img|iframe|object|embed)\b|\bsrc=|@import|url\(", own)
    assert "default-src &#x27;none&#x27;" in text


def test_the_policy_of_the_page_allows_its_own_scripts_only(tmp_path: Path) -> None:
    text = made_page(make_run(tmp_path, Made(steps=4)))
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        assert page._hash(script) in text.replace("&#x27;", "'")


def test_hostile_texts_neither_end_the_script_nor_hide_in_the_file(tmp_path: Path) -> None:
    make_run(tmp_path, Made(steps=4))
    row = {"step": 2, "prompt": HOSTILE, "chosen": HOSTILE, "rejected": HOSTILE, "chosen_score": 1}
    (tmp_path / "samples.jsonl").write_text(json.dumps(row) + "\n")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["note"] = "</script><script>alert(2)</script>"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    text = made_page(tmp_path)
    assert text.count("</script>") == 3
    assert "alert(1)" in text
    assert "<script>alert" not in text
    for character in "\x00\x1b\u202e\u2028\u2029\ud800":
        assert character not in text
    (pair,) = data_of(tmp_path / "report.html")["runs"][0]["pairs"]["rows"]
    assert pair["s"][0]["text"] == HOSTILE


def test_a_folder_whose_name_is_no_utf8_gets_a_page(tmp_path: Path) -> None:
    folders = [
        make_run(Path(os.fsdecode(os.fsencode(tmp_path) + name)), Made(steps=2)) for name in (b"/\xff<b>", b"/b")
    ]
    Page(folders, tmp_path / "report.html").write()
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>2 runs: ?&lt;b&gt;, b - rlxf report</title>" in text
    assert data_of(tmp_path / "report.html")["runs"][0]["label"] == "\udcff<b>"


def test_a_secret_in_environment_and_recipe_never_reaches_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "canary-2b7e151628aed2a6"
    monkeypatch.setenv("SECRET_TOKEN", f"env-{canary}")
    make_run(tmp_path, Made(steps=4, ends=False))
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["judge"] = {
        "base_url": f"https://me:{canary}-a@judge.example/v1?sig={canary}-b",
        "api_key": f"{canary}-c",
        "token_env": "SECRET_TOKEN",
        "headers": [{"x-secret": f"{canary}-d"}],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = f"python ray_gpt.py judge.api_key={canary}-c +x.password='{canary}-e' https://u:{canary}-f@h/"
    (tmp_path / "command.json").write_text(json.dumps({"config_name": "x", "command": command}))
    with (tmp_path / "run.jsonl").open("a") as file:
        ended = {"what": "ended", "step": 4, "exit_code": 1, "message": f"refused: {canary}-c at http://{canary}-g@h"}
        file.write(json.dumps({"what": "started", "step": 0, "command": ["x", f"--token={canary}-h"]}) + "\n")
        file.write(json.dumps(ended) + "\n")
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "lost", "message": f"Bearer {canary}-i"}) + "\n")
    text = made_page(tmp_path)
    assert canary not in text
    assert "SECRET_TOKEN" in text, "the name of a variable is no secret"
    assert "nothing in them is masked" in text, "what the page says of prompts"


def test_the_page_is_small(tmp_path: Path) -> None:
    folder = make_run(tmp_path, Made(steps=1000, samples_interval=8, tokens=48))
    assert len(RunReader(folder).read().samples) == 126 * 16
    text = made_page(folder)
    assert len(text.encode()) < 5e6
    data = data_of(tmp_path / "report.html")["runs"][0]
    assert max(len(curve["v"]) for curve in data["curves"]["of"].values()) <= 600
    assert data["curves"]["bucket"] > 1
    pairs = data["pairs"]
    assert pairs["total"] == 126 * 16
    assert len(pairs["rows"]) <= 2000
    assert pairs["tokenised"] == sum("t" in row for row in pairs["rows"]) > 100
    steps = [row["step"] for row in pairs["rows"]]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (1, 1000)


def test_long_texts_are_cut_and_many_of_them_are_thinned(tmp_path: Path) -> None:
    make_run(tmp_path, Made(steps=4))
    row = {"prompt": "p" * 20_000, "chosen": "c" * 20_000, "rejected": "r" * 20_000}
    lines = [json.dumps({"step": step, **row}) for step in range(1, 801)]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    pairs = Pairs().data(RunReader(tmp_path).read())
    assert pairs["total"] == 800
    assert 20 < len(pairs["rows"]) < 150
    assert pairs["rows"][-1]["s"][0]["text"] == ["c" * MAX_CHARACTERS, 20_000 - MAX_CHARACTERS]
    assert pairs["rows"][-1]["step"] == 800


def test_pairs_of_a_second_look_are_those_of_a_first(tmp_path: Path) -> None:
    make_run(tmp_path / "run", Made(steps=30, samples_interval=1, tokens=8))
    make_run(tmp_path / "longer", Made(steps=150, samples_interval=1, tokens=8))
    reader, pairs = RunReader(tmp_path / "run"), Pairs()
    first = pairs.data(reader.read())
    assert first["rows"] == Pairs().data(RunReader(tmp_path / "run").read())["rows"]
    whole = (tmp_path / "longer" / "samples.jsonl").read_text()
    (tmp_path / "run" / "samples.jsonl").write_text(whole)
    assert pairs.data(reader.read()) == Pairs().data(RunReader(tmp_path / "longer").read())


def test_what_the_page_shows_of_a_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path, Made(steps=40, fault=True))
    data = RunPage(RunReader(folder)).content(now=0.0).data
    assert data["name"] == "online_dpo_trainer_small"
    facts = dict(data["facts"])
    assert facts["Task"] == "online DPO, all weights"
    assert facts["Loss"] == "sigmoid, beta 0.2"
    assert facts["Reward"] == "model: models/small/rm, praise: regex (weight 0.5)"
    assert "torch 2.13.0" in dict(data["machine"])["Versions"]
    assert [mark["kind"] for mark in data["marks"]] == [
        *("start", "checkpoint", "fault", "recovery", "resume", "end"),
    ]
    title, metric, start, start_se, end, end_se = data["table"][0]
    assert (title, metric) == ("reward score", "eval/reward")
    assert start < end
    assert (start_se, end_se) == (0.24, 0.09)
    assert data["answers"]["prompts"][0] == "review of the film number 0 :"
    assert [row["step"] for row in data["answers"]["rows"]] == [0, 20, 40]


def test_a_plan_is_put_beside_what_was_measured(tmp_path: Path) -> None:
    folder = make_run(tmp_path, Made(steps=20))
    plan = {"step": {"timing/ref": 0.2, "not a metric": 1}, "memory/infer_rss_gib": 2.0, "note": "text"}
    (folder / "plan.json").write_text(json.dumps(plan))
    data = RunPage(RunReader(folder)).content(now=0.0).data
    assert data["plan"] == [["timing/ref", 0.2, 0.1], ["memory/infer_rss_gib", 2, 1.8]]


def test_recipes_of_several_runs_are_compared(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / name, Made(steps=4, seed=seed)) for seed, name in enumerate("ab", start=1)]
    made_page(*folders)
    data = data_of(folders[0] / "report.html")
    assert [run["label"] for run in data["runs"]] == ["a", "b"]
    assert ["training.seed", "1", "2"] in data["differences"]
    assert not [row for row in data["differences"] if row[1] == row[2]]


def test_the_page_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, rlxf.report.command; print([m for m in ('torch', 'ray', 'transformers', 'omegaconf', 'numpy') "
        "if m in sys.modules])"
    )
    root = Path(page.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_json_in_a_script_holds_no_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        page.as_json({"a": float("nan")})
