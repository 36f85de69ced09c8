"""Chunked log-probabilities equal the full log-softmax, forward and backward, whole and cut over a group."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rlxf.models.logps import target_logps
from rlxf.models.megatron.parallel import free_port

ROWS, HIDDEN, VOCABULARY = 40, 16, 24


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, targets that name every vocabulary id, and an uneven gradient."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    targets = torch.arange(ROWS) % VOCABULARY
    return hidden, weight, targets, torch.randn(ROWS, generator=generator)


def full(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    values = (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    values.backward(grad)
    assert hidden.grad is not None
    assert weight.grad is not None
    return values.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("rows_at_a_time", [1, 7, ROWS])
def test_chunks_of_any_size_equal_the_full_log_softmax(rows_at_a_time: int) -> None:
    hidden, weight, targets, grad = inputs()
    expected = full(hidden, weight, targets, grad)
    hidden.requires_grad_()
    weight.requires_grad_()
    values = target_logps(hidden, weight, targets, chunk_elements=rows_at_a_time * VOCABULARY)
    values.backward(grad)
    for found, wanted in zip((values.detach(), hidden.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_bf16_sums_in_fp32() -> None:
    hidden, weight, targets, grad = inputs()
    expected = full(hidden, weight, targets, grad)
    half_hidden, half_weight = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    values = target_logps(half_hidden, half_weight, targets, chunk_elements=3 * VOCABULARY)
    values.backward(grad)
    assert values.dtype == torch.float32
    for found, wanted in zip((values.detach(), half_hidden.grad, half_weight.grad), expected, strict=True):
        assert found is not None
        assert float((found.float() - wanted).abs().max() / wanted.abs().max()) < 0.02


def test_a_frozen_head_gets_no_gradient_tensor() -> None:
    hidden, weight, targets, grad = inputs()
    values = target_logps(hidden.requires_grad_(), weight, targets)
    values.backward(grad)
    assert weight.grad is None
    assert hidden.grad is not None


def _rank(rank: int, world_size: int, port: int, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    hidden, weight, targets, grad = inputs()
    share = weight.chunk(world_size)[rank].clone().requires_grad_()
    values = target_logps(
        hidden.requires_grad_(), share, targets, group=dist.group.WORLD, chunk_elements=5 * VOCABULARY // world_size
    )
    values.backward(grad)
    torch.save((values.detach(), hidden.grad, share.grad), out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_vocabulary_cut_over_ranks_equals_the_whole_one(world_size: int, tmp_path: Path) -> None:
    """Every id is a target; a rank that does not hold one must still get its softmax gradient."""
    expected_values, expected_hidden, expected_weight = full(*inputs())
    mp.start_processes(_rank, args=(world_size, free_port(), tmp_path), nprocs=world_size, start_method="spawn")
    shares = []
    for rank in range(world_size):
        values, hidden_grad, share_grad = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(values, expected_values, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(hidden_grad, expected_hidden, atol=2e-6, rtol=1e-5)
        shares.append(share_grad)
    torch.testing.assert_close(torch.cat(shares), expected_weight, atol=2e-6, rtol=1e-5)
