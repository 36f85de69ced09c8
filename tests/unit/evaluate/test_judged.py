"""Evaluations by a judge: win rates of texts, against the initial policy, the last evaluation and reference answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlxf.assembly.build_run import evaluation_settings
from rlxf.core.errors import DataError
from rlxf.core.types import PromptBatch, Text, Tokens
from rlxf.evaluate import EvalBackends, Evaluation
from rlxf.evaluate.user import BUILT_IN
from rlxf.judge.both_orders import BothOrders
from rlxf.judge.judged import Judging
from rlxf.judge.verdicts import VerdictStore, judge_digest
from tests.judge_world import RuleJudge
from tests.tiny_models import byte_tokenizer
from tests.unit.evaluate.test_evaluate import NUM_PROMPTS, learn, small
from tests.unit.small_run import EOS, LIKED, SmallRun, TokenCounter

SAID = byte_tokenizer().decode([LIKED])  # the text of the token that the policy learns to like


def likes(prompt: Text, first: str, second: str) -> float:
    """More of the liked token is better."""
    difference = first.count(SAID) - second.count(SAID)
    return 0.5 if not difference else 1.0 if difference > 0 else 0.0


def judging(judge: RuleJudge, folder: Path | None = None) -> Judging:
    store = VerdictStore(folder / "verdicts.jsonl", judge_digest(judge.identity)) if folder is not None else None
    return Judging(BothOrders(judge, store), tournament="knockout")


def evaluation(run: SmallRun, judge: Judging | None, *, scores: bool = False, columns: Any = None) -> Evaluation:
    prompts = PromptBatch(
        prompts=Tokens.from_rows([[2, 2 + i % 4] for i in range(NUM_PROMPTS)]),
        row_ids=torch.arange(NUM_PROMPTS),
        positions=torch.arange(NUM_PROMPTS),
        texts=tuple(f"prompt {i}" for i in range(NUM_PROMPTS)),
        columns=columns or {},
    )
    rooms = EvalBackends(
        rollout=run.engine,
        scorer=TokenCounter([]) if scores else None,
        actor=run.actor,
        reference=run.reference,
        judge=judge,
    )
    return Evaluation(evaluation_settings(run.run.config, (EOS,)), prompts, rooms, tokenizer=byte_tokenizer())


def test_a_judge_alone_gives_win_rates_and_no_reward() -> None:
    run = small(training__train_iters=9)
    evaluate = evaluation(run, judging(RuleJudge(likes)))
    first = evaluate(0)
    assert not [name for name in first if "reward" in name]
    assert first["eval/greedy_win_rate"] == 0.5
    assert first["eval/win_rate"] == pytest.approx(0.5, abs=0.15)
    for version in (1, 2, 3):
        learn(run, version)
    after = evaluate(2)
    assert after["eval/win_rate"] > 0.8
    assert after["eval/win_rate_previous"] > 0.8
    assert after["eval/greedy_win_rate"] == 1.0
    assert 0 < after["eval/win_rate_se"] < 0.1
    assert after["eval/judge/position_flip"] == 0
    assert after["eval/judge/asked"] > 0
    assert "eval/kl" in after


def test_with_scores_and_a_judge_the_judge_decides_who_wins() -> None:
    run = small()
    opposite = judging(RuleJudge(lambda prompt, first, second: 1 - likes(prompt, first, second)))
    evaluate = evaluation(run, opposite, scores=True)
    before = evaluate(0)
    for version in (1, 2, 3):
        learn(run, version)
    after = evaluate(2)
    assert after["eval/reward"] > before["eval/reward"] + 1
    assert after["eval/win_rate"] < 0.2


def test_the_win_rate_counts_ties_half_and_leaves_out_what_is_missing() -> None:
    def rule(prompt: Text, first: str, second: str) -> float:
        number = int(str(prompt).split()[1])
        return [0.5, float("nan"), likes(prompt, first, second), 0.5][number % 4]

    run = small(eval__greedy=False)
    metrics = evaluation(run, judging(RuleJudge(rule)))(0)
    assert metrics["eval/judge/missing"] > 0
    assert metrics["eval/judge/ties"] >= NUM_PROMPTS / 2


def test_all_names_belong_to_the_evaluation() -> None:
    run = small()
    metrics = evaluation(run, judging(RuleJudge(likes)), scores=True, columns={"good": ["x"] * NUM_PROMPTS})(0)
    assert {name.removeprefix("eval/") for name in metrics} <= BUILT_IN | {"distinct"}


@pytest.mark.parametrize("kind", ["column", "messages"])
def test_reference_answers_of_a_column(kind: str) -> None:
    run = small(training__train_iters=9, eval__reference_column="good")
    answers: list[Any] = [SAID * 3] * NUM_PROMPTS
    if kind == "messages":
        answers = [[{"role": "assistant", "content": text}] for text in answers]
    evaluate = evaluation(run, judging(RuleJudge(likes)), columns={"good": answers})
    before = evaluate(0)
    assert before["eval/win_rate_reference"] < 0.5
    for version in (1, 2, 3):
        learn(run, version)
    after = evaluate(2)
    assert after["eval/win_rate_reference"] > 0.8
    assert after["eval/greedy_win_rate_reference"] == 1.0
    assert after["eval/win_rate_reference_se"] > 0


def test_reference_answers_of_a_file_are_found_by_their_prompts(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    rows: list[dict[str, Any]] = [{"prompt": f"prompt {i}", "answer": f"answer {i}"} for i in range(NUM_PROMPTS)]
    rows[3] = {"instruction": [{"role": "user", "content": "prompt 3"}], "output": "answer 3"}
    file.write_text("\n".join(json.dumps(row) for row in reversed(rows)) + "\n")
    judge = RuleJudge(lambda prompt, first, second: 1.0 if "answer" in first else 0.0)
    run = small(eval__reference_answers=str(file))
    assert evaluation(run, judging(judge))(0)["eval/win_rate_reference"] == 0.0
    asked = {(prompt, first) for prompt, first, _ in judge.questions if first.startswith("answer")}
    assert asked == {(f"prompt {i}", f"answer {i}") for i in range(NUM_PROMPTS)}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"prompt": "prompt 0", "answer": "x"}], r"no answer to 63 of 64 evaluation prompts, such as 'prompt 1'"),
        ([{"prompt": "prompt 0"}], r"answers\.jsonl:1: expected the answer"),
        ([{"answer": "x"}], r"answers\.jsonl:1: expected the prompt"),
        ([], "holds no rows"),
    ],
)
def test_reference_answers_that_are_missing_are_told_when_the_run_starts(
    tmp_path: Path, rows: list[dict[str, str]], says: str
) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=says):
        evaluation(small(eval__reference_answers=str(file)), judging(RuleJudge()))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"topic": ["a"] * NUM_PROMPTS}, "no such column; their further columns: topic"),
        ({"good": ["a"] * 5 + [None] * (NUM_PROMPTS - 5)}, "row 5 holds no answer"),
    ],
)
def test_a_column_without_answers_is_told(columns: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        evaluation(small(eval__reference_column="good"), judging(RuleJudge()), columns=columns)


def test_a_resumed_run_gives_the_same_numbers_and_asks_nothing_twice(tmp_path: Path) -> None:
    first, judge = small(), RuleJudge(likes)
    evaluate = evaluation(first, judging(judge, tmp_path))
    evaluate(0)
    learn(first, 1)
    evaluate(2)
    baseline = json.loads(json.dumps(evaluate.describe_baseline(), allow_nan=False))
    learn(first, 2)
    expected = evaluate(4)
    again, silent = small(), RuleJudge(likes)
    resumed = evaluation(again, judging(silent, tmp_path))
    resumed.restore(baseline)
    assert again.engine.samplings == []  # nothing is sampled anew
    again.engine.logits = first.engine.logits
    with torch.no_grad():
        again.actor.logits.copy_(first.actor.logits)
    found = resumed(4)
    counted = {"eval/judge/asked", "eval/judge/cached"}
    assert {name: found[name] for name in found.keys() - counted} == {
        name: expected[name] for name in expected.keys() - counted
    }
    assert silent.questions == []
    assert found["eval/judge/asked"] == 0


def test_a_checkpoint_of_a_run_without_a_judge_is_gone_on_with(caplog: pytest.LogCaptureFixture) -> None:
    first, again = small(), small()
    evaluate = evaluation(first, None, scores=True)
    evaluate(0)
    learn(first, 1)
    evaluate(2)
    found = evaluate.describe_baseline()
    assert found is not None
    assert "texts" not in found["previous"]
    resumed = evaluation(again, judging(RuleJudge(likes)), scores=True)
    resumed.restore(found)
    assert [sampling.temperature for sampling in again.engine.samplings] == [0.0]  # the greedy texts
    metrics = resumed(4)
    assert metrics["eval/win_rate"] == pytest.approx(0.5, abs=0.15)
    assert "eval/win_rate_previous" not in metrics
    assert "eval/win_rate_previous" in resumed(5)


def test_an_evaluation_alone_compares_with_reference_answers_only() -> None:
    run = small(training__eval_only=True, eval__reference_column="good")
    metrics = evaluation(run, judging(RuleJudge(likes)), columns={"good": [SAID] * NUM_PROMPTS})(0)
    rates = {name for name in metrics if "win_rate" in name and not name.endswith("_se")}
    assert rates == {"eval/win_rate_reference", "eval/greedy_win_rate_reference"}
