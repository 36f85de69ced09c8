"""What this program uses of other packages without their promise: it is there, with the arguments that are given to it.

A failure here names the place that has to change before the package's bound in pyproject.toml is raised.
"""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from rlxf.core.errors import ConfigError
from rlxf.models.megatron import parallel
from rlxf.platform import get_platform

ROOT = Path(__file__).resolve().parents[2]
SAVE = "megatron.core.dist_checkpointing.strategies."
WRITER = f"{SAVE}filesystem_async:FileSystemWriterAsync"


@dataclass(frozen=True)
class Private:
    """An attribute of a module, ``module:attribute.path``, and where it is used."""

    name: str
    user: str
    parameters: tuple[str, ...] | None = None  # the first ones, of a function that is called with them

    def problem(self) -> str | None:
        package = re.split(r"[.:]", self.name)[0]
        installed = version({"megatron": "megatron-core"}.get(package, package))
        where = f"{package} {installed}: {self.name}, which {self.user} uses,"
        module, _, path = self.name.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in path.split("."):
                found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
        except (ImportError, AttributeError) as error:
            return f"{where} is gone ({error})"
        if self.parameters is None:
            return None
        found = getattr(found, "__func__", found)
        known = tuple(inspect.signature(found).parameters)
        fits = known[: len(self.parameters)] == self.parameters
        return None if fits else f"{where} takes {known}; expected it to begin with {self.parameters}"


DDP = "megatron.core.distributed.distributed_data_parallel:DistributedDataParallel"
OPTIMIZER = "rlxf/models/megatron/optimizer.py"
CHECKPOINT = "rlxf/models/megatron/checkpoint.py"
READER = "rlxf/models/megatron/dist_folder.py"
LINKS = "rlxf/platform/links.py"
RESTRICTED = "rlxf/models/megatron/restricted.py"
LINKS = "rlxf/platform/links.py"
# The seventh is the number of the device, which links.py replaces.
REBUILT = (
    *("tensor_cls", "tensor_size", "tensor_stride", "tensor_offset", "storage_cls", "dtype"),
    *("storage_device", "storage_handle"),
)
USED = [
    Private("ray._private.state:available_resources_per_node", "workers/pools.py", ()),
    Private("ray._private.state:actors", "workers/watch.py", ("actor_id",)),
    Private("ray.util.placement_group:placement_group", "workers/pools.py", ("bundles", "strategy")),
    Private("ray.util.placement_group:placement_group_table", "workers/pools.py", ("placement_group",)),
    *(
        Private(f"ray.experimental.internal_kv:_internal_kv_{name}", "workers/signs.py", parameters)
        for name, parameters in {
            "put": ("key", "value", "overwrite", "namespace"),
            "get": ("key",),
            "del": ("key",),
        }.items()
    ),
    Private(f"{SAVE}filesystem_async:_results_queue", CHECKPOINT),
    Private(
        f"{WRITER}.write_preloaded_data",
        CHECKPOINT,
        ("transform_list", "local_proc_idx", "write_bucket", "results_queue", "count_queue", "use_fsync"),
    ),
    Private(f"{SAVE}async_utils:AsyncRequest", CHECKPOINT, ("async_fn", "async_fn_args", "finalize_fns")),
    Private(f"{SAVE}async_utils:AsyncRequest.preload_fn", CHECKPOINT),
    Private("megatron.core.tensor_parallel.random:_get_cuda_rng_state", CHECKPOINT),
    Private("megatron.core.tensor_parallel.random:_set_cuda_rng_state", CHECKPOINT),
    Private(f"{SAVE}common:TorchCommonSaveStrategy.save_common", CHECKPOINT, ("self", "common_state_dict")),
    Private(f"{WRITER}.finish", CHECKPOINT, ("self", "metadata", "results")),
    Private("megatron.core.dist_checkpointing.serialization:save_config", CHECKPOINT, ("config", "checkpoint_dir")),
    Private(f"{SAVE}base:LoadShardedStrategy.load", RESTRICTED, ("self", "sharded_state_dict", "checkpoint_dir")),
    Private(f"{SAVE}base:LoadCommonStrategy.load_common", RESTRICTED, ("self", "checkpoint_dir")),
    *(Private(f"megatron.core.optimizer:{name}", OPTIMIZER) for name in ("Adam", "USING_PYTORCH_OPTIMIZER")),
    *(
        Private(f"megatron.core.optimizer.distrib_optimizer:{name}", OPTIMIZER)
        for name in ("Adam", "HAVE_APEX_OR_TE", "USING_APEX_OPTIMIZER")
    ),
    *(
        Private(f"megatron.core.distributed.param_and_grad_buffer:{name}", OPTIMIZER)
        for name in ("dist_reduce_scatter_func", "dist_all_gather_func")
    ),
    Private(f"{DDP}.offload_grad_buffers", OPTIMIZER, ("self", "synchronize", "empty_cache")),
    Private(f"{DDP}.restore_grad_buffers", OPTIMIZER, ("self", "synchronize")),
    *(
        Private(f"megatron.core.optimizer.{owner}.{name}", OPTIMIZER, ("self",))
        for owner in ("optimizer:ChainedOptimizer", "distrib_optimizer:DistributedOptimizer")
        for name in ("offload_to_cpu", "restore_from_cpu")
    ),
    Private("torch:_fused_adamw_", OPTIMIZER),
    Private("torch.multiprocessing.reductions:reduce_tensor", LINKS, ("tensor",)),
    Private("torch.multiprocessing.reductions:rebuild_cuda_tensor", LINKS, REBUILT),
    Private("torch.distributed:ProcessGroupGloo.create_device", LINKS),
    Private("torch.distributed:ProcessGroupGloo._Options", LINKS),
    Private("torch.distributed._shard._utils:narrow_tensor_by_index", READER, ("tensor", "offsets", "sizes")),
    Private(
        "torch.distributed.checkpoint.planner_helpers:create_read_items_for_chunk_list",
        READER,
        ("fqn", "checkpoint_md", "local_chunks"),
    ),
    Private("torch.distributed.checkpoint.filesystem:_StorageInfo", READER),
    Private("torch.distributed.checkpoint.filesystem:FileSystemReader.read_data", READER, ("self", "plan", "planner")),
    Private("torch.multiprocessing.reductions:reduce_tensor", LINKS, ("tensor",)),
    Private(
        "torch.multiprocessing.reductions:rebuild_cuda_tensor",
        LINKS,
        # A handle is opened with another number in place of the seventh.
        (
            *("tensor_cls", "tensor_size", "tensor_stride", "tensor_offset", "storage_cls", "dtype"),
            *("storage_device", "storage_handle"),
        ),
    ),
    *(Private(f"torch.distributed:ProcessGroupGloo.{name}", LINKS) for name in ("_Options", "create_device")),
    Private("torch.distributed:ProcessGroupGloo.create_default_device", LINKS),
    *(
        Private(f"torch._C._distributed_c10d:{name}", user)
        for name, user in {
            "Backend.abort": LINKS,
            "Backend.broadcast": LINKS,
            "Work.is_completed": LINKS,
            "PrefixStore": "rlxf/sync/transports/collective.py",
            "TCPStore.port": "rlxf/sync/transports/collective.py",
        }.items()
    ),
]


