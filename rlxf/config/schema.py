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
from rlxf.config.judge import JUDGE_MODEL, JudgeConfig
from rlxf.config.kinds import (
    REFERENCE_FREE,
    BelowOne,
    Checkpoint,
    CpuLinear,
    DataPaths,
    Device,
    File,
    Finite,
    HealthRule,
    PairingName,
    Pool,
    Positive,
    PythonFile,
    Rate,
    Role,
    ScorerName,
    Stage,
    Stops,
    Strict,
    Structure,
    Tracker,
    TransportName,
)
from rlxf.config.plan import PlanConfig
from rlxf.config.recording import holds_scores
from rlxf.config.roles import ActorConfig, ReferenceConfig, RewardConfig
from rlxf.config.stages import STAGES, ObjectiveName, RowKind


class TrainingConfig(Strict):
    """Settings of the run as a whole. The section may also hold keys of the roles, as defaults for all of them."""

    stage: Annotated[Stage, BeforeValidator(as_stage)]
    """What the run trains. `ray_online_dpo` samples its own pairs; `dpo`, `sft` and `rm` (reward model) read them from
    a file. See docs/stages.md."""
    device: Device = "auto"
    """Kind of device that the run uses. `auto` takes the first of `npu`, `cuda` and `cpu` that this machine has."""
    cpu_linear: CpuLinear = "auto"
    """Library that multiplies matrices on a CPU in fp32. `auto` chooses `onednn` on AMD processors with AVX-512, and
    `mkl` elsewhere."""
    seed: int = Field(1, ge=0, lt=2**32)
    """Seed of the sampling, of the order of the data and of new parameters (LoRA adapters, score head)."""
    global_batch_size: Positive = 32
    """Rows that one driver step takes: prompts online; pairs (sft: examples) offline."""
    train_iters: Positive = 100
    """Number of driver steps. Ignored if epochs is set."""
    epochs: Annotated[Finite, Field(gt=0)] | None = None
    """Number of passes over the data, instead of `train_iters`. It is rounded up to whole driver steps; fractions such
    as 0.1 work."""
    resume: Checkpoint = "auto"
    """Where the run starts. `auto`: from the newest complete checkpoint in the folder where the run saves. `last`: from
    the newest unfinished run of this recipe. `never`: at step 0. A folder: from that checkpoint."""
    save_interval: int = Field(0, ge=0)
    """Driver steps between checkpoints that are kept. 0 writes one after the last step only."""
    save_every_minutes: Rate = 30.0
    """Longest time without a checkpoint, in minutes. The checkpoint that this key causes is replaced by the next one. 0
    switches it off."""
    save_hf_interval: int = Field(0, ge=0)
    """Driver steps between exports of the policy as a Hugging Face folder `hf_*` beside the checkpoints. 0 writes
    none."""
    async_save: bool = False
    """Write checkpoints in the background while training continues. This needs host memory for a copy of the training
    state."""
    keep_latest: int = Field(0, ge=0)
    """Number of newest checkpoints to keep; older ones are deleted. 0 keeps all."""
    max_failed_saves: int = Field(2, ge=0)
    """Number of checkpoints in a row that a run continues without if they cannot be written, for example because the
    disk is full. One more ends the run. 0: the first one ends it."""
    keep_best: int = Field(0, ge=0)
    """Number of best checkpoints to keep in addition to the newest. 0 keeps none for being best."""
    keep_best_metric: str | None = None
    """Metric that decides which checkpoint is best, read at the step of the checkpoint. Unset: `eval/reward` online
    (`eval/win_rate` with a judge and no reward), `eval/loss` offline."""
    keep_best_mode: Literal["max", "min"] | None = None
    """Whether a larger (`max`) or a smaller (`min`) metric is better. Unset: `min` if the metric's name ends in loss,
    else `max`."""
    eval_interval: int = Field(0, ge=0)
    """Driver steps between evaluations. 0 evaluates never."""
    eval_only: bool = False
    """Evaluate once and train nothing. Evaluates the newest checkpoint, or the policy in `actor_rollout.load` if there
    is none."""
    stop_grace_s: Rate = 30.0
    """Seconds that an update or a weight sync may still take after Ctrl-C or SIGTERM. The checkpoint that follows is
    not limited."""
    stage_timeout_s: Positive = 3600
    """Longest time of one stage on a Ray worker, in seconds. A worker that takes longer is ended, and started again as
    `resilience` says."""
    start_timeout_s: Positive = 600
    """Longest time that a worker may take to load its model, in seconds; and longest time without progress in a stage
    that its role does for the first time."""
    trust_remote_code: bool = False
    """Let model folders run the Python code that they contain. Set it only for folders that you trust."""

    @property
    def offline(self) -> bool:
        """Whether what is trained on comes from a file."""
        return not STAGES[self.stage].online


