"""The keys of the roles: the actor (trained), the reference (frozen) and the reward model or function (scores).

Each part of the program receives the section that it needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field

from rlxf.config.fields import (
    LocalPath,
    as_list,
    as_tuple,
)
from rlxf.config.kinds import (
    BelowOne,
    Beta,
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
    Share,
    Shares,
    Strict,
    Weights,
)
from rlxf.config.rewards import RewardSource


class LengthConfig(Strict):
    """Length of sequences."""

    seq_length: Positive = 1024
    """Longest sequence of prompt and completion, in tokens."""


class LayoutConfig(Strict):
    """Parallel layout: how one copy of a model is spread over devices."""

    tensor_model_parallel_size: Positive = 1
    """Number of devices that share the matrices of each layer (TP)."""
    pipeline_model_parallel_size: Positive = 1
    """Number of pipeline stages (PP): each holds a part of the layers, on devices of its own."""
    virtual_pipeline_model_parallel_size: Positive = 1
    """Number of model pieces that each pipeline stage holds (VPP). Above 1 it needs `max_tokens_per_micro_batch`."""
    context_parallel_size: Positive = 1
    """Number of devices that share the tokens of each forward pass (CP). Useful for long sequences."""
    sequence_parallel: bool = False
    """Also split norms and residuals along the tokens over the tensor-parallel devices. Saves activation memory."""

    @property
    def devices_per_replica(self) -> int:
        """Devices that hold one copy of the model and share its work; data parallel is how many of these there are."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


class MicroBatchConfig(Strict):
    """Micro-batches: how many rows one forward and backward pass takes."""

    micro_batch_size: Positive = 1
    """Pairs (sft: examples) per forward and backward pass on one data-parallel rank. A pass takes twice as many
    completions; pairs that share completions can be more. Changes memory and speed, not the result."""
    max_tokens_per_micro_batch: Positive | None = None
    """Token budget of a forward and backward pass, instead of `micro_batch_size`. Bounds the memory whatever the
    lengths are."""
    share_prompts: bool = True
    """Compute a prompt once for both sides of a pair, or for all its completions. false is for comparisons only; the
    result is the same."""


class RoleConfig(LengthConfig, LayoutConfig, MicroBatchConfig):
    """Keys that ``actor_rollout``, ``ref`` and ``reward`` have in common."""

    model: str = ""
    """Name of a file in `configs/rlxf/model`: the shape of the model, for a plan on a machine without the folder in
    `load`. Unset for ref and reward: the actor's."""
    load: Folder | None = None
    """Folder with the weights: a Hugging Face folder or a checkpoint. Unset for ref: the actor's."""
    tokenizer_name_or_path: Folder | None = None
    """Folder with the tokenizer. Unset: the folder in `load`."""
    bf16: bool = False
    """Compute in bf16. If bf16 and fp16 are both false, the role computes in fp32."""
    fp16: bool = False
    """Compute in fp16. The actor's loss is then scaled so that small gradients do not vanish."""

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """Dtype of the parameters, by torch's name."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"


class DataConfig(LengthConfig):
    """Training data: which rows the policy learns from, and how they are read."""

    data_path: DataPaths | None = None
    """Files, folders or Hugging Face datasets on disk to train on. See docs/data.md."""
    data_weights: Weights = ()
    """Share of each path in a mixture; one number per path. Unset: every row of all paths once per epoch."""
    split: Shares = (100.0, 0.0, 0.0)
    """Shares of training, validation and test rows, cut in file order."""
    data_format: DataFormat = "auto"
    """Format of the rows. `auto` recognises it from the names of the columns."""
    map_keys: MapKeys | None = None
    """Names of the columns in alpaca and sharegpt files. The keys are prompt, query, response, history, system, chosen
    and rejected."""
    prompt_key: str = "prompt"
    """Name of the column with the prompt."""
    chosen_key: str = "chosen"
    """Offline: name of the column with the preferred completion."""
    rejected_key: str = "rejected"
    """Offline: name of the column with the other completion."""
    margin_key: str | None = None
    """Stage rm: name of the column that holds how much better chosen is. Unset: the margin is 0."""
    prompt_type: str | None = None
    """Name of a chat template; docs/preprocessing.md lists them. Unset: the tokenizer's own template."""
    eos_tokens: Annotated[tuple[str, ...], BeforeValidator(as_list)] | None = None
    """Tokens that end a completion, in addition to the model's own. Unset: those of the template in `prompt_type`."""
    max_bad_rows: int = Field(0, ge=0)
    """Number of malformed rows that are left out. One more ends the run."""
    no_shuffle: bool = False
    """Use the rows in file order. If false, they are shuffled in each epoch, by training.seed."""
    max_prompt_length: Positive = 512
    """Longest prompt, in tokens. `prompt_overflow` decides about longer ones."""
    prompt_overflow: Literal["drop", "truncate_left", "error"] = "drop"
    """What happens to a prompt, pair or sft example that is too long. `drop` leaves it out, `truncate_left` keeps its
    end, `error` ends the run."""


