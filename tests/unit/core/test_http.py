"""Asking an HTTP service: what comes back from one that works, and what is said of one that does not."""

from __future__ import annotations

import gzip
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlxf.core import http
from rlxf.core.addresses import is_link_local, short_url, url_problem
from rlxf.core.errors import ConfigError
from rlxf.core.http import HttpClient, HttpSettings, Reply
from tests.http_world import Behaviour, Service, answer, cut, drip, hang_up, late, no_service, status, text

ROOT = Path(__file__).resolve().parents[3]
QUICK = HttpSettings(timeout_s=0.5, connect_s=0.5, tries=3)
TOKEN = "canary-5f2c9e"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "PAUSE_S", 0.01)


def ask(url: str, settings: HttpSettings = QUICK, body: Any = None, **options: Any) -> Reply:
    client = HttpClient(url, settings)
    try:
        (reply,) = client.post_all([body], **options)
    finally:
        client.close()
    return reply


def by_body(*behaviours: Behaviour) -> Behaviour:
    """The body of a request is the number of its behaviour."""
    return lambda exchange: behaviours[exchange.body](exchange)


def asked(*behaviours: Behaviour, settings: HttpSettings = QUICK, **options: Any) -> tuple[Reply, int]:
    """The reply, and how often the server was asked."""
    with Service(*behaviours) as service:
        reply = ask(service.url, settings, **options)
        assert reply.problem is None or reply.problem.startswith(f"{service.url}: ")
        return reply, len(service.bodies)


def test_replies_come_in_the_order_of_the_bodies_and_are_told_as_they_come() -> None:
    def behave(exchange: Any) -> None:
        exchange.wait(0.2 if exchange.body == 0 else 0.0)
        exchange.json({"got": exchange.body})

    told: list[int] = []
    with Service(behave) as service:
        client = HttpClient(service.url, QUICK)
        replies = client.post_all(range(5), done=lambda index, reply: told.append(index))
        again = client.post_all([7])
        client.close()
    assert [reply.value for reply in replies] == [{"got": i} for i in range(5)]
    assert all(reply.problem is None and reply.tries == 1 for reply in replies)
    assert sorted(told) == [0, 1, 2, 3, 4]
    assert told[-1] == 0
    assert again[0].value == {"got": 7}


def test_nothing_is_asked_of_nobody() -> None:
    client = HttpClient(no_service(), QUICK)
    assert client.post_all([]) == []
    client.close()


def test_null_is_a_value() -> None:
    reply, _ = asked(answer(None))
    assert (reply.value, reply.problem) == (None, None)


