"""scripts/push_to_hub.py: what it lists, what a hub on this machine gets, and what it refuses."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from rlxf.tools.hub import card, collect, without_paths
from tests.scripts_here import script
from tests.tiny_models import save_causal_lm, save_reward_model

HOME = "/home/somebody/work"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as a run leaves it, with paths of this machine wherever one may be."""
    run = tmp_path_factory.mktemp("outputs") / "run"
    policy = save_causal_lm(run / "policy")
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(json.dumps(config | {"_name_or_path": f"{HOME}/models/sft"}))
    adapter = policy / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"{HOME}/models/sft", "r": 8}))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (policy / ".cache").mkdir()
    (policy / ".cache" / "secret").write_text("no")
    recipe = {
        "training": {"stage": "ray_online_dpo", "seed": 3, "resume": "auto"},
        "actor_rollout": {"load": f"{HOME}/models/sft", "lr": 1e-6, "data_path": [f"{HOME}/a.jsonl"]},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    summary = {
        "steps": 80,
        "policy": f"{HOME}/outputs/run/policy",
        "start": {"eval/reward": 0.25, "timing/all": 1.0},
        "end": {"eval/reward": 2.5, "eval/kl": None, "timing/all": 1.0},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


@pytest.fixture(scope="module")
def main() -> Callable[..., int]:
    """The command in this process, with the arguments as they are typed."""
    return script("push_to_hub")


class Hub(ThreadingHTTPServer):
    """The few addresses that an upload uses. Every file is small, so each comes inside the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.messages: list[str] = []
        self.tokens: list[str | None] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.append(self.headers["Authorization"])
        if self.headers["Authorization"] != "Bearer right":
            self._send(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._send(200, {"url": f"{self.server.address}/team/policy"})
        elif self.path == "/api/validate-yaml":  # the head of the card
            self._send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            plain = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self._send(200, {"files": plain})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                else:
                    self.server.messages.append(line["value"]["summary"])
            self._send(200, {"commitUrl": f"{self.server.address}/team/policy/commit/1", "commitOid": "1"})

    def _send(self, code: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        return None


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_dry_run_lists_files_and_sizes_and_sends_nothing(
    main: Callable[..., int], hub: Hub, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(finished, "team/policy", "--dry-run", "--private", "--endpoint", hub.address) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in lines[:-2]}
    assert listed.keys() >= {"model.safetensors", "config.json", "README.md", "tokenizer.json"}
    assert listed["model.safetensors"] == (finished / "policy" / "model.safetensors").stat().st_size
    assert lines[-2].split()[0].replace(",", "") == str(sum(listed.values()))
    assert "nothing was sent; team/policy would be created as private" in lines[-1]
    assert hub.tokens == []


def test_the_hub_gets_every_file_in_one_commit(
    main: Callable[..., int], hub: Hub, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "right")
    before = sorted(path.read_bytes() for path in finished.rglob("*") if path.is_file())
    assert main(finished, "team/policy", "--private", "--endpoint", hub.address, "--message", "first") == 0
    assert [(made["name"], made["organization"]) for made in hub.created] == [("policy", "team")]
    assert hub.created[0].get("private") is True or hub.created[0].get("visibility") == "private"
    assert hub.messages == ["first"]
    policy = finished / "policy"
    assert hub.files["model.safetensors"] == (policy / "model.safetensors").read_bytes()
    assert hub.files["adapter/adapter_model.safetensors"] == b"weights"
    expected = {str(path.relative_to(policy)) for path in policy.rglob("*") if path.is_file()}
    assert hub.files.keys() == expected - {".cache/secret"} | {"README.md"}
    assert sorted(path.read_bytes() for path in finished.rglob("*") if path.is_file()) == before


def test_nothing_names_a_folder_of_this_machine(finished: Path) -> None:
    files = {upload.name: upload.content for upload in collect(finished)}
    text = {name: data if isinstance(data, bytes) else data.read_bytes() for name, data in files.items()}
    assert not [name for name, data in text.items() if HOME.encode() in data or str(finished).encode() in data]
    assert json.loads(text["adapter/adapter_config.json"]) == {"base_model_name_or_path": "sft", "r": 8}
    assert files["model.safetensors"] == finished / "policy" / "model.safetensors"  # as it is, not a copy


def test_the_card_tells_recipe_and_measures(finished: Path) -> None:
    (content,) = (upload.content for upload in collect(finished, base_model="team/base") if upload.name == "README.md")
    assert isinstance(content, bytes)
    _, facts, text = content.decode().split("---\n", 2)
    assert yaml.safe_load(facts) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "team/base",
        "tags": ["rlxf", "ray_online_dpo"],
    }
    assert "# Online DPO policy" in text
    assert "After 80 steps." in text
    assert "| `eval/reward` | 0.25 | 2.5 |" in text
    assert "| `eval/kl` | - | - |" in text
    assert "timing" not in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["actor_rollout"] == {"load": "sft", "lr": 1e-6, "data_path": ["a.jsonl"]}
    assert recipe["training"]["resume"] == "auto"


def test_the_base_model_is_named_in_the_adapter(finished: Path) -> None:
    files = {upload.name: upload.content for upload in collect(finished, base_model="team/base")}
    adapter = files["adapter/adapter_config.json"]
    assert isinstance(adapter, bytes)
    assert json.loads(adapter)["base_model_name_or_path"] == "team/base"


def test_the_card_of_a_reward_model_says_where_its_score_is_read(finished: Path, tmp_path: Path) -> None:
    folder = save_reward_model(tmp_path / "rm", rlxf_read_at="end_of_turn")
    cards = [card(folder, None, None), card(finished / "policy", None, None)]
    assert ["Its score is read at the token that ends the answer" in text for text in cards] == [True, False]


def test_a_card_without_a_run_has_no_empty_facts(tmp_path: Path) -> None:
    facts = ModelCard(card(save_reward_model(tmp_path / "rm"), None, "")).data
    assert facts.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["rlxf"],
    }


def test_a_card_of_the_users_own_is_kept(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "mine")
    (folder / "README.md").write_text("my words")
    files = {upload.name: upload.content for upload in collect(folder)}
    assert files["README.md"] == folder / "README.md"


@pytest.mark.parametrize(
    ("value", "shared"),
    [
        ("/a/b/c", "c"),
        ("/a/b/", "b"),
        ("~/models/x", "x"),
        ("file:///a/b.jsonl", "b.jsonl"),
        ("C:\\models\\x", "x"),
        ("models/x", "models/x"),
        ("team/policy", "team/policy"),
        ({"a": ["/x/y", 3, None]}, {"a": ["y", 3, None]}),
    ],
)
def test_absolute_paths_are_cut_to_their_last_part(value: Any, shared: Any) -> None:
    assert without_paths(value) == shared


def broken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text("{}")
    for name, text in (("broken", '{"architectures": ['), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
        (tmp_path / name / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("folder", "repo", "message"),
    [
        ("nowhere", "a/b", "nowhere: no such folder; expected a run folder"),
        ("empty", "a/b", "empty: no config.json there or in"),
        ("unfinished", "a/b", "a run writes `policy` when it ends"),
        ("weightless", "a/b", "weightless: holds no weights (*.safetensors)"),
        ("broken", "a/b", "config.json: cannot be read: Expecting value"),
        ("list", "a/b", "config.json: expected keys and values, got list"),
        (None, "a/b/c", "a/b/c: not the name of a repository"),
        (None, "a b", "a b: not the name of a repository"),
    ],
)
def test_wrong_input_is_one_clear_line(
    main: Callable[..., int], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    folder: str | None, repo: str, message: str,
) -> None:  # fmt: skip
    broken(tmp_path)
    assert main(tmp_path / folder if folder else finished, repo, "--dry-run") == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert message in told.err
    assert len(told.err.splitlines()) == 1


def test_a_hub_that_refuses_says_what_to_do(
    main: Callable[..., int], hub: Hub, finished: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert main(finished, "team/policy", "--endpoint", hub.address) == 2
    told = capsys.readouterr().err
    assert "team/policy: the hub refused the upload" in told
    assert "log in with `hf auth login` or set HF_TOKEN" in told
    assert hub.files == {}


def test_a_hub_that_is_not_there_is_told(
    main: Callable[..., int], finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "right")
    assert main(finished, "team/policy", "--endpoint", "http://127.0.0.1:9") == 2
    assert "the hub refused the upload" in capsys.readouterr().err
