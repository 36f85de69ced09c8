"""Checks of the LoRA keys: what belongs together, what the device can do, and what an adapter's own config requires."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from rlxf.config.devices import device_facts, find_device
from rlxf.config.folders import shown
from rlxf.config.problems import Problem, show, wrong
from rlxf.config.roles import ActorConfig
from rlxf.config.schema import RunConfig

logger = logging.getLogger(__name__)

_KEYS = ("lora_alpha", "lora_dropout", "lora_target_modules")
_QLORA = "actor_rollout.qlora"


def lora_problems(config: RunConfig) -> Iterator[Problem]:
    """All mistakes in the LoRA keys that no single value shows."""
    actor = config.actor_rollout
    if not actor.lora_r:
        for key, off in (("lora_load", None), ("qlora", False)):
            value = getattr(actor, key)
            if value != off:
                expected = f"needs actor_rollout.lora_r > 0; set it, or set {key} to {show(off)}"
                yield wrong(f"actor_rollout.{key}", value, expected, "actor_rollout.lora_r")
        return
    if not actor.lora_target_modules:
        expected = "expected at least one of linear_qkv, linear_proj, linear_fc1, linear_fc2: nothing would train"
        yield wrong("actor_rollout.lora_target_modules", [], expected)
    if actor.qlora:
        yield from _qlora(config)
    if actor.lora_load is not None and Path(actor.lora_load).is_dir():
        yield from _adapter(actor, Path(actor.lora_load))


def warn_of_unused(config: RunConfig) -> None:
    """Names LoRA keys that a recipe sets without ``lora_r``."""
    actor = config.actor_rollout
    unused = [f"actor_rollout.{key}" for key in _KEYS if key in actor.model_fields_set]
    if unused and not actor.lora_r:
        logger.warning(
            "these keys have no effect with actor_rollout.lora_r = 0, which trains all parameters: %s",
            ", ".join(unused),
        )


def say_which_reference(config: RunConfig) -> None:
    """Log whether a LoRA run has a reference model of its own, if the recipe may have meant the opposite."""
    if not config.actor_rollout.lora_r:
        return
    if not config.needs_reference:
        return
    if not config.reference_is_base:
        logger.warning(
            "ref.load or ref.bf16 (fp16) differs from the actor's: the reference is a second model, on its own devices"
        )
    elif "ref" in config.resource_pool.model_fields_set:
        logger.warning("resource_pool.ref has no effect with LoRA: the reference is the actor with its adapters off")


def _qlora(config: RunConfig) -> Iterator[Problem]:
    device = config.training.device
    if config.dry_run and device == "auto":
        return  # a plan for another machine; its device is not known here
    if not device_facts(device).has_bitsandbytes:
        here = f"{find_device()} (which training.device=auto finds here)" if device == "auto" else device
        expected = f"expected false: bitsandbytes, which holds weights in 4 bits, has no kernels for {here}"
        yield wrong(_QLORA, True, expected, "training.device")
    elif find_spec("bitsandbytes") is None and not config.dry_run:
        yield wrong(_QLORA, True, "needs bitsandbytes, which is not installed: pip install 'rlxf[qlora]'")


def _adapter(actor: ActorConfig, folder: Path) -> Iterator[Problem]:
    """What is wrong with ``lora_load``, as far as its small file shows."""
    key = "actor_rollout.lora_load"
    file = folder / "adapter_config.json"
    if not file.is_file():
        yield Problem((key,), f"{key} = {show(shown(folder))}: holds no adapter_config.json; expected a PEFT folder")
        return
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        found = {"lora_r": int(settings["r"]), "lora_alpha": float(settings["lora_alpha"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Problem((key,), f"{key} = {show(shown(folder))}: its adapter_config.json cannot be read: {error!r}")
        return
    for name, value in found.items():
        if getattr(actor, name) != value:
            expected = f"the adapter that actor_rollout.lora_load names was trained with {value:g}; set it to that"
            yield wrong(f"actor_rollout.{name}", getattr(actor, name), expected, key)
