"""Every key of a recipe: type, unit, default, bounds. Checks that need several sections are in ``checks.py``.

A recipe is composed by Hydra, merged by ``load.py`` (model < training < role; unset = inherit) and validated here, so
the defaults below apply only to keys that no section set.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from rlxf.config.fields import (
    LocalPath,
    as_list,
    as_map_keys,
    as_names,
    as_paths,
    as_pool,
    as_shares,
    as_stage,
    as_tuple,
    finite,
)
from rlxf.config.recording import holds_scores

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, BeforeValidator(finite), Field(ge=0)]
Share = Annotated[float, BeforeValidator(finite), Field(ge=0, le=1)]
BelowOne = Annotated[float, BeforeValidator(finite), Field(ge=0, lt=1)]
Finite = Annotated[float, BeforeValidator(finite)]
Pool = Annotated[tuple[Positive, ...], BeforeValidator(as_pool)]
Folder = Annotated[str, LocalPath("folder")]
File = Annotated[str, LocalPath("file")]
DataPaths = Annotated[tuple[Annotated[str, LocalPath("data")], ...], BeforeValidator(as_paths)]
Weights = Annotated[tuple[Annotated[Finite, Field(gt=0)], ...], BeforeValidator(as_tuple)]
MapKeys = Annotated[dict[str, str], BeforeValidator(as_map_keys)]
Shares = Annotated[tuple[float, float, float], BeforeValidator(as_shares)]
RESUME_WORDS = ("auto", "last", "never")  # values of training.resume that name no folder
Checkpoint = Annotated[str, LocalPath("folder", words=RESUME_WORDS)]

Stage = Literal["ray_online_dpo", "dpo", "sft", "rm"]
Device = Literal["auto", "npu", "cuda", "cpu"]
CpuLinear = Literal["auto", "mkl", "onednn"]
LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "kto_pair",
    "robust",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sigmoid_norm",
    "simpo",
    "orpo",
    "sft",
]
# Losses that compare the policy with itself only.
REFERENCE_FREE = frozenset({"simpo", "orpo", "sft"})
LoraTarget = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "swanlab"]
DataFormat = Literal["auto", "standard", "messages", "alpaca", "sharegpt"]
ReadAt = Literal["auto", "end_of_turn", "last_token"]
Role = Literal["train", "infer", "ref", "reward"]


class Strict(BaseModel):
    """Frozen; an unknown key is an error, never a silent default; ``true`` is no integer and ``"8"`` no number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TrainingConfig(Strict):
    """What concerns the run, not one role. A recipe's ``training`` section may also hold defaults for every role."""

    stage: Annotated[Stage, BeforeValidator(as_stage)]  # ray_online_dpo, or from a file: dpo, sft, rm
    device: Device = "auto"  # auto: the first of npu, cuda, cpu that this machine has
    cpu_linear: CpuLinear = (
        "auto"  # cpu, fp32: library of the linear layers; auto: onednn on AMD with AVX-512, else mkl
    )
    seed: int = Field(1, ge=0, lt=2**32)  # of sampling and shuffling
    global_batch_size: Positive = 32  # prompts (offline: pairs) per driver step
    train_iters: Positive = 100  # driver steps
    epochs: Annotated[Finite, Field(gt=0)] | None = None  # passes over the data, which then decide train_iters
    resume: Checkpoint = (
        "auto"  # auto: from the newest whole checkpoint; last: of the newest unfinished run; or a folder
    )
    save_interval: int = Field(0, ge=0)  # driver steps between checkpoints that stay; 0 = only at the end
    save_every_minutes: Rate = 30.0  # longest time without a checkpoint, which the next one replaces; 0 = off
    save_hf_interval: int = Field(0, ge=0)  # driver steps between `hf_*` folders beside the checkpoints; 0 = none
    async_save: bool = False  # write checkpoints while training goes on; holds a copy of the state in memory
    keep_latest: int = Field(0, ge=0)  # newest checkpoints that are kept; 0 = all
    keep_best: int = Field(0, ge=0)  # best checkpoints that are kept besides the newest
    keep_best_metric: str | None = None  # what decides, at the checkpoint's own step; unset: eval/reward, eval/loss
    keep_best_mode: Literal["max", "min"] | None = None  # what is better; unset: min for a loss, else max
    eval_interval: int = Field(0, ge=0)  # driver steps between evaluations; 0 = never
    eval_only: bool = False  # evaluate once, the newest checkpoint if there is one, and train nothing
    stop_grace_s: Rate = 30.0  # how long Ctrl-C and SIGTERM let an update or a sync finish, seconds; the save follows
    stage_timeout_s: Positive = 3600  # longest time that one remote stage may take, seconds
    start_timeout_s: Positive = 600  # longest time that loading a model may take, seconds
    trust_remote_code: bool = False  # allow model folders to run their own Python code


