"""The tiny world as a folder: what is in it, when it is made anew, and how a killed build leaves nothing half made.

``sft/`` and ``rm/`` are Hugging Face folders with the tokenizer; ``prompts.jsonl`` holds training prompts,
``eval_prompts.jsonl`` prompts over held-out titles, ``preferences.jsonl`` pairs for offline training, ``report.json``
costs and quality, ``manifest.json`` the recipe and the SHA-256 of each file. ``four_heads/`` has the two models with a
fourth head of zeros, for tensor parallelism.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from rlxf.errors import ConfigError
from rlxf.tiny import heads, world
from rlxf.tiny.recipe import Recipe

MANIFEST = "manifest.json"
REPORT = "report.json"

Say = Callable[[str], None]


def ensure(folder: Path, recipe: Recipe | None = None, *, fresh: bool = False, say: Say = lambda _: None) -> bool:
    """Make the tiny world in ``folder`` unless it is there, whole and of this recipe.

    Returns:
        Whether it was made (it takes about 50 CPU seconds).
    """
    recipe = recipe or Recipe()
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}.lock"):
        reason = "asked for" if fresh else why_stale(folder, recipe)
        if reason is not None:
            _refuse_foreign(folder)
            say(f"building the tiny world in {folder} ({reason})")
            _replace(folder, recipe, say)
        if not (folder / heads.FOLDER).is_dir():  # made from the rest in a second; gone when that is replaced
            heads.write_four_heads(folder)
    return reason is not None


def _replace(folder: Path, recipe: Recipe, say: Say) -> None:
    partial, old = (folder.parent / f".{folder.name}.{which}" for which in ("partial", "old"))
    for leftover in (partial, old):  # of a build that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    _build(partial, recipe, say)
    _write_manifest(partial, recipe)
    if folder.exists():
        folder.rename(old)  # a rename is whole or not at all, but cannot replace a folder that holds files
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def why_stale(folder: Path, recipe: Recipe) -> str | None:
    """Why the world in ``folder`` cannot be used as it is; None if it can."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return "there is none yet"
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    if not isinstance(manifest, dict) or manifest.get("recipe") != asdict(recipe):
        return "it was made by another recipe"
    files: dict[str, str] = manifest["files"]
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} has changed"
    return None


def read_report(folder: Path) -> dict[str, Any]:
    """What the build cost and how good the models are."""
    report: dict[str, Any] = json.loads((folder / REPORT).read_text())
    return report


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two builds at a time would delete each other's partial folders; the second one waits and finds the world made."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _refuse_foreign(folder: Path) -> None:
    """A folder that this module did not make is never replaced."""
    if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} holds files but no {MANIFEST}, so it is not a tiny world and is not replaced. "
            "Move it away, or choose another folder with --out."
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_manifest(folder: Path, recipe: Recipe) -> None:
    files = {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    _write_json(folder / MANIFEST, {"recipe": asdict(recipe), "files": files})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class _Costs:
    """CPU seconds between two points of the build."""

    def __init__(self, say: Say) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[what] = round(time.process_time() - start, 2)
        self._say(f"  {what}: {self.seconds[what]:.1f} CPU s")


def _build(folder: Path, recipe: Recipe, say: Say) -> None:
    """Every file of the world but the manifest."""
    costs = _Costs(say)
    with costs("imports"):
        import torch  # here, so that finding a finished world takes no seconds
        from transformers.utils import logging as transformers_logging

        from rlxf.tiny import models, preferences

    transformers_logging.disable_progress_bar()
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)  # the sums of two threads differ in the last digits
    torch.manual_seed(recipe.seed)
    try:
        rng = Random(recipe.seed)
        texts = world.corpus(recipe.num_texts, recipe.seed)
        with costs("tokenizer"):
            tokenizer = models.train_tokenizer(f"{p} {r}" for p, r in texts[: recipe.num_tokenizer_texts])
            encoder = models.Encoder(tokenizer)
            rows = encoder.texts(texts)
        with costs("policy"):
            policy, policy_loss = models.train_policy(recipe, rows, len(tokenizer), rng)
        with costs("reward_model"):
            num_pairs = recipe.num_held_out_pairs + recipe.num_reward_pairs
            pairs = models.grammar_pairs(num_pairs, Random(recipe.seed + 1), recipe.label_noise)
            better, worse = (encoder.texts(side) for side in zip(*pairs, strict=True))
            held_out = recipe.num_held_out_pairs
            reward, reward_loss = models.train_reward_model(recipe, policy, better[held_out:], worse[held_out:], rng)
            right = models.score_rows(reward, better[:held_out]) > models.score_rows(reward, worse[:held_out])
        with costs("preferences"):
            collected = preferences.collect(recipe, policy, reward, tokenizer)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)

    for name, model in (("sft", policy), ("rm", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    _write_jsonl(folder / "prompts.jsonl", ({"prompt": world.prompt(title)} for title in world.TRAIN_TITLES))
    _write_jsonl(
        folder / "eval_prompts.jsonl", ({"prompt": prompt} for prompt in eval_prompts(recipe.num_eval_prompts))
    )
    _write_jsonl(folder / "preferences.jsonl", collected.pairs)
    report = {
        "parameters": policy.num_parameters(),
        "vocabulary": len(tokenizer),
        "policy_loss": policy_loss,
        "reward_loss": reward_loss,
        "reward_accuracy": right.float().mean().item(),
        "first_policy": collected.first_policy,
        "preferences": len(collected.pairs),
        "cpu_seconds": costs.seconds | {"all": round(sum(costs.seconds.values()), 2)},
    }
    _write_json(folder / REPORT, report)


def eval_prompts(count: int) -> list[str]:
    """Prompts over the held-out titles, each drawn by a seed of its own."""
    return [world.random_prompt(Random(10**6 + i), world.HELD_OUT_TITLES) for i in range(count)]
