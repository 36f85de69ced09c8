"""The learning rate of a driver step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rlxf.config.roles import OptimizerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Linear warm-up, then constant, or linear or cosine decay to ``min_lr`` in the last step. Counts driver steps.

    The first step after the warm-up has ``lr``, unless it is the last one and has ``min_lr``. A warm-up of all steps
    leaves none for the decay, and a run of a single step has ``lr``.
    """

    style: Literal["constant", "linear", "cosine"]
    lr: float
    min_lr: float
    warmup_steps: int
    num_steps: int

    def __call__(self, step: int) -> float:
        """Learning rate of driver step ``step``, from 0 to ``num_steps - 1``."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.style == "constant" or self.num_steps == 1:
            return self.lr
        last = self.num_steps - 1
        progress = (step - self.warmup_steps) / (last - self.warmup_steps) if step < last else 1.0
        share = 1 - progress if self.style == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.min_lr + (self.lr - self.min_lr) * share


def make_schedule(config: OptimizerConfig, num_steps: int) -> Schedule:
    """The schedule that a recipe describes; ``lr_warmup_fraction`` counts as that share of all steps."""
    fraction = config.lr_warmup_fraction
    warmup = round(fraction * num_steps) if fraction is not None else config.lr_warmup_iters
    return Schedule(
        style=config.lr_decay_style, lr=config.lr, min_lr=config.min_lr, warmup_steps=warmup, num_steps=num_steps
    )
