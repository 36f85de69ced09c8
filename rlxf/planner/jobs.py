"""What each role of a recipe has to do in a driver step, and on which devices: the planner's view of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlxf.config.config_json import read_settings
from rlxf.config.kinds import Role
from rlxf.config.placement import Plan, make_plan
from rlxf.config.roles import ActorConfig, RoleConfig
from rlxf.config.schema import ModelConfig, RunConfig
from rlxf.core.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
Recompute = Literal["none", "selective", "full"]

BYTES: Mapping[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}  # of one number


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A dense decoder, as far as its size matters."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    scores: bool = False  # a reward model: a head of one label in place of the output layer

    @classmethod
    def of(cls, model: ModelConfig, folder: str | None = None, *, scores: bool = False) -> Shape:
        """``folder``: of the model; if it is here, its ``config.json`` says whether there are biases and head norms."""
        kind = _kind(folder)
        return cls(
            layers=model.num_layers,
            hidden=model.hidden_size,
            ffn=model.ffn_hidden_size,
            heads=model.num_attention_heads,
            kv_heads=model.kv_heads,
            head_size=model.head_size,
            vocab=model.vocab_size,
            tied=not model.untie_embeddings_and_output_weights and not scores,
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            scores=scores,
        )

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of one layer."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.ffn

    @property
    def body(self) -> int:
        """Numbers in the matrices of all layers."""
        return self.layers * self.layer_weights

    @property
    def head(self) -> int:
        """Numbers in the output layer, or in the embedding."""
        return self.vocab * self.hidden

    @property
    def layer_vectors(self) -> int:
        """Numbers in the norms and biases of one layer."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_size if self.qkv_bias else 0
        return 2 * self.hidden + (2 * self.head_size if self.qk_norm else 0) + biases

    @property
    def parameters(self) -> int:
        """All numbers of the model."""
        outputs = self.hidden if self.scores else 0 if self.tied else self.head
        return self.body + self.layers * self.layer_vectors + self.hidden + self.head + outputs


