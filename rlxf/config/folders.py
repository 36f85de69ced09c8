"""The files and folders that a recipe names: what is missing, and what their small files show to be wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from rlxf.config.config_json import read_settings
from rlxf.config.kinds import RESUME_WORDS
from rlxf.config.problems import Problem, show
from rlxf.config.schema import RunConfig
from rlxf.core.data_files import indexed_files
from rlxf.core.errors import ConfigError
from rlxf.core.model_folder import assets_folder, megatron_checkpoint

_DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
_PYTHON = (".py",)
_INDEX_SUFFIX = ".idx"  # of indexed files, which are found by their prefix or their folder
_DATASET_FILES = ("state.json", "dataset_dict.json")  # of a Hugging Face dataset on disk
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_MORE_OF_TOKENIZERS = ("special_tokens_map.json", "merges.txt", "chat_template.jinja")
_DEFAULT_LABELS = 2  # of a Hugging Face classifier whose config.json says nothing about labels
Head = Literal["words", "score", "either"]  # language model, reward model; reward training starts from either


@dataclass(frozen=True, slots=True)
class NamedPath:
    """Something on disk that this run reads."""

    key: str
    path: Path
    folder: bool = False
    suffixes: tuple[str, ...] = ()
    data: bool = False  # a file, or a folder of files

    @property
    def exists(self) -> bool:
        if self.data and (self.path.is_dir() or indexed_files(self.path)):
            return True
        return self.path.is_dir() if self.folder else self.path.is_file()


def shown(path: Path) -> str:
    """A path as its user would type it."""
    here = Path.cwd()
    return f"./{path.relative_to(here)}" if path.is_relative_to(here) else str(path)


def named_paths(config: RunConfig) -> list[NamedPath]:
    """What this run reads; a key that its mode does not use is left out."""
    actor, reward, judge = config.actor_rollout, config.reward, config.judge
    live, evaluates = config.samples, config.evaluates
    folders: dict[str, str | None] = {
        "actor_rollout.load": actor.load,
        "actor_rollout.tokenizer_name_or_path": actor.tokenizer_name_or_path,
        "actor_rollout.lora_load": actor.lora_load,
        "ref.load": config.ref.load,
        "reward.load": reward.load if config.scores else None,
        "reward.tokenizer_name_or_path": reward.tokenizer_name_or_path if config.scores else None,
        "judge.load": judge.load if config.judges else None,
        "training.resume": None if config.training.resume in RESUME_WORDS else config.training.resume,
    }
    files: dict[str, tuple[str | None, tuple[str, ...]]] = {
        **{key: (path, _PYTHON) for key, path in _functions(config)},
        "judge.function": (judge.function if config.judges else None, _PYTHON),
        "judge.template": (judge.template if config.judges else None, ()),
        "rollout.replay_path": (config.rollout.replay_path if config.engine == "replay" else None, (".jsonl",)),
        "eval.metrics": (config.eval.metrics if evaluates else None, _PYTHON),
        "eval.reference_answers": (config.eval.reference_answers if evaluates else None, (".jsonl",)),
    }
    if config.scores:
        for number, source in enumerate(reward.sources):
            named = {"load": source.load, "tokenizer_name_or_path": source.tokenizer_name_or_path}
            folders |= {f"reward.sources[{number}].{key}": path for key, path in named.items()}
        if reward.sources:
            del folders["reward.load"], folders["reward.tokenizer_name_or_path"]
    found = [NamedPath(key, Path(path), folder=True) for key, path in folders.items() if path is not None]
    found += [NamedPath(key, Path(path), suffixes=kinds) for key, (path, kinds) in files.items() if path is not None]
    data = {
        "actor_rollout.data_path": actor.data_path if live or config.offline else None,
        "eval.data_path": config.eval.data_path if evaluates else None,
    }
    found += [
        NamedPath(key, Path(path), suffixes=_DATA_SUFFIXES, data=True) for key in data for path in data[key] or ()
    ]
    return found


def _functions(config: RunConfig) -> Iterator[tuple[str, str | None]]:
    """The Python files that score."""
    if config.offline or config.replays_scores:
        return
    yield "reward.function", config.reward.function
    for number, source in enumerate(config.reward.sources):
        yield f"reward.sources[{number}].function", source.function


def missing_paths(config: RunConfig) -> list[NamedPath]:
    return [named for named in named_paths(config) if not named.exists]


def folder_problems(config: RunConfig) -> Iterator[Problem]:
    """Missing files (a dry run only lists them), wrong suffixes, and model folders that do not fit their role."""
    for named in named_paths(config):
        key, place = named.key, show(shown(named.path))
        if named.data and named.path.is_dir():
            if not _holds_data(named.path):
                yield Problem((key,), f"{key} = {place}: a folder that holds no file that ends in {_either(named)}")
        elif named.data and indexed_files(named.path):
            continue
        elif named.data and not named.path.suffix and not named.exists:  # a folder or a prefix, still to be made
            if not config.dry_run:
                expected = f"no such folder, and no files of that prefix; paths are relative to {Path.cwd()}"
                yield Problem((key,), f"{key} = {place}: {expected}")
        elif named.suffixes and named.path.suffix.lower() not in named.suffixes:
            module = ", or the name of a module that is installed" if named.suffixes == _PYTHON else ""
            yield Problem((key,), f"{key} = {place}: expected a file that ends in {_either(named)}{module}")
        elif not named.exists and not config.dry_run:
            kind = "folder" if named.folder else "file"
            other = named.path.exists() and f", but it is a {'file' if named.folder else 'folder'}"
            expected = f"expected a {kind}{other}" if other else f"no such {kind}; paths are relative to {Path.cwd()}"
            if key == "training.resume":
                expected += f"; or one of {', '.join(RESUME_WORDS)}"
            yield Problem((key,), f"{key} = {place}: {expected}")
    yield from _save_folder(config)
    yield from _calibrated_file(config)
    yield from _model_folders(config)
    yield from _vocabularies(config)


def _either(named: NamedPath) -> str:
    return " or ".join(named.suffixes)


def _holds_data(folder: Path) -> bool:
    kinds = (*_DATA_SUFFIXES, _INDEX_SUFFIX)
    return any(path.suffix.lower() in kinds or path.name in _DATASET_FILES for path in folder.iterdir())


def _save_folder(config: RunConfig) -> Iterator[Problem]:
    """Refuse a folder that holds another run's checkpoints, or that cannot be written, before hours of training."""
    if config.actor_rollout.save is None or config.dry_run:
        return
    key, folder = "actor_rollout.save", Path(config.actor_rollout.save)
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        yield Problem((key,), f"{key} = {show(shown(folder))}: cannot be written; expected a folder of yours")
    elif config.training.resume == "never" and (earlier := sorted(path.name for path in folder.glob("iter_*"))):
        text = (
            f"holds {earlier[-1]} of an earlier run, and training.resume = never; name another folder, or set "
            "training.resume=auto to go on"
        )
        yield Problem((key, "training.resume"), f"{key} = {show(shown(folder))}: {text}")


