"""The tiny world as a folder: what is in it, when it is built again, and the cleanup after a killed build.

``init/``, ``sft/`` and ``rm/`` are Hugging Face folders with the tokenizer: the untrained model, and what the stages
sft and rm make of it. ``sft.jsonl``, ``reward_pairs.jsonl`` and ``reward_eval_pairs.jsonl`` are what they train on;
``prompts.jsonl`` holds training prompts, ``eval_prompts.jsonl`` prompts over held-out titles, ``preferences.jsonl``
pairs for offline training, ``report.json`` costs and quality, ``manifest.json`` the recipe and the SHA-256 of each
file. ``four_heads/`` has the two trained models with a fourth head of zeros, for tensor parallelism.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import IO, TYPE_CHECKING, Any

from rlxf.core.errors import ConfigError, StageTimeout, TrainingError
from rlxf.core.files import new_folder, remove_leftovers
from rlxf.core.places import RECIPES, TYPED_TRAIN, train_command
from rlxf.tools.tiny import heads, world
from rlxf.tools.tiny.recipe import Recipe

if TYPE_CHECKING:
    from rlxf.tools.tiny.preferences import Collected

STAGES = ("sft_trainer_tiny", "reward_trainer_tiny")  # the recipes that train its models
MANIFEST = "manifest.json"
REPORT = "report.json"
LIMIT_S = 1800.0  # of one stage, and of a wait for another process that builds the same world

Say = Callable[[str], None]


def ensure(folder: Path, recipe: Recipe | None = None, *, fresh: bool = False, say: Say = lambda _: None) -> bool:
    """Make the tiny world in ``folder`` unless it is there, whole and of this recipe.

    Returns:
        Whether it was made (it takes about 50 CPU seconds).
    """
    recipe = recipe or Recipe()
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / f".{folder.name}.lock", say):
        remove_leftovers(folder.parent, re.escape(folder.name))  # of a build that was killed
        reason = "asked for" if fresh else why_stale(folder, recipe)
        if reason is not None:
            _refuse_foreign(folder)
            say(f"building the tiny world in {folder} ({reason})")
            with new_folder(folder) as partial:
                _build(partial, recipe, say)
                _write_manifest(partial, recipe)
        if not (folder / heads.FOLDER).is_dir():  # made from the other files in a second; gone when those are replaced
            heads.write_four_heads(folder)
    return reason is not None


def why_stale(folder: Path, recipe: Recipe) -> str | None:
    """Why the world in ``folder`` cannot be used as it is; None if it can."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return "there is none yet"
    except (OSError, ValueError):
        return f"{MANIFEST} cannot be read"
    if not isinstance(manifest, dict) or manifest.get("recipe") != _as_json(recipe):
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
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Lock the build: two at a time would delete each other's folders. The second one waits and finds the world.

    Raises:
        StageTimeout: the first build takes too long.
    """
    deadline = time.monotonic() + LIMIT_S
    with path.open("a+") as handle:
        told = False
        while not _lock(handle):
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            if time.monotonic() > deadline:
                raise StageTimeout(
                    f"{path}: {owner} has built the tiny world for {LIMIT_S:g} s; end it, or choose another folder "
                    "with --out"
                )
            if not told:
                say(f"waiting for {owner}, which builds the tiny world")
            told = True
            time.sleep(0.2)
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        yield


def _lock(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refuse_foreign(folder: Path) -> None:
    """A folder that this module did not make is never replaced."""
    if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} holds files but no {MANIFEST}, so it is not a tiny world and is not replaced. "
            "Move it away, or choose another folder with --out."
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _as_json(recipe: Recipe) -> dict[str, Any]:
    """All that decides what the world holds: the recipe, and the recipe files that train its models."""
    stages = {name: _digest(RECIPES / f"{name}.yaml") for name in STAGES}
    known: dict[str, Any] = json.loads(json.dumps(asdict(recipe) | {"stages": stages}))
    return known


def _write_manifest(folder: Path, recipe: Recipe) -> None:
    files = {str(path.relative_to(folder)): _digest(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    _write_json(folder / MANIFEST, {"recipe": _as_json(recipe), "files": files})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class _Costs:
    """CPU seconds between two points of the build, those of finished child processes included."""

    def __init__(self, say: Say) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start = _cpu_seconds()
        yield
        self.seconds[what] = round(_cpu_seconds() - start, 2)
        self._say(f"  {what}: {self.seconds[what]:.1f} CPU s")


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _build(folder: Path, recipe: Recipe, say: Say) -> None:
    """Every file of the world but the manifest."""
    costs = _Costs(say)
    with costs("data"):
        _write_data(folder, recipe)
    say(f"  {' '.join(TYPED_TRAIN)} --config-name {STAGES[0]}, then {STAGES[1]}: the policy and the reward model")
    with costs("policy"):
        policy = _train(folder, recipe, "sft_trainer_tiny", "sft", recipe.policy_overrides)
    with costs("reward_model"):
        reward = _train(folder, recipe, "reward_trainer_tiny", "rm", recipe.reward_overrides)
    with costs("preferences"):
        collected = _collect(folder, recipe)
    _write_jsonl(folder / "preferences.jsonl", collected.pairs)
    report = {
        "policy_loss": policy["eval/loss"],
        "reward_loss": reward["eval/loss"],
        "reward_accuracy": reward["eval/accuracy"],
        "first_policy": collected.first_policy,
        "preferences": len(collected.pairs),
        "cpu_seconds": costs.seconds | {"all": round(sum(costs.seconds.values()), 2)},
    }
    _write_json(folder / REPORT, report)


def _write_data(folder: Path, recipe: Recipe) -> None:
    """The untrained model with its tokenizer, and all texts."""
    import torch  # here, so that finding a finished world takes no seconds
    from transformers import LlamaForCausalLM
    from transformers.utils import logging as transformers_logging

    from rlxf.tools.tiny import models

    transformers_logging.disable_progress_bar()
    texts = world.corpus(recipe.num_texts, recipe.seed)
    tokenizer = models.train_tokenizer(f"{p} {r}" for p, r in texts[: recipe.num_tokenizer_texts])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(models.model_config(recipe, len(tokenizer)))
    model.save_pretrained(folder / "init")
    tokenizer.save_pretrained(folder / "init")
    _write_jsonl(folder / "sft.jsonl", ({"prompt": p, "completion": f" {r}"} for p, r in texts))
    num_pairs = recipe.num_held_out_pairs + recipe.num_reward_pairs
    pairs = models.grammar_pairs(num_pairs, Random(recipe.seed + 1), recipe.label_noise)
    rows = [{"prompt": p, "chosen": f" {better}", "rejected": f" {worse}"} for (p, better), (_, worse) in pairs]
    _write_jsonl(folder / "reward_eval_pairs.jsonl", rows[: recipe.num_held_out_pairs])
    _write_jsonl(folder / "reward_pairs.jsonl", rows[recipe.num_held_out_pairs :])
    _write_jsonl(folder / "prompts.jsonl", ({"prompt": world.prompt(title)} for title in world.TRAIN_TITLES))
    prompts = eval_prompts(recipe.num_eval_prompts)
    _write_jsonl(folder / "eval_prompts.jsonl", ({"prompt": prompt} for prompt in prompts))


def _train(folder: Path, recipe: Recipe, name: str, output: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Run a stage's recipe on this folder's files; its policy becomes ``output``. The run's last metrics.

    Raises:
        TrainingError: the run failed; the message has its output.
    """
    run = folder / f".{output}.run"
    paths = {
        "hydra.run.dir": run,
        "actor_rollout.load": folder / ("init" if output == "sft" else "sft"),
        "actor_rollout.data_path": folder / ("sft.jsonl" if output == "sft" else "reward_pairs.jsonl"),
        "log.tensorboard": "false",
        "training.seed": recipe.seed,
    }
    if output == "rm":
        paths["eval.data_path"] = folder / "reward_eval_pairs.jsonl"
    command = [*train_command(), "--config-name", name]
    command += [f"{key}={value}" for key, value in paths.items()]
    # The sums of two threads differ in the last digits; spinning ones on shared cores cost a factor of 20.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"").decode(errors="replace").strip()
        raise TrainingError(f"{name} was ended after {LIMIT_S:g} s: {said[-2000:]}") from error
    if done.returncode:
        raise TrainingError(f"{name} failed with exit code {done.returncode}: {done.stderr.strip()[-2000:]}")
    metrics: dict[str, Any] = json.loads((run / "summary.json").read_text())["end"]
    (run / "policy").rename(folder / output)
    shutil.rmtree(run)
    return metrics


def _collect(folder: Path, recipe: Recipe) -> Collected:
    """What the first policy answers, ranked by the reward model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from rlxf.tools.tiny import preferences

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            policy = AutoModelForCausalLM.from_pretrained(folder / "sft")
            reward = AutoModelForSequenceClassification.from_pretrained(folder / "rm").eval()
            return preferences.collect(recipe, policy, reward, AutoTokenizer.from_pretrained(folder / "sft"))
    finally:
        torch.set_num_threads(threads)


def eval_prompts(count: int) -> list[str]:
    """Prompts over the held-out titles, each drawn by a seed of its own."""
    return [world.random_prompt(Random(10**6 + i), world.HELD_OUT_TITLES) for i in range(count)]
