"""scripts/compare_models.py with a judge: verdicts, orders, and the files of benchmarks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlxf.core.errors import DataError
from rlxf.tools.compare.formats import Answered, Question, read_questions, write_benchmark
from tests.http_world import Exchange, Service
from tests.runs.small import World, make_world
from tests.unit.judge.test_llm import completion
from tests.unit.tools.compare.test_compare_models import LIKED, main, options, results, teach

__all__ = ["main"]  # a fixture

JUDGE = f"""
def judge(prompts, first, second, **columns):
    counts = [(one.count({LIKED!r}), two.count({LIKED!r})) for one, two in zip(first, second)]
    return [0.5 if one == two else float(one > two) for one, two in counts]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    made = make_world(folder)
    (folder / "judge.py").write_text(JUDGE)
    (folder / "first.py").write_text("def judge(prompts, **others):\n    return [1.0] * len(prompts)\n")
    teach(folder / "policy", folder / "better")
    return made


def judged(world: World, out: Path | None = None, **changes: object) -> list[object]:
    judge = {"reward_function": None, "judge_function": world.folder / "judge.py"}
    return options(world, out, **{**judge, **changes})


def test_the_judge_decides_and_swapping_the_models_gives_one_minus_that(
    main: Callable[..., int], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, better = world.folder / "policy", world.folder / "better"
    assert main(better, policy, *judged(world, tmp_path / "ab")) == 0
    table = capsys.readouterr().out
    assert main(policy, better, *judged(world, tmp_path / "ba")) == 0
    (one, rows), (two, _) = results(tmp_path / "ab"), results(tmp_path / "ba")
    assert one["rate"] > 0.9
    assert one["rate"] == 1 - two["rate"]
    assert one["judge"]["position_flip"] == 0
    assert one["a"]["score"] is None
    assert "same verdict in both orders" in table
    assert "mean score" not in table
    for row in rows:
        counts = row["a"].count(LIKED), row["b"].count(LIKED)
        assert row["winner"] == ("tie" if counts[0] == counts[1] else "a" if counts[0] > counts[1] else "b")
        assert row["asked_a_first"] == row["asked_b_first"] == row["a_better"]
        assert "score_a" not in row


def test_a_judge_that_prefers_the_first_answer_is_told(
    main: Callable[..., int], world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, better = world.folder / "policy", world.folder / "better"
    assert main(better, policy, *judged(world, tmp_path, judge_function=world.folder / "first.py")) == 0
    numbers, _ = results(tmp_path)
    assert (numbers["rate"], numbers["judge"]["position_flip"]) == (0.5, 1.0)
    assert "0.000" in next(line for line in capsys.readouterr().out.splitlines() if "same verdict" in line)


def arena(exchange: Exchange) -> None:
    """A judge that likes what the small world likes."""
    text = exchange.body["messages"][0]["content"]
    one, two = (
        text.split(f"=== answer of assistant {side} ===\n")[1].split("\n=== end")[0].count(LIKED) for side in "AB"
    )
    exchange.json(completion(f"[[{'A=B' if one == two else 'A>>B' if one > two else 'B>A'}]]"))


def test_alpaca_evals_questions_and_files(main: Callable[..., int], world: World, tmp_path: Path) -> None:
    questions = [
        {"instruction": f"say {word}", "dataset": "d", "output": "x", "generator": "y"}
        for word in ("one", "two", "six")
    ]
    (tmp_path / "alpaca_eval.json").write_text(json.dumps(questions))
    with Service(arena) as server:
        asked: dict[str, object] = {
            "data": tmp_path / "alpaca_eval.json", "format": "alpaca_eval", "judge_function": None,
            "judge_url": server.url.removesuffix("/score"), "judge_model": "big/judge", "judge_set": "answer=arena",
            "max_prompt_length": 100,
        }  # fmt: skip
        arguments = judged(world, tmp_path / "out", **asked)
        assert main(world.folder / "better", world.folder / "policy", *arguments) == 0
        count = len(server.bodies)
        for name in ("pairs.jsonl", "summary.json"):
            (tmp_path / "out" / name).unlink()
        assert main(world.folder / "better", world.folder / "policy", *arguments) == 0
        assert len(server.bodies) == count  # the folder holds the verdicts
    numbers, rows = results(tmp_path / "out")
    assert numbers["prompts"] == 3
    outputs = json.loads((tmp_path / "out" / "outputs_better.json").read_text())
    assert outputs == [
        {"dataset": "d", "instruction": q["instruction"], "output": row["a"], "generator": "better"}
        for q, row in zip(questions, rows, strict=True)
    ]
    annotations = json.loads((tmp_path / "out" / "annotations.json").read_text())
    for found, row in zip(annotations, rows, strict=True):
        assert (found["output_1"], found["output_2"]) == (row["b"], row["a"])
        assert (found["generator_1"], found["generator_2"], found["annotator"]) == ("policy", "better", "big_judge")
        assert found["preference"] == pytest.approx(1 + row["a_better"])


def answered(questions: list[Question]) -> Answered:
    return Answered(
        questions=questions,
        answers=(["a0", "a1", "a2"], ["b0", "b1", "b2"]),
        names=("mine", "base"),
        judge="j",
        probability=torch.tensor([0.875, math.nan, 0.5]),
        as_asked=torch.tensor([1.0, 0.25, 0.5]),
        swapped=torch.tensor([0.75, math.nan, 0.5]),
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_arena_hards_questions_and_files(tmp_path: Path) -> None:
    file = tmp_path / "question.jsonl"
    rows = [
        {"uid": "u0", "category": "hard_prompt", "prompt": "p0"},
        {"question_id": "q1", "turns": [{"content": "p1"}]},
        {"question_id": 2, "turns": ["p2", "and then"]},
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    questions = read_questions(file, "arena_hard")
    assert [question.prompt for question in questions] == ["p0", "p1", "p2"]
    write_benchmark(tmp_path, "arena_hard", answered(questions))
    answers = lines(tmp_path / "model_answer" / "mine.jsonl")
    assert [row["question_id"] for row in answers] == ["u0", "q1", "2"]
    assert answers[1]["choices"] == [{"index": 0, "turns": [{"content": "a1"}]}]
    assert answers[1]["model_id"] == "mine"
    assert {"answer_id", "tstamp"} <= answers[0].keys()
    assert len(lines(tmp_path / "model_answer" / "base.jsonl")) == 3
    judgments = lines(tmp_path / "model_judgment" / "j" / "mine.jsonl")
    # The baseline is A in the first game: 0.75 for our model is B>A there.
    assert [[game["score"] for game in row["games"]] for row in judgments] == [
        ["B>A", "A>>B"],
        [None, "B>A"],
        ["A=B", "A=B"],
    ]


def test_a_missing_verdict_is_null_in_annotations(tmp_path: Path) -> None:
    file = tmp_path / "questions.json"
    file.write_text(json.dumps([{"instruction": "a", "input": "b"}, {"instruction": "c"}, {"instruction": "d"}]))
    questions = read_questions(file, "alpaca_eval")
    assert questions[0].prompt == "a\n\nb"
    write_benchmark(tmp_path, "alpaca_eval", answered(questions))
    found = json.loads((tmp_path / "annotations.json").read_text())
    assert [row["preference"] for row in found] == [1.875, None, 1.5]


@pytest.mark.parametrize(
    ("content", "form", "says"),
    [
        ("[]", "alpaca_eval", "holds no questions"),
        ("[{]", "alpaca_eval", "expected a JSON list, or one JSON object per line"),
        ('[{"prompt": "a"}]', "alpaca_eval", "question 0 has no instruction"),
        ('{"uid": "1", "prompt": "a"}\n{"prompt": "a"}', "arena_hard", "question 1 has no question_id or uid"),
        ('{"uid": "1", "turns": []}', "arena_hard", "question 0 has no question_id or uid, and prompt or turns"),
        ("[3]", "arena_hard", "question 0 has no"),
    ],
)
def test_questions_of_another_form_are_refused(tmp_path: Path, content: str, form: Any, says: str) -> None:
    file = tmp_path / "questions.json"
    file.write_text(content)
    with pytest.raises(DataError, match=says):
        read_questions(file, form)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"judge_model": "m"}, "--judge-model needs --judge-url"),
        ({"judge_function": None, "reward_function": "f.py", "judge_set": "a=1"}, "--judge-set needs --judge-function"),
        ({"judge_function": None, "reward_function": "f.py", "format": "alpaca_eval"}, "alpaca_eval needs a judge"),
        ({"missing_eos_penalty": 1}, "--missing-eos-penalty needs a reward"),
        ({"format": "mt_bench"}, "--format: invalid choice"),
    ],
)
def test_a_wrong_flag_is_one_clear_line(
    main: Callable[..., int], world: World, capsys: pytest.CaptureFixture[str], changes: dict[str, object], says: str
) -> None:
    policy = world.folder / "policy"
    with pytest.raises(SystemExit) as caught:
        main(policy, policy, *judged(world, **changes))
    assert caught.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"judge_set": "tournamnt=all"}, "judge.tournamnt = all: unknown key"),
        ({"judge_set": "max_calls=0"}, "judge.max_calls = 0: expected at least 1"),
        ({"judge_set": "both_orders"}, "--judge-set both_orders: expected a key of the section judge"),
        ({"judge_set": "x={"}, "--judge-set x={: the value cannot be read"),
        ({"judge_set": "max_calls=5"}, "judge.max_calls = 5: nothing reads it without judge.base_url"),
        ({"judge_function": "nowhere.py"}, "judge.function=nowhere.py: no such file"),
        ({"judge_function": None, "judge_load": "nowhere"}, "nowhere"),
        ({"judge_function": None, "judge_url": "http://127.0.0.1:1"}, "judge.model is required"),
    ],
)
def test_a_wrong_judge_is_one_line_and_writes_nothing(
    main: Callable[..., int],
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    says: str,
) -> None:
    policy = world.folder / "policy"
    assert main(policy, policy, *judged(world, tmp_path / "out", **changes)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error.replace('"', "")
    assert not (tmp_path / "out").exists()
