"""The actor: the policy being trained, on one rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from rlxf.config.schema import RunConfig
from rlxf.errors import TrainingError
from rlxf.models.backend import load_model, pair_logps, sum_rows, token_logps
from rlxf.models.batching import Limits, my_batches, pair_units
from rlxf.models.hf_folder import save_hf_folder
from rlxf.models.megatron.parallel import reduce_over_data_parallel
from rlxf.models.peft_folder import save_adapter
from rlxf.platform.base import Platform, Process
from rlxf.sync.plan import Bucket, TensorSpec, plan_buckets
from rlxf.types import Metrics, OnlinePairs, PairLogps, Pairs, ReferencedPairs, Sequences
from rlxf.update.batches import mini_batches
from rlxf.update.losses import LOSSES, reduction_of
from rlxf.update.schedule import make_schedule

if TYPE_CHECKING:
    from rlxf.models.megatron.checkpoint import Write
    from rlxf.models.megatron.packing import Packed

# Summed over pairs, then divided by their number.
_MEANS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "objective/kl",
    "objective/entropy",
)


# Behind the means in a report: sum, number and largest of the differences to the engine's log-probs.
_REPORT_SIZE = len(_MEANS) + 3


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What one forward/backward needs: chosen rows first, then rejected rows, and which of them count."""

    packed: Packed
    completion_lengths: Tensor  # [2n] int64, chosen then rejected
    reference: PairLogps  # n pairs
    engine: Tensor | None  # [sum completion tokens] the engine's log-probs, while the weights are those that sampled
    counted: bool  # False: this rank has no pair, and computes one only to take part in the collective calls


