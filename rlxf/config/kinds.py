"""Kinds of values that keys of a recipe have: bounds, words, paths."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from rlxf.config.fields import (
    LocalPath,
    as_beta,
    as_map_keys,
    as_paths,
    as_pool,
    as_shares,
    as_stops,
    as_structure,
    as_tuple,
    finite,
)

Positive = Annotated[int, Field(ge=1)]


Rate = Annotated[float, BeforeValidator(finite), Field(ge=0)]


Share = Annotated[float, BeforeValidator(finite), Field(ge=0, le=1)]


BelowOne = Annotated[float, BeforeValidator(finite), Field(ge=0, lt=1)]


Finite = Annotated[float, BeforeValidator(finite)]


Pool = Annotated[tuple[Positive, ...], BeforeValidator(as_pool)]


Folder = Annotated[str, LocalPath("folder")]


File = Annotated[str, LocalPath("file")]


PythonFile = Annotated[str, LocalPath("file", module=True)]


DataPaths = Annotated[tuple[Annotated[str, LocalPath("data")], ...], BeforeValidator(as_paths)]


Weights = Annotated[tuple[Annotated[Finite, Field(gt=0)], ...], BeforeValidator(as_tuple)]


MapKeys = Annotated[dict[str, str], BeforeValidator(as_map_keys)]


Beta = Annotated[float | tuple[float, ...], BeforeValidator(as_beta)]


Stops = Annotated[tuple[str, ...], BeforeValidator(as_stops)]


Structure = Annotated[dict[str, Any], BeforeValidator(as_structure)]


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


HealthRule = Literal[
    "over_optimised",
    "length_exploitation",
    "eos_lost",
    "collapsed",
    "useless_reward",
    "ties_rising",
    "reference_too_near",
    "reference_too_far",
    "rate_too_high",
    "stale_engine",
    "staleness_hurts",
    "offline_collapse",
    "evaluation_too_small",
    "data_repeated",
    "one_engine_bounds",
    "pool_idle",
]


DataFormat = Literal["auto", "standard", "messages", "alpaca", "sharegpt"]


ReadAt = Literal["auto", "end_of_turn", "last_token"]


PairingName = Literal["best_worst", "all", "random", "threshold"]


ReaderName = Literal["function", "http", "rule"]


SourceKind = Literal["model", "function", "http", "rule"]


ScorerName = Literal["model", "recorded"]


JudgeName = Literal["model", "llm", "function"]


JudgeLoadAs = Literal["reward_model", "pair_classifier"]


JudgeAnswer = Literal["json", "arena"]


TournamentName = Literal["knockout", "all"]


Role = Literal["train", "infer", "ref", "reward"]


TransportName = Literal["auto", "ipc", "collective", "shared_memory", "object_store"]


class Strict(BaseModel):
    """Frozen; an unknown key is an error, never a silent default; ``true`` is no integer and ``"8"`` no number."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)
