"""The keys of the roles: what is trained, what it is measured against, and what scores.

Each part of the program receives the section that it needs.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rlxf.config.fields import (
    LocalPath,
    as_list,
    as_tuple,
)
from rlxf.config.kinds import (
    BelowOne,
    DataFormat,
    DataPaths,
    Finite,
    Folder,
    LoraTarget,
    LossType,
    MapKeys,
    Positive,
    PythonFile,
    Rate,
    ReadAt,
    ScorerName,
    Share,
    Shares,
    Strict,
    Weights,
)


class LengthConfig(Strict):
    """How long a sequence may be."""

    seq_length: Positive = 1024
    """longest prompt + completion, tokens"""


class LayoutConfig(Strict):
    """How one copy of a model is spread over devices."""

    tensor_model_parallel_size: Positive = 1
    """devices that share each layer"""
    pipeline_model_parallel_size: Positive = 1
    """devices that the layers are spread over"""
    virtual_pipeline_model_parallel_size: Positive = 1
    """pieces of layers per pipeline device; needs a token budget"""
    context_parallel_size: Positive = 1
    """devices that share the tokens of each forward pass"""
    sequence_parallel: bool = False
    """cut norms and residuals along the tokens over the tensor-parallel devices, too"""

    @property
    def devices_per_replica(self) -> int:
        """Devices that hold one copy of the model and share its work; data parallel is how many of these there are."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


class MicroBatchConfig(Strict):
    """What one forward and backward pass takes at a time."""

    micro_batch_size: Positive = 1
    """pairs per forward/backward on one data-parallel rank"""
    max_tokens_per_micro_batch: Positive | None = None
    """tokens per forward/backward instead, whatever the pairs"""
    share_prompts: bool = True
    """compute a prompt once for the chosen and the rejected side, or for all its completions"""


class RoleConfig(LengthConfig, LayoutConfig, MicroBatchConfig):
    """What actor, reference and reward have in common."""

    model: str = ""
    """a file in configs/rlxf/model: the shape for a plan where `load` is not here; ref, reward: unset = the actor's"""
    load: Folder | None = None
    """folder with the weights: Hugging Face's or a checkpoint; ref: unset = the actor's"""
    tokenizer_name_or_path: Folder | None = None
    """folder with the tokenizer; unset = `load`"""
    bf16: bool = False
    """false: fp32, unless fp16"""
    fp16: bool = False
    """half precision; the actor's loss is scaled"""

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """Of the parameters, by torch's name."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"


class DataConfig(LengthConfig):
    """Which rows the policy is trained on, and how they are read."""

    data_path: DataPaths | None = None
    """files, folders or Hugging Face datasets on disk, see docs/data.md"""
    data_weights: Weights = ()
    """share of each path in a mixture; unset: every row of all once per epoch"""
    split: Shares = (100.0, 0.0, 0.0)
    """shares of training, validation and test rows, in file order"""
    data_format: DataFormat = "auto"
    """auto: what the names of the columns say"""
    map_keys: MapKeys | None = None
    """alpaca, sharegpt: the columns of prompt, query, response, history, system, chosen, rejected"""
    prompt_key: str = "prompt"
    """column with the prompt"""
    chosen_key: str = "chosen"
    """offline: column with the preferred completion"""
    rejected_key: str = "rejected"
    """offline: column with the other completion"""
    margin_key: str | None = None
    """rm: column with how much better chosen is; unset: 0"""
    prompt_type: str | None = None
    """chat template by name, see docs/data.md; unset: the tokenizer's own"""
    eos_tokens: Annotated[tuple[str, ...], BeforeValidator(as_list)] | None = None
    """tokens that end a completion besides the model's own; unset: those of prompt_type"""
    max_bad_rows: int = Field(0, ge=0)
    """malformed rows that are left out; one more stops the run"""
    no_shuffle: bool = False
    """true: prompts in file order"""
    max_prompt_length: Positive = 512
    """tokens; see prompt_overflow"""
    prompt_overflow: Literal["drop", "truncate_left", "error"] = "drop"
    """what becomes of longer prompts; sft: examples"""


class SamplingConfig(Strict):
    """How many completions a prompt gets, and what becomes of those that do not end."""

    n_samples_per_prompt: int = Field(2, ge=2)
    """completions per prompt"""
    max_new_tokens: Positive | None = None
    """unset: seq_length - max_prompt_length"""
    num_samples_per_step: Positive | None = None
    """prompts per generate call; unset = all of them"""
    do_sample: bool = True
    """false (greedy) is an error online: all completions of a prompt would be the same"""
    missing_eos_penalty: Rate = 0.0
    """subtracted from the score of a completion without EOS"""


