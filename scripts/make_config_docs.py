"""Write docs/config.md from the schema: ``python scripts/make_config_docs.py``; ``--check`` only compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pydantic.fields import FieldInfo  # noqa: E402
from pydantic_core import PydanticUndefined  # noqa: E402

from rlxf.config import keys, rewards, roles, schema  # noqa: E402
from rlxf.config.fields import LocalPath  # noqa: E402
from rlxf.config.kinds import Beta, Strict  # noqa: E402

PAGE = ROOT / "docs" / "config.md"
INTRO = """# Configuration

*Generated from the docstrings in `rlxf/config/{schema,roles,rewards,plan}.py` by `scripts/make_config_docs.py`; do not
edit.*

This page lists every key that a recipe can set, with its type, its default and its meaning. The [glossary](glossary.md)
explains the terms. A recipe is a YAML file in `configs/rlxf/`. You run it by its name:

```bash
python ray_gpt.py --config-name online_dpo_trainer_tiny training.seed=2 actor_rollout.lr=1e-4
```

- **You can set every key of this page on the command line** as `section.key=value`, for any recipe. `--cfg job` prints
  the composed recipe. `dry_run=true` checks it and prints [what it costs](planner.md). `--multirun` runs several
  recipes. `--config-dir` adds a folder of your own recipes. `hydra.run.dir` sets the run's folder (default
  `outputs/<recipe>/<date>_<time>`).
- **Where a value comes from**: the role's own key, else `training`, else the role's `model.<name>` section, else the
  default below. `null` means the same as leaving the key out. `training` may hold any key of a role; it is then the
  default of all roles.
- **The shape of a model** is read from its folder's `config.json` (`llama`, `qwen2`, `qwen3`); no key needs to repeat
  it. A role's `model` names a shape for `dry_run` on a machine without the folder. If the folder exists and its shape
  differs, the log names the keys; if you typed the differing `model` or `model.<name>` key, it is an error.
  `config.yaml` and checkpoints hold the shape that was used.
- If no section sets them, `ref` and `reward` take `bf16`, `seq_length` and `micro_batch_size` from the actor. `ref`
  also takes `load`. If their folders do not exist and they name no `model`, they take the actor's shape.
- `reward.load`, `reward.function` or `reward.sources` on the command line replaces the others in the recipe.
- `micro_batch_size` of a section on the command line replaces its `max_tokens_per_micro_batch` in the recipe.
- **Paths** are relative to the folder where you type the command.
- An unknown key, in a file or on the command line, is an error. The message names the nearest valid key. All mistakes
  in a recipe are reported at once.
- A recipe with the sections `actor_rollout_ref.actor_rollout` and `actor_rollout_ref.ref` works, too. If a key is set
  in both layouts, the value in `actor_rollout` or `ref` wins.
"""


def kind(annotation: Any, metadata: list[Any]) -> str:
    """A field's type and bounds in words."""
    if annotation == get_args(Beta)[0]:
        return "float or list of float, > 0"
    marks = [mark for mark in metadata if isinstance(mark, LocalPath)]
    inner = get_args(annotation)
    if hasattr(annotation, "__metadata__"):
        return kind(annotation.__origin__, [*annotation.__metadata__, *metadata])
    if type(None) in inner:
        return kind(next(arg for arg in inner if arg is not type(None)), metadata)
    if get_origin(annotation) is Literal:
        return " / ".join(f"`{value}`" for value in inner)
    if marks:
        places = {"output": "path", "data": "path, or list of paths"}
        place = places.get(marks[0].kind, f"path of a {marks[0].kind}")
        return " / ".join([*(f"`{word}`" for word in marks[0].words), place])
    if get_origin(annotation) is dict:
        return "mapping, or one in JSON"
    if get_origin(annotation) is tuple and any(isinstance(part, LocalPath) for part in get_args(inner[0])):
        return kind(inner[0], [])
    if get_origin(annotation) is tuple and inner[0] is rewards.RewardSource:
        return "list of mappings, see below"
    if get_origin(annotation) is tuple and inner[0] is str:
        return "list of text"
    if get_origin(annotation) is tuple and float in (inner[0], getattr(inner[0], "__origin__", None)):
        return "list of float"
    if get_origin(annotation) is tuple:
        return f"list of {kind(inner[0], [])}" if get_origin(inner[0]) is Literal else "int or list of int, each >= 1"
    words = {int: "int", float: "float", bool: "bool", str: "text"}[annotation]
    return words + bounds(metadata)


