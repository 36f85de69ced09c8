"""The shape of each role's model: from its folder's ``config.json`` if the folder exists, else from the recipe."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlxf.config.config_json import read_settings, shape_of
from rlxf.config.folders import shown
from rlxf.config.keys import ROLES
from rlxf.config.problems import Problem, show
from rlxf.config.schema import ModelConfig, RunConfig
from rlxf.core.errors import ConfigError

# Keys in which a model named on the command line must agree with the folder. Models of one size may differ in the other
# keys, for example by more rows of the embedding or a longer context.
_ONE_SIZE = frozenset(
    ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a recipe says about its models."""

    models: Mapping[str, Mapping[str, Any]]  # the sections of `model`, each with the keys that it sets
    sources: Mapping[str, str]  # role -> the key that names its model; none for a role that takes the actor's
    typed: Collection[str]  # keys of the command line


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """A recipe whose roles name shapes that ``model`` holds."""

    config: RunConfig
    problems: list[Problem]
    note: str | None  # is logged once the whole recipe has passed its checks
    decided: frozenset[str]  # models of the recipe that a folder's shape replaces


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """A role's folder, its shape, and what the recipe says about it."""

    role: str
    name: str  # of the model that the recipe names for the role; may be empty
    key: str  # `actor_rollout.load`; of the first role that loads this folder
    folder: Path
    shape: ModelConfig
    differ: Mapping[str, tuple[Any, Any]]  # key -> the recipe's value, the folder's value


def resolve_shapes(config: RunConfig, written: Written) -> Resolved:
    """Put the shape of each role's folder into ``model``, under the recipe's name if the recipe has the same shape.

    The problems include those of a folder itself: no ``config.json``, another family, an impossible shape.
    """
    problems: list[Problem] = []
    found = list(_found(config, written, problems))
    others: list[str] = []
    for item in found:
        wrong = list(_typed(item, written))
        problems += wrong
        if item.differ and item.role in written.sources and not wrong:
            others.append(_other(item))
    models, names, decided = _named_shapes(config, found)
    problems += _without_shape(config, names["actor_rollout"])
    return Resolved(
        config=_with_names(config, models, names),
        problems=problems,
        note="; ".join(["the folder decides the shape", *dict.fromkeys(others)]) if others else None,
        decided=decided,
    )


def _found(config: RunConfig, written: Written, problems: list[Problem]) -> Iterator[_Found]:
    """The roles whose folders are here; what is wrong with a folder is added to ``problems``."""
    keys: dict[Path, str] = {}
    for role in ROLES:
        name, folder = _model(config, role), _folder(config, role)
        if folder is None or not folder.is_dir() or (role in written.sources and name not in written.models):
            continue  # an unknown name is reported elsewhere
        name = name if name in written.models else ""
        key = keys.setdefault(folder, f"{role}.load")
        try:
            shape = shape_of(read_settings(folder))
        except ConfigError as error:
            problems.append(Problem((f"{role}.model",), f"{key} = {show(shown(folder))}: {error}"))
            continue
        said = _values(config.model[name]) if name in config.model else written.models.get(name, {})
        differ = _differences(said, shape)
        yield _Found(role=role, name=name, key=key, folder=folder, shape=shape, differ=differ)


def _model(config: RunConfig, role: str) -> str:
    """The model that the recipe names for a role, or nothing."""
    name: str | None = getattr(config, role).model
    return name or ""


def _folder(config: RunConfig, role: str) -> Path | None:
    """The folder that a role of this run loads."""
    load: str | None = getattr(config, role).load
    return None if load is None or (role == "reward" and not config.scores) else Path(load)


def _values(shape: ModelConfig) -> dict[str, Any]:
    """Every key of a shape, unset keys filled in."""
    values: dict[str, Any] = shape.model_dump()
    if shape.kv_channels is None and shape.hidden_size % shape.num_attention_heads:
        return values  # it has no head size
    return values | {"num_query_groups": shape.kv_heads, "kv_channels": shape.head_size}


