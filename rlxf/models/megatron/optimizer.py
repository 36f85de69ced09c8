"""Training one model: megatron's gradient buffers and distributed optimizer, and a reshardable AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from rlxf.config.schema import ActorConfig
from rlxf.errors import TrainingError
from rlxf.models.megatron.model import MegatronModel

ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]]


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
            step = torch.tensor(float(group["step"]), device=parameters[0].device)
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


class TrainableModel:
    """A model with gradient buffers and an optimizer: zero, accumulate over micro-batches, step."""

    def __init__(self, model: MegatronModel, config: ActorConfig) -> None:
        _use_group_step_adamw()
        self.model = model
        self.clip_grad = config.clip_grad
        self.weight_decay = config.weight_decay
        megatron_config = model.gpt.config
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.ddp = DistributedDataParallel(megatron_config, ddp_config, model.gpt)
        settings = OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_eps=config.adam_eps,
            clip_grad=config.clip_grad,
            use_distributed_optimizer=True,
            bf16=config.bf16,
            params_dtype=model.dtype,
        )
        self.optimizer = get_megatron_optimizer(settings, [self.ddp])
        megatron_config.finalize_model_grads_func = finalize_model_grads
        megatron_config.grad_scale_func = self.optimizer.scale_loss
        megatron_config.no_sync_func = self.ddp.no_sync

    def accumulate(self, forward_step: ForwardStep, micro_batches: list[Any]) -> list[Any]:
        """Gradients of all micro-batches, summed over the data-parallel ranks and divided by their number of pairs.

        Returns:
            What ``forward_step``'s loss function reported, one entry per micro-batch.
        """
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        run = get_forward_backward_func()
        reports: list[Any] = run(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=self.ddp,
            num_microbatches=len(micro_batches),
            seq_length=1,  # unused: shapes vary and travel with the tensors
            micro_batch_size=1,
            forward_only=False,
        )
        return reports

    def step(self, learning_rate: float) -> float:
        """Clip and apply the accumulated gradients; the global gradient norm before clipping.

        Raises:
            TrainingError: the norm is not finite; no parameter was touched.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
            group["weight_decay"] = self.weight_decay * group["wd_mult"]  # megatron-core's 0 for norms and biases
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient norm is {norm}; no parameter was changed")
        if self.clip_grad > 0:
            for optimizer in self.optimizer.chained_optimizers:
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), max_norm=self.clip_grad, total_norm=norm)
        self.optimizer.step_with_ready_grads()
        return norm
