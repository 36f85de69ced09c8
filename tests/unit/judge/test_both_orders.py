"""Both orders, the memory of verdicts, and what is counted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.core.types import Text
from rlxf.judge.both_orders import BothOrders, Compared, Prices
from rlxf.judge.verdicts import Spent, VerdictStore, judge_digest
from tests.judge_world import RuleJudge, longer


def ask(asking: BothOrders, *questions: tuple[str, str, str], **columns: list[object]) -> Compared:
    prompts, first, second = ([question[i] for question in questions] for i in range(3))
    return asking.compare(prompts, first, second, columns)


def store(folder: Path, judge: RuleJudge) -> VerdictStore:
    return VerdictStore(folder / "verdicts.jsonl", judge_digest(judge.identity))


def test_both_orders_are_averaged() -> None:
    table = {("a", "b"): 0.9, ("b", "a"): 0.4}
    found = ask(BothOrders(RuleJudge(lambda prompt, one, two: table[one, two])), ("p", "a", "b"))
    assert found.probability.tolist() == pytest.approx([(0.9 + 1 - 0.4) / 2])
    assert found.as_asked.tolist() == pytest.approx([0.9])
    assert found.swapped.tolist() == pytest.approx([0.6])


def test_a_judge_that_always_prefers_the_first_answer_flips_and_ties() -> None:
    judge = RuleJudge(lambda prompt, one, two: 1.0)
    found = ask(BothOrders(judge), ("p", "a", "b"), ("p", "a", "c"))
    assert found.probability.tolist() == [0.5, 0.5]
    metrics = found.counts.metrics()
    assert metrics["judge/position_flip"] == 1.0
    assert metrics["judge/ties"] == 2
    alone = ask(BothOrders(judge, both=False), ("p", "a", "b"))
    assert alone.probability.tolist() == [1.0]
    assert "judge/position_flip" not in alone.counts.metrics()


def test_the_share_of_flips_is_that_of_verdicts_that_change() -> None:
    """A verdict is who wins: a probability that moves on one side of a half is no flip, a lost tie is one."""
    table = {("a", "b"): 0.9, ("b", "a"): 0.4, ("a", "c"): 0.5, ("c", "a"): 0.4, ("a", "d"): 0.5, ("d", "a"): 0.5}
    asking = BothOrders(RuleJudge(lambda prompt, one, two: table[one, two]))
    found = ask(asking, ("p", "a", "b"), ("p", "a", "c"), ("p", "a", "d"))
    assert found.counts.metrics()["judge/position_flip"] == pytest.approx(1 / 3)


def test_without_a_verdict_in_one_order_there_is_none() -> None:
    judge = RuleJudge(lambda prompt, one, two: math.nan if one == "b" else 1.0)
    found = ask(BothOrders(judge), ("p", "a", "b"), ("p", "c", "d"))
    assert math.isnan(found.probability[0])
    assert found.probability[1] == 0.5
    metrics = found.counts.metrics()
    assert (metrics["judge/missing"], metrics["judge/ties"]) == (1, 1)


def test_nobody_is_asked_about_equal_answers() -> None:
    judge = RuleJudge(lambda prompt, one, two: 1.0)
    found = ask(BothOrders(judge), ("p", "a", "a"))
    assert found.probability.tolist() == [0.5]
    assert judge.questions == []
    assert found.counts.metrics()["judge/asked"] == 0


def test_equal_questions_of_a_step_are_asked_once() -> None:
    judge = RuleJudge()
    found = ask(BothOrders(judge), ("p", "aa", "b"), ("p", "aa", "b"), ("p", "b", "aa"), ("q", "aa", "b"))
    assert found.probability.tolist() == [1.0, 1.0, 0.0, 1.0]
    assert len(judge.questions) == len(set(judge.questions)) == 4  # two prompts, two orders
    metrics = found.counts.metrics()
    assert (metrics["judge/asked"], metrics["judge/cached"]) == (4, 4)


def test_a_second_run_asks_nothing(tmp_path: Path) -> None:
    first, again = RuleJudge(), RuleJudge()
    questions = [("p", "aa", "b"), ("p", "c", "d"), ("q", "e", "fff")]
    before = ask(BothOrders(first, store(tmp_path, first)), *questions)
    after = ask(BothOrders(again, store(tmp_path, again)), *questions)
    assert again.questions == []
    assert torch.equal(before.probability, after.probability)
    metrics = after.counts.metrics()
    assert (metrics["judge/asked"], metrics["judge/cached"]) == (0, 6)
    assert metrics["judge/position_flip"] == before.counts.metrics()["judge/position_flip"]


def test_the_other_order_is_another_question(tmp_path: Path) -> None:
    judge = RuleJudge()
    asking = BothOrders(judge, store(tmp_path, judge), both=False)
    ask(asking, ("p", "aa", "b"))
    ask(asking, ("p", "b", "aa"))
    assert judge.questions == [("p", "aa", "b"), ("p", "b", "aa")]


def test_another_judge_has_verdicts_of_its_own(tmp_path: Path) -> None:
    one, other = RuleJudge(), RuleJudge(lambda *_: 0.25, name="another")
    ask(BothOrders(one, store(tmp_path, one)), ("p", "aa", "b"))
    ask(BothOrders(other, store(tmp_path, other)), ("p", "aa", "b"))
    assert len(other.questions) == 2
    again = RuleJudge()
    ask(BothOrders(again, store(tmp_path, again)), ("p", "aa", "b"))
    assert again.questions == []


@pytest.mark.parametrize("reads", [True, False])
def test_columns_make_another_question_only_for_a_judge_that_reads_them(tmp_path: Path, reads: bool) -> None:
    judge = RuleJudge(reads_columns=reads)
    asking = BothOrders(judge, store(tmp_path, judge), both=False)
    ask(asking, ("p", "aa", "b"), answer=["4"])
    ask(asking, ("p", "aa", "b"), answer=["5"])
    assert [row["answer"] for row in judge.columns] == (["4", "5"] if reads else ["4"])


def test_a_call_that_failed_is_asked_again_and_a_reply_without_a_verdict_is_not(tmp_path: Path) -> None:
    for final, times in ((False, 2), (True, 1)):
        judge = RuleJudge(lambda *_: math.nan, name=f"{final}", final=final)
        asking = BothOrders(judge, store(tmp_path, judge), both=False)
        for _ in range(2):
            assert ask(asking, ("p", "a", "b")).probability.isnan().all()
        assert len(judge.questions) == times


def test_verdicts_that_came_before_a_failure_are_kept(tmp_path: Path) -> None:
    def fails(prompt: Text, first: str, second: str) -> float:
        return longer(prompt, first, second)

    judge = RuleJudge(fails)
    asking = BothOrders(judge, store(tmp_path, judge), both=False)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    kept = store(tmp_path, judge)
    assert len(kept) == 0
    add = VerdictStore.add
    calls = []

    def add_two(self: VerdictStore, verdicts: object) -> None:
        add(self, verdicts)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == 2:
            stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VerdictStore, "add", add_two)
        with pytest.raises(KeyboardInterrupt):
            ask(asking, ("p", "a", "bb"), ("p", "c", "dd"), ("p", "e", "ff"))
    assert len(store(tmp_path, judge)) == 2


def test_a_symmetric_judge_is_asked_once() -> None:
    judge = RuleJudge()
    judge.is_symmetric = True
    found = ask(BothOrders(judge), ("p", "aa", "b"))
    assert len(judge.questions) == 1
    assert found.probability.tolist() == [1.0]


def test_tokens_cost_what_their_prices_say() -> None:
    spent = Spent(calls=2, prompt_tokens=1_000_000, completion_tokens=500_000)
    assert Prices(prompt=3.0, completion=10.0).cost(spent) == 8.0


TEXT = st.text(alphabet="ab", max_size=3)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pq"), TEXT, TEXT), max_size=8))
def test_swapping_the_answers_gives_one_minus_the_probability(questions: list[tuple[str, str, str]]) -> None:
    def rule(prompt: Text, first: str, second: str) -> float:
        return (len(first) + 2) / (len(first) + len(second) + 3)  # likes the first answer a little

    asking = BothOrders(RuleJudge(rule))
    one = ask(asking, *questions).probability
    two = ask(asking, *((prompt, second, first) for prompt, first, second in questions)).probability
    torch.testing.assert_close(one, 1 - two)