def test_no_more_requests_at_a_time_than_allowed() -> None:
    with Service(late(0.05, answer(1))) as service:
        client = HttpClient(service.url, replace(QUICK, concurrency=3))
        threads = [threading.Thread(target=client.post_all, args=(range(6),)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client.close()
        assert service.most_busy == 3
        assert len(service.bodies) == 12


# What a server does, what is said, and how often it is asked.
FAULTS: dict[str, tuple[Behaviour, str, int]] = {
    "500": (status(500, "boom"), "answered 500 Internal Server Error: boom (3 tries)", 3),
    "503 without a text": (status(503), "answered 503 Service Unavailable (3 tries)", 3),
    "429": (status(429, "slow down"), "answered 429 Too Many Requests: slow down (3 tries)", 3),
    "slow": (late(5, answer(1)), "no complete answer within 0.5 s (3 tries)", 3),
    "drips": (drip, "no complete answer within 0.5 s (3 tries)", 3),
    "cut": (cut, "the connection was cut before the answer was complete (3 tries)", 3),
    "hangs up": (hang_up, "the connection was cut before the answer was complete (3 tries)", 3),
    "400": (status(400, "no\nbatch \x1b[31m"), "answered 400 Bad Request: no batch [31m", 1),
    "401": (status(401), "answered 401 Unauthorized; it wants a token, so set token_env", 1),
    "404": (status(404, "x" * 1000), f"answered 404 Not Found: {'x' * 400}...", 1),
    "redirect": (
        status(302, Location="http://169.254.169.254/latest"),
        "answered 302 Found, a redirect to http://169.254.169.254/latest; redirects are not followed, so name that "
        "address",
        1,
    ),
    "not modified": (status(304), "answered 304 Not Modified, a redirect to nowhere", 1),
    "html": (text("<html>welcome</html>"), "the answer is no JSON: <html>welcome</html>", 1),
    "empty": (text(""), "the answer is no JSON: it is empty", 1),
    "no content": (status(204), "the answer is no JSON: it is empty", 1),
    "no text": (text(b"\xff\xfe\xfd"), "the answer is no JSON", 1),
    "nan": (text('{"scores": [NaN]}'), "the answer holds NaN, which is no JSON; a value that is missing is null", 1),
    "infinity": (text("[-Infinity]"), "the answer holds -Infinity, which is no JSON", 1),
    "deep": (text("[" * 200_000), "the answer is no JSON", 1),
    "many digits": (text("9" * 5000), "the answer is no JSON", 1),
    "too large": (text(" " * (2**20 + 1)), "the answer is larger than 1,048,576 bytes", 1),
    "bomb": (text(gzip.compress(b" " * 2**24), Content_Encoding="gzip"), "the answer is larger than 1,048,576", 1),
    "brotli": (text(b"\x00", Content_Encoding="br"), "the answer is compressed in a way that was not asked for", 1),
    "broken gzip": (text(b"\x00abc", Content_Encoding="gzip"), "the answer cannot be decompressed", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_in_a_sentence(fault: str) -> None:
    behaviour, said, count = FAULTS[fault]
    begin = time.monotonic()
    reply, tries = asked(behaviour)
    assert reply.problem is not None
    assert reply.problem.partition(": ")[2].startswith(said)
    assert reply.value is None
    assert (reply.tries, tries) == (count, count)
    assert time.monotonic() - begin < 4


def test_a_header_that_is_no_http_is_told() -> None:
    def babble(exchange: Any) -> None:
        exchange.wfile.write(b"SSH-2.0-x\r\n\r\n")
        exchange.close_connection = True

    reply, tries = asked(babble)
    assert "no HTTP: " in str(reply.problem)
    assert tries == 1


def test_an_endless_answer_is_left_at_the_limit() -> None:
    sent = 0

    def pour(exchange: Any) -> None:
        nonlocal sent
        exchange.reply(200, "", Transfer_Encoding="chunked")
        for _ in range(2000):
            exchange.wfile.write(b"10000\r\n" + b" " * 65536 + b"\r\n")
            sent += 65536

    reply, _ = asked(pour, settings=replace(QUICK, timeout_s=10))
    assert str(reply.problem).endswith("the answer is larger than 1,048,576 bytes")
    assert sent < 2**25  # what fits into the buffers in between


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_answer_is_read_although_none_is_asked_for(encoding: str) -> None:
    packed = gzip.compress(b"[1]") if encoding == "gzip" else zlib.compress(b"[1]")
    with Service(text(packed, Content_Encoding=encoding)) as service:
        assert ask(service.url).value == [1]
        assert service.headers[0]["Accept-Encoding"] == "identity"


def test_two_failures_then_an_answer_is_an_answer() -> None:
    reply, tries = asked(status(500), status(500), answer(5))
    assert (reply.value, reply.problem, reply.tries, tries) == (5, None, 3, 3)


def test_a_server_that_is_down_is_said_to_be_down() -> None:
    reply = ask(no_service())
    assert str(reply.problem).endswith("no connection (Connection refused) (3 tries)")


def test_a_server_that_comes_back_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "PAUSE_S", 1.0)
    url = no_service()
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(ask(url)))
    thread.start()
    time.sleep(0.2)
    with Service(answer(3), port=int(url.split(":")[2].split("/")[0])):
        thread.join(10)
    assert (replies[0].value, replies[0].tries) == (3, 2)


def test_a_name_that_nobody_knows_is_told() -> None:
    reply = ask("http://nobody.invalid/score", replace(QUICK, connect_s=5, timeout_s=5))
    assert "http://nobody.invalid/score: no connection (" in str(reply.problem)


def test_the_server_says_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    reply, _ = asked(status(429, Retry_After="1"), answer(1))
    assert reply.value == 1
    assert 1 <= time.monotonic() - begin < 3
    monkeypatch.setattr(http, "LONGEST_PAUSE_S", 0.1)
    begin = time.monotonic()
    assert asked(status(503, Retry_After="86400"), answer(1))[0].value == 1
    assert time.monotonic() - begin < 1


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("9" * 5000, 30.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0), ("Wed, 21 Oct 2099 07:28:00 GMT", 30.0)]
    + [(bad, 0.0) for bad in ("", "soon", "-5", "nan", "1e9", "²")],
)
def test_retry_after_is_a_number_or_a_date(header: str, seconds: float) -> None:
    assert http._retry_after(header) == seconds