class ModelConfig(Strict):
    """Shape of a model, as its ``config.json`` says. Known before any folder exists, for checks and ``dry_run``."""

    num_layers: Positive  # transformer layers
    hidden_size: Positive  # width of the residual stream
    ffn_hidden_size: Positive  # width inside the feed-forward block
    num_attention_heads: Positive  # query heads
    num_query_groups: Positive | None = None  # key/value heads; unset = as many as attention heads
    kv_channels: Positive | None = None  # head size; unset = hidden_size / num_attention_heads
    vocab_size: Positive  # rows of the embedding
    max_position_embeddings: Positive  # longest sequence that the model knows, tokens
    untie_embeddings_and_output_weights: bool = False  # true: the output layer has a matrix of its own

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads


class RoleConfig(Strict):
    """What actor, reference and reward have in common."""

    model: str  # name of a file in configs/rlxf/model; ref and reward: unset = the actor's
    load: Folder | None = None  # folder with the weights: Hugging Face's or a checkpoint; ref: unset = the actor's
    tokenizer_name_or_path: Folder | None = None  # folder with the tokenizer; unset = `load`
    tensor_model_parallel_size: Positive = 1  # devices that share each layer
    pipeline_model_parallel_size: Positive = 1  # devices that the layers are spread over
    virtual_pipeline_model_parallel_size: Positive = 1  # pieces of layers per pipeline device; needs a token budget
    context_parallel_size: Positive = 1  # devices that share the tokens of each forward pass
    sequence_parallel: bool = False  # cut norms and residuals along the tokens over the tensor-parallel devices, too
    bf16: bool = False  # false: fp32, unless fp16
    fp16: bool = False  # half precision; the actor's loss is scaled
    seq_length: Positive = 1024  # longest prompt + completion, tokens
    micro_batch_size: Positive = 1  # pairs per forward/backward on one data-parallel rank
    max_tokens_per_micro_batch: Positive | None = None  # tokens per forward/backward instead, whatever the pairs
    share_prompts: bool = True  # compute a prompt once for the chosen and the rejected side, or for all its completions

    @property
    def precision(self) -> Literal["fp32", "bf16", "fp16"]:
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"

    @property
    def dtype(self) -> Literal["float32", "bfloat16", "float16"]:
        """Of the parameters, by torch's name."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"

    @property
    def devices_per_replica(self) -> int:
        """Devices that hold one copy of the model and share its work; data parallel is how many of these there are."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


