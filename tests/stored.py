"""The checkpoint of revision de81d37 in tests/data, put where a test can go on with it."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from rlxf.update.actor import MegatronActor

STORED = Path(__file__).parent / "data" / "checkpoint_de81d37"
_MADE_IN = "/tmp/rlxf"  # every path in the stored files begins so
_WITH_PATHS = ("checkpoints/iter_0000003/driver.json", "run/config.yaml")


@dataclass(frozen=True)
class StoredRun:
    """A copy of the stored run: 3 of 6 steps are done, and the process was killed in the fourth."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "iter_0000003"

    @property
    def recipe(self) -> dict[str, dict[str, Any]]:
        """The recipe that wrote it, with the paths of the copy."""
        recipe: dict[str, dict[str, Any]] = yaml.safe_load((self.folder / "recipe.yaml").read_text())
        for section, key in (("actor_rollout", "data_path"), ("actor_rollout", "save")):
            recipe[section][key] = str(self.folder / recipe[section][key])
        for section in ("actor_rollout", "ref", "reward"):
            recipe[section]["load"] = str(self.folder / recipe[section]["load"])
        return recipe

    def rewrite_driver(self, **changes: Any) -> None:
        """Change keys of ``driver.json``; the manifest fits again."""
        path = self.checkpoint / "driver.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2) + "\n")
        _fit_manifest(self.checkpoint, path)


def unpack(folder: Path) -> StoredRun:
    """A copy in ``folder``, which must not exist, as if the run had been made there."""
    shutil.copytree(STORED, folder)
    for name in _WITH_PATHS:
        path = folder / name
        path.write_text(path.read_text().replace(_MADE_IN, str(folder)))
    stored = StoredRun(folder)
    _fit_manifest(stored.checkpoint, stored.checkpoint / "driver.json")
    return stored


def _fit_manifest(checkpoint: Path, path: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["files"][path.name] = {"num_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def digests(actor: MegatronActor) -> dict[str, Any]:
    """SHA-256 of what a checkpoint holds of an actor: weights, optimizer state and this process's random states."""
    exported = actor.model.export([name for name, _ in actor.model.exported_shapes()])
    weights = {name: _digest(value) for name, value in exported}
    optimizer: dict[str, str] = {}
    for number, part in enumerate(actor.trainable.optimizer.chained_optimizers):
        for group, item in enumerate(part.optimizer.param_groups):
            for index, parameter in enumerate(item["params"]):
                for name, value in sorted(part.optimizer.state[parameter].items()):
                    if isinstance(value, Tensor):
                        optimizer[f"{number}.{group}.{index}.{name}"] = _digest(value)
            optimizer[f"{number}.{group}.step"] = str(int(item["step"]))
    return {"weights": weights, "optimizer": optimizer, "random": random_digests()}


def random_digests() -> dict[str, str]:
    """SHA-256 of the random states of this process."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": hashlib.sha256(repr(random.getstate()).encode()).hexdigest(),
        "numpy": hashlib.sha256(repr((str(kind), np.asarray(keys).tolist(), rest)).encode()).hexdigest(),
        "torch": _digest(torch.get_rng_state()),
    }


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
