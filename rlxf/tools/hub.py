"""A model folder on a Hugging Face hub: what would be uploaded, a model card, and the upload itself.

Nothing of this machine goes with it: absolute paths in JSON files and in the recipe are cut to their last part.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlxf.core.errors import ConfigError, ModelError
from rlxf.core.read_position import READ_AT, TRAINED_AT

CARD = "README.md"
_ABSOLUTE = re.compile(r"(?:/|~[/\\]|file:|[A-Za-z]:[/\\]|\\\\)")
_TASKS = {"ForSequenceClassification": "text-classification", "ForCausalLM": "text-generation"}


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of the repository: where it is, or what is in it."""

    name: str  # in the repository
    content: Path | bytes

    @property
    def num_bytes(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)


def find_model(folder: Path) -> tuple[Path, Path | None]:
    """The folder with the weights, and the run folder that it is from, if it is.

    Args:
        folder: a Hugging Face folder, or a run folder with ``policy`` in it.

    Raises:
        ModelError: there is none, or it holds no weights.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; expected a run folder, or a Hugging Face folder with a model")
    model = folder if (folder / "config.json").is_file() else folder / "policy"
    if not (model / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json there or in {model}; a run writes `policy` when it ends")
    if not any(model.glob("*.safetensors")):
        raise ModelError(f"{model}: holds no weights (*.safetensors)")
    run = model.absolute().parent
    return model, run if model.name == "policy" and (run / "config.yaml").is_file() else None


def collect(folder: Path, *, base_model: str | None = None) -> list[Upload]:
    """Every file of the repository, by name. The card is generated unless the model folder has one of its own.

    Args:
        folder: a Hugging Face folder, or a run folder.
        base_model: name on the hub of the model that was trained; for the card and the adapter.

    Raises:
        ModelError: there is no model. ConfigError: one of its JSON files, or the run's files, cannot be read.
    """
    model, run = find_model(folder)
    paths = [path for path in sorted(model.rglob("*")) if path.is_file() and not _is_hidden(path, model)]
    files = [Upload(str(path.relative_to(model)), _content(path, base_model)) for path in paths]
    if not any(upload.name == CARD for upload in files):
        files.append(Upload(CARD, card(model, run, base_model).encode()))
    return sorted(files, key=lambda upload: upload.name)


def _is_hidden(path: Path, model: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(model).parts)


def _content(path: Path, base_model: str | None) -> Path | bytes:
    """The file, or a copy without what belongs to this machine."""
    if path.name not in ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json"):
        return path
    found = _read(path)
    shared = without_paths(found)
    if base_model and "base_model_name_or_path" in found:
        shared["base_model_name_or_path"] = base_model
    return path if shared == found else (json.dumps(shared, indent=2, ensure_ascii=False) + "\n").encode()


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(found).__name__}")
    return found


def without_paths(value: Any) -> Any:
    """Plain data with the last part of each absolute path instead of it."""
    if isinstance(value, Mapping):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and _ABSOLUTE.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def card(model: Path, run: Path | None, base_model: str | None) -> str:
    """The model card: what was trained how, and what was measured. No absolute path is in it."""
    from huggingface_hub import ModelCardData

    settings = _read(model / "config.json")
    architectures = settings.get("architectures") or [""]
    task = next((task for ending, task in _TASKS.items() if architectures[0].endswith(ending)), None)
    recipe = without_paths(_read(run / "config.yaml")) if run else {}
    stage = recipe.get("training", {}).get("stage")
    tags = ["rlxf", *([stage] if stage else [])]
    facts = ModelCardData(library_name="transformers", pipeline_tag=task, base_model=base_model or None, tags=tags)
    parts = ["---", facts.to_yaml(), "---", "", f"# {_title(stage)}", ""]
    parts += [f"{architectures[0] or 'A model'}, trained with rlxf."]
    if settings.get(READ_AT) == TRAINED_AT:
        parts += [
            "Its score is read at the token that ends the answer (end of turn, or EOS). A chat template may write more "
            "behind that token: cut it before you score a text."
        ]
    if run is not None:
        parts += _measures(run) + _recipe(recipe)
    return "\n".join(parts) + "\n"


def _title(stage: str | None) -> str:
    names = {
        "ray_online_dpo": "Online DPO policy",
        "dpo": "DPO policy",
        "sft": "Fine-tuned model",
        "rm": "Reward model",
    }
    return names.get(stage or "", "Model")


def _measures(run: Path) -> list[str]:
    path = run / "summary.json"
    if not path.is_file():
        return []
    summary = _read(path)
    start, end = summary.get("start", {}), summary.get("end", {})
    rows = [name for name in end if not name.startswith(("timing/", "memory/", "pipeline/", "sync/", "rollout/"))]
    lines = ["", "## Measures", "", f"After {summary.get('steps')} steps.", "", "| | first | last |", "|---|---|---|"]
    return lines + [f"| `{name}` | {_number(start.get(name))} | {_number(end[name])} |" for name in rows]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _recipe(recipe: dict[str, Any]) -> list[str]:
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip()
    return ["", "## Recipe", "", "```yaml", text, "```"]


def push(files: list[Upload], repo_id: str, *, private: bool, message: str, endpoint: str | None = None) -> str:
    """Upload all files in one commit, making the repository if there is none; its address.

    Args:
        files: of ``collect``.
        repo_id: ``name`` or ``organisation/name``.
        private: whether a new repository is private; one that is there stays as it is.
        message: of the commit.
        endpoint: of the hub; None: ``HF_ENDPOINT``, or the public one.

    Raises:
        ConfigError: the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=endpoint)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=upload.name, path_or_fileobj=upload.content) for upload in files]
        api.create_commit(address.repo_id, operations, commit_message=message)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{repo_id}: the hub refused the upload: {type(error).__name__}: {reason}; log in with `hf auth login` or "
            "set HF_TOKEN, and check --endpoint or HF_ENDPOINT"
        ) from error
    return str(address)


def require_name(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        ConfigError: it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # a lazy export

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id}: not the name of a repository: {' '.join(str(error).split())}") from error
