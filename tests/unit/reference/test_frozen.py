"""The reference gives Hugging Face's log-probabilities, and keeps giving them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from rlxf.assembly.roles import build_actor, build_reference
from rlxf.core.types import ReferencedPairs, Sequences
from rlxf.platform import Process, get_platform
from tests.settings import random_pairs, run_config
from tests.tiny_models import save_causal_lm


@torch.no_grad()
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_sums_equal_hugging_face_whatever_the_micro_batch(tmp_path: Path, micro_batch_size: int) -> None:
    folder = save_causal_lm(tmp_path / "m")
    pairs = random_pairs(7)
    reference = build_reference(run_config(folder, micro_batch_size=micro_batch_size), get_platform("cpu"), Process())
    found = reference.logps(pairs)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)

    def sums(sequences: Sequences) -> torch.Tensor:
        values = []
        for prompt, completion in zip(sequences.prompt_rows(), sequences.completion_rows(), strict=True):
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            values.append(logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())
        return torch.stack(values)

    torch.testing.assert_close(found.chosen, sums(pairs.chosen), atol=5e-5, rtol=0)
    torch.testing.assert_close(found.rejected, sums(pairs.rejected), atol=5e-5, rtol=0)


def test_training_the_actor_never_moves_the_reference(tmp_path: Path) -> None:
    folder = save_causal_lm(tmp_path / "m")
    config = run_config(folder, ppo_mini_batch_size=4)
    platform = get_platform("cpu")
    reference, actor = build_reference(config, platform, Process()), build_actor(config, platform, Process())
    pairs = random_pairs(4)
    before = reference.logps(pairs)
    actor.update(ReferencedPairs(pairs=pairs, reference=before), 0)
    after = reference.logps(pairs)
    assert torch.equal(before.chosen, after.chosen)
    assert torch.equal(before.rejected, after.rejected)
    assert not torch.equal(actor.token_logps(pairs.chosen), reference.token_logps(pairs.chosen))
