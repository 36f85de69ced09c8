"""The answers of two models to the same prompts, and their scores by one scorer, or the verdicts of a judge."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from torch import Tensor

from rlxf.assembly.data import eval_prompts
from rlxf.assembly.judge import build_judge
from rlxf.assembly.rewards import open_scorer
from rlxf.assembly.roles import build_engine, build_models, policy_tokenizer
from rlxf.config.judging import judge_problems
from rlxf.config.kinds import ReadAt
from rlxf.config.problems import Problem, expectation, lines, show
from rlxf.config.read_position import warn_of_read_position
from rlxf.config.schema import RunConfig
from rlxf.core.errors import ConfigError, ModelError, StageTimeout, WorkerLost
from rlxf.core.types import Metrics, PromptBatch, Rollouts, Text, Tokens
from rlxf.core.waiting import own_children
from rlxf.judge.both_orders import Compared
from rlxf.models.tokenizer import eos_token_ids, load_tokenizer
from rlxf.platform import Platform, Process, get_platform
from rlxf.rollout.engine import Sampling
from rlxf.score.penalty import Shaping, with_scores
from rlxf.tools.compare.formats import Format, Question, read_questions, write_prompts
from rlxf.tools.model_shape import model_shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is asked, how it is answered, and who judges."""

    data_path: Path
    num_prompts: int  # the first ones of the file
    data_format: Format = "prompts"
    reward_model: Path | None = None  # one of these three
    reward_function: Path | None = None
    judge: dict[str, Any] = field(default_factory=dict)  # keys of the recipe's section
    verdicts: Path | None = None  # folder for the judge's verdicts; None: they are not kept
    read_at: ReadAt = "auto"  # where the reward model's score is read
    prompt_key: str = "prompt"
    max_prompt_length: int = 512  # tokens; a longer prompt of either model is left out
    max_new_tokens: int = 512
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    seed: int = 1  # of the samples: the same for both models
    missing_eos_penalty: float = 0.0
    prompts_per_call: int = 64  # answered at a time
    engine: Literal["hf", "vllm"] = "hf"
    device: str = "auto"
    bf16: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Generations:
    """One model's answers, one per prompt."""

    texts: list[str]
    scores: Tensor  # [prompts] float32, NaN where missing; all of them if a judge compares
    contains_eos: Tensor  # [prompts] bool

    @property
    def lengths(self) -> list[int]:
        """Characters: tokens of two tokenizers cannot be compared."""
        return [len(text) for text in self.texts]


@dataclass(frozen=True, slots=True)
class Comparison:
    """The answers of both models to the same prompts."""

    prompts: tuple[Text, ...]
    row_ids: list[int]  # rows of the data
    first: Generations
    second: Generations
    verdicts: Compared | None = None  # of a judge; the first answers are those of the first model
    judged: Metrics = field(default_factory=dict)  # what the verdicts took
    questions: list[Question] | None = None  # of a benchmark


def compare(first: Path, second: Path, settings: Settings) -> Comparison:
    """Both models' answers, and their scores.

    Args:
        first: a Hugging Face folder, or a run folder with ``policy`` in it.
        second: the same.
        settings: the rest. Both models sample with the same seeds, so a model is even with itself.

    Raises:
        ConfigError: a folder, the data or the scorer is wrong.
        WorkerLost, StageTimeout: the process of a vLLM engine died, or did not answer.
    """
    with _questions((model_folder(first), model_folder(second)), settings) as (questions, each):
        return _compare(first, second, questions, each)