class ModelConfig(Strict):
    """Shape of a model, for a plan (``dry_run``) on a machine without its folder; else its ``config.json`` decides."""

    num_layers: Positive
    """Number of transformer layers."""
    hidden_size: Positive
    """Width of the residual stream."""
    ffn_hidden_size: Positive
    """Width inside the feed-forward block."""
    num_attention_heads: Positive
    """Number of query heads."""
    num_query_groups: Positive | None = None
    """Number of key/value heads. Unset: as many as query heads."""
    kv_channels: Positive | None = None
    """Size of one attention head. Unset: `hidden_size` / `num_attention_heads`."""
    vocab_size: Positive
    """Number of rows of the embedding."""
    max_position_embeddings: Positive
    """Longest sequence that the model supports, in tokens."""
    untie_embeddings_and_output_weights: bool = False
    """Whether the output layer has its own matrix. If false, it uses the embedding."""

    @property
    def head_size(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads


class RolloutConfig(Strict):
    """How completions are sampled, and by which engine."""

    engine: Literal["vllm", "hf", "replay"] | None = None
    """Program that samples completions. `hf` samples with transformers' modules; `replay` reads recorded completions
    instead. Unset: `vllm` under `runtime=ray`, `hf` under `runtime=local`."""
    temperature: Finite = Field(1.0, gt=0)
    """Sampling temperature: the logits are divided by it. Lower values make completions less diverse."""
    top_p: Finite = Field(1.0, gt=0, le=1)
    """Sample from the smallest set of tokens whose probabilities add up to this value. 1 samples from all tokens."""
    top_k: int = Field(-1, ge=-1)
    """Sample from this many most probable tokens. -1 or 0 samples from all tokens."""
    min_p: BelowOne = 0.0
    """Sample from the tokens whose probability is at least this share of the most probable token's. 0 samples from all
    tokens."""
    repetition_penalty: Finite = Field(1.0, gt=0)
    """Lower the logits of tokens that the prompt or the completion so far holds: positive ones are divided by this
    value, negative ones multiplied. 1 changes nothing; a value below 1 raises them."""
    stop: Stops = ()
    """Texts that end a completion, in training and in evaluations. The token that completes one is the last of the
    completion, and counts as its end like an EOS. See docs/stages.md."""
    structured_outputs: Structure | None = None
    """Form that each completion must have, in training and in evaluations (engine vllm only): a mapping with one of
    `regex`, `json` (a JSON schema, or a file that holds one), `choice` (a list of texts) and `grammar`."""
    replay_path: File | None = None
    """Recorded completions (`rollouts.jsonl` of an earlier run) for `engine=replay`. Scores in the file are used as
    well."""
    gpu_memory_utilization: Annotated[Finite, Field(gt=0, le=1)] | None = None
    """Share of an NPU's or GPU's memory that a rollout engine takes for weights and KV cache. Unset: the planner
    computes it from what the other roles of the device need (docs/planner.md)."""
    cpu_kv_cache_gib: Positive = 1
    """Size of the KV cache of an engine on a CPU, in GiB."""
    max_num_seqs: Positive | None = None
    """Number of sequences that one engine decodes at the same time (engine vllm only). Unset: vLLM's own number for the
    device; on a CPU 256."""
    lookahead: int = Field(0, ge=0)
    """Number of driver steps that sampling runs ahead of training. 0: the engines wait while the trainer updates, and
    the trainer waits while they sample. 1: they sample the next step with the weights before the update, while it is
    made. Every completion of a step is sampled by the weights of exactly this many steps before."""
    stream_prompts: Positive | None = None
    """Prompts of one chunk, or about as many: a share is cut evenly. A chunk is scored, paired and sent to the
    reference as soon as all its completions are there, while others are still being sampled. Unset: each stage takes
    the whole step. See docs/streaming.md."""
    dispatch: Literal["planned", "queue"] = "planned"
    """How prompts are shared out among the rollout engines. `planned`: before sampling starts, by the lengths that are
    expected of their answers. `queue`: an engine takes the next prompt when it has room; sums then differ in their last
    digits from run to run."""


class SyncConfig(Strict):
    """How the actor's weights reach the rollout engines after each update."""

    transport: TransportName = "auto"
    """How weights travel to the engines. `ipc`: within a device, by handles of its memory, if engines and actor share
    devices. `collective`: broadcast from device to device, if they have different ones. `shared_memory`: memory of the
    machine that all have mapped. `object_store`: through Ray, which always works and copies the most. `auto`: the first
    of these that placement and device allow; on a CPU `shared_memory` comes first. The log says which one and why."""
    bucket_mb: Positive = 256
    """Largest message of weights (bucket), in MiB. A larger layer still travels as one message."""
    verify_first: int = Field(2, ge=0)
    """Number of first updates after which a probe compares the engines with the trainer. 0 probes none of them."""
    verify_interval: int = Field(0, ge=0)
    """Updates between later probes. 0 probes never again after the first ones."""


class AlgorithmConfig(Strict):
    """How scores become pairs."""

    pairing: PairingName = "best_worst"
    """How the completions of a prompt become pairs. `best_worst`: the best is chosen, the worst is rejected. `all`:
    every two of them. `random`: two of them, drawn. `threshold`: every one above `score_threshold` against every other
    one. The better one is always chosen, and the weights of a prompt's pairs add up to 1."""
    min_score_margin: Rate = 0.0
    """Pairs whose score margin is at or below this value are dropped and counted. 0 drops ties only."""
    score_threshold: Finite | None = None
    """For `pairing=threshold`: completions with a higher score are good, the others are bad."""
    max_pairs_per_prompt: Positive | None = None
    """For `pairing=all` and `threshold`: the number of pairs kept of each prompt, those with the largest margins. If
    unset, all are kept."""
    max_length_ratio: Annotated[Finite, Field(ge=1)] | None = None
    """A pair is dropped and counted if its longer completion has more than this many times the tokens of the other one.
    Unset: lengths are not compared."""
    margin_weight: Rate = 0.0
    """The pair's score margin times this value is subtracted from the logit of the loss, so that a completion that is
    better by more must become more probable by more. For losses that have a margin: see docs/losses.md."""
    max_empty_steps: Positive = 3
    """Number of consecutive steps without a pair after which the run ends with an error."""


class ResourcePoolConfig(Strict):
    """Devices of each role. A number means processes on one node; a list holds the processes of each node."""

    actor_rollout: Pool = (2,)
    """Devices for training and sampling. The first `num_gpus_for_train` of them train."""
    ref: Pool = (1,)
    """Devices for the reference."""
    reward: Pool = (1,)
    """Devices for the reward model. A reward function needs none."""
    colocate: Annotated[tuple[Role, ...], BeforeValidator(as_tuple)] = ()
    """Roles that share devices instead of having their own. `train` and `infer` then take turns: the engines give their
    memory back while the trainer has its optimizer on the device. `ref` and `reward` keep their memory all the time.
    See docs/colocation.md."""
    resource_name: str | None = None
    """Name of the Ray resource that stands for one device. Unset: the platform's own (NPU, GPU or CPU)."""


class ResilienceConfig(Strict):
    """What a run on Ray does when a worker process or a node is lost, or does not move. See docs/reliability.md."""

    max_recoveries: int = Field(3, ge=0)
    """Number of times within an hour that the trainer's processes may be started again from the last checkpoint; one
    more ends the run with exit code 75. 0: no process of any role is started again, and a loss ends the run."""
    min_deadline_s: Annotated[Finite, Field(gt=0)] = 60.0
    """Shortest time without progress after which a worker counts as hung, in seconds; it is then ended and started
    again. The limit of a phase is ten times its median so far, at least this, and at most `training.stage_timeout_s`.
    """
    node_wait_s: Rate = 600.0
    """How long the run waits for devices in place of those of a lost node, in seconds. Then it ends with exit code
    75."""


class EvalConfig(Strict):
    """Evaluations. Online runs answer validation prompts at temperature 1; offline runs use held-out rows."""

    data_path: DataPaths | None = None
    """Held-out rows. Unset: the validation rows of `actor_rollout.split`, else (online) training rows."""
    num_prompts: Positive = 256
    """Number of prompts, pairs or examples in each evaluation."""
    greedy: bool = True
    """Online: also evaluate the most probable completion of each prompt. false halves the sampling of an evaluation."""
    metrics: PythonFile | None = None
    """Path or module of a Python file that defines `evaluate(prompts, completions, initial_completions)`. Its results
    appear as `eval/<name>`."""
    reference_answers: File | None = None
    """With a judge: a .jsonl file of answers to compare with, found by their prompts (`prompt` and `answer`). The
    result is `eval/win_rate_reference`."""
    reference_column: str | None = None
    """With a judge: the column of the evaluation data that holds such answers, instead of a file."""


class LogConfig(Strict):
    """What a run prints, writes into its folder and sends to trackers."""

    interval: Positive = 1
    """Driver steps between progress lines."""
    samples_interval: int = Field(50, ge=0)
    """Driver steps between records of some pairs as text in `samples.jsonl`. 0 writes none."""
    report: bool = True
    """Keep the page `report.html` in the run folder up to date, by a process of its own. See docs/report.md."""
    eval_answers: int = Field(8, ge=0)
    """Number of evaluation prompts whose answers `eval.jsonl` holds, the same ones at every evaluation, with the
    log-probs of each token. 0 writes none."""
    rollouts: bool = False
    """Write all completions and scores to `rollouts.jsonl`, which `engine=replay` can read."""
    tensorboard: bool = True
    """Write TensorBoard event files to the run folder."""
    trace: bool = False
    """Write `trace.json` to the run folder: which worker did what when. Perfetto (ui.perfetto.dev) opens it. See
    docs/metrics.md."""
    report_to: Annotated[tuple[Tracker, ...], BeforeValidator(as_names)] = ()
    """Trackers that receive the metrics as well. See docs/trackers.md."""
    project: str = Field("rlxf", min_length=1)
    """Name of the project in the trackers (mlflow: of the experiment)."""
    run_name: str | None = None
    """Name of the run in the trackers. Unset: the name of the run folder."""


class HealthConfig(Strict):
    """What the run does about the verdicts on its curves. See docs/health.md."""

    stop_on: Annotated[tuple[HealthRule, ...], BeforeValidator(as_names)] = ()
    """Verdicts that end the run, with a checkpoint, as soon as they hold: names such as `over_optimised`."""


class RunConfig(Strict):
    """A whole recipe, merged and checked. The run reads it; nothing changes it."""

    runtime: Literal["ray", "local"] = "ray"
    """Where the roles run. `ray`: each role has its own worker processes. `local`: everything runs in one process
    without Ray, where breakpoints work."""
    dry_run: bool = False
    """Check the recipe, print which role gets which devices and what a step costs by estimate, and end. Nothing is
    loaded. Exit code 1: by estimate a device has too little memory. See docs/planner.md."""
    training: TrainingConfig
    model: dict[str, ModelConfig]
    actor_rollout: ActorConfig
    ref: ReferenceConfig
    reward: RewardConfig
    rollout: RolloutConfig = RolloutConfig()
    sync: SyncConfig = SyncConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    judge: JudgeConfig = JudgeConfig()
    resource_pool: ResourcePoolConfig = ResourcePoolConfig()
    resilience: ResilienceConfig = ResilienceConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    health: HealthConfig = HealthConfig()
    plan: PlanConfig = PlanConfig()

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
    def streams(self) -> bool:
        """Whether a step's prompts move on in chunks."""
        return not self.offline and self.rollout.stream_prompts is not None

    @property
    def replays_scores(self) -> bool:
        """Whether completions and scores are those of a recorded run, so that nothing scores."""
        path = self.rollout.replay_path
        return not self.offline and self.engine == "replay" and path is not None and bool(holds_scores(path))

    @property
    def scorer(self) -> ScorerName:
        """What scores the tokens of completions: reward models, unless a replay holds scores."""
        return "recorded" if self.replays_scores else "model"

    @property
    def reward_workers(self) -> int:
        """Processes that run a reward function; 0: it runs in the process of the run."""
        workers = self.reward.workers
        return (0 if self.runtime == "local" else 1) if workers is None else workers

    @property
    def scores(self) -> bool:
        """Whether a reward model, which needs devices, scores this run's completions, or judges them."""
        return bool(self.reward_models)

    @property
    def reward_models(self) -> dict[str, RewardConfig]:
        """The section of each reward model that this run loads, by the name of its source; `JUDGE_MODEL` is a judge."""
        found = {} if self.offline or self.replays_scores else dict(self.reward.models)
        if self.judges and self.judge.load is not None and self.judge.load_as == "reward_model":
            own = {"load": self.judge.load, "tokenizer_name_or_path": None, "read_at": "auto", "model": ""}
            found[JUDGE_MODEL] = self.reward.model_copy(update=own)
        return found

    @property
    def judges(self) -> bool:
        """Whether a judge compares this run's completions."""
        return not self.offline and self.judge.kind is not None

    @property
    def judges_alone(self) -> bool:
        """Whether completions have no score: a judge compares them, and there is no reward."""
        return self.judges and not self.replays_scores and not self.reward.listed

    @property
    def best_metric(self) -> tuple[str, bool]:
        """The metric that decides which checkpoint is best, and whether a larger value is better."""
        training = self.training
        online = "eval/win_rate" if self.judges_alone else "eval/reward"
        name = training.keep_best_metric or ("eval/loss" if self.offline else online)
        mode = training.keep_best_mode or ("min" if name.endswith("loss") else "max")
        return name, mode == "max"

    @property
    def sharing(self) -> set[Role]:
        """The roles of this run that share devices."""
        present = (
            {"train"}
            | ({"ref"} if self.loads_reference else set())
            | ({"infer"} if self.samples else set())
            | ({"reward"} if self.scores else set())
        )
        shared: set[Role] = {role for role in self.resource_pool.colocate if role in present}
        return shared if len(shared) > 1 else set()

    @property
    def takes_turns(self) -> bool:
        """Whether engines and actor share devices, so that one has its memory while the other does not.

        Not where engines sample ahead, which they can only do in one process: they sample before the update, too.
        """
        return {"train", "infer"} <= self.sharing and not self.rollout.lookahead

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
