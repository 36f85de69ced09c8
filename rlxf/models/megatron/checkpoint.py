"""Training state on disk: megatron's distributed checkpoint, which any other layout can load.

Written by each rank's own process, in a thread if in the background. megatron-core's writer forks, which is not safe
beside the threads of Ray or of a device, and spawns an interpreter for the queue in which its children answer.
"""

from __future__ import annotations

import json
import logging
import queue
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.tensor_parallel import random as megatron_random
from torch.distributed.checkpoint.api import CheckpointException

from rlxf.core.disk import disk_error, is_lasting
from rlxf.core.errors import CheckpointError, ModelError, SaveError
from rlxf.models.megatron.adapters import sharded_adapters
from rlxf.models.megatron.dist_folder import FORMAT, TORCH_DIST
from rlxf.models.megatron.optimizer import TrainableModel
from rlxf.models.megatron.restricted import RestrictedCommon, RestrictedTensors

log = logging.getLogger(__name__)

LAYOUT = "layout.json"  # the sizes of the parallel axes that wrote a checkpoint


class Write:
    """A checkpoint that is being written. Every rank makes one, and all ranks call its methods in the same order."""

    def __init__(self, folder: Path, trainable: TrainableModel, *, background: bool) -> None:
        """Begin to write the state into ``folder``, which exists; ``background``: from a copy, in a thread."""
        self._folder = folder
        # megatron's writer runs in this process and needs this queue; without it the first save spawns an interpreter.
        filesystem_async._results_queue = queue.Queue()
        _make_moments(trainable)
        state = _state(trainable, is_loading=False) | {"rng": _sharded_rng(_rng_state())}
        self._failures: list[Exception] = []  # of files that rank 0 alone writes
        with _kept(self._failures):
            self._request = dist_checkpointing.save(state, str(folder), async_sharded_save=True)
        if dist.get_rank() == 0:
            try:
                (folder / LAYOUT).write_text(json.dumps(_layout()) + "\n")
            except OSError as error:
                self._failures.append(error)
        self._buckets: list[Any] = self._request.async_fn_args[1] if self._request.async_fn else []
        self._thread: threading.Thread | None = None
        if background:
            live = _live_storages(trainable)
            self._buckets = [_snapshot(bucket, live) for bucket in self._buckets]
            self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._buckets = self._request.preload_fn() if self._request.async_fn else []
            self._write()
        self._finished = False

    def finish(self, *, wait: bool) -> bool:
        """Whether all ranks have written their part; then the checkpoint is complete.

        Raises:
            SaveError: the disk of a rank takes nothing; every rank raises it.
            CheckpointError: a rank could not write for another reason.
        """
        if self._finished:
            return True
        if wait and self._thread is not None:
            self._thread.join()
        busy = torch.tensor(int(self._thread is not None and self._thread.is_alive()))
        dist.all_reduce(busy)
        if int(busy):
            return False
        self._finished, self._buckets = True, []  # the copy's memory is free again
        failures: dict[int, BaseException] = {}
        try:
            with _kept(self._failures):
                for finalize in self._request.finalize_fns:
                    finalize()
        except CheckpointException as error:  # on every rank; the reasons are known to rank 0
            failures = {rank: _cause(failure) for rank, failure in error.failures.items()}
        if self._failures:
            failures[dist.get_rank()] = self._failures[0]
        self._raise_on_every_rank(failures)
        return True

    def _raise_on_every_rank(self, failures: dict[int, BaseException]) -> None:
        """One error for all ranks, of what rank 0 knows; nothing if it knows of none."""
        reasons = "; ".join(f"rank {rank}: {type(error).__name__}: {error}" for rank, error in failures.items())
        found = [disk_error(error, self._folder) for error in failures.values()]
        disk = [error for error in found if error is not None]
        told: list[Any] = [(reasons, bool(disk), any(is_lasting(error) for error in disk)) if failures else None]
        dist.broadcast_object_list(told, src=0)
        if told[0] is None:
            return
        reasons, is_disk, lasting = told[0]
        message = f"{self._folder}: the checkpoint could not be written: {reasons}"
        if is_disk:
            raise SaveError(f"{message}; make room, or check the disk", lasting=lasting)
        raise CheckpointError(message)

    def _write(self) -> None:
        """Write this rank's files. An error is kept and not raised: ``finish`` raises it on every rank."""
        if not self._request.async_fn:
            return
        _, _, answers = self._request.async_fn_args
        transforms = self._request.async_fn.args[0]  # the first argument of megatron's own writer
        written: dict[int, Any] = {}
        for index, bucket in enumerate(self._buckets):
            results, count = queue.Queue[Any](), queue.Queue[int]()
            count.put(index)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(
                transforms, index, bucket, results, count, use_fsync=True
            )
            _, result = results.get()
            if isinstance(result, Exception):
                answers.put(result)
                return
            written[index] = result
        answers.put(written)


