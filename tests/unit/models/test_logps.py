"""Chunked log-probabilities equal the full log-softmax, forward and backward, whole and cut over a group."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.models import logps
from rlxf.models.logps import log_collisions, target_logps
from rlxf.platform import get_platform, linear
from rlxf.platform.base import LogitChunks
from tests.ranks import on_ranks

ROWS, HIDDEN, VOCABULARY = 40, 16, 24
VOCABULARIES = (24, 23, 9)  # cut over ranks; 9 over 4 is 3, 3, 3 and a rank of padding only


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
    values = target_logps(hidden, weight, targets, chunks=LogitChunks(elements=rows_at_a_time * VOCABULARY))
    values.backward(grad)
    for found, wanted in zip((values.detach(), hidden.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_equal_parts_of_the_vocabulary_equal_the_full_log_softmax() -> None:
    """As an accelerator cuts it: parts of about one width, whatever the number of rows."""
    hidden, weight, targets, grad = inputs()
    expected = full(hidden, weight, targets, grad)
    hidden.requires_grad_()
    weight.requires_grad_()
    chunks = LogitChunks(elements=2**20, rows=7, columns=9)
    values = target_logps(hidden, weight, targets, chunks=chunks)
    values.backward(grad)
    for found, wanted in zip((values.detach(), hidden.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
    parts = list(logps._vocabulary_chunks(128256, 3000, LogitChunks(columns=2**15)))
    assert {part.stop - part.start for part in parts} == {32064}
    assert list(logps._vocabulary_chunks(0, 3000, LogitChunks(columns=2**15))) == []


@pytest.mark.parametrize("rows_at_a_time", [1, 7, ROWS])
@pytest.mark.parametrize("real", [VOCABULARY, VOCABULARY - 5])
def test_collisions_are_the_sum_of_squared_probabilities(rows_at_a_time: int, real: int) -> None:
    hidden, weight, *_ = inputs()
    expected = (hidden @ weight[:real].t()).softmax(-1).square().sum(-1).log()
    found = log_collisions(
        hidden, weight, vocab_size=real, chunks=LogitChunks(elements=rows_at_a_time * VOCABULARY // 2)
    )
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_bf16_sums_in_fp32() -> None:
    hidden, weight, targets, grad = inputs()
    expected = full(hidden, weight, targets, grad)
    half_hidden, half_weight = (x.bfloat16().requires_grad_() for x in (hidden, weight))
    values = target_logps(half_hidden, half_weight, targets, chunks=LogitChunks(elements=3 * VOCABULARY))
    values.backward(grad)
    assert values.dtype == torch.float32
    for found, wanted in zip((values.detach(), half_hidden.grad, half_weight.grad), expected, strict=True):
        assert found is not None
        assert float((found.float() - wanted).abs().max() / wanted.abs().max()) < 0.02


def test_no_rows_give_a_gradient_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context-parallel rank may hold no completion token; memory that nothing wrote must not become a gradient."""
    monkeypatch.setattr(torch, "empty_like", lambda like: torch.full_like(like, torch.nan))
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, requires_grad=True)
    target_logps(hidden, weight, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert weight.grad is not None
    assert weight.grad.eq(0).all()


def test_a_frozen_head_gets_no_gradient_tensor() -> None:
    hidden, weight, targets, grad = inputs()
    values = target_logps(hidden.requires_grad_(), weight, targets)
    values.backward(grad)
    assert weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("rows_at_a_time", [2, ROWS])
def test_padding_rows_of_the_head_take_no_part(rows_at_a_time: int) -> None:
    hidden, weight, targets, grad = inputs()
    expected = full(hidden, weight, targets, grad)
    padded = torch.cat([weight, torch.full((5, HIDDEN), 100.0)]).requires_grad_()  # would be the largest logits of all
    values = target_logps(
        hidden.requires_grad_(),
        padded,
        targets,
        vocab_size=VOCABULARY,
        chunks=LogitChunks(elements=rows_at_a_time * VOCABULARY),
    )
    values.backward(grad)
    assert padded.grad is not None
    for found, wanted in zip((values.detach(), hidden.grad, padded.grad[:VOCABULARY]), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
    assert not padded.grad[VOCABULARY:].any()


def test_logits_of_hundreds_neither_overflow_nor_vanish() -> None:
    """The running maximum moves up from chunk to chunk, and down again; exp of a raw logit would be infinite."""
    _, _, targets, grad = inputs()
    hidden = torch.ones(ROWS, 1)
    weight = torch.tensor([[400.0 * math.sin(column)] for column in range(VOCABULARY)])
    expected = full(hidden.double(), weight.double(), targets, grad.double())
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    values = target_logps(hidden, weight, targets, chunks=LogitChunks(elements=ROWS * 2))
    values.backward(grad)
    # A logit of 400 is exact to 3e-5 in fp32, so is a probability; the gradient of hidden adds 400 times that.
    tolerances = (1e-4, 2e-2, 1e-4)
    for found, wanted, tolerance in zip((values.detach(), hidden.grad, weight.grad), expected, tolerances, strict=True):
        torch.testing.assert_close(found, wanted.float(), atol=tolerance, rtol=1e-5)


def test_the_fast_linear_path_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MIN_WEIGHT_ELEMENTS", 1)
    hidden, weight, targets, grad = inputs()
    expected = full(hidden, weight, targets, grad)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    values = target_logps(
        hidden,
        weight,
        targets,
        chunks=LogitChunks(elements=ROWS * 10),
        linear=get_platform("cpu", cpu_linear="onednn").linear,
    )
    values.backward(grad)
    for found, wanted in zip((values.detach(), hidden.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_every_id_equals_hugging_face_forward_and_backward(tmp_path: Path) -> None:
    import transformers  # here: the ranks of the tests below, which import this file, do without

    from tests.tiny_models import save_causal_lm

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(save_causal_lm(tmp_path, tied=False))
    vocabulary = model.config.vocab_size
    tokens = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1))[None]
    targets = tokens[0].roll(-1)  # each id is a target once
    model(tokens).logits[0].log_softmax(-1).gather(1, targets[:, None]).sum().backward()
    expected = model.lm_head.weight.grad.clone()
    wanted = model(tokens).logits[0].detach().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    head = model.lm_head.weight.detach().requires_grad_()
    hidden = model.model(tokens).last_hidden_state[0].detach()
    values = target_logps(hidden, head, targets, chunks=LogitChunks(elements=vocabulary * 50))
    values.sum().backward()
    torch.testing.assert_close(values.detach(), wanted, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(head.grad, expected, atol=1e-5, rtol=1e-5)


def _rank(rank: int, world_size: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    for vocabulary in VOCABULARIES:
        hidden, weight, targets, grad = inputs()
        size = -(-vocabulary // world_size)  # rows of each rank, the last ones filled up with padding
        padded = torch.cat([weight[:vocabulary], torch.full((size * world_size - vocabulary, HIDDEN), 100.0)])
        share = padded.split(size)[rank].clone().requires_grad_()
        values = target_logps(
            hidden.requires_grad_(), share, targets % vocabulary, group=dist.group.WORLD, vocab_size=vocabulary,
            chunks=LogitChunks(elements=5 * size),
        )  # fmt: skip
        values.backward(grad)
        torch.save((values.detach(), hidden.grad, share.grad), out / f"{vocabulary}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_vocabulary_cut_over_ranks_equals_the_whole_one(world_size: int, tmp_path: Path) -> None:
    """Every id is a target; a rank that does not hold one must still get its softmax gradient."""
    on_ranks(_rank, world_size, tmp_path)
    for vocabulary in VOCABULARIES:
        hidden, weight, targets, grad = inputs()
        expected = full(hidden, weight[:vocabulary], targets % vocabulary, grad)
        shares = []
        for rank in range(world_size):
            values, hidden_grad, share_grad = torch.load(tmp_path / f"{vocabulary}_{rank}.pt", weights_only=True)
            torch.testing.assert_close(values, expected[0], atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(hidden_grad, expected[1], atol=2e-6, rtol=1e-5)
            shares.append(share_grad)
        weight_grad = torch.cat(shares)
        torch.testing.assert_close(weight_grad[:vocabulary], expected[2], atol=2e-6, rtol=1e-5)
        assert not weight_grad[vocabulary:].any()
