"""Each format gives the same texts as the one that it stands for, and says what a row lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlxf.assembly.data import open_prompts
from rlxf.config.roles import ActorConfig
from rlxf.core.errors import DataError
from rlxf.data.fields import BadRow
from rlxf.data.formats import Task, find_layout
from tests.data_world import chat_tokenizer, recipe, write_rows

Row = dict[str, Any]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


def taken(row: Row, task: Task, **actor: Any) -> Any:
    layout = find_layout(row, ActorConfig(model="tiny", **actor), task)
    return {"prompt": layout.prompt, "pair": layout.pair, "example": layout.example}[task](row)


ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]], "system": "Be brief."}
ALPACA_PROMPT = [system("Be brief."), user("Hi"), assistant("Hello"), user("Add.\n1 2")]
SHAREGPT = {"conversations": [turn("human", "a"), turn("gpt", "b"), turn("human", "c")], "system": "s"}
SHAREGPT_PROMPT = [system("s"), user("a"), assistant("b"), user("c")]

PROMPTS: dict[str, tuple[Row, Any]] = {
    "string": ({"prompt": "p", "answer": "x"}, "p"),
    "chat": ({"prompt": [system("s"), user("u")]}, [system("s"), user("u")]),
    "messages": (
        {"messages": [user("u"), assistant("a"), user("v"), assistant("b")]},
        [user("u"), assistant("a"), user("v")],
    ),
    "messages without an answer": ({"messages": [system("s"), user("u")]}, [system("s"), user("u")]),
    "completion": ({"prompt": "p", "completion": "c"}, "p"),
    "pair": ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p"),
    "pair of chats beside a string": (
        {"prompt": "u", "chosen": [user("u"), assistant("a")], "rejected": [user("u"), assistant("b")]},
        "u",
    ),
    "implicit strings": ({"chosen": "Q: x A: one", "rejected": "Q: x A: two"}, "Q: x A:"),
    "implicit chats": ({"chosen": [user("u"), assistant("a")], "rejected": [user("u"), assistant("b")]}, [user("u")]),
    "alpaca": (ALPACA, ALPACA_PROMPT),
    "alpaca, least": ({"instruction": "Hi.", "output": ""}, [user("Hi.")]),
    "alpaca, nulls": ({"instruction": "Hi.", "input": None, "history": None, "system": ""}, [user("Hi.")]),
    "sharegpt": (SHAREGPT, SHAREGPT_PROMPT),
    "sharegpt with an answer": ({"conversations": [turn("user", "a"), turn("assistant", "b")]}, [user("a")]),
    "sharegpt, system as a turn": (
        {"conversations": [turn("system", "s"), turn("human", "a")]},
        [system("s"), user("a")],
    ),
    "sharegpt, tools": (
        {"conversations": [turn("human", "a"), turn("function_call", "f()"), turn("observation", "1")]},
        [user("a"), assistant("f()"), {"role": "tool", "content": "1"}],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "prompt"), PROMPTS.values(), ids=PROMPTS.keys())
def test_the_prompt_of_every_format(row: Row, prompt: Any) -> None:
    assert taken(row, "prompt") == prompt


CHAT_SIDES = ([assistant("yes")], [assistant("no")])
PAIRS: dict[str, tuple[Row, Any]] = {
    "strings": ({"prompt": "p", "chosen": "c", "rejected": "r"}, ("p", "c", "r")),
    "implicit strings": (
        {"chosen": "Q: x A: one", "rejected": "Q: x A: two"},
        ("Q: x A:", " one", " two"),
    ),
    "implicit chats": (
        {"chosen": [user("u"), *CHAT_SIDES[0]], "rejected": [user("u"), *CHAT_SIDES[1]]},
        ([user("u")], *CHAT_SIDES),
    ),
    "chats that repeat a prompt given as a string": (
        {"prompt": "u", "chosen": [user("u"), *CHAT_SIDES[0]], "rejected": [user("u"), *CHAT_SIDES[1]]},
        ([user("u")], *CHAT_SIDES),
    ),
    "null prompt": (
        {"prompt": None, "chosen": [user("u"), *CHAT_SIDES[0]], "rejected": [user("u"), *CHAT_SIDES[1]]},
        ([user("u")], *CHAT_SIDES),
    ),
    "alpaca": (ALPACA | {"chosen": "yes", "rejected": "no"}, (ALPACA_PROMPT, *CHAT_SIDES)),
    "alpaca, both in the output": ({"instruction": "u", "output": ["yes", "no"]}, ([user("u")], *CHAT_SIDES)),
    "sharegpt": (
        SHAREGPT | {"chosen": turn("gpt", "yes"), "rejected": turn("gpt", "no")},
        (SHAREGPT_PROMPT, *CHAT_SIDES),
    ),
    "sharegpt, answers as texts": (SHAREGPT | {"chosen": "yes", "rejected": "no"}, (SHAREGPT_PROMPT, *CHAT_SIDES)),
}


@pytest.mark.parametrize(("row", "pair"), PAIRS.values(), ids=PAIRS.keys())
def test_the_pair_of_every_format(row: Row, pair: Any) -> None:
    assert taken(row, "pair") == pair


EXAMPLES: dict[str, tuple[Row, Any]] = {
    "strings": ({"prompt": "p", "completion": "c"}, ("p", "c")),
    "chats": ({"prompt": [user("u")], "completion": [assistant("a")]}, ([user("u")], [assistant("a")])),
    "messages": (
        {"messages": [system("s"), user("u"), assistant("a"), user("v"), assistant("b")]},
        ([system("s"), user("u")], [assistant("a"), user("v"), assistant("b")]),
    ),
    "messages beside a prompt": (
        {"prompt": "u", "messages": [user("u"), assistant("a")]},
        ([user("u")], [assistant("a")]),
    ),
    "alpaca": (ALPACA, (ALPACA_PROMPT[:2], [*ALPACA_PROMPT[2:], assistant("3")])),
    "sharegpt": (
        {"conversations": [*SHAREGPT["conversations"], turn("gpt", "d")]},
        ([user("a")], [assistant("b"), user("c"), assistant("d")]),
    ),
}


@pytest.mark.parametrize(("row", "example"), EXAMPLES.values(), ids=EXAMPLES.keys())
def test_the_example_of_every_format(row: Row, example: Any) -> None:
    assert taken(row, "example") == example


BAD: dict[str, tuple[Task, Row, str]] = {
    "one conversation for two": (
        "pair",
        {"messages": [user("u")]},
        "field 'chosen' is missing; the row has: 'messages'",
    ),
    "messages of text": ("prompt", {"messages": "hi"}, "expected a list of chat messages, got a string ('hi')"),
    "answers only": ("prompt", {"messages": [assistant("a")]}, "holds nothing but answers of the assistant"),
    "no answer": ("example", {"messages": [user("u")]}, "no message with role 'assistant'"),
    "answer first": ("example", {"messages": [assistant("a")]}, "begins with the assistant"),
    "no completion": ("example", {"prompt": "p"}, "field 'completion' is missing; the row has: 'prompt'"),
    "completion of another kind": (
        "example",
        {"prompt": "p", "completion": [assistant("a")]},
        "the two texts of a row must be of one kind, but prompt is a string, completion is chat messages",
    ),
    "completion without an answer": (
        "example",
        {"prompt": [user("u")], "completion": [user("v")]},
        "no message with role 'assistant'",
    ),
    "strings without a common start": ("pair", {"chosen": "a", "rejected": "b"}, "no common prompt"),
    "one string is the start of the other": (
        "pair",
        {"chosen": "Q: x", "rejected": "Q: x y"},
        "the chosen text holds nothing beyond the prompt",
    ),
    "implicit, two kinds": ("pair", {"chosen": "a", "rejected": [user("u")]}, "field 'prompt' is missing"),
    "alpaca without an output": ("example", {"instruction": "u"}, "field 'output' is missing"),
    "alpaca with an empty output": ("example", {"instruction": "u", "output": ""}, "field 'output' is empty"),
    "alpaca, nothing asked": ("prompt", {"instruction": " ", "input": ""}, "field 'instruction' is empty"),
    "alpaca, a number": ("prompt", {"instruction": 5}, "field 'instruction': expected a string, got a number (5)"),
    "alpaca, system of another kind": ("prompt", {"instruction": "u", "system": 1}, "'system': expected a string"),
    "alpaca, flat history": (
        "prompt",
        {"instruction": "u", "history": ["a"]},
        "expected [question, answer] in the list, got a string ('a')",
    ),
    "alpaca, history of another kind": (
        "prompt",
        {"instruction": "u", "history": "a"},
        "expected a list of [question, answer]",
    ),
    "alpaca, three outputs": ("pair", {"instruction": "u", "output": ["a", "b", "c"]}, "field 'chosen' is missing"),
    "sharegpt, no turns": ("prompt", {"conversations": []}, "field 'conversations' is an empty list"),
    "sharegpt, messages": ("prompt", {"conversations": [user("u")]}, "expected objects with 'from' and 'value'"),
    "sharegpt, unknown speaker": (
        "prompt",
        {"conversations": [turn("bing", "x")]},
        "'from' is a string ('bing'); known: human, user, gpt",
    ),
    "sharegpt, null": ("prompt", {"conversations": [{"from": "human", "value": None}]}, "'content' must be a string"),
    "sharegpt, no answers": ("pair", SHAREGPT, "field 'chosen' is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("task", "row", "reason"), BAD.values(), ids=BAD.keys())
def test_what_a_row_lacks_is_said(task: Task, row: Row, reason: str) -> None:
    with pytest.raises(BadRow) as raised:
        taken(row, task)
    assert reason in str(raised.value)


def test_a_format_can_be_forced() -> None:
    row = {"prompt": "p", "instruction": "i"}
    assert taken(row, "prompt") == "p"
    assert taken(row, "prompt", data_format="alpaca") == [user("i")]


def test_map_keys_of_the_seed_documents() -> None:
    prompts = '{"prompt":"prompt","query":"","response":"prompt","system":""}'
    assert taken({"prompt": "p", "input": "not this"}, "prompt", map_keys=prompts) == [user("p")]
    pairs = '{"prompt":"question","query":"","system":"system"}'
    orca = {"system": "s", "question": "q", "chosen": "yes", "rejected": "no"}
    assert taken(orca, "pair", map_keys=pairs) == ([system("s"), user("q")], *CHAT_SIDES)


def test_map_keys_name_the_columns_of_sharegpt() -> None:
    row = {"talk": [turn("human", "a")], "good": turn("gpt", "yes"), "bad": turn("gpt", "no")}
    keys = {"prompt": "talk", "chosen": "good", "rejected": "bad"}
    assert taken(row, "pair", map_keys=keys) == ([user("a")], *CHAT_SIDES)


def test_a_mapped_column_that_no_row_has_is_named_with_those_that_exist(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"question": "q"}])
    actor = {"model": "tiny", "data_path": str(path), "map_keys": {"prompt": "question", "system": "sys"}}
    with pytest.raises(DataError, match=r"map_keys\.system = 'sys': no such column; it has: question"):
        open_prompts(recipe(actor_rollout=actor), chat_tokenizer())


def test_the_columns_that_are_not_in_the_prompt_reach_reward_functions(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [ALPACA, ALPACA | {"input": "2 2", "output": "4", "level": 1}])
    actor = {"model": "tiny", "data_path": str(path), "no_shuffle": True, "max_prompt_length": 128}
    config = recipe(actor_rollout=actor, training={"stage": "ray_online_dpo", "global_batch_size": 2})
    batch = open_prompts(config, chat_tokenizer()).next_batch(0)
    assert batch.columns == {"output": ["3", "4"], "level": [None, 1]}


def test_the_first_row_that_can_be_read_decides_the_format(tmp_path: Path) -> None:
    rows = [{}, {"prompt": "p"}, {"instruction": "i"}]
    actor = {"model": "tiny", "data_path": str(write_rows(tmp_path / "a.jsonl", rows)), "max_bad_rows": 2}
    source = open_prompts(recipe(actor_rollout=actor), chat_tokenizer())
    assert source.num_dropped == 2
    assert set(source.next_batch(0).texts) == {"p"}
