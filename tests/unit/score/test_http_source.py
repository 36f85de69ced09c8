"""Scores of an HTTP service: what it is asked in each form, which answers count, and what is missing."""

from __future__ import annotations

import datetime
import json
import signal
import threading
import time
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlxf.core import http
from rlxf.core.errors import ConfigError, StopRequested
from rlxf.core.stop import Stop
from rlxf.score.http import HttpSource, HttpSourceSettings, as_json
from rlxf.score.texts import Answered, Asked
from tests.http_world import Behaviour, Exchange, Service, answer, cut, drip, late, no_service, status, text


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "PAUSE_S", 0.01)


def asked(count: int = 6, *, chat: bool = False, **columns: list[Any]) -> Asked:
    """``count`` completions; number i ends with token 2 if i is even."""
    numbers = range(count)
    return Asked(
        prompts=[[{"role": "user", "content": f"p{i}"}] if chat else f"p{i}" for i in numbers],
        completions=[[{"role": "assistant", "content": f" c{i}"}] if chat else f" c{i}" for i in numbers],
        completion_ids=[[5, 2 if i % 2 == 0 else 6] for i in numbers],
        columns=columns,
    )


def ask(service: Service | str, wanted: Asked | None = None, *, eos_ids: tuple[int, ...] = (), **keys: Any) -> Answered:
    url = service if isinstance(service, str) else service.url
    source = HttpSource(HttpSourceSettings(url=url, **{"timeout_s": 0.5, **keys}), eos_ids=eos_ids)
    try:
        return source.ask(wanted or asked())
    finally:
        source.close()


def numbers(exchange: Exchange) -> None:
    """The number in each completion, later batches first."""
    scores = [float(completion[2:]) for completion in exchange.body["completions"]]
    exchange.wait(0.1 / (1 + scores[0]))
    exchange.json({"scores": scores})


def test_scores_have_the_order_of_the_completions() -> None:
    with Service(numbers) as service:
        found = ask(service, asked(11), batch_size=3)
        assert sorted(len(body["prompts"]) for body in service.bodies) == [2, 3, 3, 3]
    assert found == Answered(scores=[float(i) for i in range(11)])


def test_our_form_holds_texts_ids_ends_and_columns() -> None:
    wanted = asked(2, topic=["a", None], day=[datetime.date(2026, 1, 2), None])
    with Service(answer({"scores": [1, None]})) as service:
        found = ask(service, wanted, eos_ids=(2,))
        assert service.bodies == [
            {
                "prompts": ["p0", "p1"],
                "completions": [" c0", " c1"],
                "completion_ids": [[5, 2], [5, 6]],
                "ended": [True, False],
                "topic": ["a", None],
                "day": ["2026-01-02", None],
            }
        ]
    assert found == Answered(scores=[1.0, None])  # null is no failure


def test_chat_messages_are_sent_as_they_are() -> None:
    with Service(answer({"scores": [1, 2]})) as service:
        ask(service, asked(2, chat=True))
        assert service.bodies[0]["prompts"][1] == [{"role": "user", "content": "p1"}]
        assert service.bodies[0]["completions"][0] == [{"role": "assistant", "content": " c0"}]
        assert "ended" not in service.bodies[0]  # without EOS ids nobody knows


@pytest.mark.parametrize(("chat", "query"), [(False, "p1 c1"), (True, "p1\n\n c1")])
def test_the_form_of_openrlhf(chat: bool, query: str) -> None:
    with Service(answer({"rewards": [1, 2], "scores": [7, 7], "extra_logs": {}})) as service:
        found = ask(service, asked(2, chat=chat, gold=["x", 4]), form="openrlhf", label_column="gold")
        assert service.bodies[0]["query"][1] == query
        assert service.bodies[0]["prompts"] == ["p0", "p1"]
        assert service.bodies[0]["labels"] == ["x", 4]
        ask(service, asked(2), form="openrlhf")
        assert service.bodies[1].keys() == {"query", "prompts", "labels"}
        assert service.bodies[1]["labels"] == ["", ""]
    assert found.scores == [1.0, 2.0]