class SamplingConfig(Strict):
    """Sampling: how many completions a prompt gets, and how long they may be."""

    n_samples_per_prompt: int = Field(2, ge=2)
    """Number of completions that are sampled for each prompt."""
    max_new_tokens: Positive | None = None
    """Longest completion, in tokens. Unset: `seq_length` - `max_prompt_length`."""
    num_samples_per_step: Positive | None = None
    """Number of prompts that an engine receives in one call. Unset: all of its prompts."""
    do_sample: bool = True
    """Sample randomly. false (greedy) is an error online, because all completions of a prompt would be equal."""
    missing_eos_penalty: Rate = 0.0
    """Number that is subtracted from the score of a completion that did not end with EOS."""
    length_penalty: Rate = 0.0
    """Number that is subtracted from the score for each token of a completion."""
    overlong_tokens: int = Field(0, ge=0)
    """Length of the zone before `max_new_tokens` in which `overlong_penalty` sets in, in tokens (DAPO). 0: no zone."""
    overlong_penalty: Rate = 0.0
    """Number that is subtracted from the score of a completion of `max_new_tokens`; in the zone of `overlong_tokens` it
    grows linearly from 0 to this number."""


class LossConfig(Strict):
    """The loss."""

    dpo_loss_type: Annotated[tuple[LossType, ...], BeforeValidator(as_list), Field(min_length=1)] = ("sigmoid",)
    """Name of the loss, or a list of losses that are added up. See docs/losses.md."""
    dpo_loss_weights: Annotated[tuple[Rate, ...], BeforeValidator(as_tuple)] | None = None
    """Weight of each loss in `dpo_loss_type`. Unset: 1 for each."""
    dpo_beta: Beta = 0.1
    """DPO beta (KL strength): a larger value keeps the policy closer to the reference. orpo: the lambda of its
    paper. A list holds the value of each epoch, and its last value is that of all later epochs."""
    dpo_label_smoothing: Finite = Field(0.0, ge=0, lt=0.5)
    """Share of pairs whose label is assumed to be swapped. 0 trusts all labels."""
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl"
    """Divergence that measures the distance to the reference. `reverse_kl` is plain DPO."""
    f_alpha_divergence_coef: Finite = 0.5
    """Alpha of `alpha_divergence`. At 1 this divergence equals `reverse_kl`."""
    discopop_tau: Finite = Field(0.05, gt=0)
    """Loss discopop: temperature of the sigmoid that blends its two losses."""
    simpo_gamma: Finite = 0.5
    """Loss simpo: target margin between chosen and rejected, in units of `dpo_beta` x nats per token."""
    pref_ftx: Rate = 0.0
    """Weight of an additional SFT term: the mean negative log-likelihood of the tokens of chosen. 0 adds none."""
    center_rewards_coefficient: Rate = 0.0
    """Stage rm: weight of the term (score of chosen + score of rejected)^2, which keeps scores near 0. 0 adds none."""
    dpo_logp_reduction: Literal["auto", "sum", "mean"] = "auto"
    """Whether log-probabilities are summed (`sum`) or averaged (`mean`) over the tokens of a completion. `auto`: `mean`
    for offline ipo, else `sum`."""
    ld_alpha: Share | None = None
    """LD-DPO: weight of the log-probabilities of those tokens by which one completion of a pair is longer than the
    other one. 0 leaves them out; unset, as 1, counts them like all others. See docs/losses.md."""
    dpo_weighting: Literal["none", "wpo"] = "none"
    """Weight of each pair in the loss. `wpo`: how probable both completions are under the policy that is trained
    (WPO). See docs/losses.md."""

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """One weight for each loss of ``dpo_loss_type``."""
        return self.dpo_loss_weights or (1.0,) * len(self.dpo_loss_type)

    def beta_after(self, epochs: float) -> float:
        """``dpo_beta`` of a step that begins after ``epochs`` passes over the data."""
        if isinstance(self.dpo_beta, tuple):
            return self.dpo_beta[min(int(epochs), len(self.dpo_beta) - 1)]
        return self.dpo_beta


