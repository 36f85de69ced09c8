"""What every run imports; the server that forks runs does so once, when it imports this (tests/runs/killed.py)."""

from __future__ import annotations

import importlib
import os

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from rlxf.models.megatron.parallel import require_megatron
from rlxf.platform import get_platform

MODULES = (
    "transformers.models.llama.modeling_llama",
    "rlxf.assembly.local",
    "rlxf.models.megatron.checkpoint",
    "rlxf.models.megatron.model",
    "rlxf.reference.frozen",
    "rlxf.rollout.hf",
    "rlxf.score.functions",
    "rlxf.score.reward_model",
    "rlxf.update.actor",
)

get_platform("cpu").prepare_megatron()  # before the first import of megatron-core
require_megatron()  # this one, which leaves out what is not needed
for name in MODULES:
    importlib.import_module(name)
