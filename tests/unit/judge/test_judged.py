"""What training calls: completions in, judged pairs and metrics out."""

from __future__ import annotations

import math

import torch

from rlxf.core.types import PromptBatch, Rollouts, Sequences, Text, Tokens
from rlxf.judge.both_orders import BothOrders, Prices
from rlxf.judge.judged import Judging, wins
from tests.judge_world import RuleJudge


def rollouts(prompts: list[int], samples: list[int]) -> Rollouts:
    count = max(prompts) + 1
    batch = PromptBatch(
        prompts=Tokens.from_rows([[2]] * count),
        row_ids=torch.arange(count),
        positions=torch.arange(count),
        texts=tuple(f"prompt {i}" for i in range(count)),
        columns={"answer": [10 * i for i in range(count)]},
    )
    return Rollouts(
        prompts=batch,
        sequences=Sequences.from_rows([[2]] * len(prompts), [[3]] * len(prompts)),
        prompt_index=torch.tensor(prompts),
        sample_index=torch.tensor(samples),
        engine_logps=torch.zeros(len(prompts)),
        policy_version=torch.zeros(len(prompts), dtype=torch.int64),
    )


def test_a_steps_completions_are_judged_with_their_prompts_and_columns() -> None:
    judge = RuleJudge(reads_columns=True)
    judging = Judging(BothOrders(judge), tournament="knockout")
    found, counts = judging(rollouts([1, 0, 0, 1], [0, 1, 0, 1]), ["aaa", "b", "cc", "d"])
    assert list(zip(found.first.tolist(), found.second.tolist(), found.probability.tolist(), strict=True)) == [
        (2, 1, 1.0),
        (0, 3, 1.0),
    ]
    asked = {question: row["answer"] for question, row in zip(judge.questions, judge.columns, strict=True)}
    assert asked == {
        ("prompt 0", "cc", "b"): 0, ("prompt 0", "b", "cc"): 0,
        ("prompt 1", "aaa", "d"): 10, ("prompt 1", "d", "aaa"): 10,
    }  # fmt: skip
    assert judging.metrics(counts) == {
        "judge/asked": 4, "judge/cached": 0, "judge/missing": 0, "judge/ties": 0, "judge/position_flip": 0,
    }  # fmt: skip


def test_the_counts_of_all_rounds_are_added_up() -> None:
    def rule(prompt: Text, first: str, second: str) -> float:
        return math.nan if "x" in first + second else 1.0  # the first answer is always better

    judging = Judging(BothOrders(RuleJudge(rule)), tournament="all", prices=Prices())
    _, counts = judging(rollouts([0, 0, 0, 0], [0, 1, 2, 3]), ["a", "b", "x", "a"])
    metrics = judging.metrics(counts)
    assert metrics["judge/missing"] == 3
    assert metrics["judge/ties"] == 3  # two that flip, and a pair of equal answers
    assert metrics["judge/position_flip"] == 1.0
    assert metrics["judge/calls"] == 0


def test_a_win_is_who_is_more_likely_better() -> None:
    found = wins(torch.tensor([0.9, 0.51, 0.5, 0.2, math.nan]))
    assert found.tolist() == [1.0, 1.0, 0.5, 0.0]