class OptimizerConfig(Strict):
    """AdamW, its learning-rate schedule, and the size of an optimizer step."""

    ppo_mini_batch_size: Positive = 1
    """Pairs (sft: examples) per optimizer step on one data-parallel rank."""
    ppo_epochs: Positive = 1
    """Number of passes over the pairs of a driver step."""
    shuffle_minibatch: bool = False
    """Shuffle the pairs of a driver step before each pass."""
    lr: Rate = 1e-6
    """Highest learning rate. Large models usually need 1e-7 to 1e-6; LoRA needs ten to a hundred times as much."""
    min_lr: Rate = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from lr to `min_lr` after the warm-up. `constant` keeps lr."""
    lr_warmup_iters: int = Field(0, ge=0)
    """Driver steps of linear warm-up. Set either this or `lr_warmup_fraction`."""
    lr_warmup_fraction: Share | None = None
    """Length of the warm-up as a share of all driver steps."""
    weight_decay: Rate = 0.0
    """Weight decay of AdamW."""
    clip_grad: Rate = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it. 0 switches clipping off."""
    adam_beta1: BelowOne = 0.9
    """AdamW: decay rate of the running mean of gradients."""
    adam_beta2: BelowOne = 0.999
    """AdamW: decay rate of the running mean of squared gradients."""
    adam_eps: Finite = Field(1e-8, gt=0)
    """AdamW: small number that is added to the denominator."""
    loss_scale: Annotated[Finite, Field(gt=0)] | None = None
    """With fp16: constant factor of the loss. Unset: the factor adapts itself, by the four keys below."""
    initial_loss_scale: Finite = Field(65536.0, gt=0)
    """With fp16: factor of the loss at the start. It is halved when gradients overflow."""
    min_loss_scale: Finite = Field(1.0, gt=0)
    """With fp16: smallest factor. An overflow at this factor ends the run."""
    loss_scale_window: Positive = 1000
    """With fp16: optimizer steps without an overflow after which the factor is doubled."""
    hysteresis: Positive = 2
    """With fp16: number of overflows after which the factor is halved."""


class LoraConfig(Strict):
    """LoRA: low-rank adapters that are trained while the model's own parameters stay frozen."""

    lora_r: int = Field(0, ge=0)
    """Rank of the LoRA adapters. 0 trains all parameters instead."""
    lora_alpha: Finite = Field(32.0, gt=0)
    """Scale of the adapters: their output is multiplied by `lora_alpha` / `lora_r`."""
    lora_dropout: BelowOne = 0.0
    """Share of an adapter's inputs that is set to zero while training."""
    lora_target_modules: Annotated[tuple[LoraTarget, ...], BeforeValidator(as_tuple)] = (
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    )
    """Layers that get an adapter: query, key and value (`linear_qkv`), attention output (`linear_proj`), MLP input
    (`linear_fc1`), MLP output (`linear_fc2`)."""
    lora_load: Folder | None = None
    """PEFT folder whose adapters the run starts from. Unset: new adapters."""
    qlora: bool = False
    """Hold the frozen base model in 4 bits (NF4). Needs `lora_r` above 0 and the package bitsandbytes; not available on
    NPUs."""