def _compare(first: Path, second: Path, questions: list[Question] | None, each: Sequence[Settings]) -> Comparison:
    """``each``: the settings of both models, whose prompts may be written in different forms."""
    settings = each[0]
    configs = [recipe(model_folder(folder), own) for folder, own in zip((first, second), each, strict=True)]
    problems = [found for config in configs[:1] for found in judge_problems(config)]
    if problems:
        raise ConfigError(*lines(problems))
    warn_of_read_position(configs[0])
    platform = get_platform(settings.device)
    models = build_models(configs[0], platform, Process()) if configs[0].judges else {}
    judging = build_judge(configs[0], settings.verdicts, models=models)
    prompts = [eval_prompts(config, policy_tokenizer(config)) for config in configs]
    common = set.intersection(*(set(batch.row_ids.tolist()) for batch in prompts))
    if not common:
        raise ConfigError(f"{settings.data_path}: no prompt is short enough for both models; raise --max-prompt-length")
    said = [
        answer(config, _only(batch, common), settings, platform) for config, batch in zip(configs, prompts, strict=True)
    ]
    asked = _only(prompts[0], common)
    rows = asked.row_ids.tolist()
    found = Comparison(asked.texts, rows, said[0], said[1], questions=questions and [questions[row] for row in rows])
    if judging is None:
        return found
    verdicts = judging.answers(asked, said[0].texts, said[1].texts)
    return replace(found, verdicts=verdicts, judged=judging.metrics(verdicts.counts, prefix=""))


@contextmanager
def _questions(
    folders: tuple[Path, Path], settings: Settings
) -> Iterator[tuple[list[Question] | None, tuple[Settings, Settings]]]:
    """A benchmark's questions, and for each model the settings that name them as a file of prompts.

    A model with a chat template gets them as messages of a user.
    """
    if settings.data_format == "prompts":
        yield None, (settings, settings)
        return
    questions = read_questions(settings.data_path, settings.data_format)[: settings.num_prompts]
    with tempfile.TemporaryDirectory() as scratch:
        each = []
        for number, folder in enumerate(folders):
            tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
            path = Path(scratch) / f"questions_{number}.jsonl"
            write_prompts(path, questions, chat=tokenizer.chat_template is not None)
            each.append(replace(settings, data_path=path, prompt_key="prompt", num_prompts=len(questions)))
        yield questions, (each[0], each[1])


def model_folder(folder: Path) -> Path:
    """The folder with the weights: the one named, or ``policy`` of a run.

    Raises:
        ModelError: neither holds a model.
    """
    for found in (folder, folder / "policy"):
        if (found / "config.json").is_file():
            return found.absolute()
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: holds a LoRA adapter only; name a folder with merged weights")
    raise ModelError(f"{folder}: no config.json there or in {folder / 'policy'}; expected a Hugging Face or run folder")


def recipe(folder: Path, settings: Settings) -> RunConfig:
    """A recipe with all that the rooms read to sample from ``folder`` and to score the answers."""
    reward_model, function = settings.reward_model, settings.reward_function
    trust = settings.trust_remote_code
    models = {"policy": model_shape(folder, trust_remote_code=trust)}
    reward: dict[str, Any] = {"function": str(function) if function else None}
    if reward_model is not None:
        models["reward"] = model_shape(reward_model, trust_remote_code=trust)
        reward |= {"model": "reward", "load": str(reward_model.absolute()), "read_at": settings.read_at}
        # The options count the policies' tokens, not the reward model's: it may use all of its positions.
        reward |= _lengths(settings) | {"seq_length": models["reward"].max_position_embeddings}
    return _checked(
        {
            "runtime": "local",
            "training": {
                "stage": "ray_online_dpo",
                "device": settings.device,
                "seed": settings.seed,
                "trust_remote_code": trust,
            },
            "model": models,
            "actor_rollout": {
                "model": "policy",
                "load": str(folder),
                "data_path": str(settings.data_path),
                "prompt_key": settings.prompt_key,
                "max_prompt_length": settings.max_prompt_length,
                "max_new_tokens": settings.max_new_tokens,
                "bf16": settings.bf16,
                **_lengths(settings),
            },
            "ref": {"model": "policy"},
            "reward": reward,
            "judge": settings.judge,
            "rollout": {"engine": settings.engine},
            "eval": {"num_prompts": settings.num_prompts, "data_path": str(settings.data_path)},
        }
    )


