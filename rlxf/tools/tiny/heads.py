"""The tiny world's models with one more attention head, so that two tensor-parallel ranks can share them.

The new head has zeros in all of its weights: it adds nothing, and no gradient reaches it, so a run computes and learns
what it does without it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rlxf.core.files import new_folder, remove_leftovers

FOLDER = "four_heads"  # below the world's folder


def write_four_heads(world: Path) -> None:
    """Write ``sft`` and ``rm`` of the world in ``world`` with a fourth head; complete or not there at all."""
    remove_leftovers(world, FOLDER)  # of a build that was killed
    with new_folder(world / FOLDER) as partial:
        for model in ("sft", "rm"):
            _add_head(world / model, partial / model)


def _add_head(source: Path, target: Path) -> None:
    from safetensors.torch import load_file, save_file
    from torch.nn.functional import pad

    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    heads = config["num_attention_heads"]
    size = config["hidden_size"] // heads
    more = {"num_attention_heads": heads + 1, "num_key_value_heads": heads + 1, "head_dim": size}
    (target / "config.json").write_text(json.dumps(config | more, indent=2) + "\n")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensors[name] = pad(tensor, (0, 0, 0, size))  # its outputs
        elif name.endswith("o_proj.weight"):
            tensors[name] = pad(tensor, (0, size)).contiguous()  # its inputs
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
