"""The actor: the model being trained, on one rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from rlxf.config.roles import LoraConfig, OptimizerConfig
from rlxf.core.disk import disk_error, explain, is_lasting
from rlxf.core.errors import DiskError, ShapeError, TrainingError
from rlxf.core.types import Batch, Metrics, Pairs, PairValues, Sequences
from rlxf.models.backend import pair_logps, token_logps
from rlxf.models.batching import MicroBatchLimits, my_batches
from rlxf.models.hf_folder import save_hf_folder
from rlxf.models.megatron.parallel import reduce_over_data_parallel
from rlxf.models.peft_folder import save_adapter
from rlxf.platform.memory import PhaseMemory
from rlxf.sync.plan import Bucket, TensorSpec, plan_buckets
from rlxf.update.batches import digest, mini_batches
from rlxf.update.kept import KeptWeights
from rlxf.update.objective import MicroBatch, MiniBatch, Objective
from rlxf.update.schedule import make_schedule

if TYPE_CHECKING:
    from rlxf.models.megatron.checkpoint import Write
    from rlxf.models.megatron.model import MegatronModel


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorSettings:
    """How a model is trained."""

    optimizer: OptimizerConfig
    lora: LoraConfig
    limits: MicroBatchLimits  # of one forward pass
    num_steps: int  # of the run: its learning-rate schedule ends there
    seed: int
    bucket_bytes: int  # largest message of a weight sync
    ld_alpha: float | None = None  # weight of the tokens by which one side of a pair is longer; None: as all others


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """A mini-batch whose gradients are accumulated, with its report."""

    step: int
    digest: str  # of its rows
    sums: Tensor
    maxima: Tensor
    dropout: dict[str, Tensor]  # random states after it; empty without dropout


class MegatronActor:
    """One rank of the trained model. Every rank of the role is called with the same arguments.

    Args:
        model: this rank's share of it, with its adapters if it has any.
        objective: what an optimizer step minimises.
        settings: how it is trained.
        save_tokenizer: writes the policy's tokenizer into a model folder; None: it is that of ``actor_rollout.load``.
    """

    _write: Write | None = None  # the newest checkpoint
    _num_made = 0  # optimizer steps of the newest update, including one that was cut half way
    _prepared: _Prepared | None = None  # the gradients that the model holds now
    _kept: KeptWeights | None = None  # the weights of the last push, if somebody may ask for them later

    def __init__(
        self,
        model: MegatronModel,
        objective: Objective[Any],
        settings: ActorSettings,
        *,
        save_tokenizer: Callable[[Path], None] | None = None,
    ) -> None:
        model.platform.keep_freed_memory()
        self.model = model
        self.objective = objective
        self.layout = model.layout
        self.schedule = make_schedule(settings.optimizer, settings.num_steps)
        self._optimizer, self._lora = settings.optimizer, settings.lora
        self._seed, self._limits, self._ld_alpha = settings.seed, settings.limits, settings.ld_alpha
        self._save_tokenizer = save_tokenizer
        dtype = str(model.dtype).removeprefix("torch.")
        specs = [TensorSpec(name, shape, dtype) for name, shape in model.exported_shapes()]
        self._sync_plan = plan_buckets(specs, settings.bucket_bytes)
        from rlxf.models.megatron.optimizer import TrainableModel

        self.trainable = TrainableModel(model, settings.optimizer)
        self.memory = PhaseMemory(model.platform)

    def prepare(self, batch: Batch, step: int) -> None:
        """Forward and backward of a step's first mini-batch, before the step's other rows are known; no optimizer step.

        ``update`` of that step goes on from there, with the same numbers to the bit as without this call, if its first
        mini-batch is equal to ``batch`` and nothing has changed gradients or weights. Otherwise it computes it anew.

        Args:
            batch: the rows of that mini-batch, all of them and in their order (``ActorConfig.first_rows``), with the
                step's beta; the same on every rank.
            step: the driver step.

        Raises:
            TrainingError: the loss is not finite, or gradients and optimizer are off the device; nothing was changed.
            ShapeError: more rows than a mini-batch has, or ``shuffle_minibatch``: the first mini-batch is not known.
        """
        if self._optimizer.shuffle_minibatch:
            raise ShapeError("prepare: actor_rollout.shuffle_minibatch = true draws the first mini-batch from all rows")
        if len(batch) > self._mini_batch_size:
            raise ShapeError(f"prepare: expected at most {self._mini_batch_size} rows, a mini-batch, got {len(batch)}")
        self._num_made, self._prepared = 0, None
        self._copy_pushed()
        before = self._dropout_states()
        self._seed_dropout(step)
        rows = torch.arange(len(batch))
        sums, maxima = self._accumulate(self.objective.mini_batch(batch, rows, first_pass=True), rows, step)
        self._prepared = _Prepared(
            step=step, digest=digest(batch), sums=sums, maxima=maxima, dropout=self._dropout_states()
        )
        self._set_dropout_states(before)  # a checkpoint that is written now is as if this call had not been made

    def update(self, batch: Batch, step: int) -> Metrics:
        """Train on the step's batch: ``ppo_epochs`` passes, one optimizer step per mini-batch.

        Args:
            batch: at least one item (a pair, an example), the same on every rank.
            step: the driver step; decides learning rate and shuffle.

        Returns:
            Means over all items and passes, by the names of docs/metrics.md; ``grad_norm`` is the mean over optimizer
            steps (NaN if fp16 overflows skipped all of them).

        Raises:
            TrainingError: gradients and optimizer are off the device; or the loss or the gradient norm is not finite:
                that optimizer step was not made, but those of the mini-batches before it were (``is_untouched``).
        """
        self._num_made = 0
        self._copy_pushed()
        self._seed_dropout(step)
        learning_rate = self.schedule(step)
        objective = self.objective
        sums = torch.zeros(len(objective.sums), dtype=torch.float64)
        maxima = torch.full((len(objective.maxima),), -torch.inf, dtype=torch.float64)
        norms: list[float | None] = []
        for epoch in range(self._optimizer.ppo_epochs):
            key = (self._seed, step, epoch) if self._optimizer.shuffle_minibatch else None
            for rows in mini_batches(len(batch), self._mini_batch_size, shuffle_key=key):
                prepared, self._prepared = self._prepared, None
                if prepared is not None and prepared.step == step and prepared.digest == digest(batch.select(rows)):
                    found, largest = prepared.sums, prepared.maxima
                    self._set_dropout_states(prepared.dropout)
                else:
                    # Before the first optimizer step the weights are those that the batch was sampled from.
                    mini_batch = objective.mini_batch(batch, rows, first_pass=not norms)
                    found, largest = self._accumulate(mini_batch, rows, step)
                sums += found
                maxima = torch.maximum(maxima, largest)
                norms.append(self._step(learning_rate, step))
        metrics = {**objective.metrics(sums, maxima), **self._step_metrics(norms), "learning_rate": learning_rate}
        return metrics | (self._kept.metrics() if self._kept is not None else {})

    @property
    def _mini_batch_size(self) -> int:
        """Rows of an optimizer step, on all data-parallel ranks."""
        return self._optimizer.ppo_mini_batch_size * self.layout.dp_size

    def _seed_dropout(self, step: int) -> None:
        if self._lora.lora_dropout:
            from rlxf.models.megatron.lora import seed_dropout

            seed_dropout(self._seed, step)

    def _dropout_states(self) -> dict[str, Tensor]:
        if not self._lora.lora_dropout:
            return {}
        from rlxf.models.megatron.lora import dropout_states

        return dropout_states()

    def _set_dropout_states(self, states: dict[str, Tensor]) -> None:
        if self._lora.lora_dropout:
            from rlxf.models.megatron.lora import set_dropout_states

            set_dropout_states(states)

    def _step_metrics(self, norms: Sequence[float | None]) -> Metrics:
        """Metrics of the optimizer steps. A norm is None if the step was skipped because gradients overflowed fp16."""
        made = [norm for norm in norms if norm is not None]
        metrics = {"grad_norm": sum(made) / len(made) if made else math.nan}
        if self.trainable.loss_scale is not None:
            metrics |= {"loss_scale": self.trainable.loss_scale, "skipped_steps": float(len(norms) - len(made))}
        return metrics

    def is_untouched(self) -> bool:
        """Whether the newest ``prepare`` or ``update`` made no optimizer step, so that it changed no weight."""
        return self._num_made == 0

    def evaluate(self, batch: Batch) -> Metrics:
        """What ``update`` would report of the batch, without training on it: means over its items, and ``moments``."""
        return self.objective.evaluate(batch)

    def _accumulate(self, mini_batch: MiniBatch, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Gradients of one mini-batch; sums and maxima (float64) of its report, on all ranks."""
        batches = self._micro_batches(mini_batch)
        num_sums, size = len(self.objective.sums), len(self.objective.sums) + len(self.objective.maxima)
        reports = self.trainable.accumulate(_forward, batches, size)
        sums = reduce_over_data_parallel(reports[:, :num_sums].sum(dim=0), self.layout)
        largest = reduce_over_data_parallel(reports[:, num_sums:].amax(dim=0), self.layout, ReduceOp.MAX)
        loss = float(sums[1])
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {step + 1}: the loss is {loss} on rows {rows.tolist()[:8]} of the step; {self._changed()}. "
                "Lower actor_rollout.lr, or look at the step's pairs in rollouts.jsonl (log.rollouts=true)"
            )
        return sums, largest

    def _step(self, learning_rate: float, step: int) -> float | None:
        if self._kept is not None:
            self._kept.before_step()
        self._num_made += 1  # counted first: a step that fails half way has changed weights
        try:
            return self.trainable.step(learning_rate)
        except TrainingError as error:  # raised before anything is changed
            self._num_made -= 1
            raise TrainingError(f"step {step + 1}: {error}; {self._changed()}. Lower actor_rollout.lr") from error

    def _changed(self) -> str:
        """What the step did to the weights before it failed."""
        if not self._num_made:
            return "no parameter was changed"
        return f"the step's first {self._num_made} optimizer steps have changed the weights"

    def _micro_batches(self, mini_batch: MiniBatch) -> list[MicroBatch]:
        """This rank's share of a mini-batch; at least one, so that every rank makes the collective calls."""
        from rlxf.models.megatron.passes import fill_up

        layout, limits = self.layout, self._limits
        mine = my_batches(
            mini_batch.sequences, mini_batch.groups, limits, dp_rank=layout.dp_rank, dp_size=layout.dp_size
        )
        found = [mini_batch.micro_batch(torch.tensor(part), True) for part in mine]
        filler = partial(mini_batch.micro_batch, torch.tensor([0]), False)  # packed where one is needed
        return fill_up(found or [filler()], layout, filler)

    def token_logps(self, sequences: Sequences) -> Tensor:
        """[sum completion tokens] float32 log-probabilities of every completion token, without gradient."""
        return token_logps(self.model, sequences, self._limits)

    def base_token_logps(self, sequences: Sequences) -> Tensor:
        """``token_logps`` with LoRA adapters off."""
        from rlxf.models.megatron.lora import adapters_off

        with adapters_off(self.model.chunks):
            return token_logps(self.model, sequences, self._limits)

    def base_logps(self, pairs: Pairs) -> PairValues:
        """Log-probabilities of both sides with LoRA adapters off, summed over the completion tokens.

        The micro-batches are those of ``update``, so that fresh adapters have a margin of exactly 0.
        """
        from rlxf.models.megatron.lora import adapters_off

        with adapters_off(self.model.chunks):
            return pair_logps(self.model, pairs, self._limits, ld_alpha=self._ld_alpha)

    def sync_plan(self) -> tuple[Bucket, ...]:
        """The messages that carry all weights, by Hugging Face names; a tied head is not sent twice."""
        return self._sync_plan

    def bucket_tensors(self, index: int, *, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Name and newest tensor of all that is in bucket ``index``: whole, on the device, on rank 0 only.

        Every rank must call it, in the same order, and exhaust the iterator. ``everywhere``: every rank gets them.
        """
        return self.model.export(self._names(index), everywhere=everywhere)

    def _names(self, index: int) -> list[str]:
        return [spec.name for spec in self._sync_plan[index].tensors]

    def keep_pushed(self) -> None:
        """From now on ``pushed_copy`` can give the weights of the last push, also when the actor has newer ones."""
        if self._kept is None:
            self._kept = KeptWeights(self.model)

    def begin_push(self) -> None:
        """The weights that the actor has now are those of the last push."""
        if self._kept is not None:
            self._kept.pushed()

    def _copy_pushed(self) -> None:
        """Begin to, before an update changes them."""
        if self._kept is not None:
            self._kept.before_update()

    def pushed_copy(self, index: int) -> Tensor:
        """``export_copy`` of the weights that were pushed last."""
        assert self._kept is not None  # the run said that somebody may ask
        return self._packed(index, self._kept.export(self._names(index)))

    def export_copy(self, index: int) -> Tensor:
        """[num_bytes] uint8 on the CPU: the newest weights of bucket ``index``, filled in on rank 0 only.

        Every rank must call it, in the same order.
        """
        return self._packed(index, self.bucket_tensors(index))

    def _packed(self, index: int, tensors: Iterator[tuple[str, Tensor]]) -> Tensor:
        """[num_bytes] uint8 on the CPU: the tensors of bucket ``index`` in their places."""
        bucket = self._sync_plan[index]
        payload = torch.empty(bucket.num_bytes, dtype=torch.uint8)
        bucket.fill(payload, tensors)
        return payload

    def save_hf(self, folder: Path) -> None:
        """Write the policy as a folder that ``transformers`` loads; complete or not there at all.

        With LoRA the weights are merged, and ``adapter`` in it is what PEFT loads.

        Raises:
            DiskError: rank 0 could not write it.
        """
        names = [name for name, _ in self.model.exported_shapes()]
        adapters = self._adapters()
        tensors = self.model.export(names)
        failure: OSError | None = None
        if dist.get_rank() == 0:
            changes, extra = self.model.config_changes(), partial(self._save_extra, adapters)
            try:
                save_hf_folder(folder, tensors, like=self.model.folder, changes=changes, extra=extra)
            except Exception as error:
                failure = disk_error(error, folder)
                if failure is None:
                    raise
        for _ in tensors:  # also after a failure: the other ranks gather with rank 0
            continue
        dist.barrier()
        if failure is not None:
            words = explain(failure, folder, "hydra.run.dir or actor_rollout.save")
            raise DiskError(words, lasting=is_lasting(failure))

    def _save_extra(self, adapters: dict[str, Tensor], folder: Path) -> None:
        if self._lora.lora_r:
            lora = self._lora
            save_adapter(
                folder / "adapter",
                adapters.items(),
                rank=lora.lora_r,
                alpha=lora.lora_alpha,
                dropout=lora.lora_dropout,
                base=str(self.model.folder),
            )
        if self._save_tokenizer is not None:
            self._save_tokenizer(folder)

    def _adapters(self) -> dict[str, Tensor]:
        """Name and tensor of every adapter, on rank 0; every rank must call it."""
        from rlxf.models.megatron.adapters import export_adapters

        return dict(export_adapters(self.model)) if self._lora.lora_r else {}

    def save_checkpoint(self, folder: Path, background: bool = False) -> None:
        """Write parameters, optimizer state and random states into ``folder``, which exists; any layout can load them.

        ``background``: return when the state is copied, and write the copy while training goes on; then
        ``checkpoint_written`` must be called until it returns True.
        """
        from rlxf.models.megatron.checkpoint import Write

        self._write = Write(folder, self.trainable, background=background)
        if not background:
            self.checkpoint_written(wait=True)

    def checkpoint_written(self, wait: bool) -> bool:
        """Whether every rank has written the checkpoint; ``wait``: return when they have.

        Raises:
            CheckpointError: it could not be written.
        """
        return self._write is None or self._write.finish(wait=wait)

    def load_checkpoint(self, folder: Path) -> None:
        """Load what ``save_checkpoint`` wrote; random states only if the layout is the same."""
        from rlxf.models.megatron.checkpoint import load

        self._prepared = None  # its gradients are those of other weights
        away = self.trainable.is_offloaded
        if away:  # megatron-core makes a new state on the device
            self.trainable.restore()
        load(folder, self.trainable)
        if away:
            self.trainable.offload()

    def offload(self) -> None:
        """Gradients and optimizer leave the device, for others that share it; the weights stay.

        Log-probs, ``evaluate``, exports and checkpoints work as before. What was prepared is dropped: the next
        ``update`` computes it anew, with the same numbers.

        Raises:
            TrainingError: they are away already.
        """
        self.memory.end("update")
        self.trainable.offload()
        self._prepared = None  # its gradients are freed

    def restore(self) -> None:
        """Gradients and optimizer come back, before the next ``prepare`` or ``update``.

        Raises:
            TrainingError: nothing is away.
        """
        self.memory.end("away")
        self.trainable.restore()

    def free_cache(self) -> None:
        """Give the device what the allocator holds and nobody uses."""
        self.model.platform.synchronize()
        self.model.platform.empty_cache()

    def memory_peaks(self) -> dict[str, int]:
        """Bytes, by phase: with the optimizer on the device (``update``), and without it (``away``)."""
        return dict(self.memory.peaks)


def _forward(iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
    """Megatron's schedule calls it for each micro-batch and chunk: the output, and the loss for the last stage."""
    micro = next(iterator)
    return chunk(micro.packed), micro.loss
