"""Who meets whom: numbers of comparisons, brackets, and nothing that depends on the order of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlxf.config.kinds import TournamentName
from rlxf.core.types import Comparisons
from rlxf.judge.tournament import Ask, comparisons

NAN = math.nan


def by_strength(strength: Sequence[float], rounds: list[int] | None = None) -> Ask:
    """The stronger row wins surely; equal ones tie."""

    def ask(first: Sequence[int], second: Sequence[int]) -> Tensor:
        if rounds is not None:
            rounds.append(len(first))
        return torch.tensor(
            [
                0.5 if strength[a] == strength[b] else float(strength[a] > strength[b])
                for a, b in zip(first, second, strict=True)
            ]
        )

    return ask


def one_prompt(strength: Sequence[float], tournament: TournamentName) -> list[tuple[int, int, float]]:
    count = len(strength)
    found = comparisons(torch.zeros(count, dtype=torch.int64), torch.arange(count), by_strength(strength), tournament)
    return list(zip(found.first.tolist(), found.second.tolist(), found.probability.tolist(), strict=True))


@pytest.mark.parametrize("tournament", ["knockout", "all"])
def test_two_completions_are_compared_once(tournament: TournamentName) -> None:
    assert one_prompt([1, 2], tournament) == [(0, 1, 0.0)]
    assert one_prompt([1], tournament) == []


def test_winners_meet_winners() -> None:
    assert one_prompt([3, 1, 2, 4], "knockout") == [(0, 1, 1.0), (2, 3, 0.0), (0, 3, 0.0)]


def test_one_without_a_partner_goes_on() -> None:
    assert one_prompt([1, 2, 3, 4, 5], "knockout") == [(0, 1, 0.0), (2, 3, 0.0), (1, 3, 0.0), (3, 4, 0.0)]


def test_after_a_tie_or_without_a_verdict_the_lower_sample_goes_on() -> None:
    assert one_prompt([2, 2, 1, 1], "knockout") == [(0, 1, 0.5), (2, 3, 0.5), (0, 2, 1.0)]
    asked: list[tuple[int, int]] = []

    def silent(first: Sequence[int], second: Sequence[int]) -> Tensor:
        asked.extend(zip(first, second, strict=True))
        return torch.full((len(first),), NAN)

    found = comparisons(torch.zeros(4, dtype=torch.int64), torch.arange(4), silent, "knockout")
    assert asked == [(0, 1), (2, 3), (0, 2)]
    assert found.probability.isnan().all()


def test_rounds_of_all_prompts_are_asked_together() -> None:
    rounds: list[int] = []
    prompts = torch.arange(3).repeat_interleave(4)
    comparisons(prompts, torch.arange(4).repeat(3), by_strength(list(range(12)), rounds), "knockout")
    assert rounds == [6, 3]


@st.composite
def completions(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Prompt, sample and strength of each row, in any order."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    rows = [(prompt, sample) for prompt, size in enumerate(sizes) for sample in range(size)]
    strength = [draw(st.integers(0, 3)) for _ in rows]
    order = draw(st.permutations(range(len(rows))))
    return [rows[i][0] for i in order], [rows[i][1] for i in order], [strength[i] for i in order]


def run(prompts: list[int], samples: list[int], strength: list[int], tournament: TournamentName) -> Comparisons:
    return comparisons(torch.tensor(prompts), torch.tensor(samples), by_strength(strength), tournament)


@settings(deadline=None)
@given(completions(), st.sampled_from(["knockout", "all"]), st.randoms())
def test_what_is_compared(
    found: tuple[list[int], list[int], list[int]], tournament: TournamentName, random: object
) -> None:
    prompts, samples, strength = found
    judged = run(prompts, samples, strength, tournament)
    pairs = list(zip(judged.first.tolist(), judged.second.tolist(), strict=True))
    counts = {prompt: prompts.count(prompt) for prompt in prompts}
    expected = {prompt: n - 1 if tournament == "knockout" else n * (n - 1) // 2 for prompt, n in counts.items()}
    assert {prompt: sum(prompts[a] == prompt for a, _ in pairs) for prompt in counts} == expected
    assert all(prompts[a] == prompts[b] and samples[a] < samples[b] for a, b in pairs)
    assert len(set(pairs)) == len(pairs)
    if tournament == "knockout":  # the strongest loses to nobody, everybody else is beaten or ties once
        for prompt in counts:
            best = max(strength[row] for row in range(len(prompts)) if prompts[row] == prompt)
            beaten = {
                b if p > 0.5 else a for (a, b), p in zip(pairs, judged.probability.tolist(), strict=True) if p != 0.5
            }
            assert any(strength[r] == best for r in range(len(prompts)) if prompts[r] == prompt and r not in beaten)


@settings(deadline=None)
@given(completions(), st.sampled_from(["knockout", "all"]), st.data())
def test_the_order_of_rows_plays_no_part(
    found: tuple[list[int], list[int], list[int]], tournament: TournamentName, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(found[0]))))
    moved = tuple([values[i] for i in order] for values in found)
    said = []
    for prompts, samples, strength in (found, moved):
        judged = run(prompts, samples, strength, tournament)
        rows = zip(judged.first.tolist(), judged.second.tolist(), judged.probability.tolist(), strict=True)
        said.append([(prompts[a], samples[a], samples[b], p) for a, b, p in rows])
    assert said[0] == said[1]
