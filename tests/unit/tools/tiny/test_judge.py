"""The judge of the tiny world: the ground truth, with a known share of mistakes."""

from __future__ import annotations

from random import Random

import pytest

from rlxf.tools.tiny.judge import NOISE, judge
from rlxf.tools.tiny.world import random_response, score


def test_it_is_the_ground_truth_with_a_known_share_of_mistakes_in_either_order() -> None:
    rng = Random(1)
    pairs = [(random_response(rng), random_response(rng)) for _ in range(4000)]
    pairs = [pair for pair in pairs if score(pair[0]) != score(pair[1])]
    first, second = [list(side) for side in zip(*pairs, strict=True)]
    prompts = ["a"] * len(pairs)
    found = judge(prompts, first, second)
    truth = [float(score(one) > score(two)) for one, two in pairs]
    wrong = sum(value != true for value, true in zip(found, truth, strict=True)) / len(pairs)
    assert wrong == pytest.approx(NOISE, abs=0.02)
    assert judge(prompts, second, first) == [1 - value for value in found]


def test_equal_scores_tie() -> None:
    assert judge(["a"], ["good"], ["good"], other=[1]) == [0.5]