def _kind(folder: str | None) -> str:
    """The family that a folder's ``config.json`` names; empty if it is not here."""
    if folder is None:
        return ""
    try:
        return str(read_settings(Path(folder)).get("model_type", ""))
    except ConfigError:
        return ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a role's model and work are spread over its devices."""

    tp: int = 1
    pp: int = 1
    vp: int = 1
    cp: int = 1
    dp: int = 1
    sequence_parallel: bool = False

    @property
    def devices(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        """``TP4 DP2``: the sizes above 1."""
        sizes = {"TP": self.tp, "PP": self.pp, "VP": self.vp, "CP": self.cp, "DP": self.dp}
        return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """The largest forward pass of a role: a micro-batch of the longest sequences, before TP and CP cut it."""

    tokens: int  # that are computed
    rows: int  # that the head reads: completion tokens, or one per sequence of a reward model
    sequences: int  # at least
    budget: bool  # whether tokens bound it, so that every pass is about as large; else its number of sequences


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardJob:
    """A frozen model: the reference, or a reward model."""

    role: Role
    name: str  # of the source of rewards; "ref" for the reference
    shape: Shape
    layout: Layout
    precision: Precision
    largest: Pass
    share_prompts: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """Adapters: then the base is frozen."""

    rank: int
    targets: tuple[str, ...]
    four_bits: bool  # of the base's linears


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """The model that is trained."""

    shape: Shape
    layout: Layout
    precision: Precision
    recompute: Recompute
    lora: Lora | None
    largest: Pass
    share_prompts: bool
    mini_batch: int  # rows of an optimizer step, on all ranks
    epochs: int
    bucket_bytes: int  # of a push
    refers: bool  # it is its own reference, with the adapters off


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineJob:
    """The rollout engines."""

    shape: Shape
    kind: Literal["vllm", "hf"]
    engines: int
    tp: int
    precision: Precision
    max_length: int  # tokens of a sequence
    slots: int | None  # sequences that one engine decodes at a time; None: the device's default, of hf all
    utilization: float | None  # of the device's memory, as the recipe sets it
    cpu_cache_bytes: int

    @property
    def devices(self) -> int:
        return self.engines * self.tp


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a driver step works on. Lengths are means; memory is planned for the longest ones."""

    prompts: int  # rows of a step: prompts; offline pairs or examples
    samples: int  # completions of a prompt; 1 where nothing is sampled
    prompt_tokens: float
    completion_tokens: float
    longest: float = 1.0  # tokens of the longest completion over the mean
    pairs: float = 0.0  # that are trained on; offline all rows
    sides: int = 2  # completions of a row that is trained on; 1: examples

    @property
    def completions(self) -> float:
        return self.prompts * self.samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Devices that hold the same roles."""

    name: str  # of the placement group
    roles: tuple[Role, ...]
    devices: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Jobs:
    """Everything that a recipe asks of its devices."""

    train: TrainJob
    engine: EngineJob | None
    reference: ForwardJob | None
    rewards: tuple[ForwardJob, ...]
    work: Work
    places: tuple[Place, ...]
    lookahead: int
    chunks: int  # of a step that is streamed; 1: a stage takes the whole step
    takes_turns: bool
    local: bool  # all in one process, one stage after the other

    @property
    def devices(self) -> dict[Role, int]:
        """Of each role."""
        found: dict[Role, int] = {"train": self.train.layout.devices}
        if self.engine is not None:
            found["infer"] = self.engine.devices
        if self.reference is not None:
            found["ref"] = self.reference.layout.devices
        if self.rewards:
            found["reward"] = self.rewards[0].layout.devices
        return found

    @property
    def num_devices(self) -> int:
        return sum(place.devices for place in self.places)


def jobs_of(config: RunConfig) -> Jobs:
    """The jobs of a recipe that was checked."""
    plan = make_plan(config)
    actor, rollout = config.actor_rollout, config.rollout
    shape = Shape.of(config.model[actor.model], actor.load, scores=config.objective == "reward")
    streams = config.streams and rollout.stream_prompts is not None
    return Jobs(
        train=_train(config, shape),
        engine=_engine(config, shape) if config.samples else None,
        reference=_reference(config) if config.loads_reference else None,
        rewards=tuple(_rewards(config)),
        work=work_of(config),
        places=tuple(_places(plan)),
        lookahead=0 if config.offline else rollout.lookahead,
        chunks=max(config.training.global_batch_size // (rollout.stream_prompts or 1), 1) if streams else 1,
        takes_turns=config.takes_turns,
        local=config.runtime == "local",
    )


def work_of(config: RunConfig) -> Work:
    """A driver step with the lengths that ``plan`` names; without them the longest ones that the recipe allows."""
    actor, plan, rows = config.actor_rollout, config.plan, config.training.global_batch_size
    most = actor.seq_length // 2 if config.offline else actor.seq_length - config.max_new_tokens
    prompt = plan.prompt_tokens or min(actor.max_prompt_length, most)
    completion = plan.completion_tokens or (actor.seq_length - prompt if config.offline else config.max_new_tokens)
    limit = actor.seq_length - prompt if config.offline else config.max_new_tokens
    return Work(
        prompts=rows,
        samples=1 if config.offline else actor.n_samples_per_prompt,
        prompt_tokens=prompt,
        completion_tokens=completion,
        longest=1.0 if config.offline else max(limit / completion, 1.0),
        pairs=float(rows),
        sides=1 if config.objective == "supervised" else 2,
    )


def _train(config: RunConfig, shape: Shape) -> TrainJob:
    actor = config.actor_rollout
    layout = _layout(actor, actor.num_gpus_for_train)
    lora = Lora(rank=actor.lora_r, targets=actor.lora_target_modules, four_bits=actor.qlora) if actor.lora_r else None
    return TrainJob(
        shape=shape,
        layout=layout,
        precision=actor.precision,
        recompute=actor.recompute_granularity,
        lora=lora,
        largest=_largest(config, actor, sides=1 if config.objective == "supervised" else 2, scores=shape.scores),
        share_prompts=actor.share_prompts,
        mini_batch=min(actor.ppo_mini_batch_size * layout.dp, config.training.global_batch_size),
        epochs=actor.ppo_epochs,
        bucket_bytes=config.sync.bucket_mb * 2**20,
        refers=config.reference_is_base,
    )


def _engine(config: RunConfig, shape: Shape) -> EngineJob:
    actor, rollout = config.actor_rollout, config.rollout
    tp = actor.inference_tensor_model_parallel_size
    return EngineJob(
        shape=shape,
        kind="hf" if config.engine == "hf" else "vllm",
        engines=actor.num_gpus_for_infer // tp,
        tp=tp,
        precision=actor.precision,
        max_length=actor.seq_length,
        slots=_at_a_time(config),
        utilization=rollout.gpu_memory_utilization,
        cpu_cache_bytes=rollout.cpu_kv_cache_gib * 2**30,
    )


def _at_a_time(config: RunConfig) -> int | None:
    """Sequences that an engine decodes at a time by the recipe; engine hf has a number of prompts in its place."""
    if config.engine == "vllm":
        return config.rollout.max_num_seqs
    prompts = config.actor_rollout.num_samples_per_step
    return None if prompts is None else prompts * config.actor_rollout.n_samples_per_prompt


def _reference(config: RunConfig) -> ForwardJob:
    ref = config.ref
    return ForwardJob(
        role="ref",
        name="ref",
        shape=Shape.of(config.model[ref.model], ref.load),
        layout=_layout(ref, sum(config.resource_pool.ref)),
        precision=ref.precision,
        largest=_largest(config, ref, sides=2, scores=False),
        share_prompts=ref.share_prompts,
    )


def _rewards(config: RunConfig) -> Iterator[ForwardJob]:
    for name, section in config.reward_models.items():
        model = config.model.get(section.model or "", config.model[config.reward.model or config.actor_rollout.model])
        yield ForwardJob(
            role="reward",
            name=name,
            shape=Shape.of(model, section.load, scores=True),
            layout=_layout(section, sum(config.resource_pool.reward)),
            precision=section.precision,
            largest=_largest(config, section, sides=config.actor_rollout.n_samples_per_prompt, scores=True),
            share_prompts=section.share_prompts,
        )


def _layout(section: RoleConfig, devices: int) -> Layout:
    return Layout(
        tp=section.tensor_model_parallel_size,
        pp=section.pipeline_model_parallel_size,
        vp=section.virtual_pipeline_model_parallel_size,
        cp=section.context_parallel_size,
        dp=max(devices // section.devices_per_replica, 1),
        sequence_parallel=section.sequence_parallel and section.tensor_model_parallel_size > 1,
    )


def _largest(config: RunConfig, section: RoleConfig, *, sides: int, scores: bool) -> Pass:
    """The pass of the longest sequences. Sequences of one prompt share it; of a file, they may differ from it on."""
    actor: ActorConfig = config.actor_rollout
    sequences = section.micro_batch_size * (1 if sides == 1 else 2)
    completion = actor.seq_length - 1 if config.offline else config.max_new_tokens
    prompt = actor.seq_length - completion
    together = min(sides, sequences)  # sequences of one prompt in one pass
    one = prompt + together * completion if section.share_prompts else together * actor.seq_length
    units = max(sequences // together, 1)
    budget = section.max_tokens_per_micro_batch
    tokens = units * one if budget is None else max(budget, one)
    share = together * completion / one  # of the tokens that belong to completions
    return Pass(
        tokens=tokens,
        rows=max(tokens // actor.seq_length, 1) if scores else round(tokens * share),
        sequences=together if budget is not None else units * together,
        budget=budget is not None,
    )


def _places(plan: Plan) -> Iterator[Place]:
    """Devices by the roles that they hold."""
    for group in plan.groups:
        held: dict[tuple[Role, ...], int] = {}
        for bundle in range(group.num_devices):
            roles = tuple(role.role for role in plan.roles if role.group == group.name and bundle in role.bundles)
            held[roles] = held.get(roles, 0) + 1
        yield from (Place(name=group.name, roles=roles, devices=count) for roles, count in held.items())