class ActorConfig(RoleConfig):
    """The policy being trained, with its optimizer and its rollout."""

    data_path: DataPaths | None = None  # files, folders or Hugging Face datasets on disk, see docs/data.md
    data_weights: Weights = ()  # share of each path in a mixture; unset: every row of all once per epoch
    split: Shares = (100.0, 0.0, 0.0)  # shares of training, validation and test rows, in file order
    data_format: DataFormat = "auto"  # auto: what the names of the columns say
    map_keys: MapKeys | None = (
        None  # alpaca, sharegpt: the columns of prompt, query, response, history, system, chosen, rejected
    )
    prompt_type: str | None = None  # chat template by name, see docs/data.md; unset: the tokenizer's own
    eos_tokens: Annotated[tuple[str, ...], BeforeValidator(as_list)] | None = (
        None  # tokens that end a completion besides the model's own; unset: those of prompt_type
    )
    max_bad_rows: int = Field(0, ge=0)  # malformed rows that are left out; one more stops the run
    save: Annotated[str, LocalPath("output")] | None = (
        None  # folder of checkpoints; unset: `checkpoints` in the run folder
    )
    prompt_key: str = "prompt"  # column with the prompt
    chosen_key: str = "chosen"  # offline: column with the preferred completion
    rejected_key: str = "rejected"  # offline: column with the other completion
    margin_key: str | None = None  # rm: column with how much better chosen is; unset: 0
    no_shuffle: bool = False  # true: prompts in file order
    max_prompt_length: Positive = 512  # tokens; see prompt_overflow
    prompt_overflow: Literal["drop", "truncate_left", "error"] = "drop"  # what becomes of longer prompts; sft: examples
    max_new_tokens: Positive | None = None  # unset: seq_length - max_prompt_length
    n_samples_per_prompt: int = Field(2, ge=2)  # completions per prompt
    num_samples_per_step: Positive | None = None  # prompts per generate call; unset = all of them
    do_sample: bool = True  # false (greedy) is an error online: all completions of a prompt would be the same
    missing_eos_penalty: Rate = 0.0  # subtracted from the score of a completion without EOS
    ppo_mini_batch_size: Positive = 1  # pairs per optimizer step on one data-parallel rank
    ppo_epochs: Positive = 1  # passes over the same pairs
    shuffle_minibatch: bool = False  # shuffle pairs before each pass; a pair is never split
    dpo_loss_type: Annotated[tuple[LossType, ...], BeforeValidator(as_list), Field(min_length=1)] = (
        "sigmoid",
    )  # one loss or several (docs/losses.md)
    dpo_loss_weights: Annotated[tuple[Rate, ...], BeforeValidator(as_tuple)] | None = None  # of each; unset = 1
    dpo_beta: Finite = Field(0.1, gt=0)  # pull towards the reference; larger stays closer; orpo: its lambda
    dpo_label_smoothing: Finite = Field(0.0, ge=0, lt=0.5)  # assumed share of swapped labels
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"  # that the reference is kept near in; reverse_kl is plain DPO
    )
    f_alpha_divergence_coef: Finite = 0.5  # alpha of alpha_divergence
    discopop_tau: Finite = Field(0.05, gt=0)  # discopop: how sharply its two losses are blended
    simpo_gamma: Finite = 0.5  # simpo: the margin that chosen should have, in units of dpo_beta x nats per token
    pref_ftx: Rate = 0.0  # weight of the mean negative log-likelihood of the chosen side's tokens, added to the loss
    center_rewards_coefficient: Rate = 0.0  # rm: weight of (score of chosen + score of rejected)^2
    dpo_logp_reduction: Literal["auto", "sum", "mean"] = "auto"  # auto: mean for offline ipo, sum otherwise
    lr: Rate = 1e-6  # highest learning rate
    min_lr: Rate = 0.0  # learning rate at the end of the decay
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"  # from lr to min_lr over train_iters
    lr_warmup_iters: int = Field(0, ge=0)  # driver steps; set this or lr_warmup_fraction
    lr_warmup_fraction: Share | None = None  # share of train_iters
    weight_decay: Rate = 0.0  # of AdamW
    clip_grad: Rate = 1.0  # largest global gradient norm; 0 = no clipping
    loss_scale: Annotated[Finite, Field(gt=0)] | None = None  # fp16: constant factor of the loss
    initial_loss_scale: Finite = Field(65536.0, gt=0)  # fp16: the factor at the start; halved by gradients beyond fp16
    min_loss_scale: Finite = Field(1.0, gt=0)  # fp16: an overflow at this factor ends the run
    loss_scale_window: Positive = 1000  # fp16: optimizer steps without overflow before the factor is doubled
    hysteresis: Positive = 2  # fp16: overflows before the factor is halved
    recompute_granularity: Literal["none", "selective", "full"] = "none"  # activations computed again in backward
    adam_beta1: BelowOne = 0.9  # decay of the mean of gradients
    adam_beta2: BelowOne = 0.999  # decay of the mean of squared gradients
    adam_eps: Finite = Field(1e-8, gt=0)  # added to the root of the mean of squared gradients
    lora_r: int = Field(0, ge=0)  # rank of the LoRA adapters; 0 = train all parameters
    lora_alpha: Finite = Field(32.0, gt=0)  # the adapters' output is scaled by lora_alpha / lora_r
    lora_dropout: BelowOne = 0.0  # share of the adapters' inputs that is zeroed while training
    lora_target_modules: Annotated[tuple[LoraTarget, ...], BeforeValidator(as_tuple)] = (  # that get an adapter
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
    )
    lora_load: Folder | None = None  # PEFT folder that the adapters start from; unset = fresh ones
    qlora: bool = False  # hold the frozen base in 4 bits (NF4); needs lora_r and bitsandbytes
    num_gpus_for_train: Positive = 1  # devices of actor_rollout that train
    num_gpus_for_infer: Positive = 1  # devices of actor_rollout that sample
    inference_tensor_model_parallel_size: Positive = 1  # devices of one rollout engine

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Of each of ``dpo_loss_type``."""
        return self.dpo_loss_weights or (1.0,) * len(self.dpo_loss_type)


class ReferenceConfig(RoleConfig):
    """The frozen model that DPO is measured against. Without ``load`` it starts from the actor's folder."""

    refer_model_iter: Positive | None = None  # which checkpoint, where `load` is a run's folder of checkpoints
    precompute_ref_log_probs: bool = False  # dpo: compute those of all pairs before the first step, and keep them
    cache: Annotated[str, LocalPath("output")] | None = None  # where they are kept; unset: ~/.cache/rlxf/ref_logps
    ref_update_interval: int = Field(0, ge=0)  # updates between moves of the reference after the policy; 0 = never
    ref_mixup_alpha: Share = 0.6  # reference = alpha * policy + (1 - alpha) * reference at each move (TR-DPO)


