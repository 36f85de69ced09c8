"""Training one model: megatron's gradient buffers and distributed optimizer, and a reshardable AdamW."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
    param_and_grad_buffer,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import clip_grads, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor

from rlxf.config.roles import OptimizerConfig
from rlxf.core.errors import TrainingError
from rlxf.models.megatron.model import MegatronModel
from rlxf.models.megatron.parallel import from_last_stage
from rlxf.models.megatron.passes import ForwardStep, run_schedule


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with the step count in the parameter group, not in each parameter's state.

    megatron-core reshards optimizer state only in that form, which torch's own AdamW does not have. The arithmetic is
    ATen's fused kernel, which exists on every device.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **_: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = int(group.get("step") or 0) + 1
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            first, second = zip(*(self._moments(parameter) for parameter in parameters), strict=True)
            step = torch.full((), float(group["step"]), device=parameters[0].device)
            torch._fused_adamw_(
                parameters,
                [parameter.grad for parameter in parameters],
                list(first),
                list(second),
                [],
                [step.clone() for _ in parameters],  # the kernel advances none of them, but asks for one each
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )

    def _moments(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state["exp_avg"], state["exp_avg_sq"]


def _use_group_step_adamw() -> None:
    # Without Apex megatron-core falls back to torch's AdamW and takes its state layout for granted.
    megatron_optimizer.Adam = distrib_optimizer.Adam = GroupStepAdamW
    megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


_MARK = "skips_groups_of_one"


def _skip_collectives_of_one() -> None:
    """Leave out the collectives of a rank that is alone in its data-parallel group: it has every sum already.

    megatron-core still sends its gradients and parameters through the backend, which copies them: 12 % of a step.
    """
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        collective = getattr(param_and_grad_buffer, name)
        if not hasattr(collective, _MARK):
            setattr(param_and_grad_buffer, name, _unless_alone(collective))


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(output: Tensor, source: Tensor, *args: Any, group: Any = None, **options: Any) -> Any:
        if dist.get_world_size(group) == 1 and output.data_ptr() == source.data_ptr():
            return None
        return collective(output, source, *args, group=group, **options)

    setattr(call, _MARK, True)
    return call


def _norms_and_scales_in_one_call() -> None:
    """Without Apex megatron-core reads the norm of each gradient by itself, and the host waits for every one."""
    if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = _l2_norm
        clip_grads.multi_tensor_scale_impl = _scale


def _l2_norm(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """[1] norm of all tensors of the first list together, by the call of Apex's ``multi_tensor_l2norm``."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(lists[0]))).view(1), None


