"""Reference log-probabilities on disk: asked for once, whatever the order, and never wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlxf.reference.cached import CachedReference, cache_file
from rlxf.types import PairLogps, Pairs, Sequences
from tests.settings import random_pairs
from tests.tiny_models import save_causal_lm


class Counting:
    """Gives each pair numbers of its own, and counts what it is asked for."""

    def __init__(self) -> None:
        self.num_pairs = 0

    def token_logps(self, sequences: Sequences) -> Tensor:
        return torch.zeros(int(sequences.completion_lengths.sum()))

    def logps(self, pairs: Pairs) -> PairLogps:
        self.num_pairs += len(pairs)
        chosen, rejected = (
            torch.tensor([-sum(row) / 7 for row in side.rows()], dtype=torch.float32)
            for side in (pairs.chosen, pairs.rejected)
        )
        return PairLogps(chosen=chosen, rejected=rejected)


def equal(found: PairLogps, expected: PairLogps) -> bool:
    return torch.equal(found.chosen, expected.chosen) and torch.equal(found.rejected, expected.rejected)


def test_a_pair_is_computed_once_over_runs_and_orders(tmp_path: Path) -> None:
    pairs, inner = random_pairs(9), Counting()
    expected = Counting().logps(pairs)
    first = CachedReference(inner, tmp_path / "model.logps")
    assert equal(first.logps(pairs.select(torch.arange(5))), expected.select(torch.arange(5)))
    assert equal(first.logps(pairs), expected)
    assert inner.num_pairs == 9
    again = CachedReference(inner, tmp_path / "model.logps")
    order = torch.tensor([8, 3, 0, 7, 1, 2, 6, 5, 4])
    assert equal(again.logps(pairs.select(order)), expected.select(order))
    assert again.fill([pairs]) == 0
    assert inner.num_pairs == 9


def test_a_changed_token_side_or_prompt_end_is_another_pair(tmp_path: Path) -> None:
    chosen, rejected = Sequences.from_rows([[5, 6]], [[7, 8]]), Sequences.from_rows([[5, 6]], [[9]])
    others = [
        Pairs(chosen=chosen, rejected=Sequences.from_rows([[5, 6]], [[10]])),
        Pairs(chosen=rejected, rejected=chosen),
        Pairs(chosen=Sequences.from_rows([[5, 6, 7]], [[8]]), rejected=rejected),
        Pairs(chosen=Sequences.from_rows([[5, 6]], [[7, 8, 5, 6, 9]]), rejected=rejected),
    ]
    inner = Counting()
    cached = CachedReference(inner, tmp_path / "model.logps")
    cached.logps(Pairs(chosen=chosen, rejected=rejected))
    for number, other in enumerate(others):
        cached.logps(other)
        assert inner.num_pairs == number + 2


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_record_is_computed_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path, pairs, expected = tmp_path / "model.logps", random_pairs(4), Counting().logps(random_pairs(4))
    CachedReference(Counting(), path).logps(pairs)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-3:]
    else:
        content[18] ^= 1  # of the first pair's number
    path.write_bytes(content)
    inner = Counting()
    cached = CachedReference(inner, path)
    assert "1 records are damaged" in caplog.text
    assert equal(cached.logps(pairs), expected)
    assert inner.num_pairs == 1
    assert equal(CachedReference(Counting(), path).logps(pairs), expected)


def test_the_file_belongs_to_the_weights_and_the_dtype(tmp_path: Path) -> None:
    model = save_causal_lm(tmp_path / "model")
    first = cache_file(tmp_path, model, "fp32")
    assert cache_file(tmp_path, model, "fp32") == first
    assert cache_file(tmp_path, model, "bf16") != first
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert cache_file(tmp_path, model, "fp32") != first
