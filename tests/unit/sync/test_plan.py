"""Properties of the bucket plan, on many random models."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from rlxf.sync.plan import ALIGNMENT, TensorSpec, plan_buckets


def random_specs(seed: int) -> list[TensorSpec]:
    draw = random.Random(seed)

    def spec(name: str) -> TensorSpec:
        shape = tuple(draw.randrange(1, 20) for _ in range(draw.randrange(1, 4)))
        return TensorSpec(name, shape, draw.choice(["float32", "bfloat16", "int8"]))

    layers = [
        spec(f"model.layers.{i}.part{j}.weight")
        for i in range(draw.randrange(1, 14))
        for j in range(draw.randrange(1, 6))
    ]
    return [spec("model.embed_tokens.weight"), *layers, spec("model.norm.weight"), spec("lm_head.weight")]


def layer_of(name: str) -> str:
    return name.split(".")[2] if ".layers." in name else name


CASES = [(seed, max_bytes) for seed in range(15) for max_bytes in (1, 3000, 20_000, 10**9)]


@pytest.mark.parametrize(("seed", "max_bytes"), CASES)
def test_every_tensor_travels_once_aligned_and_without_overlap(seed: int, max_bytes: int) -> None:
    specs = random_specs(seed)
    buckets = plan_buckets(specs, max_bytes)
    sent = [(spec.name, spec.shape, spec.dtype) for bucket in buckets for spec in bucket.tensors]
    assert sent == [(spec.name, spec.shape, spec.dtype) for spec in specs]
    for bucket in buckets:
        end = 0
        for spec in bucket.tensors:
            assert spec.offset % ALIGNMENT == 0
            assert spec.offset >= end
            end = spec.offset + spec.num_bytes
        assert end <= bucket.num_bytes < end + ALIGNMENT


@pytest.mark.parametrize(("seed", "max_bytes"), CASES)
def test_a_layer_is_never_split_and_a_bucket_only_exceeds_the_limit_for_one_layer(seed: int, max_bytes: int) -> None:
    buckets = plan_buckets(random_specs(seed), max_bytes)
    layers = [{layer_of(spec.name) for spec in bucket.tensors} for bucket in buckets]
    assert sum(map(len, layers)) == len(set.union(*layers))
    assert all(bucket.num_bytes <= max_bytes or len(names) == 1 for bucket, names in zip(buckets, layers, strict=True))


@pytest.mark.parametrize("seed", range(15))
def test_buckets_are_as_few_as_the_order_allows(seed: int) -> None:
    buckets = plan_buckets(random_specs(seed), 3000)
    for bucket, following in pairwise(buckets):
        head = layer_of(following.tensors[0].name)
        first_layer = [spec for spec in following.tensors if layer_of(spec.name) == head]
        assert bucket.num_bytes + sum(-(-spec.num_bytes // ALIGNMENT) * ALIGNMENT for spec in first_layer) > 3000


def test_a_layer_stays_whole_when_its_tensors_come_apart() -> None:
    names = ["model.layers.0.a", "model.layers.1.a", "model.layers.0.b", "model.layers.1.b"]
    buckets = plan_buckets([TensorSpec(name, (16,), "float32") for name in names], 128)
    assert [[spec.name[-3:] for spec in bucket.tensors] for bucket in buckets] == [["0.a", "0.b"], ["1.a", "1.b"]]


def test_layers_of_two_towers_with_the_same_number_are_two_layers() -> None:
    names = ["model.layers.0.a", "draft.layers.0.a"]
    assert len(plan_buckets([TensorSpec(name, (16,), "float32") for name in names], 64)) == 2


@pytest.mark.parametrize("seed", range(15))
def test_what_is_written_through_the_views_is_read_through_them(seed: int) -> None:
    for bucket in plan_buckets(random_specs(seed), 3000):
        payload = torch.zeros(bucket.num_bytes, dtype=torch.uint8)
        written = {}
        for name, view in bucket.views(payload):
            view.copy_(torch.randint(-100, 100, view.shape).to(view.dtype))
            written[name] = view.clone()
        copy = torch.frombuffer(bytearray(payload.numpy().tobytes()), dtype=torch.uint8)
        read = dict(bucket.views(copy))
        assert read.keys() == written.keys()
        assert all(torch.equal(read[name], written[name]) and read[name].dtype == written[name].dtype for name in read)