def _scale(chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """The second list becomes the first one, which is the same here, times ``factor``."""
    torch._foreach_mul_(lists[1], factor)


class TrainableModel:
    """A model with gradient buffers and an optimizer: zero, accumulate over micro-batches, step.

    Between updates both can leave the device; the weights stay.
    """

    is_offloaded = False  # whether gradients and optimizer are away

    def __init__(self, model: MegatronModel, config: OptimizerConfig) -> None:
        _use_group_step_adamw()
        _skip_collectives_of_one()
        _norms_and_scales_in_one_call()
        self.model = model
        self.clip_grad = config.clip_grad
        self.weight_decay = config.weight_decay
        fp16 = model.dtype == torch.float16
        # If the factor cannot shrink after an overflow, the overflow is an error and the step is not just skipped.
        self._least_scale = (config.loss_scale or config.min_loss_scale) if fp16 else None
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.chunks = [DistributedDataParallel(model.config, ddp_config, gpt) for gpt in model.chunks]
        settings = MegatronOptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            use_distributed_optimizer=True,
            bf16=model.dtype == torch.bfloat16,
            fp16=fp16,
            loss_scale=config.loss_scale,
            initial_loss_scale=config.initial_loss_scale,
            min_loss_scale=config.min_loss_scale,
            loss_scale_window=config.loss_scale_window,
            hysteresis=config.hysteresis,
            params_dtype=model.dtype,
        )
        self.optimizer = get_megatron_optimizer(settings, self.chunks)
        model.config.finalize_model_grads_func = finalize_model_grads
        model.config.grad_scale_func = self.optimizer.scale_loss
        no_sync = [chunk.no_sync for chunk in self.chunks]
        model.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]

    def accumulate(self, step: ForwardStep, batches: Sequence[Any], report_size: int) -> Tensor:
        """Gradients of all micro-batches, summed over the data-parallel ranks and divided by their number of pairs.

        Args:
            step: runs one of ``batches`` through one chunk. Returns the output, and the function that makes of the last
                stage's output the loss, the number of pairs, and a function that gives the report.
            batches: at least one; each has its ``packed`` tokens.
            report_size: length of a report.

        Returns:
            [micro-batches, report_size] float64 on every stage's rank, on the CPU.

        Raises:
            TrainingError: gradients and optimizer are off the device.
        """
        self._require_restored()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        layout = self.model.layout
        found = run_schedule(step, self.chunks, batches, layout, forward_only=False)
        reports = torch.zeros(len(batches), report_size, dtype=torch.float64)
        if layout.is_last_stage:
            reports = torch.stack([report() for report in found])
        return from_last_stage(reports, layout)

    @property
    def loss_scale(self) -> float | None:
        """The factor that the loss is multiplied with now; None unless the model is in fp16."""
        return None if self._least_scale is None else float(self.optimizer.get_loss_scale())

    def step(self, learning_rate: float) -> float | None:
        """Clip and apply the accumulated gradients; the global gradient norm before clipping.

        None if gradients overflowed fp16: no parameter was changed, and the loss scale is smaller from now on.

        Raises:
            TrainingError: the norm is not finite, and a smaller loss scale cannot help, or gradients and optimizer are
                off the device; no parameter was changed.
        """
        self._require_restored()
        scale = self.loss_scale
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.weight_decay * group["wd_mult"]  # megatron-core's 0 for norms and biases
        if self.optimizer.prepare_grads():
            if scale is not None and self._least_scale is not None and scale > self._least_scale:
                return None
            raise TrainingError(f"gradients overflow fp16 at a loss scale of {scale:g}")
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient norm is {norm}")
        if self.clip_grad > 0:
            for optimizer in self.optimizer.chained_optimizers:
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), max_norm=self.clip_grad, total_norm=norm)
        self.optimizer.step_with_ready_grads()
        return norm

    def offload(self) -> None:
        """Free the gradients, and move the optimizer's state and its copies of the weights to the host.

        Raises:
            TrainingError: they are away already.
        """
        if self.is_offloaded:
            raise TrainingError("gradients and optimizer are off the device already; call restore before")
        self.is_offloaded = True
        platform = self.model.platform
        platform.synchronize()
        self.optimizer.zero_grad()  # what is left of them are views of the buffers
        for chunk in self.chunks:
            chunk.offload_grad_buffers(synchronize=False, empty_cache=False)
        views = self._views_of_weights()
        self.optimizer.offload_to_cpu()
        for parameter, view in views:
            parameter.data = view  # in fp32 it is the weight itself, which stays: megatron-core would part the two
        platform.empty_cache()

    def restore(self) -> None:
        """What ``offload`` took away is on the device again; the gradients are zero.

        Raises:
            TrainingError: nothing is away.
        """
        if not self.is_offloaded:
            raise TrainingError("gradients and optimizer are on the device; only what was offloaded can be restored")
        self.optimizer.restore_from_cpu()
        for chunk in self.chunks:
            chunk.restore_grad_buffers(synchronize=False)
        self.model.platform.synchronize()
        self.is_offloaded = False

    def _views_of_weights(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters of the optimizer that have the memory of a weight, each with its tensor."""
        weights = {weight.untyped_storage().data_ptr() for chunk in self.chunks for weight in chunk.parameters()}
        return [
            (parameter, parameter.data)
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.untyped_storage().data_ptr() in weights
        ]

    def _require_restored(self) -> None:
        if self.is_offloaded:
            raise TrainingError("gradients and optimizer are off the device; call restore before an update")