class RewardConfig(RoleConfig):
    """What scores a completion: a reward model (``load``) or a Python function (``function``)."""

    model: str | None = None  # type: ignore[assignment]  # a reward function has no model
    function: File | None = (
        None  # path of a Python file that defines `reward(prompts, completions, completion_ids, **columns)`
    )
    read_at: ReadAt = "auto"  # token where a reward model's score is read; auto: what its folder says, else last_token
    max_failures: int = Field(0, ge=0)  # completions of a whole run that may stay without a score when calls fail


class RolloutConfig(Strict):
    """Sampling, and the engine that does it."""

    engine: Literal["vllm", "hf", "replay"] | None = None  # unset: vllm under runtime=ray, hf under runtime=local
    temperature: Finite = Field(1.0, gt=0)  # divides the logits
    top_p: Finite = Field(1.0, gt=0, le=1)  # smallest set of tokens with this probability; 1 = all
    top_k: int = Field(-1, ge=-1)  # -1 or 0: off
    replay_path: File | None = None  # rollouts.jsonl that engine=replay trains on; its scores are used, too
    gpu_memory_utilization: Finite = Field(
        0.85, gt=0, le=1
    )  # npu and cuda: share of the device for weights and KV cache
    cpu_kv_cache_gib: Positive = 1  # cpu: size of the KV cache, GiB
    max_num_seqs: Positive = 256  # sequences that one engine decodes at a time


class SyncConfig(Strict):
    """Pushing the actor's weights into the rollout engines."""

    transport: Literal["auto", "object_store"] = (
        "auto"  # auto: shared memory on a cpu where actor and engines are on one machine, else Ray's object store
    )
    bucket_mb: Positive = 256  # largest message, MiB; a layer is never split over messages
    verify_first: int = Field(2, ge=0)  # probe the engines after this many first updates
    verify_interval: int = Field(0, ge=0)  # and after every so many updates; 0 = never again


class AlgorithmConfig(Strict):
    """From scores to pairs."""

    pairing: Literal["best_worst"] = "best_worst"  # best against worst of a prompt's completions
    min_score_margin: Rate = 0.0  # pairs with a margin at or below it are dropped and counted
    max_empty_steps: Positive = 3  # steps in a row without a single pair before the run stops


class ResourcePoolConfig(Strict):
    """Devices per role. A list is processes per node, an int is processes on one node."""

    actor_rollout: Pool = (2,)  # devices that train and sample
    ref: Pool = (1,)  # devices of the reference
    reward: Pool = (1,)  # devices of the reward model; none are used by a reward function
    colocate: Annotated[tuple[Role, ...], BeforeValidator(as_tuple)] = ()  # roles that share devices
    resource_name: str | None = None  # Ray resource of one device; unset: the platform's (NPU, GPU, CPU)


