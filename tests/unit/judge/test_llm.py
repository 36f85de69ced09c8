"""A judge behind an OpenAI-compatible endpoint: what it is sent, what servers do wrong, what it may cost."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest

from rlxf.config.judge import JudgeConfig
from rlxf.core.errors import ConfigError
from rlxf.judge import JudgeParts, build_judging
from rlxf.judge.llm import completions_url
from tests.http_world import Behaviour, Exchange, Service, answer, cut, drip, hang_up, late, no_service, status, text


def completion(content: object = '{"first": 0.9}', tokens: tuple[int, int] | None = (100, 10)) -> dict[str, Any]:
    usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]} if tokens else {}
    choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    return {"object": "chat.completion", "choices": [choice], **({"usage": usage} if tokens else {})}


GOOD = answer(completion())


def first_is_longer(exchange: Exchange) -> None:
    """A judge that reads the answers."""
    content = exchange.body["messages"][0]["content"]
    first = content.split("=== first answer ===\n")[1].split("\n=== end of first answer")[0]
    second = content.split("=== second answer ===\n")[1].split("\n=== end of second answer")[0]
    exchange.json(completion(json.dumps({"first": 1.0 if len(first) > len(second) else 0.0})))


def config(url: str, **changes: object) -> JudgeConfig:
    values = {"base_url": url.removesuffix("/score"), "model": "m", "tries": 1, "timeout_s": 5.0, **changes}
    return JudgeConfig.model_validate(values)


def ask(
    config: JudgeConfig, *questions: tuple[str, str, str], folder: Path | None = None
) -> tuple[list[float], dict[str, float]]:
    """Probabilities and metrics of questions."""
    judging = build_judging(JudgeParts(config=config), None if folder is None else folder / "verdicts.jsonl")
    prompts, first, second = ([question[i] for question in questions] for i in range(3))
    found = judging._asking.compare(prompts, first, second, {})
    return found.probability.tolist(), judging.metrics(found.counts)


QUESTIONS = [("p", "aaa", "b"), ("q", "c", "dd")]


def test_both_orders_go_to_the_server_in_its_form() -> None:
    with Service(first_is_longer) as server:
        found, metrics = ask(config(server.url, options={"top_p": 0.5, "max_tokens": None}), *QUESTIONS)
    assert found == [1.0, 0.0]
    assert len(server.bodies) == 4
    assert server.bodies[0].keys() == {"model", "messages", "temperature", "top_p"}
    assert (server.bodies[0]["model"], server.bodies[0]["temperature"]) == ("m", 0.0)
    assert metrics == {
        "judge/asked": 4, "judge/cached": 0, "judge/missing": 0, "judge/ties": 0, "judge/position_flip": 0,
        "judge/calls": 4, "judge/prompt_tokens": 400, "judge/completion_tokens": 40, "judge/cost": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("http://h:1", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
        ("https://h/openai/v2", "https://h/openai/v2/chat/completions"),
        ("https://h/v1/chat/completions", "https://h/v1/chat/completions"),
    ],
)
def test_the_address_may_be_written_in_several_ways(base: str, url: str) -> None:
    assert completions_url(base) == url


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        (status(500, "broken"), "answered 500"),
        (status(429), "answered 429"),
        (status(401), "it wants a token, so set token_env"),
        (status(302, Location="http://elsewhere/"), "redirects are not followed"),
        (late(5.0, GOOD), "no complete answer within 0.3 s"),
        (drip, "no complete answer within 0.3 s"),
        (cut, "the connection was cut"),
        (hang_up, "the connection was cut"),
        (text("<html>busy</html>", Content_Type="text/html"), "the answer is no JSON: <html>busy"),
        (text('{"choices": [{"mess'), "the answer is no JSON"),
        (text('{"choices": NaN}'), "NaN, which is no JSON"),
        (text("[" * 100_000), "the answer is no JSON"),
        (text("x" * 2**21), "larger than 1,048,576 bytes"),
        (answer({"choices": []}), "no choices[0].message.content"),
        (answer([1, 2]), "no choices[0].message.content"),
        (answer(completion(None)), "no choices[0].message.content"),
        (answer(completion("Both are fine, I would say.")), "no verdict of judge.answer = json: 'Both are fine"),
        (answer(completion('{"first": NaN}')), "no verdict of judge.answer = json"),
        (answer(completion('{"first": 7}')), "no verdict of judge.answer = json"),
        (answer(completion('{"first": 0.9')), "no verdict of judge.answer = json"),
        (answer(completion("")), "no verdict of judge.answer = json"),
    ],
)
def test_what_a_server_does_wrong_is_a_missing_verdict_and_one_line(
    behaviour: Behaviour, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Service(behaviour) as server:
        found, metrics = ask(config(server.url, timeout_s=0.3, both_orders=False), ("p", "a", "b"))
    assert math.isnan(found[0])
    assert metrics["judge/missing"] == 1
    assert "judge/position_flip" not in metrics
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("rlxf.judge")]
    assert len(lines) == 1
    assert "1 of 1 questions have no verdict" in lines[0]
    assert says in lines[0]


def test_a_server_that_is_down_is_a_missing_verdict(caplog: pytest.LogCaptureFixture) -> None:
    found, _ = ask(config(no_service()), *QUESTIONS)
    assert [math.isnan(value) for value in found] == [True, True]
    assert "4 of 4 questions have no verdict" in caplog.text


def test_a_question_is_tried_again_after_a_500() -> None:
    with Service(status(500), GOOD) as server:
        found, metrics = ask(config(server.url, tries=2, both_orders=False), ("p", "a", "b"))
    assert found == [pytest.approx(0.9)]
    assert (len(server.bodies), metrics["judge/calls"]) == (2, 1)


def test_a_second_run_makes_no_request(tmp_path: Path) -> None:
    with Service(first_is_longer) as server:
        first = ask(config(server.url), *QUESTIONS, folder=tmp_path)
        again, metrics = ask(config(server.url), *QUESTIONS, folder=tmp_path)
        assert len(server.bodies) == 4
        assert again == first[0]
        assert (metrics["judge/asked"], metrics["judge/cached"], metrics["judge/calls"]) == (0, 4, 0)
        ask(config(server.url, temperature=0.5), *QUESTIONS, folder=tmp_path)  # another judge
        assert len(server.bodies) == 8


def test_prose_is_paid_for_once_and_a_failure_is_asked_again(tmp_path: Path) -> None:
    with Service(answer(completion("hm")), status(500), GOOD) as server:
        settings = config(server.url, both_orders=False, concurrency=1)
        ask(settings, ("p", "a", "b"), ("q", "c", "d"), folder=tmp_path)
        found, metrics = ask(settings, ("p", "a", "b"), ("q", "c", "d"), folder=tmp_path)
    assert math.isnan(found[0])
    assert found[1] == pytest.approx(0.9)
    assert (metrics["judge/asked"], metrics["judge/cached"]) == (1, 1)


def test_the_replies_that_came_are_on_disk_when_the_run_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlxf.judge.verdicts import VerdictStore

    add = VerdictStore.add

    def interrupted(self: VerdictStore, verdicts: Any) -> None:
        add(self, verdicts)
        if len(self) == 2:
            raise KeyboardInterrupt

    questions = [(f"p{i}", "aaa", "b") for i in range(5)]
    with Service(first_is_longer) as server:
        settings = config(server.url, both_orders=False, concurrency=1)
        with monkeypatch.context() as patch:
            patch.setattr(VerdictStore, "add", interrupted)
            with pytest.raises(KeyboardInterrupt):
                ask(settings, *questions, folder=tmp_path)
        _, metrics = ask(settings, *questions, folder=tmp_path)
    assert (metrics["judge/asked"], metrics["judge/cached"]) == (3, 2)


def test_over_the_number_of_calls_nothing_more_is_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    questions = [(f"p{i}", "aaa", "b") for i in range(5)]
    with Service(first_is_longer) as server:
        settings = config(server.url, both_orders=False, max_calls=3)
        found, metrics = ask(settings, *questions, folder=tmp_path)
        assert [math.isnan(value) for value in found] == [False] * 3 + [True] * 2
        assert (metrics["judge/calls"], metrics["judge/missing"], len(server.bodies)) == (3, 2, 3)
        again, _ = ask(settings, *questions, folder=tmp_path)  # the budget is the run's
        assert len(server.bodies) == 3
        assert again[:3] == found[:3]
        more, _ = ask(config(server.url, both_orders=False, max_calls=4), *questions, folder=tmp_path)
        assert sum(math.isnan(value) for value in more) == 1
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 3  # one a run
    assert "judge.max_calls = 3 is used up (3 calls" in warnings[0].getMessage()


def test_over_the_cost_nothing_more_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    questions = [(f"p{i}", "aaa", "b") for i in range(9)]
    prices = {"prompt_price": 1e4, "completion_price": 1e5}  # 100 and 10 tokens: 2 a call
    with Service(GOOD) as server:
        settings = config(server.url, both_orders=False, max_cost=5.0, concurrency=2, **prices)
        _, metrics = ask(settings, *questions)
    assert (metrics["judge/calls"], metrics["judge/cost"]) == (4, pytest.approx(8.0))
    assert metrics["judge/missing"] == 5
    assert caplog.text.count("judge.max_cost = 5 is used up") == 1


def test_a_reply_without_usage_counts_as_a_call() -> None:
    with Service(answer(completion(tokens=None))) as server:
        _, metrics = ask(config(server.url, both_orders=False), ("p", "a", "b"))
    assert (metrics["judge/calls"], metrics["judge/prompt_tokens"]) == (1, 0)


def test_placeholders_inside_answers_are_not_filled() -> None:
    with Service(GOOD) as server:
        ask(config(server.url, both_orders=False), ("the prompt", "ignore that {second} {prompt}", "{first}"))
    content = server.bodies[0]["messages"][0]["content"]
    assert "\nignore that {second} {prompt}\n" in content
    assert "\n{first}\n" in content
    assert content.count("the prompt\n") == 1


def test_a_template_of_ones_own_and_the_form_of_the_arena(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text('P {prompt} 1 {first} 2 {second} {"winner": "?"} {other}')
    with Service(answer(completion("so [[B>A]]"))) as server:
        settings = config(server.url, both_orders=False, template=str(tmp_path / "mine.txt"), answer="arena")
        assert ask(settings, ("p", "a", "b"))[0] == [0.25]
        assert server.bodies[0]["messages"][0]["content"] == 'P p 1 a 2 b {"winner": "?"} {other}'
        ask(config(server.url, both_orders=False, answer="arena"), ("p", "a", "b"))
        assert "=== answer of assistant A ===\na\n" in server.bodies[1]["messages"][0]["content"]


def test_the_token_is_sent_and_never_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("MY_TOKEN", "canary-123")
    with Service(status(401, "bad token canary-123"), GOOD) as server:
        settings = config(server.url, token_env="MY_TOKEN", both_orders=False, concurrency=1)
        ask(settings, ("p", "a", "b"), ("q", "a", "b"), folder=tmp_path)
    assert server.headers[0]["Authorization"] == "Bearer canary-123"
    assert "it does not take the token of MY_TOKEN" in caplog.text
    assert "canary" not in caplog.text + (tmp_path / "verdicts.jsonl").read_text()


def test_requests_are_under_way_together_up_to_the_limit() -> None:
    with Service(late(0.1, GOOD)) as server:
        ask(config(server.url, concurrency=3), *[(f"p{i}", "aaa", "b") for i in range(6)])
    assert server.most_busy == 3


def test_an_address_that_is_refused_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"judge\.base_url = http://169\.254\.169\.254: .*link-local"):
        ask(config("http://169.254.169.254"), ("p", "a", "b"))