class Actor:
    """One rank of the policy. Every rank of the role is called with the same arguments.

    Args:
        config: the whole recipe.
        platform: the device.
        process: this rank's place.

    Raises:
        ModelError: ``actor_rollout.load`` does not hold a causal language model.
    """

    _write: Write | None = None  # the newest checkpoint

    def __init__(self, config: RunConfig, platform: Platform, process: Process) -> None:
        self.config = config.actor_rollout
        self.model = load_model(config, "actor_rollout", platform, process)
        self.layout = self.model.layout
        self.schedule = make_schedule(self.config, config.training.train_iters)
        self._seed = config.training.seed
        self._loss = LOSSES[self.config.dpo_loss_type]
        self._reduction = reduction_of(
            self.config.dpo_logp_reduction, loss_type=self.config.dpo_loss_type, offline=config.offline
        )
        dtype = str(self.model.dtype).removeprefix("torch.")
        specs = [TensorSpec(name, shape, dtype) for name, shape in self.model.exported_shapes()]
        self._sync_plan = plan_buckets(specs, config.sync.bucket_mb * 2**20)
        self._limits = Limits.of(self.config)
        from rlxf.models.megatron.optimizer import TrainableModel

        self.trainable = TrainableModel(self.model, self.config)

    def update(self, batch: ReferencedPairs, step: int) -> Metrics:
        """Train on the step's pairs: ``ppo_epochs`` passes, one optimizer step per mini-batch.

        Args:
            batch: at least one pair, the same on every rank.
            step: the driver step; decides learning rate and shuffle.

        Returns:
            Means over all pairs and passes, by the names of docs/metrics.md; ``grad_norm`` is the mean over optimizer
            steps.

        Raises:
            TrainingError: the loss or the gradient norm is not finite; that optimizer step was not made.
        """
        if self.config.lora_dropout:
            from rlxf.models.megatron.lora import seed_dropout

            seed_dropout(self._seed, step)
        learning_rate = self.schedule(step)
        sums = torch.zeros(len(_MEANS), dtype=torch.float64)
        norms: list[float] = []
        count = 0
        drift: Metrics = {}
        for epoch in range(self.config.ppo_epochs):
            key = (self._seed, step, epoch) if self.config.shuffle_minibatch else None
            for rows in mini_batches(
                len(batch), self.config.ppo_mini_batch_size * self.layout.dp_size, shuffle_key=key
            ):
                report = self._accumulate(batch, rows, step, fresh=not norms)
                drift = drift or _drift(report)
                sums += report[: len(_MEANS)]
                norms.append(self._step(learning_rate, step))
                count += len(rows)
        means = dict(zip(_MEANS, (sums / count).tolist(), strict=True))
        return {
            **means,
            **drift,
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": learning_rate,
            "beta": self.config.dpo_beta,
        }

    def _accumulate(self, batch: ReferencedPairs, rows: Tensor, step: int, *, fresh: bool) -> Tensor:
        """Gradients of one mini-batch; [_REPORT_SIZE] float64 report of its pairs, on all ranks.

        ``fresh``: the weights are still those that the pairs were sampled from.
        """
        batches = self._micro_batches(batch, rows, fresh=fresh)
        reports = self.trainable.accumulate(self._forward, batches, _REPORT_SIZE)
        sums = reduce_over_data_parallel(reports[:, :-1].sum(dim=0), self.layout)
        largest = reduce_over_data_parallel(reports[:, -1].amax(dim=0, keepdim=True), self.layout, ReduceOp.MAX)
        if not math.isfinite(float(sums[0])):
            raise TrainingError(
                f"step {step + 1}: the loss is {float(sums[0])} on pairs {rows.tolist()[:8]} of the step; no parameter "
                "was changed. Lower actor_rollout.lr, or look at the step's pairs in rollouts.jsonl (log.rollouts=true)"
            )
        return torch.cat([sums, largest])

    def _step(self, learning_rate: float, step: int) -> float:
        try:
            return self.trainable.step(learning_rate)
        except TrainingError as error:
            raise TrainingError(f"step {step + 1}: {error}. Lower actor_rollout.lr") from error

    def _micro_batches(self, batch: ReferencedPairs, rows: Tensor, *, fresh: bool) -> list[MicroBatch]:
        """This rank's share of a mini-batch; at least one, so that every rank makes the collective calls."""
        from rlxf.models.megatron.passes import fill_up

        pairs = batch.pairs.select(rows)
        both = Sequences.concat([pairs.chosen, pairs.rejected])
        units = pair_units(len(rows))
        layout = self.layout
        mine = my_batches(both, units, self._limits, dp_rank=layout.dp_rank, dp_size=layout.dp_size)
        found = [self._micro_batch(batch, rows[part], fresh=fresh, counted=True) for part in map(torch.tensor, mine)]
        filler = self._micro_batch(batch, rows[:1], fresh=False, counted=False)
        return fill_up(found or [filler], layout, filler)

    def _micro_batch(self, batch: ReferencedPairs, rows: Tensor, *, fresh: bool, counted: bool) -> MicroBatch:
        from rlxf.models.megatron.packing import pack_for_logps

        online = batch.pairs if fresh and isinstance(batch.pairs, OnlinePairs) else None
        pairs = batch.pairs.select(rows)
        sequences = Sequences.concat([pairs.chosen, pairs.rejected])
        limits = self._limits
        return MicroBatch(
            packed=pack_for_logps(sequences, self.layout, share_prompts=limits.share_prompts, num_tokens=limits.length),
            completion_lengths=sequences.completion_lengths,
            reference=batch.reference.select(rows),
            engine=None if online is None else online.engine_logps(rows),
            counted=counted,
        )

    def _forward(self, iterator: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Any]:
        micro = next(iterator)
        return chunk(micro.packed), partial(self._loss_of, micro)

    def _loss_of(self, micro: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss summed over the pairs, their number, and the [_REPORT_SIZE] float64 report on the CPU."""
        token_logps = self.model.logps(hidden, micro.packed)
        sums = sum_rows(token_logps, micro.completion_lengths)  # [2n]
        summed = PairLogps(chosen=sums.chunk(2)[0], rejected=sums.chunk(2)[1])
        device = sums.device
        reference = PairLogps(chosen=micro.reference.chosen.to(device), rejected=micro.reference.rejected.to(device))
        actor_side, reference_side = self._reduced(summed, micro), self._reduced(reference, micro)
        losses = self._loss(
            actor_side,
            reference_side,
            beta=self.config.dpo_beta,
            label_smoothing=self.config.dpo_label_smoothing,
        )  # [n]
        means = _report(losses, summed, reference, self.config.dpo_beta)
        report = torch.cat([means, _difference(token_logps.detach(), micro.engine)])
        share = 1.0 if micro.counted else 0.0
        # Every context-parallel rank has all losses: one of them counts the pairs.
        counts = micro.counted and self.layout.cp_rank == 0
        count = torch.tensor(len(losses) if counts else 0, dtype=torch.int, device=device)
        return losses.sum() * share, count, report * share

    def _reduced(self, logps: PairLogps, micro: MicroBatch) -> PairLogps:
        if self._reduction == "sum":
            return logps
        chosen, rejected = micro.completion_lengths.to(logps.chosen.device).chunk(2)
        return PairLogps(chosen=logps.chosen / chosen, rejected=logps.rejected / rejected)

    def token_logps(self, sequences: Sequences) -> Tensor:
        """[sum completion tokens] float32 log-probabilities of every completion token, without gradient."""
        return token_logps(self.model, sequences, self._limits)

    def base_token_logps(self, sequences: Sequences) -> Tensor:
        """``token_logps`` with LoRA adapters off."""
        from rlxf.models.megatron.lora import adapters_off

        with adapters_off(self.model.chunks):
            return token_logps(self.model, sequences, self._limits)

    def base_logps(self, pairs: Pairs) -> PairLogps:
        """Log-probabilities of both sides with LoRA adapters off, summed over the completion tokens.

        The micro-batches are those of ``update``, so that fresh adapters have a margin of exactly 0.
        """
        from rlxf.models.megatron.lora import adapters_off

        with adapters_off(self.model.chunks):
            return pair_logps(self.model, pairs, self._limits)

    def sync_plan(self) -> tuple[Bucket, ...]:
        """The messages that carry all weights, by Hugging Face names; a tied head is not sent twice."""
        return self._sync_plan

    def export_bucket(self, index: int, into: Tensor | None = None) -> Tensor:
        """[num_bytes] uint8 on the CPU: the newest weights of bucket ``index``, filled in on rank 0 only.

        Every rank must be called, in the same order.

        Args:
            index: of the plan.
            into: [num_bytes] uint8 memory to fill; None: this object's own, which the next call overwrites.
        """
        bucket = self._sync_plan[index]
        payload = self._payload[: bucket.num_bytes] if into is None else into
        places = dict(bucket.views(payload))
        for name, tensor in self.model.export(list(places)):
            places[name].copy_(tensor)
        return payload

    @cached_property
    def _payload(self) -> Tensor:
        """Memory of the largest bucket, allocated once: fresh pages cost more than the copy into them."""
        return torch.empty(max(bucket.num_bytes for bucket in self._sync_plan), dtype=torch.uint8)

    def save_hf(self, folder: Path) -> None:
        """Write the policy as a folder that ``transformers`` loads; complete or not there at all.

        With LoRA the weights are merged, and ``adapter`` in it is what PEFT loads.
        """
        names = [name for name, _ in self.model.exported_shapes()]
        tensors = self.model.export(names)
        if dist.get_rank() == 0:
            dtype = str(self.model.dtype).removeprefix("torch.")
            extra = self._save_adapter if self.config.lora_r else None
            save_hf_folder(folder, tensors, like=self.model.folder, dtype=dtype, extra=extra)
        else:
            for _ in tensors:
                continue
            if self.config.lora_r:
                self._save_adapter(folder)
        dist.barrier()

    def _save_adapter(self, folder: Path) -> None:
        from rlxf.models.megatron.adapters import export_adapters

        tensors = dict(export_adapters(self.model))
        if dist.get_rank() == 0:
            config = self.config
            save_adapter(
                folder / "adapter",
                tensors.items(),
                rank=config.lora_r,
                alpha=config.lora_alpha,
                dropout=config.lora_dropout,
                base=str(self.model.folder),
            )

    def save_checkpoint(self, folder: Path, background: bool = False) -> None:
        """Write parameters, optimizer state and random states into ``folder``, which exists; any layout can load them.

        ``background``: return when the state is copied, and write the copy while training goes on; then
        ``checkpoint_written`` must be called until it says so.
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
        """Take over what ``save_checkpoint`` wrote; random states only if the layout is the same."""
        from rlxf.models.megatron.checkpoint import load

        load(folder, self.trainable)


def _report(losses: Tensor, actor: PairLogps, reference: PairLogps, beta: float) -> Tensor:
    """[len(_MEANS)] float64 sums over the pairs; log-probs summed over the completion, whatever the loss reads."""
    chosen = beta * (actor.chosen - reference.chosen)  # [n] implicit rewards
    rejected = beta * (actor.rejected - reference.rejected)
    both = torch.cat([actor.chosen - reference.chosen, actor.rejected - reference.rejected])
    entropy = -torch.cat([actor.chosen, actor.rejected])
    columns = (
        losses,
        chosen,
        rejected,
        chosen - rejected,
        (chosen > rejected).float(),
        actor.chosen,
        actor.rejected,
        both.view(2, -1).mean(dim=0),
        entropy.view(2, -1).mean(dim=0),
    )
    return torch.stack([column.detach().double().sum() for column in columns]).cpu()


def _difference(own: Tensor, engine: Tensor | None) -> Tensor:
    """[3] float64: sum, number and largest of |own - engine|, where the engine gave log-probs."""
    if engine is None:
        return torch.zeros(3, dtype=torch.float64)
    difference = (own.cpu().double() - engine).abs()
    difference = difference[difference.isfinite()]
    largest = difference.max() if len(difference) else torch.tensor(0.0, dtype=torch.float64)
    return torch.stack([difference.sum(), torch.tensor(float(len(difference)), dtype=torch.float64), largest])


def _drift(report: Tensor) -> Metrics:
    """How far the engine's log-probs are from the trainer's, over the pairs of the step's first optimizer step."""
    total, count, largest = report[-3:].tolist()
    if not count:
        return {}
    return {"rollout/logp_diff_mean": total / count, "rollout/logp_diff_max": largest}
