"""The service as a client meets it: batches, token, limits, failures, its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from rlxf.core.errors import ModelError
from rlxf.core.http import HttpClient, HttpSettings, Reply
from rlxf.score.http import HttpSource, HttpSourceSettings
from rlxf.score.texts import Asked
from rlxf.tools.serve.app import Served, make_app
from rlxf.tools.serve.batching import Batcher
from rlxf.tools.serve.forms import Scores, Wanted
from tests.scripts_here import script

ROOT = Path(__file__).resolve().parents[4]


def lengths(requests: Sequence[Wanted]) -> Scores:
    return [float(len(text)) for request in requests for text in request.asked.completions]


class Slow:
    """Scores by length; the first call waits until it may go on."""

    def __init__(self) -> None:
        self.go, self.sizes = threading.Event(), list[int]()

    def __call__(self, requests: Sequence[Wanted]) -> Scores:
        self.sizes.append(sum(len(request) for request in requests))
        assert self.go.wait(20)
        return lengths(requests)


@contextmanager
def running(score: Any, *, merge: bool = True, batch_size: int = 8, **served: Any) -> Iterator[tuple[str, Batcher]]:
    """A server in a thread, and its batcher."""
    batcher = Batcher(score, batch_size=batch_size, max_wait_s=0.01, merge=merge)
    app = make_app(batcher, Served(**{"name": "m", "kind": "model", "max_bytes": 10_000, **served}))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/score", batcher
    finally:
        server.should_exit = True
        thread.join(20)


def wait_until(is_true: Any) -> None:
    deadline = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def body(*completions: str, **more: Any) -> dict[str, Any]:
    return {"prompts": ["p"] * len(completions), "completions": list(completions), **more}


def post(url: str, *bodies: Any, **settings: Any) -> list[Reply]:
    client = HttpClient(url, HttpSettings(**{"timeout_s": 30.0, "tries": 1, "concurrency": 64, **settings}))
    try:
        return client.post_all(bodies)
    finally:
        client.close()


def test_all_forms_are_understood_at_any_path() -> None:
    with running(lengths) as (url, _):
        base = url.removesuffix("/score")
        assert post(url, body("a", "bb"))[0].value == {"scores": [1.0, 2.0]}
        assert post(f"{base}/openrlhf", {"query": ["pab"], "prompts": ["p"], "labels": [""]})[0].value["rewards"] == [
            2.0
        ]
        assert post(f"{base}/slime", {"prompt": "p", "response": "abc", "label": None})[0].value == 3.0
        assert post(base, body())[0].value == {"scores": []}


def test_requests_that_wait_are_scored_together_and_get_their_own_scores() -> None:
    slow = Slow()
    with running(slow) as (url, batcher):
        replies: list[Reply] = []
        first = threading.Thread(target=lambda: post(url, body("x")))
        first.start()
        wait_until(lambda: slow.sizes)
        second = threading.Thread(target=lambda: replies.extend(post(url, *(body("a" * i, "b") for i in range(6)))))
        second.start()
        wait_until(lambda: batcher.counts.queue == 13)
        slow.go.set()
        first.join(20)
        second.join(20)
        assert slow.sizes == [1, 8, 4]
        assert [reply.value["scores"] for reply in replies] == [[float(i), 1.0] for i in range(6)]
        assert (batcher.counts.requests, batcher.counts.completions, batcher.counts.batches) == (7, 13, 3)
        assert (batcher.counts.queue, batcher.counts.failed) == (0, 0)


def test_a_request_whose_client_has_gone_is_not_scored() -> None:
    slow = Slow()
    with running(slow) as (url, batcher):
        first = threading.Thread(target=lambda: post(url, body("x")))
        first.start()
        wait_until(lambda: slow.sizes)
        (reply,) = post(url, body("a", "b", "c"), timeout_s=0.3)
        assert "no complete answer within 0.3 s" in str(reply.problem)
        last = threading.Thread(target=lambda: post(url, body("y", "z")))
        last.start()
        wait_until(lambda: batcher.counts.requests == 3)
        slow.go.set()
        first.join(20)
        last.join(20)
        assert slow.sizes == [1, 2]
        wait_until(lambda: batcher.counts.queue == 0)


def test_one_request_does_not_spoil_another() -> None:
    slow = Slow()

    def score(requests: Sequence[Wanted]) -> Scores:
        scores = slow(requests)
        if any("bad" in request.asked.completions for request in requests):
            raise ModelError("the chat template refuses the messages")
        return scores

    with running(score) as (url, batcher):
        first = threading.Thread(target=lambda: post(url, body("x")))
        first.start()
        wait_until(lambda: slow.sizes)
        timer = threading.Timer(0.5, slow.go.set)
        timer.start()
        good, bad = post(url, body("good"), body("bad"))
        first.join(20)
        assert good.value == {"scores": [4.0]}
        assert "answered 422 Unprocessable Entity: the chat template refuses" in str(bad.problem)
        assert batcher.counts.failed == 1


def test_failures_are_told() -> None:
    def fail(_: Sequence[Wanted]) -> Scores:
        raise MemoryError("out of memory")

    with running(fail, max_bytes=2000) as (url, _):
        problems = [str(reply.problem) for reply in post(url, body("a"), {"text": 1}, body("a" * 3000))]
    assert "answered 500 Internal Server Error: scoring failed: MemoryError: out of memory" in problems[0]
    assert "answered 422 Unprocessable Entity: expected one of the forms" in problems[1]
    assert "answered 413 " in problems[2]
    assert "the request is larger than 2,000 bytes; send fewer completions at a time" in problems[2]


def test_a_token_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(lengths, token="canary-1") as (url, batcher):
        assert "answered 401 Unauthorized: expected the header" in str(post(url, body("a"))[0].problem)
        for value, accepted in (("canary-2", False), ("canary-1", True)):
            monkeypatch.setenv("MY_TOKEN", value)
            (reply,) = post(url, body("a"), token_env="MY_TOKEN")
            assert (reply.problem is None) == accepted
            assert "canary" not in str(reply.problem)
        assert batcher.counts.requests == 1


# The script.

REWARD = """
import time