def test_pauses_grow_and_differ() -> None:
    first = [http._pause(1, 0) for _ in range(100)]
    third = [http._pause(3, 0) for _ in range(100)]
    assert max(first) < 4 * http.PAUSE_S / 2 <= min(third) + 1e-9
    assert len(set(first)) > 50


def test_the_deadline_ends_everything() -> None:
    begin = time.monotonic()
    with Service(late(0.2, status(500, "boom"))) as service:
        client = HttpClient(service.url, replace(QUICK, concurrency=1, timeout_s=5, tries=10))
        replies = client.post_all(range(3), deadline_s=0.5)
        client.close()
    assert time.monotonic() - begin < 2
    problems = [str(reply.problem).partition(": ")[2] for reply in replies]
    assert problems[0].startswith("no answer within the deadline of 0.5 s; the last try: answered 500")
    assert problems[1] == problems[2] == "no answer within the deadline of 0.5 s"
    assert [reply.tries for reply in replies[1:]] == [0, 0]


# Addresses.

REFUSED = [
    "http://169.254.169.254/latest/meta-data",
    "http://169.254.1.2:8000/score",
    "http://[fe80::1]/score",
    "http://[fe80::1%25eth0]/score",
    "http://[fd00:ec2::254]/score",
    "http://[::ffff:169.254.169.254]/score",
    "http://[64:ff9b::a9fe:a9fe]/score",
    "http://100.100.100.200/score",
    "http://\uff11\uff16\uff19.\uff12\uff15\uff14.\uff11\uff16\uff19.\uff12\uff15\uff14/score",  # full-width digits
]


@pytest.mark.parametrize("url", REFUSED)
def test_link_local_addresses_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="link-local or metadata address, which is refused unless allow_link_local"):
        HttpClient(url, QUICK)


@pytest.mark.parametrize("host", ["2852039166", "0xA9FEA9FE", "169.254.43518", "0251.0376.0251.0376"])
def test_other_ways_to_write_such_an_address_lead_nowhere(host: str) -> None:
    reply = ask(f"http://{host}/latest", replace(QUICK, connect_s=1, timeout_s=1, tries=1))
    assert "is a link-local or metadata address" in str(reply.problem) or "no HTTP: " in str(reply.problem)


def leads_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """All names lead to these addresses."""

    def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [
            (socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port))
            for ip in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def test_a_name_that_leads_to_such_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    leads_to(monkeypatch, "169.254.169.254")
    reply = ask("http://rewards.example/score")
    assert reply.problem == (
        "http://rewards.example/score: rewards.example (169.254.169.254) is a link-local or metadata address, which is "
        "refused unless allow_link_local is true"
    )
    assert reply.tries == 1


def test_a_name_may_have_such_an_address_beside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with Service(answer(1)) as service:
        leads_to(monkeypatch, "fe80::1", "127.0.0.1")
        assert ask(service.url.replace("127.0.0.1", "rewards.example")).value == 1


def test_allowed_addresses_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    leads_to(monkeypatch, "169.254.169.254")
    reply = ask("http://rewards.example/", HttpSettings(connect_s=0.2, tries=1, allow_link_local=True))
    assert "link-local" not in str(reply.problem)
    assert url_problem("http://169.254.1.1/score", allow_link_local=True) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "10.0.0.1", "::1", "fd00::1", "localhost", "8.8.8.8", "169.253.0.1"])
def test_other_addresses_are_fine(host: str) -> None:
    assert not is_link_local(host)


@pytest.mark.parametrize(
    "url",
    ["", "host:8000", "ftp://host/", "file:///etc/passwd", "http://", "http://host:port/", "http://a b/", "http://[x"],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^url: expected an http or https address, such as http://host:8000/score, got"
    ):
        HttpClient(url, QUICK)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="token_env") as raised:
        HttpClient(f"http://me:{TOKEN}@host/score", QUICK)
    assert TOKEN not in str(raised.value)
    assert short_url(f"http://me:{TOKEN}@host:8000/score?key={TOKEN}") == "http://host:8000/score"


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, no_service())
    assert asked(answer(1))[0].value == 1


