"""The tiny world's grammar and its ground truth."""

from __future__ import annotations

from random import Random

import pytest

from rlxf.tools.tiny import world


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the plot was great .", 1),
        ("the plot was dull .", -1),
        ("the plot was not dull .", 1),
        ("the plot was not great .", -1),
        ("the plot was really great .", 1),
        ("i loved the cast .", 1),
        ("i never enjoyed the cast .", -1),
        ("i never hated the cast .", 1),
        ("it was made in paris .", 0),
        ("the plot was great but the hero was weak .", 0),
        ("i admired the hero and the music was not bland . overall , a superb film .", 3),
        (" the plot was dull . overall , a boring story .", -2),
        ("not", 0),
        ("", 0),
    ],
)
def test_score_is_the_sum_of_clause_polarities(text: str, expected: int) -> None:
    assert world.score(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "the plot was great .",
        " the plot was great .",
        "the plot was not great .",
        "i never hated the cast and the script was quite flat .",
        "we saw it on monday . overall , a silly movie .",
        "i loved the hero . i loved the hero . i loved the hero . i loved the hero .",
    ],
)
def test_sentences_of_the_grammar_are_valid(text: str) -> None:
    assert world.valid(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the plot was great",
        "great great great .",
        "the plot was not really great .",
        "the plot was great . .",
        "the plot was great . \n the plot was great .",
        "the plots was great .",
        "the plot was great but .",
        "i loved the hero . " * 5,
        "the plot was great . superb",
    ],
)
def test_anything_else_is_not_valid(text: str) -> None:
    assert not world.valid(text)


def test_whole_corpus_is_valid() -> None:
    assert all(world.valid(response) for _, response in world.corpus(5_000))


def test_corpus_is_balanced_between_praise_and_blame() -> None:
    scores = [world.score(response) for _, response in world.corpus(20_000)]
    positive = sum(score > 0 for score in scores) / len(scores)
    negative = sum(score < 0 for score in scores) / len(scores)
    assert sum(scores) / len(scores) == pytest.approx(0, abs=0.05)
    assert positive == pytest.approx(0.39, abs=0.02)
    assert negative == pytest.approx(0.40, abs=0.02)


def test_corpus_depends_on_the_seed_only() -> None:
    assert world.corpus(50, seed=3) == world.corpus(50, seed=3)
    assert world.corpus(50, seed=3) != world.corpus(50, seed=4)
    assert world.corpus(50, seed=3) == world.corpus(80, seed=3)[:50]


def test_training_never_sees_a_held_out_title() -> None:
    assert len(world.TRAIN_TITLES) == 90
    assert len(world.HELD_OUT_TITLES) == 30
    assert not set(world.TRAIN_TITLES) & set(world.HELD_OUT_TITLES)
    prompts = {prompt for prompt, _ in world.corpus(20_000)}
    assert prompts == {world.prompt(title) for title in world.TRAIN_TITLES}


def test_swapping_every_polar_word_turns_the_score_round() -> None:
    opposite = dict(zip((*world.PRAISE, *world.LIKED), (*world.BLAME, *world.DISLIKED), strict=True))
    opposite |= {bad: good for good, bad in opposite.items()}
    rng = Random(5)
    for _ in range(500):
        text = world.random_response(rng)
        swapped = " ".join(opposite.get(word, word) for word in text.split())
        assert world.score(swapped) == -world.score(text)
        assert world.valid(swapped)
