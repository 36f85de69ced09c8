"""The map of the code, enforced: who imports whom, where a device may be named, what is never called, how long it gets.

A rule takes a file's path (from the repository's root) and its syntax tree, and returns what is wrong with it.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("rlxf", "workers", "scripts", "benchmarks", "ray_gpt.py")

ROOMS = {"data", "rollout", "score", "judge", "pair", "reference", "update", "sync"}
BASE = {"core", "config"}
BELOW_ROOMS = BASE | {"models", "observe", "platform"}

# What each part of rlxf may import besides itself, lowest first. A new part needs a line here: decide where it stands.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "config": {"core"},
    "placement": BASE,
    # What a recipe costs, by formulas: numbers in, numbers out.
    "planner": BASE | {"placement"},
    # Verdicts on the curves of a run: numbers in, sentences out.
    "health": set(),
    "platform": BASE,
    "observe": BASE | {"health"},
    "models": BASE | {"platform"},
    **dict.fromkeys(ROOMS, BELOW_ROOMS),
    # Which stage of which step runs when: pure of what a step is made of.
    "schedule": {"core"},
    # The loop's members as protocols: no device, no model, nothing that builds a room.
    "loop": BASE | {"rollout", "schedule", "score", "sync"},
    # What a step collects: stages called by their protocols, no model.
    "algorithms": BASE | {"loop", "observe", "pair", "schedule", "score"},
    "checkpointing": BASE | {"loop", "observe"},
    "evaluate": BELOW_ROOMS | ROOMS | {"algorithms", "loop"},
    "driver": BASE | {"algorithms", "loop", "observe", "schedule"},
    # The only ones that build rooms.
    "assembly": BELOW_ROOMS | ROOMS | {"checkpointing", "driver", "evaluate", "loop", "planner", "schedule"},
    "tools": BELOW_ROOMS | ROOMS | {"assembly", "checkpointing"},
    # Reads the files of runs: neither a model nor a loop.
    "report": BASE | {"observe", "health"},
}
EXCEPTIONS = {
    # The wire format between trainer and engines belongs to both.
    *((room, "rlxf.sync.plan") for room in ("rollout", "update", "reference")),
    # Each process of an engine has an end of the transport, and checks what it received.
    *(("rollout", f"rlxf.sync.{module}") for module in ("transports.transport", "checksums")),
    # What is fixed before a step is sampled, and what comes back while it is.
    *(("algorithms", f"rlxf.rollout.{module}") for module in ("dispatch", "chunks", "shares")),
    # What judging took, chunk by chunk.
    *((part, "rlxf.judge.both_orders") for part in ("algorithms", "loop")),
}

# Packages that few places may import: the files, or the folders (with a slash at the end), that may.
HOMES: dict[str, tuple[str, ...]] = {
    "vllm": (
        *("rlxf/rollout/vllm.py", "rlxf/rollout/vllm_requests.py"),  # the engine
        "rlxf/rollout/vllm_worker.py",  # what runs inside it
    ),
    "torch_npu": ("rlxf/platform/npu.py",),
    "megatron": ("rlxf/models/megatron/", "rlxf/platform/", "rlxf/data/indexed.py"),
    "bitsandbytes": ("rlxf/models/megatron/nf4.py",),
    "huggingface_hub": ("rlxf/tools/hub.py",),
    **dict.fromkeys(("wandb", "mlflow", "swanlab"), ("rlxf/observe/trackers.py",)),
    "ray": ("workers/", "ray_gpt.py", "scripts/", "benchmarks/"),
    **dict.fromkeys(("hydra", "omegaconf"), ("workers/cli.py", "workers/train.py")),
    "workers": ("workers/", "ray_gpt.py", "scripts/", "benchmarks/"),
}

# Who makes recipes and takes them apart. Every other file receives the sections that it needs.
RECIPE_HOMES = (
    *("rlxf/config/", "rlxf/assembly/", "rlxf/planner/", "rlxf/driver.py", "scripts/", "benchmarks/"),
    *("workers/launch.py", "workers/crew.py"),
)
# Files that may know the whole recipe besides, at most eight: what they do concerns all of it.
RECIPE_READERS = (
    "rlxf/placement/text.py",  # prints the plan of a recipe
    "rlxf/loop/run.py",  # the bundle that the driver works with
    "rlxf/checkpointing/run_folder.py",  # writes the recipe into checkpoints
    "rlxf/checkpointing/resume.py",  # compares a checkpoint's recipe with the run's
    "rlxf/checkpointing/unfinished.py",  # the same of the runs beside it
    "rlxf/tools/compare/models.py",  # makes a recipe of its options
    "workers/worker.py",  # receives the recipe over the wire, for assembly
    "workers/dry_run.py",  # hands the recipe to placement
)
WHOLE = {"rlxf.config.schema.RunConfig", "rlxf.config.roles.ActorConfig"}
WHOLE_MODULES = {"rlxf.config", "rlxf.config.schema", "rlxf.config.roles"}  # by which everything in them is reached

# What runs without a check of the recipe: the modules of rlxf.config that each part may import.
# The sections, and the words for their values.
VALUES = {"schema", "roles", "rewards", "rules", "judge", "kinds", "devices", "stages"}
CONFIG_MODULES: dict[str, set[str]] = {
    **dict.fromkeys(ROOMS | {"models", "platform", "observe", "loop", "algorithms", "evaluate"}, VALUES),
    "checkpointing": VALUES | {"changes", "curve"},  # what a change of the recipe does to a run that goes on
}

DEVICE_HOME = "rlxf/platform/"
DEVICE_WORDS = {"cuda", "npu", "hccl", "nccl"}
# Files that name devices to people, or say what must be known before torch is imported.
NAMES_DEVICES = (
    *("rlxf/config/kinds.py", "rlxf/config/devices.py", "rlxf/planner/device.py"),
    # What kernels and engines of a kind keep: figures of a plan, which may be for devices that are not here.
    *(f"rlxf/planner/{name}.py" for name in ("activations", "engine_memory", "memory", "transients")),
)
DEVICE_TEXTS = {file: {"cuda", "npu"} for file in NAMES_DEVICES}

# Torch keeps the index of a distributed checkpoint as a pickle; this file reads it with a list of the classes allowed.
RESTRICTED_UNPICKLER = "rlxf/models/megatron/dist_folder.py"

# Files that write down when something was: no duration depends on it.
DATES = (
    "rlxf/observe/trace.py",  # one offset for a process, so that its times never go back
    "rlxf/observe/sinks.py",
    "rlxf/core/events.py",
    "rlxf/observe/diary.py",
    "rlxf/observe/trackers.py",
    "rlxf/tools/compare/formats.py",
    *("rlxf/report/make.py", "rlxf/report/watch.py"),  # how old the files of a run are
    "rlxf/core/http.py",  # `Retry-After` is a date; the wait that it gives has a limit
)

MAX_FUNCTION_LINES, MAX_FILE_LINES = 80, 500
SHORT_FILES = {"rlxf/driver.py": 160, "ray_gpt.py": 20}

Rule = Callable[[str, ast.Module], list[str]]


def _imports(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and absolute name of everything imported, at the top of the file or inside a function."""
    package = path.removesuffix(".py").removesuffix("/__init__").split("/")
    if not path.endswith("/__init__.py"):
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def _dotted(node: ast.expr) -> str:
    """``torch.cuda.empty_cache`` of such an expression; calls and subscripts on the way become ``()``."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{_dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "()"


def _is_in(path: str, homes: tuple[str, ...]) -> bool:
    return any(path == home or (home.endswith("/") and path.startswith(home)) for home in homes)


def arrows(path: str, tree: ast.Module) -> list[str]:
    """Parts of rlxf import only what stands below them."""
    parts = path.removesuffix(".py").split("/")
    if parts[0] != "rlxf" or parts[1] == "__init__":
        return []
    part = parts[1]
    if part not in MAY_IMPORT:
        return [f"rlxf.{part} has no place in the map; add it to MAY_IMPORT"]
    problems = []
    for line, name in _imports(path, tree):
        target = name.split(".")
        if target[0] != "rlxf" or len(target) < 2 or target[1] == part:
            continue
        excepted = any(part == room and f"{name}.".startswith(f"{module}.") for room, module in EXCEPTIONS)
        if target[1] not in MAY_IMPORT[part] and not excepted:
            problems.append(f"line {line}: rlxf.{part} may not import {name}")
    return problems


def whole_recipe(path: str, tree: ast.Module) -> list[str]:
    """A room receives its own sections of the recipe, neither the whole of it nor all keys of the actor."""
    if _is_in(path, RECIPE_HOMES) or path in RECIPE_READERS:
        return []
    return [
        f"line {line}: {name}; take the sections that are used, and let rlxf/assembly hand them over"
        for line, name in _imports(path, tree)
        if name in WHOLE | WHOLE_MODULES
    ]


def config_checks(path: str, tree: ast.Module) -> list[str]:
    """Rooms import the sections of a recipe, and none of its checks."""
    parts = path.removesuffix(".py").split("/")
    allowed = CONFIG_MODULES.get(parts[1]) if parts[0] == "rlxf" else None
    if allowed is None:
        return []
    return [
        f"line {line}: rlxf.{parts[1]} may not import {name}; of rlxf.config: {', '.join(sorted(allowed))}"
        for line, name in _imports(path, tree)
        if name.startswith("rlxf.config") and (name.split(".")[2:3] or [""])[0] not in allowed
    ]


def homes(path: str, tree: ast.Module) -> list[str]:
    """A package with a home is imported nowhere else."""
    return [
        f"line {line}: {name} may be imported only in {', '.join(HOMES[package])}"
        for line, name in _imports(path, tree)
        if (package := name.split(".")[0]) in HOMES and not _is_in(path, HOMES[package])
    ]


def devices(path: str, tree: ast.Module) -> list[str]:
    """No device is named outside rlxf/platform."""
    if path.startswith(DEVICE_HOME):
        return []
    allowed = DEVICE_TEXTS.get(path, set())
    problems = [f"line {line}: {name}" for line, name in _imports(path, tree) if _names_device(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _names_device(_dotted(node)):
            problems.append(f"line {node.lineno}: {_dotted(node)}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DEVICE_WORDS:
            problems.append(f"line {node.lineno}: .{node.func.attr}()")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            word = node.value.lower().split(":")[0]
            if word in DEVICE_WORDS - allowed:
                problems.append(f'line {node.lineno}: "{node.value}"')
    return problems


def _names_device(name: str) -> bool:
    return any(name == device or name.startswith(f"{device}.") for device in ("torch.cuda", "torch.npu", "torch_npu"))


def siblings(path: str, tree: ast.Module) -> list[str]:
    """A wheel installs workers/ under another name: its modules import each other relatively."""
    if not path.startswith("workers/"):
        return []
    return [
        f"line {node.lineno}: write `from .module import name`; `workers` is this folder's name in a checkout only"
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] == "workers")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "workers" for alias in node.names))
    ]


def deadlines(path: str, tree: ast.Module) -> list[str]:
    """Nothing waits for ever: remote answers are awaited by workers/remote.py, which has a deadline."""
    if path == "workers/remote.py":
        return []
    names = [(line, name) for line, name in _imports(path, tree) if name in ("ray.get", "ray.wait")]
    calls = [
        (node.lineno, _dotted(node.func))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _dotted(node.func) in ("ray.get", "ray.wait")
    ]
    return [f"line {line}: {name} without a deadline; use workers/remote.py" for line, name in names + calls]


def clocks(path: str, tree: ast.Module) -> list[str]:
    """Durations and deadlines are measured with clocks that only go forward; a clock that is set changes none."""
    if path in DATES:
        return []
    names = [(line, name) for line, name in _imports(path, tree) if name in ("time.time", "time.time_ns")]
    calls = [
        (node.lineno, _dotted(node.func))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and re.fullmatch(r"time\.time(_ns)?|(datetime\.)*datetime\.(now|utcnow|today)", _dotted(node.func))
    ]
    return [f"line {line}: {name}: take time.monotonic or time.perf_counter" for line, name in names + calls]


def unsafe(path: str, tree: ast.Module) -> list[str]:
    """No code from data: eval, exec, pickle, or a torch.load that may unpickle objects."""
    problems = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func)
        keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name in ("eval", "exec") or name.split(".")[0] in ("pickle", "cloudpickle", "dill"):
            problems.append(f"line {node.lineno}: {name}()")
        if name == "torch.load" and keywords.get("weights_only") is not True:
            problems.append(f"line {node.lineno}: torch.load() without weights_only=True")
        if keywords.get("allow_pickle") is True:
            problems.append(f"line {node.lineno}: {name}(allow_pickle=True)")
    imported = [(line, name) for line, name in _imports(path, tree) if name.split(".")[0] in ("pickle", "dill")]
    if path == RESTRICTED_UNPICKLER:
        imported = []
    return problems + [f"line {line}: import of {name}" for line, name in imported]


def lengths(path: str, tree: ast.Module) -> list[str]:
    """Functions fit two screens, files one sitting."""
    lines = max((node.end_lineno or 0 for node in tree.body), default=0)
    limit = SHORT_FILES.get(path, MAX_FILE_LINES)
    problems = [f"{lines} lines, at most {limit}"] if lines > limit else []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > MAX_FUNCTION_LINES:
                problems.append(f"line {node.lineno}: {node.name}() has {size} lines, at most {MAX_FUNCTION_LINES}")
    return problems


RULES: tuple[Rule, ...] = (
    arrows,
    whole_recipe,
    config_checks,
    homes,
    siblings,
    devices,
    deadlines,
    clocks,
    unsafe,
    lengths,
)


def _python_files(*tops: str) -> list[Path]:
    found = [path for top in tops for path in ([ROOT / top] if top.endswith(".py") else (ROOT / top).rglob("*.py"))]
    return sorted(path for path in found if path.exists())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_code_keeps_to_the_map(rule: Rule) -> None:
    tops = (*PRODUCT, "tests") if rule is lengths else PRODUCT
    problems = []
    for file in _python_files(*tops):
        path = file.relative_to(ROOT).as_posix()
        problems += [f"{path}: {problem}" for problem in rule(path, ast.parse(file.read_text()))]
    assert not problems, f"{rule.__doc__}\n" + "\n".join(problems)


@pytest.mark.parametrize(
    "path", ["ray_gpt.py", "rlxf/driver.py", "workers/remote.py", *(f"rlxf/{r}" for r in sorted(ROOMS))]
)
def test_the_places_that_the_rules_speak_of_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_few_files_know_the_whole_recipe() -> None:
    assert len(RECIPE_READERS) <= 8
    for path in RECIPE_READERS:
        names = {name for _, name in _imports(path, ast.parse((ROOT / path).read_text()))}
        assert names & WHOLE, f"{path} needs no place in RECIPE_READERS any more"


def test_the_driver_is_the_only_module_at_the_root() -> None:
    assert sorted(path.name for path in (ROOT / "rlxf").glob("*.py")) == ["__init__.py", "driver.py"]


def test_every_folder_has_a_place_in_the_map() -> None:
    folders = {path.parent.name for path in (ROOT / "rlxf").glob("*/__init__.py")}
    assert folders | {"driver"} == set(MAY_IMPORT)


def test_a_recipe_is_checked_before_torch_and_ray_are_imported() -> None:
    code = "import sys, rlxf.config.load; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


LONG = "def f():\n" + "    x = 1\n" * 80

BAD: list[tuple[Rule, str, str]] = [
    (arrows, "rlxf/pair/strategies.py", "from rlxf.rollout.engine import Sampling"),
    (arrows, "rlxf/pair/strategies.py", "import rlxf.rollout.engine"),
    (arrows, "rlxf/pair/strategies.py", "from rlxf import rollout"),
    (arrows, "rlxf/pair/strategies.py", "from ..rollout import engine"),
    (arrows, "rlxf/pair/__init__.py", "from ..rollout import engine"),
    (arrows, "rlxf/pair/strategies.py", "def f():\n    from rlxf.driver import train"),
    (arrows, "rlxf/rollout/hf.py", "from rlxf.sync.push import WeightSync"),
    (arrows, "rlxf/update/actor.py", "from rlxf.sync.plan import Bucket, elsewhere\nfrom rlxf.pair import strategies"),
    (arrows, "rlxf/models/logps.py", "from rlxf.update import losses"),
    (arrows, "rlxf/core/types.py", "from rlxf.models import tokenizer"),
    (arrows, "rlxf/config/checks.py", "import rlxf.platform"),
    (arrows, "rlxf/core/files.py", "from rlxf.config.schema import RunConfig"),
    (arrows, "rlxf/driver.py", "from rlxf.pair import PAIRINGS"),
    (arrows, "rlxf/algorithms/online_dpo.py", "from rlxf.update.preference import PreferenceObjective"),
    (arrows, "rlxf/algorithms/online_dpo.py", "from rlxf.rollout.hf import HfEngine"),
    (arrows, "rlxf/loop/run.py", "from rlxf.algorithms import Algorithm"),
    (arrows, "rlxf/newcomer.py", "import torch"),
    (arrows, "rlxf/newcomer/file.py", "import torch"),
    (arrows, "rlxf/observe/report.py", "from rlxf.checkpointing.resume import Resume"),
    (whole_recipe, "rlxf/update/actor.py", "from rlxf.config.schema import RunConfig"),
    (whole_recipe, "rlxf/update/actor.py", "from rlxf.config.roles import ActorConfig, LossConfig"),
    (whole_recipe, "rlxf/update/actor.py", "from rlxf.config import schema"),
    (whole_recipe, "rlxf/update/actor.py", "def f():\n    import rlxf.config.schema"),
    (whole_recipe, "workers/actor.py", "from rlxf.config.schema import RunConfig"),
    (config_checks, "rlxf/score/reward_model.py", "from rlxf.config.read_position import warn_of_read_position"),
    (config_checks, "rlxf/models/backend.py", "from rlxf.config import checks"),
    (config_checks, "rlxf/platform/cpu.py", "import rlxf.config.load"),
    (config_checks, "rlxf/checkpointing/store.py", "from rlxf.config.folders import missing_paths"),
    (homes, "rlxf/driver.py", "import ray"),
    (homes, "rlxf/assembly/local.py", "from hydra import main"),
    (homes, "rlxf/config/load.py", "from omegaconf import OmegaConf"),
    (homes, "rlxf/driver.py", "from workers.launch import launch"),
    (homes, "rlxf/rollout/hf.py", "def f():\n    from vllm import LLM"),
    (homes, "workers/rollout.py", "import vllm.envs as envs"),
    (homes, "ray_gpt.py", "import hydra"),
    (siblings, "workers/launch.py", "from workers.actor import ActorWorker"),
    (siblings, "workers/launch.py", "def f():\n    import workers.actor"),
    (homes, "rlxf/platform/cpu.py", "import torch_npu"),
    (homes, "rlxf/update/step.py", "from megatron.core import parallel_state"),
    (devices, "rlxf/update/step.py", "import torch\ntorch.cuda.synchronize()"),
    (devices, "rlxf/update/step.py", "from torch import cuda"),
    (devices, "rlxf/update/step.py", "import torch.cuda.amp"),
    (devices, "rlxf/update/step.py", "weights = weights.cuda()"),
    (devices, "workers/pools.py", "load(path).layers[0].npu()"),
    (devices, "workers/pools.py", "resources = {'NPU': 1}"),
    (devices, "rlxf/update/step.py", "torch.zeros(2, device='cuda:0')"),
    (devices, "rlxf/sync/collective.py", "init_process_group(backend='hccl')"),
    (devices, "rlxf/config/schema.py", "backend = 'nccl'"),
    (deadlines, "workers/launch.py", "import ray\nray.get(handle)"),
    (deadlines, "workers/launch.py", "from ray import get"),
    (deadlines, "workers/launch.py", "import ray\ndone, _ = ray.wait(handles)"),
    (clocks, "rlxf/core/stop.py", "import time\nstarted = time.time()"),
    (clocks, "rlxf/core/stop.py", "from time import time"),
    (clocks, "workers/remote.py", "import datetime\nstarted = datetime.datetime.now()"),
    (clocks, "workers/remote.py", "from datetime import UTC, datetime\nstarted = datetime.now(UTC)"),
    (unsafe, "rlxf/score/rules.py", "score = eval(text)"),
    (unsafe, "rlxf/score/rules.py", "exec(compile(text, 'f', 'exec'))"),
    (unsafe, "rlxf/checkpointing/store.py", "import pickle"),
    (unsafe, "rlxf/checkpointing/store.py", "state = pickle.load(file)"),
    (unsafe, "rlxf/checkpointing/store.py", "state = torch.load(path)"),
    (unsafe, "rlxf/checkpointing/store.py", "state = torch.load(path, weights_only=False)"),
    (unsafe, "rlxf/data/indexed.py", "rows = numpy.load(path, allow_pickle=True)"),
    (lengths, "rlxf/update/step.py", LONG),
    (lengths, "rlxf/update/step.py", "class A:\n" + "".join(f"    {line}\n" for line in LONG.splitlines())),
    (lengths, "rlxf/update/step.py", "x = 1\n" * 501),
    (lengths, "rlxf/driver.py", "x = 1\n" * 161),
    (lengths, "ray_gpt.py", "x = 1\n" * 21),
]

GOOD: list[tuple[Rule, str, str]] = [
    (arrows, "rlxf/rollout/engine.py", "from rlxf.sync.plan import Bucket\nfrom rlxf.core.types import Rollouts"),
    (arrows, "rlxf/rollout/hf.py", "from rlxf.rollout.engine import Sampling\nfrom .engine import Sampling"),
    (arrows, "rlxf/driver.py", "from rlxf.algorithms import ALGORITHMS\nimport rlxf.loop.run"),
    (arrows, "rlxf/algorithms/online_dpo.py", "from rlxf.pair import PAIRINGS\nimport rlxf.score.penalty"),
    (arrows, "workers/actor.py", "from rlxf.update.actor import MegatronActor"),
    (whole_recipe, "rlxf/assembly/roles.py", "from rlxf.config.schema import RunConfig"),
    (whole_recipe, "workers/worker.py", "from rlxf.config.schema import RunConfig"),
    (whole_recipe, "rlxf/update/actor.py", "from rlxf.config.roles import LossConfig, OptimizerConfig"),
    (config_checks, "rlxf/update/actor.py", "from rlxf.config.roles import LossConfig"),
    (config_checks, "rlxf/platform/__init__.py", "from rlxf.config.devices import find_device"),
    (config_checks, "rlxf/checkpointing/resume.py", "from rlxf.config.changes import compare"),
    (config_checks, "rlxf/assembly/start.py", "from rlxf.config.load import load_config"),
    (homes, "rlxf/rollout/vllm.py", "def f():\n    from vllm import LLM"),
    (homes, "rlxf/models/megatron/spec.py", "from megatron.core import parallel_state"),
    (devices, "rlxf/platform/cuda.py", "import torch\ntorch.cuda.synchronize()\nname = 'cuda'"),
    (devices, "rlxf/config/kinds.py", "Device = Literal['auto', 'npu', 'cuda', 'cpu']"),
    (devices, "rlxf/update/step.py", '"""Runs on cuda and npu alike."""\nplatform.synchronize()'),
    (siblings, "workers/launch.py", "from .actor import ActorWorker\nfrom rlxf.core.errors import RlxfError"),
    (siblings, "ray_gpt.py", "from workers.train import main"),
    (deadlines, "workers/remote.py", "import ray\nray.get(handle, timeout=limit)"),
    (deadlines, "workers/launch.py", "config.get('key')"),
    (clocks, "workers/remote.py", "import time\ndeadline = time.monotonic() + time.perf_counter()"),
    (clocks, "rlxf/observe/trackers.py", "import time\nnow = time.time()"),
    (unsafe, "rlxf/models/load.py", "model.eval()\ntorch.load(path, weights_only=True)"),
    (lengths, "rlxf/update/step.py", "def f():\n" + "    x = 1\n" * 79),
]


@pytest.mark.parametrize(("rule", "path", "source"), BAD)
def test_a_rule_sees_what_breaks_it(rule: Rule, path: str, source: str) -> None:
    assert rule(path, ast.parse(source))


@pytest.mark.parametrize(("rule", "path", "source"), GOOD)
def test_a_rule_lets_good_code_pass(rule: Rule, path: str, source: str) -> None:
    assert rule(path, ast.parse(source)) == []
