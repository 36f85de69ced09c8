"""Operations that are counted are those that the model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlxf.assembly.roles import build_actor
from rlxf.core.types import Pairs, Sequences
from rlxf.planner.flops import Rows, Trained, decode_rows, forward_flops, model_flops, prefill_rows, stream
from rlxf.planner.jobs import Shape, Work
from rlxf.platform import Process, get_platform
from tests.settings import MODEL, random_rows, referenced, run_config
from tests.tiny_models import save_causal_lm

PROMPT, COMPLETION, PAIRS = 24, 40, 3
SHAPE = Shape.of(MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("flops") / "model")


def sequences() -> list[Sequences]:
    draw = torch.Generator().manual_seed(0)
    prompts = random_rows(PAIRS, PROMPT, PROMPT + 1, draw)
    return [Sequences.from_rows(prompts, random_rows(PAIRS, COMPLETION, COMPLETION + 1, draw)) for _ in range(2)]


@pytest.mark.parametrize("share", [True, False])
def test_an_optimizer_step_computes_what_is_counted(folder: Path, share: bool) -> None:
    chosen, rejected = sequences()
    batch = referenced(Pairs(chosen=chosen, rejected=rejected))
    config = run_config(folder, ppo_mini_batch_size=PAIRS, share_prompts=share)
    actor = build_actor(config, get_platform("cpu", cpu_linear="mkl"), Process())
    rows = torch.arange(PAIRS)
    mini_batch = actor.objective.mini_batch(batch, rows, first_pass=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        actor._accumulate(mini_batch, rows, 0)
    unit = stream(PROMPT, COMPLETION, 2, share=share)
    flops = forward_flops(SHAPE, unit.times(PAIRS))
    # torch computes the whole square of scores where half of it is masked.
    fed = COMPLETION - 1
    squares = PROMPT**2 + 2 * fed * (PROMPT + fed) if share else 2 * (PROMPT + fed) ** 2
    whole = flops.attention * squares / unit.seen
    # Three passes through layers and attention, and a fourth one of the head: its logits are computed again.
    assert counter.get_total_flops() == pytest.approx(3 * flops.body + 3 * whole + 4 * flops.head, rel=0.02)
    assert model_flops(SHAPE, unit.times(PAIRS)) == 3 * flops.total


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("scores", [True, False])
def test_streams_are_those_that_are_packed(folder: Path, share: bool, scores: bool) -> None:
    get_platform("cpu").prepare_megatron()
    from rlxf.models.megatron.packing import pack_for_logps, pack_for_scores

    config = run_config(folder)
    layout = build_actor(config, get_platform("cpu"), Process()).layout
    packed = (pack_for_scores if scores else pack_for_logps)(Sequences.concat(sequences()), layout, share_prompts=share)
    found = stream(PROMPT, COMPLETION, 2, share=share, scores=scores).times(PAIRS)
    sizes = packed.blocks.sizes
    seen = sum(q * k - q * (q - 1) // 2 for q, k in zip(sizes.queries, sizes.keys, strict=True))
    assert (found.tokens, found.read, found.seen) == (packed.num_tokens, len(packed.rows), seen)


def test_prompts_are_filled_in_once_and_the_last_token_is_not_fed() -> None:
    work = Work(prompts=3, samples=4, prompt_tokens=10.0, completion_tokens=6.0)
    assert prefill_rows(work) == Rows(tokens=30, read=3, seen=3 * 55)
    each = sum(10 + 1 + index for index in range(5))  # keys of the five tokens that are fed
    assert decode_rows(work) == Rows(tokens=12 * 5, read=12 * 5, seen=12 * each)


def test_completions_of_several_pairs_are_computed_once() -> None:
    assert Trained.of(Work(prompts=8, samples=2, prompt_tokens=1, completion_tokens=1, pairs=8.0)) == Trained(
        prompts=8, sides=2
    )
    every = Work(prompts=8, samples=4, prompt_tokens=1, completion_tokens=1, pairs=48.0)
    assert Trained.of(every) == Trained(prompts=8, sides=4)
    tied = Work(prompts=8, samples=4, prompt_tokens=1, completion_tokens=1, pairs=5.0)
    assert Trained.of(tied) == Trained(prompts=5, sides=2)
    examples = Work(prompts=8, samples=1, prompt_tokens=1, completion_tokens=1, pairs=8.0, sides=1)
    assert Trained.of(examples) == Trained(prompts=8, sides=1)
