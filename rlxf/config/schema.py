"""Every key of a recipe: type, unit, default, bounds. Checks that need several sections are in ``checks.py``.

A recipe is composed by Hydra, merged by ``load.py`` (model < training < role; unset = inherit) and validated here, so
the defaults below apply only to keys that no section set.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rlxf.config.fields import (
    as_names,
    as_stage,
    as_tuple,
)
from rlxf.config.kinds import (
    REFERENCE_FREE,
    Checkpoint,
    CpuLinear,
    DataPaths,
    Device,
    File,
    Finite,
    PairingName,
    Pool,
    Positive,
    PythonFile,
    Rate,
    Role,
    ScorerName,
    Stage,
    Strict,
    Tracker,
)
from rlxf.config.recording import holds_scores
from rlxf.config.roles import ActorConfig, ReferenceConfig, RewardConfig
from rlxf.config.stages import STAGES, ObjectiveName, RowKind


class TrainingConfig(Strict):
    """What concerns the run, not one role. A recipe's ``training`` section may also hold defaults for every role."""

    stage: Annotated[Stage, BeforeValidator(as_stage)]
    """ray_online_dpo, or from a file: dpo, sft, rm"""
    device: Device = "auto"
    """auto: the first of npu, cuda, cpu that this machine has"""
    cpu_linear: CpuLinear = "auto"
    """cpu, fp32: library of the linear layers; auto: onednn on AMD with AVX-512, else mkl"""
    seed: int = Field(1, ge=0, lt=2**32)
    """of sampling and shuffling"""
    global_batch_size: Positive = 32
    """prompts (offline: pairs) per driver step"""
    train_iters: Positive = 100
    """driver steps"""
    epochs: Annotated[Finite, Field(gt=0)] | None = None
    """passes over the data, which then decide train_iters"""
    resume: Checkpoint = "auto"
    """auto: from the newest whole checkpoint; last: of the newest unfinished run; or a folder"""
    save_interval: int = Field(0, ge=0)
    """driver steps between checkpoints that stay; 0 = only at the end"""
    save_every_minutes: Rate = 30.0
    """longest time without a checkpoint, which the next one replaces; 0 = off"""
    save_hf_interval: int = Field(0, ge=0)
    """driver steps between `hf_*` folders beside the checkpoints; 0 = none"""
    async_save: bool = False
    """write checkpoints while training goes on; holds a copy of the state in memory"""
    keep_latest: int = Field(0, ge=0)
    """newest checkpoints that are kept; 0 = all"""
    keep_best: int = Field(0, ge=0)
    """best checkpoints that are kept besides the newest"""
    keep_best_metric: str | None = None
    """what decides, at the checkpoint's own step; unset: eval/reward, eval/loss"""
    keep_best_mode: Literal["max", "min"] | None = None
    """what is better; unset: min for a loss, else max"""
    eval_interval: int = Field(0, ge=0)
    """driver steps between evaluations; 0 = never"""
    eval_only: bool = False
    """evaluate once, the newest checkpoint if there is one, and train nothing"""
    stop_grace_s: Rate = 30.0
    """how long Ctrl-C and SIGTERM let an update or a sync finish, seconds; the save follows"""
    stage_timeout_s: Positive = 3600
    """longest time that one remote stage may take, seconds"""
    start_timeout_s: Positive = 600
    """longest time that loading a model may take, seconds"""
    trust_remote_code: bool = False
    """allow model folders to run their own Python code"""

    @property
    def offline(self) -> bool:
        """Whether what is trained on comes from a file."""
        return not STAGES[self.stage].online

    @property
    def best_metric(self) -> tuple[str, bool]:
        """What decides which checkpoint is the best, and whether more of it is better."""
        name = self.keep_best_metric or ("eval/loss" if self.offline else "eval/reward")
        mode = self.keep_best_mode or ("min" if name.endswith("loss") else "max")
        return name, mode == "max"


class ModelConfig(Strict):
    """Shape of a model, for a plan (``dry_run``) where its folder is not here; else its ``config.json`` decides."""

    num_layers: Positive
    """transformer layers"""
    hidden_size: Positive
    """width of the residual stream"""
    ffn_hidden_size: Positive
    """width inside the feed-forward block"""
    num_attention_heads: Positive
    """query heads"""
    num_query_groups: Positive | None = None
    """key/value heads; unset = as many as attention heads"""
    kv_channels: Positive | None = None
    """head size; unset = hidden_size / num_attention_heads"""
    vocab_size: Positive
    """rows of the embedding"""
    max_position_embeddings: Positive
    """longest sequence that the model knows, tokens"""
    untie_embeddings_and_output_weights: bool = False
    """true: the output layer has a matrix of its own"""

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads


class RolloutConfig(Strict):
    """Sampling, and the engine that does it."""

    engine: Literal["vllm", "hf", "replay"] | None = None
    """unset: vllm under runtime=ray, hf under runtime=local"""
    temperature: Finite = Field(1.0, gt=0)
    """divides the logits"""
    top_p: Finite = Field(1.0, gt=0, le=1)
    """smallest set of tokens with this probability; 1 = all"""
    top_k: int = Field(-1, ge=-1)
    """-1 or 0: off"""
    replay_path: File | None = None
    """rollouts.jsonl that engine=replay trains on; its scores are used, too"""
    gpu_memory_utilization: Finite = Field(0.85, gt=0, le=1)
    """npu and cuda: share of the device for weights and KV cache"""
    cpu_kv_cache_gib: Positive = 1
    """cpu: size of the KV cache, GiB"""
    max_num_seqs: Positive = 256
    """sequences that one engine decodes at a time"""


class SyncConfig(Strict):
    """Pushing the actor's weights into the rollout engines."""

    transport: Literal["auto", "object_store"] = "auto"
    """auto: shared memory on a cpu where actor and engines are on one machine, else Ray's object store"""
    bucket_mb: Positive = 256
    """largest message, MiB; a layer is never split over messages"""
    verify_first: int = Field(2, ge=0)
    """probe the engines after this many first updates"""
    verify_interval: int = Field(0, ge=0)
    """and after every so many updates; 0 = never again"""


class AlgorithmConfig(Strict):
    """From scores to pairs."""

    pairing: PairingName = "best_worst"
    """best against worst of a prompt's completions"""
    min_score_margin: Rate = 0.0
    """pairs with a margin at or below it are dropped and counted"""
    max_empty_steps: Positive = 3
    """steps in a row without a single pair before the run stops"""


class ResourcePoolConfig(Strict):
    """Devices per role. A list is processes per node, an int is processes on one node."""

    actor_rollout: Pool = (2,)
    """devices that train and sample"""
    ref: Pool = (1,)
    """devices of the reference"""
    reward: Pool = (1,)
    """devices of the reward model; none are used by a reward function"""
    colocate: Annotated[tuple[Role, ...], BeforeValidator(as_tuple)] = ()
    """roles that share devices"""
    resource_name: str | None = None
    """Ray resource of one device; unset: the platform's (NPU, GPU, CPU)"""


class EvalConfig(Strict):
    """Online: completions of validation prompts, sampled at temperature 1. Offline: held-out pairs or examples."""

    data_path: DataPaths | None = None
    """unset: the rows that actor_rollout.split sets aside, else training rows"""
    num_prompts: Positive = 256
    """prompts, pairs or examples of each evaluation"""
    greedy: bool = True
    """online: the most probable completion of each prompt, too"""
    metrics: PythonFile | None = None
    """path or module of a Python file that defines `evaluate(prompts, completions, initial_completions)`"""


class LogConfig(Strict):
    """What a run writes into its folder, and which trackers it tells."""

    interval: Positive = 1
    """driver steps between progress lines"""
    samples_interval: int = Field(50, ge=0)
    """driver steps between tables of sampled pairs; 0 = never"""
    rollouts: bool = False
    """write rollouts.jsonl"""
    tensorboard: bool = True
    """write TensorBoard event files"""
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(as_names)] = ()
    """trackers that get the numbers, too"""
    project: str = Field("rlxf", min_length=1)
    """the trackers' project (mlflow: experiment)"""
    run_name: str | None = None
    """the trackers' name of this run; unset: that of the run folder"""


class RunConfig(Strict):
    """A whole recipe, merged and checked. What a run reads; nothing writes back into it."""

    runtime: Literal["ray", "local"] = "ray"
    """local: one process without Ray"""
    dry_run: bool = False
    """check the recipe, print the placement plan and end"""
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
    def objective(self) -> ObjectiveName:
        """What an optimizer step minimises."""
        return STAGES[self.training.stage].objective

    @property
    def rows(self) -> RowKind:
        """What a row of the data is."""
        return STAGES[self.training.stage].rows

    @property
    def offline(self) -> bool:
        """Whether what is trained on comes from a file."""
        return self.training.offline

    @property
    def training_paths(self) -> tuple[str, ...]:
        """What is trained on: data paths, or the recording of a replay."""
        if self.engine == "replay":
            return (self.rollout.replay_path,) if self.rollout.replay_path else ()
        return self.actor_rollout.data_path or ()

    @property
    def needs_reference(self) -> bool:
        """Whether a reference takes part. Online it does even with a loss that needs none: the KL is measured."""
        free = self.offline and REFERENCE_FREE.issuperset(self.actor_rollout.dpo_loss_type)
        return self.objective == "preference" and not free

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
    def scorer(self) -> ScorerName:
        """What scores completions: what the ``reward`` section holds, unless a replay holds scores."""
        return "recorded" if self.replays_scores else self.reward.kind

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