class LossConfig(Strict):
    """What an update minimises."""

    dpo_loss_type: Annotated[tuple[LossType, ...], BeforeValidator(as_list), Field(min_length=1)] = ("sigmoid",)
    """one loss or several (docs/losses.md)"""
    dpo_loss_weights: Annotated[tuple[Rate, ...], BeforeValidator(as_tuple)] | None = None
    """of each; unset = 1"""
    dpo_beta: Finite = Field(0.1, gt=0)
    """pull towards the reference; larger stays closer; orpo: its lambda"""
    dpo_label_smoothing: Finite = Field(0.0, ge=0, lt=0.5)
    """assumed share of swapped labels"""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """that the reference is kept near in; reverse_kl is plain DPO"""
    f_alpha_divergence_coef: Finite = 0.5
    """alpha of alpha_divergence"""
    discopop_tau: Finite = Field(0.05, gt=0)
    """discopop: how sharply its two losses are blended"""
    simpo_gamma: Finite = 0.5
    """simpo: the margin that chosen should have, in units of dpo_beta x nats per token"""
    pref_ftx: Rate = 0.0
    """weight of the mean negative log-likelihood of the chosen side's tokens, added to the loss"""
    center_rewards_coefficient: Rate = 0.0
    """rm: weight of (score of chosen + score of rejected)^2"""
    dpo_logp_reduction: Literal["auto", "sum", "mean"] = "auto"
    """auto: mean for offline ipo, sum otherwise"""

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Of each of ``dpo_loss_type``."""
        return self.dpo_loss_weights or (1.0,) * len(self.dpo_loss_type)


class OptimizerConfig(Strict):
    """AdamW, its schedule, and how a step's pairs are cut into optimizer steps."""

    ppo_mini_batch_size: Positive = 1
    """pairs per optimizer step on one data-parallel rank"""
    ppo_epochs: Positive = 1
    """passes over the same pairs"""
    shuffle_minibatch: bool = False
    """shuffle pairs before each pass; a pair is never split"""
    lr: Rate = 1e-6
    """highest learning rate"""
    min_lr: Rate = 0.0
    """learning rate at the end of the decay"""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """from lr to min_lr over train_iters"""
    lr_warmup_iters: int = Field(0, ge=0)
    """driver steps; set this or lr_warmup_fraction"""
    lr_warmup_fraction: Share | None = None
    """share of train_iters"""
    weight_decay: Rate = 0.0
    """of AdamW"""
    clip_grad: Rate = 1.0
    """largest global gradient norm; 0 = no clipping"""
    adam_beta1: BelowOne = 0.9
    """decay of the mean of gradients"""
    adam_beta2: BelowOne = 0.999
    """decay of the mean of squared gradients"""
    adam_eps: Finite = Field(1e-8, gt=0)
    """added to the root of the mean of squared gradients"""
    loss_scale: Annotated[Finite, Field(gt=0)] | None = None
    """fp16: constant factor of the loss"""
    initial_loss_scale: Finite = Field(65536.0, gt=0)
    """fp16: the factor at the start; halved by gradients beyond fp16"""
    min_loss_scale: Finite = Field(1.0, gt=0)
    """fp16: an overflow at this factor ends the run"""
    loss_scale_window: Positive = 1000
    """fp16: optimizer steps without overflow before the factor is doubled"""
    hysteresis: Positive = 2
    """fp16: overflows before the factor is halved"""


class LoraConfig(Strict):
    """Low-rank adapters, trained in place of the model's own parameters."""

    lora_r: int = Field(0, ge=0)
    """rank of the LoRA adapters; 0 = train all parameters"""
    lora_alpha: Finite = Field(32.0, gt=0)
    """the adapters' output is scaled by lora_alpha / lora_r"""
    lora_dropout: BelowOne = 0.0
    """share of the adapters' inputs that is zeroed while training"""
    lora_target_modules: Annotated[tuple[LoraTarget, ...], BeforeValidator(as_tuple)] = (
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    )
    """that get an adapter"""
    lora_load: Folder | None = None
    """PEFT folder that the adapters start from; unset = fresh ones"""
    qlora: bool = False
    """hold the frozen base in 4 bits (NF4); needs lora_r and bitsandbytes"""


class ActorConfig(RoleConfig, DataConfig, SamplingConfig, LossConfig, OptimizerConfig, LoraConfig):
    """The policy being trained. A part of the program receives it as the section that it needs."""

    save: Annotated[str, LocalPath("output")] | None = None
    """folder of checkpoints; unset: `checkpoints` in the run folder"""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """activations computed again in backward"""
    num_gpus_for_train: Positive = 1
    """devices of actor_rollout that train"""
    num_gpus_for_infer: Positive = 1
    """devices of actor_rollout that sample"""
    inference_tensor_model_parallel_size: Positive = 1
    """devices of one rollout engine"""


class ReferenceConfig(RoleConfig):
    """The frozen model that DPO is measured against. Without ``load`` it starts from the actor's folder."""

    refer_model_iter: Positive | None = None
    """which checkpoint, where `load` is a run's folder of checkpoints"""
    precompute_ref_log_probs: bool = False
    """dpo: compute those of all pairs before the first step, and keep them"""
    cache: Annotated[str, LocalPath("output")] | None = None
    """where they are kept; unset: ~/.cache/rlxf/ref_logps"""
    ref_update_interval: int = Field(0, ge=0)
    """updates between moves of the reference after the policy; 0 = never"""
    ref_mixup_alpha: Share = 0.6
    """reference = alpha * policy + (1 - alpha) * reference at each move (TR-DPO)"""


class RewardConfig(RoleConfig):
    """What scores a completion: a reward model (``load``) or a Python function (``function``)."""

    model: str | None = None  # type: ignore[assignment]
    """a reward function has no model"""
    function: PythonFile | None = None
    """path or module of a Python file that defines `reward(prompts, completions, completion_ids, **columns)`"""
    read_at: ReadAt = "auto"
    """token where a reward model's score is read; auto: what its folder says, else last_token"""
    max_failures: int = Field(0, ge=0)
    """completions of a whole run that may stay without a score when calls fail"""

    @property
    def kind(self) -> ScorerName:
        """What this section holds."""
        return "model" if self.function is None else "function"
