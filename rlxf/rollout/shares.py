"""One batch of prompts over several engines, and their results as one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from rlxf.core.types import PromptBatch, Rollouts, Sequences


def split_evenly(prompts: PromptBatch, parts: int) -> list[PromptBatch]:
    """Contiguous shares whose sizes differ by at most one; fewer than ``parts`` when there are fewer prompts."""
    count = min(parts, len(prompts))
    bounds = [len(prompts) * i // count for i in range(count + 1)]
    return [prompts.slice(start, stop) for start, stop in pairwise(bounds)]


def join(prompts: PromptBatch, parts: Sequence[Rollouts]) -> Rollouts:
    """The rollouts of contiguous shares of ``prompts``, in prompt order, with rows that count within ``prompts``."""
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + len(part.prompts))
    return Rollouts(
        prompts=prompts,
        sequences=Sequences.concat([part.sequences for part in parts]),
        prompt_index=torch.cat([part.prompt_index + offset for part, offset in zip(parts, offsets[:-1], strict=True)]),
        sample_index=torch.cat([part.sample_index for part in parts]),
        engine_logps=torch.cat([part.engine_logps for part in parts]),
        policy_version=torch.cat([part.policy_version for part in parts]),
    )
