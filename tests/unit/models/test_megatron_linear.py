"""The platform's linear layers against Megatron's own, whole, cut over two ranks, and with sequence parallelism."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.assembly.roles import build_actor, build_reference
from rlxf.core.types import ReferencedPairs
from rlxf.models.megatron.parallel import ParallelSizes, init_parallel
from rlxf.platform import Process, get_platform, linear
from tests.ranks import on_ranks
from tests.settings import random_pairs, run_config
from tests.tiny_models import save_causal_lm

ROWS, HIDDEN, FFN = 32, 512, 1024  # a rank's share is still large enough for the path

Found = dict[str, Tensor]


def _layers(seed: int, *, ours: bool, bias: bool, sequence_parallel: bool, tp_size: int) -> tuple[Any, Any]:
    """A column and a row parallel layer with the same weights, whoever computes them."""
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig

    from rlxf.models.megatron.linear import column_parallel, row_parallel

    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, tensor_model_parallel_size=tp_size,
        sequence_parallel=sequence_parallel, gradient_accumulation_fusion=False,
    )  # fmt: skip
    platform = get_platform("cpu", cpu_linear="onednn" if ours else "mkl")
    shared: dict[str, Any] = {"config": config, "init_method": config.init_method, "bias": bias}
    column = build_module(
        column_parallel(platform), HIDDEN, FFN, gather_output=False, skip_bias_add=False, **shared
    )  # fmt: skip
    row = build_module(row_parallel(platform), FFN, HIDDEN, input_is_parallel=True, skip_bias_add=False, **shared)
    generator = torch.Generator().manual_seed(seed)
    for parameter in (*column.parameters(), *row.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator) / 16
    return column, row


def _run(column: Any, row: Any, *, shard: slice, frozen: bool = False) -> Found:
    """Output and gradients of this rank for its part of the sequence."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(ROWS, 1, HIDDEN, generator=generator)[shard].clone().requires_grad_()
    grad = torch.randn(ROWS, 1, HIDDEN, generator=generator)[shard]
    for layer in (column, row):
        layer.requires_grad_(not frozen)
    out, _ = row(torch.tanh(column(x)[0]))
    out.backward(grad)
    found = {"out": out.detach(), "x": x.grad}
    for name, layer in (("column", column), ("row", row)):
        found |= {f"{name}.{key}": value.grad for key, value in layer.named_parameters() if value.grad is not None}
    return found  # type: ignore[return-value]


def _compare(out: Path, rank: int, world_size: int, sequence_parallel: bool) -> None:
    options = {"bias": True, "sequence_parallel": sequence_parallel, "tp_size": world_size}
    size = ROWS // world_size
    shard = slice(rank * size, (rank + 1) * size) if sequence_parallel else slice(None)
    products = []
    through = linear._times_transposed
    linear._times_transposed = lambda *a: products.append(a) or through(*a)  # type: ignore[func-returns-value]
    ours, theirs = (_layers(rank, ours=mine, **options) for mine in (True, False))  # type: ignore[arg-type]
    for frozen in (False, True):
        products.clear()
        found = _run(*ours, shard=shard, frozen=frozen)
        assert len(products) == (4 if frozen else 6), "not every product took the path"
        expected = _run(*theirs, shard=shard, frozen=frozen)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert [list(layer.state_dict()) for layer in ours] == [list(layer.state_dict()) for layer in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for (name, parameter), (_, wanted) in zip(mine.named_parameters(), other.named_parameters(), strict=True):
            for mark in ("tensor_model_parallel", "partition_dim", "sequence_parallel", "allreduce"):
                assert getattr(parameter, mark, None) == getattr(wanted, mark, None), (name, mark)
    (out / f"{rank}").write_text("equal")


def _child(rank: int, world_size: int, port: int, out: Path, sequence_parallel: bool) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    process = Process(rank=rank, world_size=world_size, master_port=port)
    init_parallel(get_platform("cpu"), process, sizes=ParallelSizes(tp=world_size), seed=1, timeout_s=60)
    _compare(out, rank, world_size, sequence_parallel)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(("world_size", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_output_gradients_and_names_are_megatrons(world_size: int, sequence_parallel: bool, tmp_path: Path) -> None:
    on_ranks(_child, world_size, tmp_path, sequence_parallel)
    assert len(list(tmp_path.iterdir())) == world_size


def test_where_torchs_product_is_used_the_layers_are_megatrons_own() -> None:
    get_platform("cpu").prepare_megatron()
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from rlxf.models.megatron.linear import column_parallel, row_parallel

    platform = get_platform("cpu", cpu_linear="mkl")
    assert (column_parallel(platform), row_parallel(platform)) == (ColumnParallelLinear, RowParallelLinear)


def test_an_actor_trains_the_same_on_either_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MIN_WEIGHT_ELEMENTS", 1)  # a tiny model takes the path
    folder = save_causal_lm(tmp_path / "model", "qwen2", tied=True)  # with a bias
    reference = build_reference(run_config(folder), get_platform("cpu", cpu_linear="mkl"), Process())
    found = []
    for choice in ("onednn", "mkl"):
        actor = build_actor(run_config(folder), get_platform("cpu", cpu_linear=choice), Process())
        steps = []
        for step in range(3):
            pairs = random_pairs(6, seed=step)
            steps.append(actor.update(ReferencedPairs(pairs=pairs, reference=reference.logps(pairs)), step))
        names = [name for name, _ in actor.model.exported_shapes()]
        found.append((steps, {name: value.clone() for name, value in actor.model.export(names)}))
    (fast_steps, fast), (plain_steps, plain) = found
    for mine, other in zip(fast_steps, plain_steps, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    assert any(not torch.equal(fast[name], plain[name]) for name in plain), "the path was not taken"
    for name in plain:
        torch.testing.assert_close(fast[name], plain[name], rtol=0, atol=2e-5)