# Tokens.


def test_the_token_is_sent_and_never_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_TOKEN", f"{TOKEN}\n")
    with Service(status(401, f"no: {TOKEN}"), text(f"oh {TOKEN}"), status(302, Location=f"/?{TOKEN}")) as service:
        client = HttpClient(service.url, replace(QUICK, token_env="MY_TOKEN"))
        replies = [client.post_all([None])[0] for _ in range(3)]
        client.close()
        assert service.headers[0]["Authorization"] == f"Bearer {TOKEN}"
    assert "no: ***; it does not take the token of MY_TOKEN" in str(replies[0].problem)
    assert TOKEN not in str(replies) + caplog.text


@pytest.mark.parametrize("value", [None, "", "  ", "two words", "schlüssel", "a\nb"])
def test_a_token_that_cannot_be_sent_is_refused(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_TOKEN", value)
    with pytest.raises(ConfigError, match=r"^token_env=MY_TOKEN: expected") as raised:
        HttpClient("http://host/", replace(QUICK, token_env="MY_TOKEN"))
    assert not value or not value.strip() or value not in str(raised.value)


# Ends.


def test_a_body_that_is_no_json_is_a_defect_of_the_caller() -> None:
    with Service(answer(1)) as service:
        client = HttpClient(service.url, QUICK)
        with pytest.raises(ValueError, match="JSON"):
            client.post_all([1, float("nan")])
        with pytest.raises(TypeError):
            client.post_all([1, object()])
        assert service.bodies == []


def test_close_from_another_thread_ends_the_wait_with_what_has_come() -> None:
    with Service(answer(1), late(20, answer(2))) as service:
        client = HttpClient(service.url, replace(QUICK, timeout_s=20, concurrency=1))
        timer = threading.Timer(0.3, client.close)
        timer.start()
        begin = time.monotonic()
        replies = client.post_all([0, 1, 2])
        assert time.monotonic() - begin < 3
        timer.join()
    assert replies[0].value == 1
    assert all(str(reply.problem).endswith("the client was closed before an answer came") for reply in replies[1:])
    client.close()  # a second time


def test_a_failure_of_the_callers_function_drops_the_rest() -> None:
    def fail(index: int, reply: Reply) -> None:
        raise OSError("disk full")

    with Service(by_body(answer(1), late(20, answer(2)))) as service:
        client = HttpClient(service.url, replace(QUICK, timeout_s=20))
        begin = time.monotonic()
        with pytest.raises(OSError, match="disk full"):
            client.post_all([0, 1], done=fail)
        assert time.monotonic() - begin < 3
        client.close()


INTERRUPTED = """
import signal, sys, threading, time
from rlxf.core.errors import StopRequested
from rlxf.core.http import HttpClient, HttpSettings
from rlxf.core.stop import Stop

stop = Stop(interrupt=True)
told = []
with stop.installed():
    client = HttpClient(sys.argv[1], HttpSettings(timeout_s=60))
    print("asking", flush=True)
    try:
        with stop.interruptible():
            client.post_all([0, 1], done=lambda index, reply: told.append(index))
    except StopRequested as error:
        print(error, told, flush=True)
        if sys.argv[2] == "close":
            client.close()
        sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("then", ["close", "leave"])
def test_a_signal_interrupts_the_wait_and_nothing_keeps_the_process(then: str) -> None:
    with Service(by_body(answer(1), late(60, answer(2)))) as service:
        command = [sys.executable, "-c", INTERRUPTED, service.url, then]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "asking\n"
        deadline = time.monotonic() + 20
        while len(service.bodies) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        begin = time.monotonic()
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=20)
    assert time.monotonic() - begin < 20
    assert (out, err, child.returncode) == ("stopped by SIGTERM [0]\n", "", 143)


def test_a_silent_name_server_does_not_keep_the_process() -> None:
    code = (
        "import socket, time\n"
        "socket.getaddrinfo = lambda *a, **k: time.sleep(60)\n"
        "from rlxf.core.http import HttpClient, HttpSettings\n"
        "print(HttpClient('http://silent.example/', HttpSettings(connect_s=0.3, tries=1)).post_all([0])[0].problem)\n"
    )
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.stdout, done.stderr) == ("http://silent.example/: no connection within 0.3 s\n", "")
    assert time.monotonic() - begin < 10
