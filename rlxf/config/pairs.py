"""Checks of the keys that say how completions become pairs, and how a pair's margin and weight enter the loss."""

from __future__ import annotations

from collections.abc import Iterator

from rlxf.config.problems import Problem, wrong
from rlxf.config.schema import RunConfig

# What rlxf/update/losses.py calls WITH_OFFSET and OF_WHOLE_BATCH: the checks of a recipe import no torch.
WITH_MARGIN = ("sigmoid", "hinge", "robust", "sigmoid_norm", "simpo")
ALL_AT_ONCE = ("aot", "aot_unpaired", "kto_pair")
_SEVERAL = ("all", "threshold")  # pairings that may give a prompt several pairs
_PAIRING, _TYPE = "algorithm.pairing", "actor_rollout.dpo_loss_type"
_LIMIT = "algorithm.max_pairs_per_prompt"


def pair_problems(config: RunConfig) -> Iterator[Problem]:
    """All mistakes in the keys of pairs that no single value shows."""
    yield from _margin(config)
    if config.offline:
        return
    algorithm = config.algorithm
    key, cut = "algorithm.score_threshold", algorithm.score_threshold
    if algorithm.pairing == "threshold" and cut is None:
        text = f"{key} is required with {_PAIRING}=threshold: completions with a higher score are good, the others bad"
        yield Problem((key, _PAIRING), text)
    if algorithm.pairing != "threshold" and cut is not None:
        expected = f"nothing reads it with {_PAIRING}={algorithm.pairing}; set {_PAIRING}=threshold, or remove it"
        yield wrong(key, cut, expected, _PAIRING)
    if algorithm.pairing == "threshold" and config.judges:
        expected = "expected best_worst, all or random with a judge, which compares completions and gives no score"
        yield wrong(
            _PAIRING, algorithm.pairing, expected, *(f"judge.{key}" for key in ("load", "function", "base_url"))
        )
    several, limit = algorithm.pairing in _SEVERAL, algorithm.max_pairs_per_prompt
    if not several and limit is not None and limit > 1:
        expected = (
            f"expected 1 or nothing: {_PAIRING}={algorithm.pairing} makes one pair of a prompt; set {_PAIRING}=all"
        )
        yield wrong(_LIMIT, limit, expected, _PAIRING)
    whole = [name for name in config.actor_rollout.dpo_loss_type if name in ALL_AT_ONCE]
    if several and limit != 1 and whole:
        expected = (
            f"expected best_worst or random (or {_LIMIT}=1) with {', '.join(whole)}, which compares all pairs of a "
            "mini-batch with each other and has no meaning for pairs of different weights"
        )
        yield wrong(_PAIRING, algorithm.pairing, expected, _TYPE, _LIMIT)


def _margin(config: RunConfig) -> Iterator[Problem]:
    key, weight = "algorithm.margin_weight", config.algorithm.margin_weight
    if not weight:
        return
    if config.offline:
        stage = config.training.stage
        yield wrong(key, weight, f"expected 0 with training.stage={stage}: its pairs have no scores", "training.stage")
        return
    names = config.actor_rollout.dpo_loss_type
    # sft may be added to a loss with a margin, because it compares nothing.
    without = [name for name in names if name not in WITH_MARGIN and (name != "sft" or len(names) == 1)]
    if without:
        expected = f"expected 0 with {', '.join(without)}: a margin is defined for {', '.join(WITH_MARGIN)}"
        yield wrong(key, weight, expected, _TYPE)