def _checked(recipe: dict[str, Any]) -> RunConfig:
    """The recipe as a config; a wrong key of the judge is the user's mistake."""
    try:
        return RunConfig.model_validate(recipe)
    except ValidationError as error:
        found = [said for said in error.errors(include_url=False) if said["loc"][0] == "judge"]
        if not found:
            raise
    keys = [".".join(map(str, said["loc"][:2])) for said in found]
    texts = [f"{key} = {show(said['input'])}: {_expected(said)}" for key, said in zip(keys, found, strict=True)]
    raise ConfigError(*lines(Problem((key,), text) for key, text in zip(keys, texts, strict=True)))


def _expected(error: ErrorDetails) -> str:
    return "unknown key; docs/config.md lists them" if error["type"] == "extra_forbidden" else expectation(error)


def _lengths(settings: Settings) -> dict[str, int]:
    return {
        "seq_length": settings.max_prompt_length + settings.max_new_tokens,
        "micro_batch_size": settings.prompts_per_call,
    }


def _only(prompts: PromptBatch, wanted: set[int]) -> PromptBatch:
    """The prompts of these rows of the data."""
    rows = [row for row, number in enumerate(prompts.row_ids.tolist()) if number in wanted]
    tokens = prompts.prompts.rows()
    return PromptBatch(
        prompts=Tokens.from_rows([tokens[row] for row in rows]),
        row_ids=prompts.row_ids[rows],
        positions=prompts.positions[rows],
        texts=tuple(prompts.texts[row] for row in rows),
        columns={name: [values[row] for row in rows] for name, values in prompts.columns.items()},
    )


def answer(config: RunConfig, prompts: PromptBatch, settings: Settings, platform: Platform) -> Generations:
    """One model's completions of all prompts, scored; the model is freed before the scorer is loaded."""
    sampling = Sampling(
        num_samples=1,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
        purpose="eval",
    )
    size = settings.prompts_per_call
    parts = [prompts.slice(start, start + size) for start in range(0, len(prompts), size)]
    sample = _generate if settings.engine == "hf" else _generate_apart
    rollouts = sample(config, parts, sampling, platform.name)
    tokenizer = policy_tokenizer(config)
    eos_ids = eos_token_ids(str(config.actor_rollout.load), tokenizer)
    shaping = Shaping(missing_eos_penalty=settings.missing_eos_penalty)
    with open_scorer(config, platform) as scorer:
        scored = [with_scores(part, scorer.score(part), eos_ids=eos_ids, shaping=shaping) for part in rollouts]
    rows = [row for part in rollouts for row in part.sequences.completion_rows()]
    return Generations(
        texts=tokenizer.batch_decode(rows, skip_special_tokens=True),
        scores=torch.cat([part.scores for part in scored]),
        contains_eos=torch.cat([part.contains_eos for part in scored]),
    )


def _generate(config: RunConfig, parts: Sequence[PromptBatch], sampling: Sampling, device: str) -> list[Rollouts]:
    engine = build_engine(config, get_platform(device))
    return [engine.generate(part, sampling) for part in parts]


def _generate_apart(config: RunConfig, parts: Sequence[PromptBatch], sampling: Sampling, device: str) -> list[Rollouts]:
    """Generate in a process of its own: on a CPU vLLM must be alone in it, and its end frees vLLM's memory."""
    limit = config.training.start_timeout_s + len(parts) * config.training.stage_timeout_s
    model = config.actor_rollout.load
    with own_children() as kill, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        future = pool.submit(_generate, config, parts, sampling, device)
        try:
            return future.result(timeout=limit)
        except BrokenProcessPool as error:
            raise WorkerLost(f"the process of the vLLM engine died with {model}") from error
        except FutureTimeout as error:
            kill()
            raise StageTimeout(
                f"no answer within {limit} s from the vLLM engine with {model}; its process was ended. Look at what it "
                "wrote, or try --engine hf"
            ) from error