def test_the_form_of_slime_asks_for_one_at_a_time() -> None:
    def behave(exchange: Exchange) -> None:
        number = int(exchange.body["response"][2:])
        exchange.json(None if number == 2 else number / 2)

    with Service(behave) as service:
        found = ask(service, asked(4, gold=["x", "y", "z", "w"]), form="slime", label_column="gold", batch_size=64)
        assert sorted(service.bodies, key=lambda body: body["prompt"])[3] == {
            "prompt": "p3", "response": " c3", "label": "w",
        }  # fmt: skip
    assert found == Answered(scores=[0.0, 0.5, None, 1.5])


def test_messages_of_a_continued_answer_are_joined_without_a_gap() -> None:
    wanted = Asked(
        prompts=[[{"role": "user", "content": "q"}, {"role": "assistant", "content": "It"}]],
        completions=[[{"role": "assistant", "content": " is"}]],
        completion_ids=[[1]],
        columns={},
    )
    with Service(answer({"rewards": [1]})) as service:
        ask(service, wanted, form="openrlhf")
        assert service.bodies[0]["query"] == ["q\n\nIt is"]


def test_a_failed_batch_is_missing_and_counted_and_the_others_count() -> None:
    def behave(exchange: Exchange) -> None:
        if " c2" in exchange.body["completions"]:
            exchange.reply(400, "no")
        else:
            numbers(exchange)

    with Service(behave) as service:
        found = ask(service, asked(7), batch_size=2)
        assert found.scores == [0.0, 1.0, None, None, 4.0, 5.0, 6.0]
        assert found.failed == 2
        assert found.problem == f"{service.url}: answered 400 Bad Request: no; 1 of 4 requests failed"


