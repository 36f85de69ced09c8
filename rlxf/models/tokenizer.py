"""Loading a tokenizer, and the ids that end a completion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlxf.core.errors import ModelError, RlxfError
from rlxf.core.model_folder import assets_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a local Hugging Face folder; never looks at the network.

    Args:
        path: folder with `tokenizer.json` or the files of another Hugging Face tokenizer.
        trust_remote_code: allow the folder to run Python code of its own.

    Raises:
        ModelError: the folder is missing, holds no tokenizer, or the tokenizer cannot be loaded.
    """
    folder = assets_folder(Path(path))
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; expected a Hugging Face folder with a tokenizer ({_KEYS})")
    if not any((folder / name).is_file() for name in _FILES):
        raise ModelError(
            f"{folder}: holds no tokenizer (none of {', '.join(_FILES)}); set {_KEYS} to a folder that has one"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except RlxfError:
        raise  # a stop that the user asked for, among others
    except Exception as error:  # transformers raises nearly any type on a damaged folder
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "the tokenizer runs code of its own; set training.trust_remote_code=true if you trust the folder"
        raise ModelError(f"{folder}: the tokenizer cannot be loaded: {reason[:300]}") from error


_KEYS = "`load` or `tokenizer_name_or_path`"
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def eos_token_ids(
    model_folder: str | Path, tokenizer: PreTrainedTokenizerBase, also: Sequence[str] | None = ()
) -> tuple[int, ...]:
    """Every id that ends a completion, sorted: of `generation_config.json`, `config.json` and the tokenizer together.

    A chat model often ends a turn with another token than its tokenizer's EOS; only one of the two files names it.
    ``also``: further tokens, as ``actor_rollout.eos_tokens`` has them.

    Raises:
        ModelError: none of the three names one, or the tokenizer does not have one of ``also``.
    """
    found = declared_eos_ids(model_folder, tokenizer, also)
    if not found:
        raise ModelError(
            f"{assets_folder(Path(model_folder))}: no end-of-sequence token in generation_config.json, config.json or "
            'the tokenizer; add "eos_token_id" to generation_config.json, or completions never end'
        )
    return tuple(sorted(found))


def declared_eos_ids(
    model_folder: str | Path | None, tokenizer: PreTrainedTokenizerBase, also: Sequence[str] | None = ()
) -> set[int]:
    """As ``eos_token_ids``, unordered and possibly none. ``model_folder`` None: only the tokenizer's and ``also``.

    Raises:
        ModelError: the tokenizer does not have one of ``also``.
    """
    found: set[int] = set()
    for name in ("generation_config.json", "config.json") if model_folder is not None else ():
        file = assets_folder(Path(str(model_folder))) / name
        found |= _ids(_read_json(file).get("eos_token_id"), file)
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    vocabulary = tokenizer.get_vocab() if also else {}
    for token in also or ():
        if token not in vocabulary:
            raise ModelError(
                f"{tokenizer.name_or_path}: has no token {token!r}, which should end completions (by "
                "actor_rollout.eos_tokens, or by the chat template of actor_rollout.prompt_type); name one that it "
                "has, or set actor_rollout.eos_tokens=[] for none"
            )
        found.add(int(vocabulary[token]))
    return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _ids(value: Any, path: Path) -> set[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise ModelError(f"{path}: eos_token_id must be a token id or a list of them, got {value!r}")
    return set(ids)


def padding_id(folder: str | Path) -> int | None:
    """The padding id of the folder's tokenizer; None if there is none, or if the id also has another meaning."""
    if not any((Path(folder) / name).is_file() for name in _FILES):
        return None
    tokenizer = load_tokenizer(folder)
    pad: int | None = tokenizer.pad_token_id
    return None if pad == tokenizer.eos_token_id else pad
