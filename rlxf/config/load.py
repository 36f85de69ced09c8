"""A recipe as Hydra composed it -> one frozen ``RunConfig``, or every mistake in it at once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlxf.config.checks import check
from rlxf.config.fields import LocalPath
from rlxf.config.keys import REFUSED_STAGES, ROLES, SECTIONS
from rlxf.config.kinds import Stage, Strict
from rlxf.config.normalise import Section, normalise
from rlxf.config.problems import Problem, concerning, expectation, lines, show
from rlxf.config.rewards import RewardSource, with_first_model
from rlxf.config.schema import ModelConfig, RunConfig
from rlxf.config.shapes import Written, resolve_shapes
from rlxf.config.stages import STAGES
from rlxf.config.typed import make_room
from rlxf.core.errors import ConfigError
from rlxf.core.user_file import file_of_module
from rlxf.core.words import nearest

logger = logging.getLogger(__name__)

# Keys that the frozen models take from the actor when no section sets them.
_FROM_ACTOR = {
    "ref": ("load", "bf16", "fp16", "seq_length", "micro_batch_size"),
    "reward": ("bf16", "fp16", "seq_length", "micro_batch_size"),
}


def load_config(raw: Mapping[str, Any], *, earlier: Sequence[str] = (), typed: Collection[str] = ()) -> RunConfig:
    """The merged and checked recipe. Real defaults apply only after the merge ``model < training < role``.

    Args:
        raw: plain data, interpolations resolved; ``null`` means unset.
        earlier: mistakes that were found before, such as unknown keys on the command line; reported with the rest.
        typed: keys that the command line sets, such as ``model.tiny.num_layers``; the rest stands in a file.

    Raises:
        ConfigError: with every mistake found, one line each.
    """
    recipe, problems = normalise(raw)
    notes = make_room(recipe, typed)
    if "reward" in recipe:
        recipe["reward"] = with_first_model(recipe["reward"])
    merged, origins = _merge(recipe)
    config, wrong_values, incomplete = _validate(merged, origins)
    problems += wrong_values
    if config is not None:
        sources = {role: origins[f"{role}.model"] for role in ROLES if f"{role}.model" in origins}
        resolved = resolve_shapes(config, Written(models=merged["model"], sources=sources, typed=typed))
        config = resolved.config
        problems += [found for found in resolved.problems if not concerning(problems, found.keys)]
        notes += [resolved.note] if resolved.note else []
        incomplete = {name: missing for name, missing in incomplete.items() if name not in resolved.decided}
    problems += [problem for missing in incomplete.values() for problem in missing]
    if config is not None:
        problems += [found for found in check(config) if not concerning(problems, found.keys)]
    if problems or earlier:
        raise ConfigError(*earlier, *lines(problems))
    assert config is not None
    for note in notes:
        logger.info("%s", note)
    return config


def _merge(recipe: Section) -> tuple[Section, dict[str, str]]:
    """The sections of ``RunConfig``, and where each inherited value was written: ``ref.bf16 -> training.bf16``."""
    training, models = recipe.get("training", {}), recipe.get("model", {})
    origins: dict[str, str] = {}
    merged: Section = {name: value for name, value in recipe.items() if name not in ROLES}
    merged["training"] = {key: value for key, value in training.items() if key in SECTIONS["training"].model_fields}
    merged["model"] = {name: _only(shape, ModelConfig) for name, shape in models.items()}
    for role, schema in ROLES.items():
        own = recipe.get(role, {})
        name = own.get("model", training.get("model"))
        if name is None and (role == "ref" or (role == "reward" and "load" in {**training, **own})):
            name = merged["actor_rollout"].get("model")
        model = models.get(name, {}) if isinstance(name, str) else {}
        values: Section = {} if name is None else {"model": name}
        for prefix, source in ((f"model.{name}", model), ("training", training), (role, own)):
            for key, value in _only(source, schema).items():
                values[key] = value
                origins[f"{role}.{key}"] = f"{prefix}.{key}"
        for key in _FROM_ACTOR.get(role, ()):
            if key not in values and key in merged["actor_rollout"]:
                values[key] = merged["actor_rollout"][key]
                origins[f"{role}.{key}"] = origins[f"actor_rollout.{key}"]
        merged[role] = values
    return merged, origins


def _only(values: Section, schema: type[Strict]) -> Section:
    return {key: value for key, value in values.items() if key in schema.model_fields}


def _validate(
    merged: Section, origins: Mapping[str, str]
) -> tuple[RunConfig | None, list[Problem], dict[str, list[Problem]]]:
    """The config (or None), and the problems. Wrong values are left out of it, so that other checks can still run.

    Returned separately, by model: the keys that its section lacks. They are no mistake if a folder supplies them.
    """
    located = _with_reference_iteration(_with_absolute_paths(merged))
    try:
        return RunConfig.model_validate(located), [], {}
    except ValidationError as error:
        errors = error.errors(include_url=False)
    problems: list[Problem] = []
    incomplete: dict[str, list[Problem]] = {}
    for found in errors:
        problem = _problem(found, merged, origins)
        if found["type"] == "missing" and found["loc"][0] == "model":
            incomplete.setdefault(str(found["loc"][1]), []).append(problem)
        else:
            problems.append(problem)
    try:
        return RunConfig.model_validate(_without(located, errors)), problems, incomplete
    except ValidationError:
        return None, problems, incomplete


def _problem(error: ErrorDetails, merged: Section, origins: Mapping[str, str]) -> Problem:
    path = [str(part) for part in error["loc"]]
    depth = 3 if path[0] == "model" else 2
    key = ".".join(path[:depth])
    name = origins.get(key, key)
    whole = [".".join(path[:2])] if path[0] == "model" else []  # a model with a wrong key is left out as a whole
    if error["type"] == "missing":
        return Problem((key, *whole), f"{name} is required: {_required(path)}")
    if path[:2] == list(_LISTED) and len(path) > len(_LISTED):
        return _problem_of_source(error, path)
    value: Any = merged
    for part in path[:depth]:
        value = value[part] if isinstance(value, Mapping) and part in value else error["input"]
    if key == "training.stage" and str(value) in REFUSED_STAGES:
        return Problem((key,), f"{name} = {show(value)}: {REFUSED_STAGES[value]}")
    return Problem((key, *whole), f"{name} = {show(value)}: {_EXPLAINED.get(path[-1]) or expectation(error)}")


_LISTED = ("reward", "sources")


def _problem_of_source(error: ErrorDetails, path: list[str]) -> Problem:
    """A mistake inside an entry of ``reward.sources``."""
    whole = ".".join(_LISTED)
    key = f"{whole}[{path[2]}]" + (f".{path[3]}" if len(path) > 3 else "")
    if error["type"] == "extra_forbidden":
        near = nearest(path[3], RewardSource.model_fields)
        return Problem((whole,), f"{key}: unknown key" + (f'; did you mean "{near}"?' if near else ""))
    expected = expectation(error) if len(path) > 3 else "expected a mapping such as {function: my.py, weight: 0.5}"
    return Problem((whole,), f"{key} = {show(error['input'])}: {expected}")


_EXPLAINED = {
    "n_samples_per_prompt": "expected a whole number, at least 2: a pair needs two completions of a prompt",
}


def _required(path: list[str]) -> str:
    if path[:2] == ["training", "stage"]:
        return f"set it to one of {', '.join(f'{name} ({facts.title})' for name, facts in STAGES.items())}"
    return "give its value, as the model's config.json has it" if path[0] == "model" else "give its value"


def _without(merged: Section, errors: Sequence[ErrorDetails]) -> Section:
    """The recipe with defaults in place of its wrong values; a model with a wrong shape is left out."""
    rest: Section = {name: dict(value) if isinstance(value, dict) else value for name, value in merged.items()}
    for error in errors:
        section, *keys = (str(part) for part in error["loc"])
        if keys and isinstance(rest.get(section), dict):
            rest[section].pop(keys[0], None)
        else:
            rest.pop(section, None)
    rest["training"].setdefault("stage", _stage_meant(merged["training"].get("stage")))
    return rest


def _stage_meant(value: Any) -> str:
    """The stage that the other checks assume if the recipe names none, or a wrong one."""
    near = None if str(value) in REFUSED_STAGES else nearest(str(value), get_args(Stage))
    return near or "ray_online_dpo"


def _absolute(path: Any, mark: LocalPath) -> Any:
    if not isinstance(path, str) or not path:
        return path
    file = file_of_module(path) if mark.module else None
    return str((file or Path(path)).expanduser().absolute())


def path_fields(schema: type[Strict]) -> Iterator[tuple[str, LocalPath]]:
    """The fields of a section that name something on disk."""
    for name, field in schema.model_fields.items():
        candidates = [*field.metadata, *_metadata(field.annotation)]
        yield from ((name, mark) for mark in candidates if isinstance(mark, LocalPath))


def _metadata(annotation: Any) -> Iterator[Any]:
    yield from getattr(annotation, "__metadata__", ())
    for inner in get_args(annotation):
        yield from _metadata(inner)


def _with_reference_iteration(merged: Section) -> Section:
    """Apply ``ref.refer_model_iter``, which names one checkpoint if ``ref.load`` is a folder of checkpoints."""
    ref = merged["ref"]
    number, folder = ref.get("refer_model_iter"), ref.get("load")
    if not isinstance(number, int) or not isinstance(folder, str) or (Path(folder) / "config.json").is_file():
        return merged  # a model folder has no iterations: it is the reference, also of a resumed run
    return merged | {"ref": ref | {"load": str(Path(folder) / f"iter_{number:07d}")}}


def _with_absolute_paths(merged: Section) -> Section:
    """A path is relative to the folder where the command is typed; workers run in other folders."""
    located = dict(merged)
    for section, schema in SECTIONS.items():
        values = dict(merged.get(section, {}))
        for key, mark in path_fields(schema):
            if isinstance(values.get(key), list | tuple):
                values[key] = [_absolute(path, mark) for path in values[key]]
            elif key in values and values[key] not in mark.words:
                values[key] = _absolute(values[key], mark)
        if section == _LISTED[0] and isinstance(values.get(_LISTED[1]), list | tuple):
            values[_LISTED[1]] = [_with_absolute_path(source) for source in values[_LISTED[1]]]
        located[section] = values
    return located


def _with_absolute_path(source: Any) -> Any:
    if not isinstance(source, Mapping):
        return source
    marks = dict(path_fields(RewardSource))
    return {key: _absolute(value, marks[key]) if key in marks else value for key, value in source.items()}