class EvalConfig(Strict):
    """Online: completions of validation prompts, sampled at temperature 1. Offline: held-out pairs or examples."""

    data_path: DataPaths | None = None  # unset: the rows that actor_rollout.split sets aside, else training rows
    num_prompts: Positive = 256  # prompts, pairs or examples of each evaluation
    greedy: bool = True  # online: the most probable completion of each prompt, too
    metrics: File | None = (
        None  # path of a Python file that defines `evaluate(prompts, completions, initial_completions)`
    )


class LogConfig(Strict):
    """What a run writes into its folder, and which trackers it tells."""

    interval: Positive = 1  # driver steps between progress lines
    samples_interval: int = Field(50, ge=0)  # driver steps between tables of sampled pairs; 0 = never
    rollouts: bool = False  # write rollouts.jsonl
    tensorboard: bool = True  # write TensorBoard event files
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(as_names)] = ()  # trackers that get the numbers, too
    project: str = Field("rlxf", min_length=1)  # the trackers' project (mlflow: experiment)
    run_name: str | None = None  # the trackers' name of this run; unset: that of the run folder


class RunConfig(Strict):
    """A whole recipe, merged and checked. What a run reads; nothing writes back into it."""

    runtime: Literal["ray", "local"] = "ray"  # local: one process without Ray
    dry_run: bool = False  # check the recipe, print the placement plan and end
    training: TrainingConfig
    model: dict[str, ModelConfig]
    actor_rollout: ActorConfig
    ref: ReferenceConfig
    reward: RewardConfig
    rollout: RolloutConfig = RolloutConfig()
    sync: SyncConfig = SyncConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    resource_pool: ResourcePoolConfig = ResourcePoolConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    @property
    def offline(self) -> bool:
        """Whether what is trained on comes from a file."""
        return self.training.stage != "ray_online_dpo"

    @property
    def needs_reference(self) -> bool:
        """Whether a reference takes part. Online it does even with a loss that needs none: the KL is measured."""
        free = self.offline and REFERENCE_FREE.issuperset(self.actor_rollout.dpo_loss_type)
        return self.training.stage in ("ray_online_dpo", "dpo") and not free

    @property
    def max_new_tokens(self) -> int:
        actor = self.actor_rollout
        return actor.max_new_tokens or actor.seq_length - actor.max_prompt_length

    @property
    def samples(self) -> bool:
        """Whether a rollout engine makes this run's completions."""
        return not self.offline and self.engine != "replay"

    @property
    def replays_scores(self) -> bool:
        """Whether completions and scores are those of a recorded run, so that nothing scores."""
        path = self.rollout.replay_path
        return not self.offline and self.engine == "replay" and path is not None and bool(holds_scores(path))

    @property
    def scores(self) -> bool:
        """Whether a reward model, which needs devices, scores this run's completions."""
        return not self.offline and self.reward.load is not None and not self.replays_scores

    @property
    def holds_out(self) -> bool:
        """Whether some rows are for evaluation."""
        return self.eval.data_path is not None or self.actor_rollout.split[1] > 0

    @property
    def evaluates(self) -> bool:
        """Whether something is measured on validation prompts, or (offline) on held-out rows."""
        wanted = self.training.eval_interval > 0 or self.training.eval_only
        return wanted and (self.holds_out if self.offline else self.samples)

    @property
    def reference_is_base(self) -> bool:
        """Whether the reference is the actor with its LoRA adapters off: no second model, no devices of its own."""
        actor, ref = self.actor_rollout, self.ref
        return self.needs_reference and actor.lora_r > 0 and (ref.load, ref.precision) == (actor.load, actor.precision)

    @property
    def loads_reference(self) -> bool:
        """Whether the reference is a model of its own, which needs devices."""
        return self.needs_reference and not self.reference_is_base

    @property
    def engine(self) -> Literal["vllm", "hf", "replay"]:
        return self.rollout.engine or ("vllm" if self.runtime == "ray" else "hf")

    def dump(self) -> dict[str, Any]:
        """The merged recipe as plain data, for `config.yaml` in the run folder and for checkpoints."""
        return self.model_dump(mode="json")