def _calibrated_file(config: RunConfig) -> Iterator[Problem]:
    """Refuse a file of figures that could not be written at the third step, or that would replace something else."""
    key, name = "plan.calibrate", config.plan.calibrate
    if name is None or config.dry_run or config.training.eval_only:
        return
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        expected = "expected a file that ends in .yaml, so that plan.device can name it"
    elif not path.parent.is_dir():
        expected = "its folder does not exist; make it first"
    elif path.exists() and not (path.is_file() and _holds_figures(path)):
        expected = "is there, and is no file of a device's figures (configs/rlxf/device); name another one"
    elif not os.access(path.parent, os.W_OK):
        expected = "cannot be written; expected a file in a folder of yours"
    else:
        return
    yield Problem((key,), f"{key} = {show(shown(path))}: {expected}")


def _holds_figures(path: Path) -> bool:
    """Whether a file looks like one of ``configs/rlxf/device``; the planner reads it whole."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    if not isinstance(found, dict) or not {"kind", "title", "per_node"} <= found.keys():
        return False
    figures = [found.get(key) for key in ("memory_gib", "train_share", "push_s")]
    return all(isinstance(figure, dict) and {"value", "source", "date"} <= figure.keys() for figure in figures)


def _model_folders(config: RunConfig) -> Iterator[Problem]:
    seen: set[str] = set()
    for role in ("actor_rollout", "ref", "reward"):
        section = getattr(config, role)
        unused = role == "reward" and not config.scores
        if section.load is None or unused or not Path(section.load).is_dir():
            continue
        if section.load in seen and role == "ref":
            continue  # the actor's folder: its problems are reported for the actor
        seen.add(section.load)
        key, folder = f"{role}.load", Path(section.load)
        head: Head = "score" if role == "reward" else "either" if config.objective == "reward" else "words"
        for text in _folder(folder, head=head):
            yield Problem((key,), f"{key} = {show(shown(folder))}: {text}")
        if role != "ref":
            yield from _tokenizer(role, Path(section.tokenizer_name_or_path or section.load))


def _tokenizer(role: str, folder: Path) -> Iterator[Problem]:
    if folder.is_dir() and not any((assets_folder(folder) / name).is_file() for name in _TOKENIZER_FILES):
        key = f"{role}.tokenizer_name_or_path"
        text = f"holds no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); set {key} to a folder with one"
        yield Problem((key,), f"{key}: {shown(folder)} {text}")


def tokenizer_files(folder: Path) -> dict[str, bytes]:
    """What the tokenizer of a folder is made of."""
    files = {name: assets_folder(folder) / name for name in (*_TOKENIZER_FILES, *_MORE_OF_TOKENIZERS)}
    return {name: file.read_bytes() for name, file in files.items() if file.is_file()}


def _folder(folder: Path, *, head: Head) -> Iterator[str]:
    """What is wrong with a model folder, as far as its small files show. ``shapes.py`` checks its shape."""
    try:
        settings = read_settings(folder)
    except ConfigError:
        return  # reported with its shape
    yield from _weights(folder)
    yield from _head(settings, head)


def _weights(folder: Path) -> Iterator[str]:
    checkpoint = megatron_checkpoint(folder)
    if checkpoint is not None:
        if any(checkpoint.glob("mp_rank_*")):
            yield f"holds {checkpoint.name} in Megatron's older layout (mp_rank_*); convert it (docs/convert.md)"
        elif not (checkpoint / ".metadata").is_file():
            yield f"names {checkpoint.name}, which is no distributed checkpoint (no .metadata in it)"
        return
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not (folder / "model.safetensors").is_file():
            other = "; convert pytorch_model.bin to safetensors" if (folder / "pytorch_model.bin").is_file() else ""
            yield f"holds no model.safetensors{other}"
        return
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        yield f"its {index.name} cannot be read: {error!r}"
        return
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        yield f"{len(missing)} of {len(files)} weight files are missing ({missing[0]}); copy or download it again"


def _head(settings: dict[str, Any], head: Head) -> Iterator[str]:
    kinds = settings.get("architectures") or []
    classifier = any(str(kind).endswith("ForSequenceClassification") for kind in kinds)
    if head == "words" and classifier:
        yield f"is a {kinds[0]}; expected a language model (*ForCausalLM)"
    if head == "words" or (head == "either" and not classifier):
        return
    labels = settings.get("num_labels") or len(settings.get("id2label") or range(_DEFAULT_LABELS))
    if kinds and not classifier:
        yield f"is a {kinds[0]}, which has no score head; expected a *ForSequenceClassification with one label"
    elif labels != 1:
        yield f"has {labels} labels; a reward model has one (num_labels=1)"


def _vocabularies(config: RunConfig) -> Iterator[Problem]:
    """Compare the vocabularies: the reference reads the policy's tokens."""
    actor, ref = config.actor_rollout, config.ref
    shapes = [config.model.get(role.model) for role in (actor, ref)]
    if not config.loads_reference or None in shapes or ref.load is None or actor.load is None:
        return
    ours, theirs = (shape.vocab_size for shape in shapes if shape is not None)
    if ours == theirs or not (Path(actor.load).is_dir() and Path(ref.load).is_dir()):
        return
    if _same_tokens(*(Path(role.tokenizer_name_or_path or str(role.load)) for role in (actor, ref))):
        return  # models of one family may pad their embeddings differently
    text = (
        f"its model has {theirs} tokens, the policy (actor_rollout.load) has {ours}; expected a reference with the "
        "policy's vocabulary, such as the policy's own folder"
    )
    yield Problem(("ref.load",), f"ref.load = {show(shown(Path(ref.load)))}: {text}")


def _same_tokens(first: Path, second: Path) -> bool:
    """Whether two folders hold tokenizers with the same tokens; false if the files do not show it."""
    found = []
    for folder in (first, second):
        try:
            tokenizer = json.loads((assets_folder(folder) / "tokenizer.json").read_text(encoding="utf-8"))
            found.append((tokenizer["model"]["vocab"], tokenizer.get("added_tokens")))
        except (OSError, ValueError, KeyError, TypeError):
            return False
    return bool(found[0] == found[1])