# Answers that are none, in the form of rlxf for two completions, and what is said of them.
BAD: dict[str, tuple[Any, str]] = {
    "a list": ([1, 2], 'expected {"scores": [...]} with a number per completion, got a list'),
    "no object": ("1, 2", 'expected {"scores": [...]} with a number per completion, got a text'),
    "null": (None, 'expected {"scores": [...]} with a number per completion, got null'),
    "another key": ({"rewards": [1, 2]}, 'expected {"scores": [...]} with a number per completion, got an object'),
    "no list": ({"scores": 1}, 'expected {"scores": [...]} with a number per completion, got an object'),
    "too few": ({"scores": [1]}, "expected 2 scores, one per completion, got 1"),
    "too many": ({"scores": [1, 2, 3]}, "expected 2 scores, one per completion, got 3"),
    "a text": ({"scores": [1, "2"]}, "scores[1] must be a finite number or null, got a text"),
    "a list within": ({"scores": [[1], [2]]}, "scores[0] must be a finite number or null, got a list"),
    "an object within": ({"scores": [{}, 2]}, "scores[0] must be a finite number or null, got an object"),
    "beyond float32": ({"scores": [1e39, 2]}, "scores[0] must be a finite number or null, got 1e+39"),
    "a huge integer": ({"scores": [10**400, 2]}, "scores[0] must be a finite number or null, got a number that is too"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_answer_of_another_shape_is_no_answer(name: str) -> None:
    value, said = BAD[name]
    with Service(answer(value)) as service:
        found = ask(service, asked(2))
        assert len(service.bodies) == 1  # it would give the same again
        assert str(found.problem).startswith(f"{service.url}: {said}")
    assert (found.scores, found.failed) == ([None, None], 2)


def test_a_number_that_becomes_infinite_is_no_score() -> None:
    with Service(text('{"scores": [1e999, 2]}')) as service:
        assert "must be a finite number or null, got inf" in str(ask(service, asked(2)).problem)


def test_true_is_one() -> None:
    with Service(answer({"scores": [True, False]})) as service:
        assert ask(service, asked(2)).scores == [1.0, 0.0]


# What a server does to the first request of three, and how many of six completions are then missing.
FAULTS: dict[str, tuple[tuple[Behaviour, ...], int]] = {
    "500 twice": ((status(500), status(500), numbers), 0),
    "busy": ((status(429, Retry_After="0"), numbers), 0),
    "cut once": ((cut, numbers), 0),
    "late once": ((late(3, numbers), numbers), 0),
    "redirects": ((status(307, Location="/new"), numbers), 2),
    "not a number": ((text('{"scores": [NaN, 1]}'), numbers), 2),
    "wrong length": ((answer({"scores": [1]}), numbers), 2),
    "too large": ((text(b" " * 2**21), numbers), 2),
    "always 500": ((status(500),), 6),
    "never ends": ((drip,), 6),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_costs_misses_and_no_run(fault: str) -> None:
    behaviours, misses = FAULTS[fault]
    with Service(*behaviours) as service:
        found = ask(service, batch_size=2, concurrency=1)
    assert (found.scores.count(None), found.failed) == (misses, misses)
    assert (found.problem is None) == (misses == 0)
    assert [score for score in found.scores if score is not None] == [float(i) for i in range(misses % 6, 6)][
        : 6 - misses
    ]


def test_a_server_that_is_down_costs_all() -> None:
    found = ask(no_service())
    assert (found.scores, found.failed) == ([None] * 6, 6)
    assert str(found.problem).endswith("no connection (Connection refused) (3 tries)")


def test_two_clients_share_a_server() -> None:
    found: list[Answered] = []
    with Service(numbers) as service:
        clients = [
            threading.Thread(target=lambda: found.append(ask(service, asked(40), batch_size=4, timeout_s=10)))
            for _ in range(2)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
    assert found == [Answered(scores=[float(i) for i in range(40)])] * 2


def test_the_deadline_is_of_all_completions() -> None:
    begin = time.monotonic()
    with Service(late(0.2, numbers)) as service:
        found = ask(service, asked(20), batch_size=1, concurrency=1, timeout_s=5, deadline_s=0.7)
    assert time.monotonic() - begin < 4
    assert found.scores[0] == 0.0
    assert 15 <= found.failed == found.scores.count(None)
    assert "no answer within the deadline of 0.7 s" in str(found.problem)


def test_a_stop_request_ends_the_wait_where_signals_raise_nothing() -> None:
    stop = Stop(grace_s=60, leave=lambda code: None)
    with Service(late(20, numbers)) as service:
        source = HttpSource(HttpSourceSettings(url=service.url), stop=stop)
        threading.Timer(0.2, lambda: stop._on_signal(signal.SIGTERM, None)).start()
        begin = time.monotonic()
        with pytest.raises(StopRequested, match="stopped while waiting for http"), stop.interruptible():
            source.ask(asked())
        assert time.monotonic() - begin < 5
        source.close()


def test_what_cannot_be_asked_is_told_with_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_TOKEN", raising=False)
    for settings, said in (
        (HttpSourceSettings(url="localhost"), "url: expected an http or https address"),
        (HttpSourceSettings(url="http://h/", token_env="NO_TOKEN"), "token_env=NO_TOKEN: expected"),
    ):
        with pytest.raises(ConfigError, match=rf"^reward\.sources\[1\]\.{said}"):
            HttpSource(settings, key="reward.sources[1]")
    with pytest.raises(ConfigError, match=r"label_column=gold: expected a column of the data, which has silver"):
        ask("http://h/", asked(1, silver=["x"]), form="slime", label_column="gold")
    with pytest.raises(ConfigError, match="rename column 'ended'"):
        ask("http://h/", asked(1, ended=["x"]))


def test_values_of_a_data_file_become_json() -> None:
    values = [
        Decimal("1.50"),
        b"a\xff",
        datetime.datetime(2026, 1, 2, 3),
        datetime.time(4),
        float("nan"),
        (1, {2: b"x"}),
    ]
    expected = ["1.50", "a\ufffd", "2026-01-02T03:00:00", "04:00:00", None, [1, {"2": "x"}]]
    assert [as_json(value) for value in values] == expected


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(JSON)
def test_json_stays_as_it_is(value: Any) -> None:
    assert as_json(value) == value
    assert json.loads(json.dumps(as_json(value))) == value