def load(folder: Path, trainable: TrainableModel) -> None:
    """Load what a ``Write`` wrote, in any layout; random states only from the same layout.

    Raises:
        CheckpointError: a file is damaged, or asks for code to be run; nothing of that was run.
    """
    layout = _read_json(folder / LAYOUT)
    form = _read_json(folder / FORMAT)
    if form != TORCH_DIST:
        raise CheckpointError(f"{folder / FORMAT}: found {json.dumps(form)}; expected {json.dumps(TORCH_DIST)}")
    state = _state(trainable, is_loading=True)
    same = layout == _layout()
    if same:
        state["rng"] = _sharded_rng(None)
    # The checkpoint's parameter groups hold the old recipe's settings; those of the current recipe count.
    settings = [(group["betas"], group["eps"]) for group in trainable.optimizer.param_groups]
    try:
        loaded = dist_checkpointing.load(
            state, str(folder), sharded_strategy=RestrictedTensors(), common_strategy=RestrictedCommon()
        )
    except ModelError as error:
        raise CheckpointError(f"{error}") from error
    for name, _, chunk in _chunks(trainable):
        chunk.load_state_dict(loaded[name], strict=not trainable.model.adapter_ranks)
    trainable.optimizer.load_state_dict(loaded["optimizer"])
    for group, (betas, eps) in zip(trainable.optimizer.param_groups, settings, strict=True):
        group["betas"], group["eps"] = betas, eps
    if same:
        _set_rng_state(loaded["rng"])
    elif dist.get_rank() == 0:
        log.info("%s was written by %s, and is resharded to %s", folder, layout, _layout())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy the checkpoint again") from error
    return content


def _state(trainable: TrainableModel, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    model: dict[str, Any] = {}
    for name, index, chunk in _chunks(trainable):
        if trainable.model.adapter_ranks:  # the base is frozen: it is the folder that the recipe loads
            model[name] = sharded_adapters(trainable.model, index)
        else:
            model[name] = chunk.sharded_state_dict(metadata=metadata)
    optimizer = trainable.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
    return {**model, "optimizer": optimizer}


def _chunks(trainable: TrainableModel) -> list[tuple[str, int, Any]]:
    """Every chunk of this rank's model: its name in the state, its number, and the module."""
    models = [chunk.module for chunk in trainable.chunks]
    return [("model" if len(models) == 1 else f"model{i}", i, model) for i, model in enumerate(models)]


def _make_moments(trainable: TrainableModel) -> None:
    """An optimizer that has made no step (of a run whose first steps had no pair) is saved as one with zero moments."""
    for part in trainable.optimizer.chained_optimizers:
        for parameter in (parameter for group in part.optimizer.param_groups for parameter in group["params"]):
            moments = part.optimizer.state[parameter]
            if not moments:
                moments |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def _layout() -> dict[str, int]:
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "world_size": dist.get_world_size(),
    }


def _sharded_rng(state: dict[str, Any] | None) -> ShardedObject:
    """Random states, one for each rank. Another layout has another number of ranks and cannot load them."""
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),))


def _rng_state() -> dict[str, Any]:
    """The random states of this rank, as tensors and plain numbers, which are loaded without running code."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "device": megatron_random._get_cuda_rng_state(),
        "tracker": megatron_random.get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    megatron_random._set_cuda_rng_state(state["device"])
    megatron_random.get_cuda_rng_tracker().set_states(state["tracker"])


def _live_storages(trainable: TrainableModel) -> set[int]:
    """Addresses of the memory that the next optimizer step writes to."""
    tensors = [tensor for _, _, chunk in _chunks(trainable) for tensor in (*chunk.parameters(), *chunk.buffers())]
    for part in trainable.optimizer.chained_optimizers:
        tensors += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)}


def _snapshot(bucket: tuple[Any, ...], live: set[int]) -> tuple[Any, ...]:
    """A file to write, its tensors copied to the host so that training cannot change them. Megatron copied most."""
    path, key, (objects, tensors) = bucket

    def owned(tensor: torch.Tensor) -> torch.Tensor:
        is_live = tensor.untyped_storage().data_ptr() in live
        return tensor.detach().to("cpu", copy=is_live)

    return path, key, (objects, [(item, owned(tensor)) for item, tensor in tensors])


def _cause(failure: Any) -> BaseException:
    """The first error behind one that torch has wrapped."""
    error: BaseException = failure[0] if isinstance(failure, tuple) else failure
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _kept(failures: list[Exception]) -> Iterator[None]:
    """Inside, an error in a file that rank 0 alone writes is kept, and ``finish`` tells it to every rank.

    Megatron would raise it on rank 0, and the other ranks would wait for that rank in the next collective call.
    """
    writers: tuple[tuple[Any, str], ...] = (
        (common.TorchCommonSaveStrategy, "save_common"),  # common.pt
        (filesystem_async.FileSystemWriterAsync, "finish"),  # .metadata
        (serialization, "save_config"),  # metadata.json
    )

    def keeping(write: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args: Any, **options: Any) -> Any:
            try:
                return write(*args, **options)
            except Exception as error:  # noqa: BLE001  every rank raises it
                failures.append(error)

        return kept

    before = [getattr(owner, name) for owner, name in writers]
    for (owner, name), write in zip(writers, before, strict=True):
        setattr(owner, name, keeping(write))
    try:
        yield
    finally:
        for (owner, name), write in zip(writers, before, strict=True):
            setattr(owner, name, write)