def bounds(metadata: list[Any]) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits: dict[str, float] = {}
    for mark in [part for item in metadata for part in (getattr(item, "metadata", None) or [item])]:
        limits |= {sign: getattr(mark, sign) for sign in signs if getattr(mark, sign, None) is not None}
    return "".join(f", {signs[sign]} {value}" for sign, value in limits.items())


def default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default in (None, ""):
        return "unset"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


HEAD = ["| key | type | default | meaning |", "|---|---|---|---|"]


def row(name: str, field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).replace("|", "\\|")
    return f"| `{name}` | {kind(field.annotation, field.metadata)} | {default(field)} | {text} |"


def section(title: str, model: type[Strict], *, above: type[Strict] | None = None) -> str:
    """A heading, the class's docstring and a table of its fields. Another table has the fields of ``above``.

    A class that is put together from others has a table for each of them.
    """
    skip = set(above.model_fields) if above else set()
    lines = [f"\n## `{title}`\n", (model.__doc__ or "").strip().replace("``", "`"), ""]
    own = [name for name in model.model_fields if name in vars(model).get("__annotations__", {}) and name not in skip]
    if own:
        lines += [*HEAD, *(row(name, model.model_fields[name]) for name in own)]
    for part in model.__bases__:
        names = [name for name in getattr(part, "model_fields", {}) if name not in skip]
        if names:
            lines += ["", f"**{(part.__doc__ or '').strip()}**", "", *HEAD]
            lines += [row(name, model.model_fields[name]) for name in names]
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    parts = [INTRO, top_level()]
    parts.append(section("training", schema.TrainingConfig))
    parts.append(section("actor_rollout, ref and reward", roles.RoleConfig))
    parts.append(section("actor_rollout", roles.ActorConfig, above=roles.RoleConfig))
    parts.append(section("ref", roles.ReferenceConfig, above=roles.RoleConfig))
    parts.append(section("reward", roles.RewardConfig, above=roles.RoleConfig))
    parts.append(section("reward.sources[]", rewards.RewardSource))
    last = ("rollout", "sync", "algorithm", "judge", "resource_pool", "resilience", "eval", "log", "health", "plan")
    parts += [section(name, keys.SECTIONS[name]) for name in last]
    parts.append(section("model.<name>", schema.ModelConfig))
    return "".join([*parts, older_names()])


def top_level() -> str:
    lines = ["\n## Top level\n", *HEAD]
    lines += [row(name, schema.RunConfig.model_fields[name]) for name in ("runtime", "dry_run")]
    return "\n".join(lines) + "\n"


def older_names() -> str:
    """Aliases, legacy keys and what is not there yet."""
    lines = ["\n## Older names\n"]
    lines += [f"- `{'.'.join(old)}` is read as `{'.'.join(new)}`." for old, new in keys.ALIASES.items()]
    lines.append("- `model.<name>.padded_vocab_size` is read as `model.<name>.vocab_size`.")
    lines.append("\nThe following keys are accepted and have no effect. One warning names those that a recipe sets:\n")
    roles = ", ".join(f"`{key}`" for key in sorted(keys.LEGACY["training"]))
    algorithm = ", ".join(f"`{key}`" for key in sorted(keys.LEGACY["algorithm"]))
    lines += [f"- in `training`, the roles and `model.<name>`: {roles}", f"- in `algorithm`: {algorithm}"]
    lines.append("\nThe following keys are not available. Only the value that switches them off is accepted:\n")
    lines.append(", ".join(f"`{key}`" for key in keys.NOT_YET))
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 when the page is stale, write nothing")
    check = parser.parse_args().check
    text = page()
    if check:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print(f"{PAGE.relative_to(ROOT)} is {'up to date' if fresh else 'stale: run scripts/make_config_docs.py'}")
        return 0 if fresh else 1
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