def reward(prompts, completions, completion_ids, label=None, **columns):
    if "slow" in completions:
        time.sleep(1.5)
    if "fail" in completions:
        raise ValueError("no")
    return [None if text == "none" else len(text) + len(ids) for text, ids in zip(completions, completion_ids)]
"""


@contextmanager
def serving(*arguments: object, **environment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "scripts/serve_reward.py", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http" in line, process.communicate()
        yield line.split()[-1], process
    finally:
        process.kill()
        process.wait()


def test_one_served_function_scores_for_two_clients_and_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(REWARD)
    monkeypatch.setenv("MY_TOKEN", "canary-1")
    with serving("--function", file, "--token-env", "MY_TOKEN") as (url, process):
        settings = HttpSourceSettings(url=url, token_env="MY_TOKEN", batch_size=3, tries=1)
        count = 20
        asked = Asked(
            prompts=["p"] * count,
            completions=["a" * i if i != 4 else "none" for i in range(count)],
            completion_ids=[[1]] * count,
            columns={"topic": ["t"] * count},
        )
        found: list[Scores] = []
        sources = [HttpSource(settings) for _ in range(2)]
        clients = [threading.Thread(target=lambda s=source: found.append(s.ask(asked).scores)) for source in sources]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        assert found == [[None if i == 4 else i + 1.0 for i in range(count)]] * 2
        failing, other = post(url, body("fail"), body("x", label=["l"]), token_env="MY_TOKEN")
        assert "mine.py: `reward` failed" in str(failing.problem)
        assert "ValueError: no" in str(failing.problem)
        assert other.value == {"scores": [1.0]}

        replies: list[Reply] = []
        last = threading.Thread(target=lambda: replies.extend(post(url, body("slow"), token_env="MY_TOKEN")))
        last.start()
        time.sleep(0.7)
        process.send_signal(signal.SIGTERM)
        last.join(20)
        out, err = process.communicate(timeout=20)
    assert replies[0].value == {"scores": [4.0]}  # it was under way
    assert (process.returncode, err) == (143, "")
    assert out == f"ended: {2 * 7 + 3} requests, {2 * count + 3} completions, 1 failed\n"


# Arguments, and what is said of them in one line.
BAD_ARGUMENTS: list[tuple[tuple[str, ...], str]] = [
    ((), "one of the arguments --load --function --rule is required"),
    (("--rule", "maths"), '"maths" is no rule; did you mean "math"?'),
    (("--rule", "regex", "--options", "{}"), "--options"),
    (("--rule", "regex", "--options", "[1]"), "argument --options: expected a JSON object, got '[1]'"),
    (("--function", "a.py", "--options", "{}"), "--options is an option of --rule; a reward function does not read it"),
    (("--load", "a", "--timeout-s", "5"), "--timeout-s is an option of --function and --rule; a reward model does not"),
    (("--load", "a", "--function", "b"), "not allowed with argument"),
    (("--function", "nowhere.py"), "--function=nowhere.py: no such file; expected a Python file with `def reward("),
    (("--function", "empty.py"), "empty.py: defines no function `reward`"),
    (("--function", "broken.py"), "broken.py: cannot be loaded: broken.py:1: SyntaxError"),
    (("--load", "nowhere"), "nowhere: no such folder; `load` must name a Hugging Face model folder"),
    (("--load", "."), "no config.json in it; `load` must name a Hugging Face model folder"),
    (("--load", "a", "--port", "70000"), "argument --port: expected a whole number at least 0, at most 65535"),
    (("--load", "a", "--port", "x"), "argument --port: expected a whole number at least 0, at most 65535, got 'x'"),
    (("--load", "a", "--batch-size", "0"), "argument --batch-size: expected a whole number at least 1, got '0'"),
    (("--load", "a", "--max-wait-ms", "-1"), "argument --max-wait-ms: expected a number at least 0"),
    (("--load", "a", "--max-mb", "nan"), "argument --max-mb: expected a number at least 0.001, got 'nan'"),
    (("--load", "a", "--seq-length", "1.5"), "argument --seq-length: expected a whole number at least 1, got '1.5'"),
    (("--load", "a", "--device", "abacus"), "argument --device: invalid choice: 'abacus'"),
    (("--function", "a.py", "--bf16"), "--bf16 is an option of --load; a reward function does not read it"),
    (("--load", "a", "--token-env", "NO_TOKEN"), "--token-env NO_TOKEN: expected an environment variable with a token"),
    (("--load", "a", "--host", "256.1.1.1"), "--host 256.1.1.1 --port 8000: cannot be served at"),
    (("--load", "a", "--port", "TAKEN"), "cannot be served at: Address already in use; name another port, or 0"),
]


@pytest.mark.parametrize(
    ("arguments", "said"), BAD_ARGUMENTS, ids=[" ".join(row[0]) or "none" for row in BAD_ARGUMENTS]
)
def test_a_bad_argument_is_told_in_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NO_TOKEN", raising=False)
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "broken.py").write_text("def")
    with running(lengths) as (url, _):
        arguments = tuple(url.split(":")[2].split("/")[0] if part == "TAKEN" else part for part in arguments)
        if "--port" not in arguments and "--host" not in arguments:
            arguments += ("--port", "0")
        try:
            code = script("serve_reward")(*arguments)
        except SystemExit as error:  # argparse
            code = int(str(error.code))
    assert code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert said in line
