"""The two sides of a comparison of speed: this project, as its recipe runs it, and TRL's live ``OnlineDPOTrainer``.

Both get the same random models, prompts in the same order, two samples per prompt, and completions of the same lengths:
the length of every sample of every step is drawn beforehand. The end-of-sequence logit is minus infinity until a
sample has its length, and the only finite one then, in both programs by the same function; a vLLM request asks for
its number of tokens. Each program samples everything else by itself.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.random_world import EOS, PROMPT_LENGTHS, World  # noqa: E402 - the root must be importable first
from benchmarks.turns import Gate, GatedClock  # noqa: E402
from workers.engine import RolloutWorker  # noqa: E402

SAMPLES = 2  # per prompt: TRL has no other number
SPEC = "RLXF_BENCHMARK_WORK"  # environment variable that tells a worker process what a step's lengths are


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a step is; the same for every side."""

    workloads: tuple[str, ...] = ("fixed", "lognormal")  # of the turns, one after the other
    steps_per_turn: int = 1
    prompts: int = 8  # per step
    max_new_tokens: int = 256
    mean_tokens: int = 64  # of a completion
    sigma: float = 0.8  # of the lognormal lengths
    bf16: bool = False
    lr: float = 1e-6
    beta: float = 0.1

    def workload(self, step: int) -> str:
        return self.workloads[step // self.steps_per_turn % len(self.workloads)]

    def lengths(self, step: int) -> NDArray[np.int64]:
        """[prompts, SAMPLES] tokens of every completion of a step, the EOS included."""
        shape = (self.prompts, SAMPLES)
        if self.workload(step) == "fixed":
            return np.full(shape, self.mean_tokens)
        draw = np.random.default_rng((1, step))
        median = self.mean_tokens / np.exp(self.sigma**2 / 2)
        return np.clip(draw.lognormal(np.log(median), self.sigma, shape).round(), 1, self.max_new_tokens).astype(int)

    def step_of(self, prompts: Any) -> int:
        """The driver step that a batch of training prompts belongs to."""
        return int(prompts.positions[0]) // self.prompts

    def turn_tokens(self, turn: int) -> int:
        """Sampled tokens of all steps of a turn."""
        return sum(int(self.lengths(turn * self.steps_per_turn + i).sum()) for i in range(self.steps_per_turn))


def end_at(scores: Tensor, lengths: Tensor, index: int) -> Tensor:
    """[n, V] scores at ``index`` (from 0): EOS is the only finite one in rows that end here, and -inf in the others."""
    scores = scores.clone()
    scores[:, EOS] = -torch.inf
    last = lengths == index + 1
    scores[last] = -torch.inf
    scores[last, EOS] = 0.0
    return scores


@dataclass(frozen=True, kw_only=True, slots=True)
class Ours:
    """This project: ``runtime`` and ``engine`` as in a recipe."""

    world: World
    work: Work
    runtime: str = "local"
    engine: str = "hf"
    overrides: tuple[tuple[str, str, Any], ...] = ()  # section, key, value

    def recipe(self) -> dict[str, Any]:
        work, world = self.work, self.world
        length = PROMPT_LENGTHS[1] + work.max_new_tokens
        role = {"model": "random", "load": str(world.policy), "seq_length": length, "micro_batch_size": work.prompts}
        sections: dict[str, Any] = {
            "runtime": self.runtime,
            "training": {
                "stage": "ray_online_dpo", "device": "cpu", "global_batch_size": work.prompts, "train_iters": 100_000,
                "bf16": work.bf16,
            },
            "model": {"random": world.shape.section()},
            "actor_rollout": {
                **role, "data_path": str(world.prompts), "no_shuffle": True, "max_prompt_length": PROMPT_LENGTHS[1],
                "max_new_tokens": work.max_new_tokens, "n_samples_per_prompt": SAMPLES,
                "ppo_mini_batch_size": work.prompts, "dpo_beta": work.beta, "lr": work.lr,
            },
            "ref": role,
            "reward": {**role, "load": str(world.reward)},
            "rollout": {"engine": self.engine},
            "resource_pool": {"actor_rollout": [2], "ref": [1], "reward": [1]},
            "log": {"tensorboard": False, "samples_interval": 0},
        }  # fmt: skip
        for section, key, value in self.overrides:
            sections[section][key] = value
        return sections


def run_ours(gate: Gate, side: Ours, folder: Path) -> None:
    """Train by the recipe, through the launcher that a user's command reaches."""
    from rlxf.assembly import start
    from rlxf.config.load import load_config

    os.environ[SPEC] = json.dumps(asdict(side.work))
    config = load_config(side.recipe())
    if side.runtime == "local":
        from rlxf.assembly import local as launcher

        fix_lengths(side.work, gate)
    else:
        from workers import crew
        from workers import launch as launcher  # type: ignore[no-redef]

        crew.WORKERS["infer"] = FixedLengthWorker
    start.Clock = partial(GatedClock, gate)  # type: ignore[misc, assignment]
    if config.rollout.lookahead:
        drain_at_turns(gate)
    launcher.launch(config, folder / "run")


def drain_at_turns(gate: Gate) -> None:
    """A turn ends when no work of this program is under way: what it has begun counts, and disturbs no other turn."""
    from rlxf import driver
    from rlxf.schedule import Lookahead

    class Drained(Lookahead[Any]):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            gate.before_turn = self.drained

    driver.Lookahead = Drained  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A shipped recipe as it is."""

    name: str
    runtime: str
    engine: str
    overrides: tuple[str, ...] = ()


def run_recipe(gate: Gate, side: Recipe, folder: Path) -> None:
    """The command that a user types, in this process."""
    os.chdir(ROOT)
    options = (f"runtime={side.runtime}", f"rollout.engine={side.engine}", f"hydra.run.dir={folder / 'run'}")
    sys.argv = ["ray_gpt.py", "--config-name", side.name, *options, *side.overrides]
    from rlxf.assembly import start

    start.Clock = partial(GatedClock, gate)  # type: ignore[misc, assignment]
    runpy.run_path("ray_gpt.py", run_name="__main__")


def fix_lengths(work: Work, gate: Gate | None = None) -> None:
    """Training completions of the engines of this process get the lengths of ``work``; those of a sync probe do not."""
    from rlxf.rollout import engine, hf, hf_sampling, session, vllm
    from rlxf.rollout.engine import Sampling

    lengths: dict[int, int] = {}  # by the completion's seed

    def noting(prompts: Any, sampling: Sampling, prompts_per_call: int | None) -> Iterator[Any]:
        calls = list(engine.sample_requests(prompts, sampling, prompts_per_call))
        if sampling.purpose == "train":
            wanted = work.lengths(work.step_of(prompts))[prompts.positions % work.prompts]
            lengths.update(zip((seed for call in calls for _, seed in call), wanted.flatten().tolist(), strict=True))
        yield from calls

    class FixedLengths(hf_sampling.Sampler):
        def __init__(self, seeds: Any, sampling: Sampling, *rest: Any) -> None:
            super().__init__(seeds, sampling, *rest)
            self._index = 0
            found = [lengths.pop(seed, 0) for seed in seeds]
            self._lengths = torch.tensor(found) if all(found) else None

        def choose(self, logits: Tensor, rows: list[int]) -> Tensor:
            if self._lengths is not None:
                logits = end_at(logits, self._lengths[rows], self._index)
                if gate is not None:
                    gate.tokens += len(rows)
            self._index += 1
            return super().choose(logits, rows)

    class FixedLengthRequests(vllm.VllmRequests):
        def add(self, number: int, prompt: list[int], seed: int) -> None:
            if seed in lengths:
                self._shared |= {"max_tokens": lengths.pop(seed), "stop_token_ids": []}
            super().add(number, prompt, seed)

    hf_sampling.Sampler = FixedLengths  # type: ignore[misc]
    vllm.VllmRequests = FixedLengthRequests  # type: ignore[misc]
    for module in (hf, session, vllm):
        module.sample_requests = noting  # type: ignore[attr-defined]


class FixedLengthWorker(RolloutWorker):
    """The rollout worker with completions of given lengths, by either engine."""

    def build(self, config: Any, master: tuple[str, int], again: bool = False) -> None:
        values = json.loads(os.environ[SPEC])
        fix_lengths(Work(**{**values, "workloads": tuple(values["workloads"])}))
        super().build(config, master, again)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trl:
    """TRL, with its KV cache on (its default, gradient checkpointing, switches it off) and its faster AdamW."""

    world: World
    work: Work
    threads: int = 1


def run_trl(gate: Gate, side: Trl, folder: Path) -> None:
    """``OnlineDPOTrainer.train`` with a gate before each step."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    torch.set_num_threads(side.threads)
    import transformers
    from datasets import Dataset
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    work, world = side.work, side.world
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(world.policy, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.policy)
    scorer = transformers.AutoModelForSequenceClassification
    trainer = OnlineDPOTrainer(
        model=model,
        ref_model=load(world.policy, dtype=torch.float32),
        reward_funcs=scorer.from_pretrained(world.reward, dtype=torch.float32, num_labels=1).eval(),
        reward_processing_classes=transformers.AutoTokenizer.from_pretrained(world.reward),
        args=OnlineDPOConfig(
            output_dir=str(folder / "trl"), max_steps=100_000, per_device_train_batch_size=work.prompts,
            gradient_accumulation_steps=1, learning_rate=work.lr, lr_scheduler_type="constant", weight_decay=0.0,
            max_grad_norm=1.0, optim="adamw_torch_fused", beta=work.beta, bf16=work.bf16, use_cpu=True,
            gradient_checkpointing=False, disable_dropout=True, train_sampling_strategy="sequential", logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, seed=1, temperature=1.0, top_p=1.0,
            max_new_tokens=work.max_new_tokens, max_length=PROMPT_LENGTHS[1] + work.max_new_tokens,
        ),
        train_dataset=Dataset.from_dict({"prompt": world.texts()}),
        processing_class=tokenizer,
    )  # fmt: skip

    class AtEachStep(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            gate.begin_step(state.global_step)

    trainer.add_callback(AtEachStep())
    fix_lengths_of_trl(trainer, model, gate, work)
    trainer.train()


def fix_lengths_of_trl(trainer: Any, model: Any, gate: Gate, work: Work) -> None:
    """Completions get the lengths of ``work``, and the parts of a step are counted."""
    generate = model.generate

    def fixed(**arguments: Any) -> Tensor:
        # Its rows: first samples of all prompts, then second samples.
        lengths = torch.from_numpy(work.lengths(trainer.state.global_step)).T.flatten()
        start = arguments["input_ids"].size(1)

        def process(tokens: Tensor, scores: Tensor) -> Tensor:
            return end_at(scores, lengths, tokens.size(1) - start)

        output: Tensor = generate(**arguments, logits_processor=[process])
        ends = (output[:, start:] == EOS).int().argmax(dim=1) + 1
        if not torch.equal(ends, lengths):
            raise AssertionError(f"completions of {ends.tolist()} tokens, not {lengths.tolist()}")
        gate.tokens += int(ends.sum())
        return output

    def counted(owner: Any, method: str, stage: str) -> None:
        original = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with gate.stage(stage):
                return original(*args, **kwargs)

        setattr(owner, method, call)

    model.generate = fixed
    counted(trainer, "_generate", "gen")
    counted(trainer, "_calculate_rewards_from_functions", "adv")
    counted(trainer.accelerator, "backward", "backward")
    forward = trainer._forward

    def passes(model_: Any, *args: Any, **kwargs: Any) -> Any:
        with gate.stage("ref" if model_ is trainer.ref_model else "forward"):
            return forward(model_, *args, **kwargs)

    trainer._forward = passes
