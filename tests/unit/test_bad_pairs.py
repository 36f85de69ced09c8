"""Wrong keys of pairs: one clear line each, with the key, the value and the fix."""

from __future__ import annotations

from typing import Any

import pytest

from rlxf.config.changes import SINCE, compare
from rlxf.config.load import load_config
from rlxf.config.pairs import ALL_AT_ONCE, WITH_MARGIN
from rlxf.core.errors import ConfigError
from rlxf.update.losses import LOSSES, OF_WHOLE_BATCH, WITH_OFFSET
from tests.unit.config.recipes import recipe
from tests.unit.test_bad_recipes import Wrong


def pairs(losses: Any = "sigmoid", stage: str = "ray_online_dpo", **keys: Any) -> dict[str, Any]:
    return {"algorithm": keys, "actor_rollout": {"dpo_loss_type": losses}, "training": {"stage": stage}}


LIMIT, RATIO, CUT = "algorithm.max_pairs_per_prompt", "algorithm.max_length_ratio", "algorithm.score_threshold"
MARGIN, PAIRING = "algorithm.margin_weight", "algorithm.pairing"
WRONG = [
    Wrong(pairs(pairing="best"), PAIRING, "expected one of best_worst, all, random, threshold"),
    Wrong(pairs(pairing="best_wurst"), PAIRING, 'did you mean "best_worst"?'),
    Wrong(pairs(pairing=["all"]), PAIRING, "expected one of"),
    Wrong(pairs(pairing="threshold"), CUT, "is required with algorithm.pairing=threshold"),
    Wrong(pairs(score_threshold=0.5), CUT, "nothing reads it with algorithm.pairing=best_worst"),
    Wrong(pairs(pairing="all", score_threshold=0.5), CUT, "set algorithm.pairing=threshold, or remove it"),
    Wrong(pairs(pairing="threshold", score_threshold="high"), CUT, "expected a number, got text"),
    Wrong(pairs(pairing="threshold", score_threshold=float("nan")), CUT, "expected a finite number"),
    Wrong(pairs(pairing="all", max_pairs_per_prompt=0), LIMIT, "expected at least 1"),
    Wrong(pairs(pairing="all", max_pairs_per_prompt=2.5), LIMIT, "expected a whole number"),
    Wrong(pairs(max_pairs_per_prompt=3), LIMIT, "best_worst makes one pair of a prompt; set algorithm.pairing=all"),
    Wrong(pairs(pairing="random", max_pairs_per_prompt=3), LIMIT, "expected 1 or nothing"),
    Wrong(pairs(max_length_ratio=0.5), RATIO, "expected at least 1"),
    Wrong(pairs(max_length_ratio="2"), RATIO, "write it without quotes"),
    Wrong(pairs(max_length_ratio=float("inf")), RATIO, "expected a finite number"),
    Wrong(pairs(margin_weight=-1.0), MARGIN, "expected at least 0"),
    Wrong(pairs(margin_weight=True), MARGIN, "expected a number"),
    Wrong(pairs("ipo", margin_weight=0.5), MARGIN, "expected 0 with ipo: a margin is defined for sigmoid, hinge"),
    Wrong(pairs("sft", margin_weight=0.5), MARGIN, "expected 0 with sft"),
    Wrong(pairs(["sigmoid", "aot"], margin_weight=0.5), MARGIN, "expected 0 with aot"),
    Wrong(
        pairs(stage="dpo", margin_weight=0.5), MARGIN, "expected 0 with training.stage=dpo: its pairs have no scores"
    ),
    Wrong(pairs("aot", pairing="all"), PAIRING, "expected best_worst or random"),
    Wrong(pairs(["sigmoid", "kto_pair"], pairing="all", max_pairs_per_prompt=2), PAIRING, "with kto_pair"),
    Wrong(pairs("aot_unpaired", pairing="threshold", score_threshold=0.0), PAIRING, "pairs of different weights"),
    Wrong(pairs(min_margin=0.5), "algorithm.min_margin", "unknown key"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.key} {wrong.says[:20]}")
def test_a_wrong_recipe_gets_one_line_with_key_and_fix(wrong: Wrong) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe(**wrong.change))
    (line,) = caught.value.problems
    assert wrong.key in line.split(": ")[0]
    assert wrong.says in line


@pytest.mark.parametrize(
    "change",
    [
        pairs(pairing="threshold", score_threshold=-0.5, max_pairs_per_prompt=4, max_length_ratio=1.0),
        pairs("aot", pairing="all", max_pairs_per_prompt=1),
        pairs("aot", pairing="random", max_pairs_per_prompt=1),
        pairs(["hinge", "sft"], pairing="all", margin_weight=0.5),
    ],
    ids=str,
)
def test_what_goes_together_is_accepted(change: dict[str, Any]) -> None:
    load_config(recipe(**change))


def test_the_checks_know_the_losses() -> None:
    assert set(WITH_MARGIN) == WITH_OFFSET <= set(LOSSES)
    assert set(ALL_AT_ONCE) == OF_WHOLE_BATCH


def test_a_checkpoint_of_an_earlier_version_had_none_of_these() -> None:
    config = load_config(recipe(**pairs(pairing="all", max_pairs_per_prompt=2, margin_weight=0.5)))
    earlier = config.dump()
    earlier["algorithm"] = {"pairing": "all", "min_score_margin": 0.0, "max_empty_steps": 3}
    assert compare(earlier, config).curve == [
        "algorithm.margin_weight 0.0 -> 0.5",
        "algorithm.max_pairs_per_prompt null -> 2",
    ]
    assert {f"algorithm.{key}" for key in config.dump()["algorithm"].keys() - earlier["algorithm"].keys()} <= set(SINCE)