@pytest.fixture(autouse=True)
def _bridge() -> None:
    get_platform("cpu").prepare_megatron()


@pytest.mark.parametrize("used", USED, ids=lambda used: used.name)
def test_what_is_used_without_a_promise_is_still_there(used: Private) -> None:
    problem = used.problem()
    assert problem is None, problem


def test_the_number_of_a_device_is_where_a_handle_has_it() -> None:
    from torch.multiprocessing import reductions

    from rlxf.platform.links import _DEVICE

    assert list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)[_DEVICE] == "storage_device"


def test_keys_are_read_and_deleted_by_namespace() -> None:
    """The other parameters of Ray's store; ``del_by_prefix`` is what leaves nothing behind."""
    from ray.experimental import internal_kv

    assert "namespace" in inspect.signature(internal_kv._internal_kv_get).parameters
    assert {"del_by_prefix", "namespace"} <= set(inspect.signature(internal_kv._internal_kv_del).parameters)


def test_an_actors_handle_has_its_number() -> None:
    """By which ``workers/watch.py`` asks whether it is dead."""
    from ray.actor import ActorHandle

    assert "_actor_id" in inspect.getsource(ActorHandle.__init__)


def test_py_spy_comes_with_ray_and_has_the_options_that_are_used() -> None:
    """``workers/ending.py``."""
    program = Path(sys.executable).with_name("py-spy")
    shown = subprocess.run([program, "dump", "--help"], capture_output=True, text=True, timeout=30, check=True).stdout
    assert {"--nonblocking", "--pid"} <= set(re.findall(r"--\w+", shown))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            Private("ray.nowhere:x", "workers/pools.py"),
            r"^ray [\d.]+: ray\.nowhere:x, which workers/pools\.py uses, is g",
        ),
        (Private("ray:no_such_name", "workers/pools.py"), r"ray:no_such_name, .* is gone"),
        (Private("ray:get", "workers/remote.py", ("handle",)), r"ray:get, .* takes \('object_refs',.*\('handle',\)"),
    ],
)
def test_a_change_is_told_with_version_name_and_place(changed: Private, said: str) -> None:
    assert re.search(said, changed.problem() or "")


def test_only_the_listed_modules_of_ray_are_private() -> None:
    """A new use of Ray's internals comes with a line in this file."""
    found = {
        name
        for file in (ROOT / "workers").glob("*.py")
        for name in re.findall(r"ray(?:\.\w+)*\._\w+(?:\.\w+)*", file.read_text())
    }
    listed = {used.name.split(":")[0] for used in USED}
    assert found <= listed


@pytest.mark.parametrize("package", ["ray", "megatron-core"])
def test_these_packages_have_an_upper_bound_that_admits_what_is_installed(package: str) -> None:
    import tomllib

    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [Requirement(line) for line in content["project"]["dependencies"]]
    (bound,) = (wish.specifier for wish in wanted if wish.name == package)
    assert version(package) in bound
    assert "99.0" not in bound


def test_another_megatron_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron.core

    parallel.require_megatron()
    assert version("megatron-core") == parallel.MEGATRON
    monkeypatch.setattr(megatron.core, "__version__", "0.17.0")
    with pytest.raises(ConfigError, match=r"megatron-core 0\.17\.0 is installed; expected 0\.16\.1"):
        parallel.require_megatron()