class ActorConfig(RoleConfig, DataConfig, SamplingConfig, LossConfig, OptimizerConfig, LoraConfig):
    """The policy that is trained, with its data, sampling, loss, optimizer and adapters."""

    save: Annotated[str, LocalPath("output")] | None = None
    """Folder for checkpoints. Unset: `checkpoints` in the run folder."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Which activations the backward pass computes again to save memory. `selective`: attention; `full`: whole
    layers."""
    num_gpus_for_train: Positive = 1
    """Number of devices of `resource_pool.actor_rollout` that train."""
    num_gpus_for_infer: Positive = 1
    """Number of devices of `resource_pool.actor_rollout` that sample."""
    inference_tensor_model_parallel_size: Positive = 1
    """Number of devices of one rollout engine."""

    def first_rows(self) -> int | None:
        """Rows of a driver step's first optimizer step, which are the step's first ones, if it has as many.

        None: ``shuffle_minibatch`` draws them.
        """
        if self.shuffle_minibatch:
            return None
        return self.ppo_mini_batch_size * (self.num_gpus_for_train // self.devices_per_replica)


class ReferenceConfig(RoleConfig):
    """The frozen model that DPO compares the policy with. Without ``load`` it is loaded from the actor's folder."""

    refer_model_iter: Positive | None = None
    """Step of the checkpoint to load, if `load` is a folder of checkpoints. Unset: the newest."""
    precompute_ref_log_probs: bool = False
    """Stage dpo: compute the reference log-probabilities of all pairs before the first step and keep them on disk for
    later runs."""
    cache: Annotated[str, LocalPath("output")] | None = None
    """Folder where precomputed log-probabilities are kept. Unset: `~/.cache/rlxf/ref_logps`."""
    ref_update_interval: int = Field(0, ge=0)
    """Updates after which the reference moves towards the policy (TR-DPO). 0: the reference never moves."""
    ref_mixup_alpha: Share = 0.6
    """Share of the policy in a moved reference: alpha * policy + (1 - alpha) * reference."""


class RewardConfig(RoleConfig):
    """What scores completions: a reward model (``load``), a Python function (``function``), or several ``sources``."""

    model: str | None = None  # type: ignore[assignment]
    """Shape of the reward model, as for the other roles. A reward function has no model."""
    function: PythonFile | None = None
    """Path or module of a Python file that defines `reward(prompts, completions, completion_ids, **columns)`."""
    read_at: ReadAt = "auto"
    """Token at which a reward model's score is read. `auto`: the one that its `config.json` names, else `last_token`.
    See docs/stages.md."""
    sources: Annotated[tuple[RewardSource, ...], BeforeValidator(as_tuple)] = ()
    """Several sources of scores, which are scaled, weighted and added up. `load` or `function` alone is the short form
    of a list of one."""
    workers: int | None = Field(None, ge=0)
    """Processes that run a reward function or a rule. 0: the run's own process, where breakpoints work. Several are for
    functions that keep no state. Unset: 1, and 0 with `runtime=local`."""
    timeout_s: Annotated[Finite, Field(gt=0)] = 600.0
    """Longest time, in seconds, that a reward function, a rule or a service may take for the completions of a step. A
    function that takes longer is ended, and its completions have no score."""
    max_failures: int = Field(0, ge=0)
    """Number of scores in the whole run that may be missing because a call of a reward function or service failed. One
    more ends the run."""

    @property
    def listed(self) -> tuple[RewardSource, ...]:
        """The sources by their full names; what `load` or `function` says as a list of one."""
        sources = self.sources or self._short
        names: list[str] = []
        for source in sources:
            names.append(_free(source.name or _default_name(source), names))
        return tuple(source.model_copy(update={"name": name}) for source, name in zip(sources, names, strict=True))

    @property
    def _short(self) -> tuple[RewardSource, ...]:
        if self.function is not None:
            return (RewardSource(function=self.function),)
        if self.load is None:
            return ()
        return (RewardSource(load=self.load, tokenizer_name_or_path=self.tokenizer_name_or_path, read_at=self.read_at),)

    @property
    def models(self) -> dict[str, RewardConfig]:
        """The section of each reward model, by the name of its source. The first one has the shape of `model`."""
        found: dict[str, RewardConfig] = {}
        for source in self.listed:
            if source.load is not None:
                own = {"load": source.load, "tokenizer_name_or_path": source.tokenizer_name_or_path}
                own |= {"read_at": source.read_at, **({"model": ""} if source.load != self.load else {})}
                found[str(source.name)] = self.model_copy(update=own)
        return found


def _default_name(source: RewardSource) -> str:
    """The name of a checked source that has none of its own."""
    if source.load is not None:
        return Path(source.load).name
    if source.function is not None:
        return Path(source.function).stem
    if source.url is not None:
        return urlsplit(source.url).hostname or "service"
    return str(source.rule)


def _free(name: str, taken: list[str]) -> str:
    found, number = name, 1
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found
