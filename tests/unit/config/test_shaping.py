"""Keys that lower scores for length: wrong values are one line each."""

from __future__ import annotations

from typing import Any

import pytest

from rlxf.config.changes import compare
from rlxf.config.load import load_config
from rlxf.core.errors import ConfigError
from tests.unit.config.recipes import recipe

ZONE = {"overlong_tokens": 8, "overlong_penalty": 1.0}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"length_penalty": -0.1}, "length_penalty", "= -0.1: expected at least 0"),
    ({"length_penalty": float("inf")}, "length_penalty", "expected a finite number"),
    ({"length_penalty": "0.1"}, "length_penalty", "write it without quotes"),
    ({"overlong_penalty": -1.0, "overlong_tokens": 8}, "overlong_penalty", "expected at least 0"),
    (ZONE | {"overlong_tokens": 1.5}, "overlong_tokens", "= 1.5: expected a whole number"),
    (ZONE | {"overlong_tokens": -1}, "overlong_tokens", "= -1: expected at least 0"),
    ({"overlong_tokens": 8}, "overlong_tokens", "= 8: expected 0 without actor_rollout.overlong_penalty"),
    ({"overlong_penalty": 1.0}, "overlong_penalty", "= 1.0: expected 0 without actor_rollout.overlong_tokens"),
    (ZONE | {"overlong_tokens": 33}, "overlong_tokens", "= 33: expected at most 32, the longest completion"),
    (ZONE | {"max_new_tokens": 7}, "overlong_tokens", "= 8: expected at most 7, the longest completion"),
    ({"soft_punish_cache": 3}, "soft_punish_cache", 'unknown key; did you mean "actor_rollout.overlong_tokens"?'),
    ({"overlong_token": 3}, "overlong_token", 'unknown key; did you mean "actor_rollout.overlong_tokens"?'),
]


@pytest.mark.parametrize(("keys", "key", "says"), WRONG)
def test_a_wrong_value_is_one_line(keys: dict[str, Any], key: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(recipe(actor_rollout=keys))
    (line,) = raised.value.problems
    assert line.startswith(f"actor_rollout.{key}")
    assert says in line


def test_the_keys_count_for_the_learning_curve_and_a_run_of_an_earlier_version_had_none() -> None:
    config = load_config(recipe(actor_rollout={**ZONE, "length_penalty": 0.5}))
    plain = load_config(recipe())
    earlier = plain.dump()
    for key in ("length_penalty", *ZONE):
        del earlier["actor_rollout"][key]
    assert compare(earlier, plain).curve == []
    assert compare(earlier, config).curve == [
        "actor_rollout.length_penalty 0.0 -> 0.5",
        "actor_rollout.overlong_penalty 0.0 -> 1.0",
        "actor_rollout.overlong_tokens 0 -> 8",
    ]