def _differences(said: Mapping[str, Any], shape: ModelConfig) -> dict[str, tuple[Any, Any]]:
    theirs = shape.model_dump()
    return {key: (said[key], value) for key, value in theirs.items() if key in said and said[key] != value}


def _other(item: _Found) -> str:
    """The keys in which a folder differs from the recipe's file."""
    values = ", ".join(
        f"{key} = {show(theirs)} (model.{item.name}: {show(ours)})" for key, (ours, theirs) in item.differ.items()
    )
    return f"{shown(item.folder)} has {values}"


def _typed(item: _Found, written: Written) -> Iterator[Problem]:
    """The problem of a shape on the command line that differs from the folder's."""
    source, place = written.sources.get(item.role), f"{item.key} = {show(shown(item.folder))}"
    if source is None:
        return
    for key, (ours, theirs) in item.differ.items():
        full = f"model.{item.name}.{key}"
        if full in written.typed:
            text = f"expected {show(theirs)}, as {place} has it; leave the key out: the folder decides the shape"
            yield Problem((full,), f"{full} = {show(ours)}: {text}")
    if not {source, "model", f"model.{item.name}"} & set(written.typed):
        return
    values = [
        f"{key} = {show(theirs)} ({item.name}: {show(ours)})"
        for key, (ours, theirs) in item.differ.items()
        if key in _ONE_SIZE
    ]
    if values:
        text = f"{place} has {', '.join(values)}; leave the model out: the folder decides the shape"
        yield Problem((source,), f"{source} = {show(item.name)}: {text}")


def _named_shapes(
    config: RunConfig, found: list[_Found]
) -> tuple[dict[str, ModelConfig], dict[str, str], frozenset[str]]:
    """The models, the name of each role's model, and the recipe's models that folders have replaced."""
    left = {role: _model(config, role) for role in ROLES if role not in {item.role for item in found}}
    decided = frozenset(item.name for item in found if item.name) - set(left.values())
    models = {name: shape for name, shape in config.model.items() if name not in decided}
    names: dict[str, str] = {}
    for item in found:
        keeps = item.name and not item.differ
        names[item.role] = _free(item.name if keeps else _name_of(item.folder), item.shape, models)
        models[names[item.role]] = item.shape
    for role, name in left.items():  # without its folder and without a name: the actor's shape, to plan with
        names[role] = name or names.get("actor_rollout", "")
    return models, names, decided


def _name_of(folder: Path) -> str:
    """A folder's name, as a key of a recipe may be written."""
    return re.sub(r"[^\w-]", "_", folder.name) or "model"


def _free(name: str, shape: ModelConfig, models: Mapping[str, ModelConfig]) -> str:
    """The name, or the name with a number if another shape has it."""
    free, count = name, 1
    while free in models and _values(models[free]) != _values(shape):
        count += 1
        free = f"{name}_{count}"
    return free


def _without_shape(config: RunConfig, name: str) -> Iterator[Problem]:
    """Roles without a shape. A dry run needs one. A real run needs the folder, whose absence is reported elsewhere."""
    folder = _folder(config, "actor_rollout")
    if not config.dry_run or name or folder is None or folder.is_dir():
        return
    file = "+model=NAME actor_rollout.model=NAME, with a file of configs/rlxf/model such as llama3-8b"
    way = f"actor_rollout.model={next(iter(config.model))}" if config.model else file
    text = f"no such folder, and the recipe names no model to plan with; put the folder there, or name a shape: {way}"
    keys = tuple(f"{role}.model" for role in ROLES)
    yield Problem(keys, f"actor_rollout.load = {show(shown(folder))}: {text}")


def _with_names(config: RunConfig, models: dict[str, ModelConfig], names: Mapping[str, str]) -> RunConfig:
    roles = [role for role in ROLES if role != "reward" or config.reward.load is not None]  # a function has no model
    sections = {role: getattr(config, role).model_copy(update={"model": names[role]}) for role in roles}
    return config.model_copy(update={"model": models, **sections})
