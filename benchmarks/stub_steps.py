"""The driver's own work of a step in chunks: real stages, schedule and pairing.

Engines, scorer and reference are stubs; what they cost is measured apart and left out.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.against_trl import spread  # noqa: E402 - the root must be importable first
from rlxf.algorithms import ALGORITHMS  # noqa: E402
from rlxf.config.schema import RunConfig  # noqa: E402
from rlxf.core.clock import Clock  # noqa: E402
from rlxf.core.garbage import leave_out_what_is_loaded  # noqa: E402
from rlxf.core.stop import Stop  # noqa: E402
from rlxf.core.types import Pairs, PairValues, PromptBatch, Rollouts, Sequences, Tokens  # noqa: E402
from rlxf.loop.collected import Collected  # noqa: E402
from rlxf.loop.run import Online, Run, State  # noqa: E402
from rlxf.rollout.dispatch import Dispatch  # noqa: E402
from rlxf.rollout.engine import Completion, Sampling, pack_rollouts  # noqa: E402
from rlxf.rollout.lengths import SeenLengths  # noqa: E402
from rlxf.rollout.shares import part_of  # noqa: E402
from rlxf.schedule import InThreads, Lookahead, OneAfterTheOther  # noqa: E402
from rlxf.score.combine import RunningScales, Term  # noqa: E402
from rlxf.score.sources import Rewards, TokenTerm  # noqa: E402

ENGINES, CHUNK, SAMPLES, ROWS = 64, 16, 2, 1_000_000
PROMPTS = 64 * CHUNK
MEAN_TOKENS = 128
UNCOUNTED = 2


@dataclass
class Stubs:
    """Prompts, engines, scorer and reference; ``seconds``: CPU that they took themselves."""

    seconds: float = 0.0
    step: PromptBatch | None = None
    whole: Rollouts | None = None
    num_engines: int = ENGINES
    num_dropped: int = 0
    draw: np.random.Generator = field(default_factory=lambda: np.random.default_rng(1))

    def next_batch(self, step: int) -> PromptBatch:
        begin = time.thread_time()
        rows = [self.draw.integers(2, 30_000, self.draw.integers(16, 65)).tolist() for _ in range(PROMPTS)]
        self.step = PromptBatch(
            prompts=Tokens.from_rows(rows),
            row_ids=torch.from_numpy(self.draw.choice(ROWS, PROMPTS, replace=False)),
            positions=torch.arange(step * PROMPTS, (step + 1) * PROMPTS),
            texts=("",) * PROMPTS,
            columns={},
        )
        lengths = self.draw.lognormal(np.log(MEAN_TOKENS) - 0.32, 0.8, PROMPTS * SAMPLES).clip(1, 1024).astype(int)
        completions = [Completion(tokens=[7] * int(n), logps=[-1.0] * int(n)) for n in lengths]
        self.whole = pack_rollouts(self.step, SAMPLES, completions, 0)
        self.seconds += time.thread_time() - begin
        return self.step

    def epoch(self, step: int) -> float:
        return 0.0

    def num_slots(self, sampling: Sampling) -> int | None:
        return 256

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        raise AssertionError("steps come in chunks")

    def sample(self, prompts: PromptBatch, sampling: Sampling, dispatch: Dispatch) -> Iterator[Rollouts]:
        assert self.whole is not None
        begin = time.thread_time()
        parts = [part_of(self.whole, rows) for rows in dispatch.chunks]
        self.seconds += time.thread_time() - begin
        yield from parts

    def score(self, rollouts: Rollouts) -> Tensor:
        begin = time.thread_time()
        scores = torch.rand(len(rollouts))
        self.seconds += time.thread_time() - begin
        return scores

    def logps(self, pairs: Pairs) -> PairValues:
        return PairValues(chosen=torch.zeros(len(pairs)), rejected=torch.zeros(len(pairs)))

    def prepare(self, batch: Any, step: int) -> None: ...

    def shown(self, step: int, pairs: Any) -> Any:
        """In place of the recorder: people are shown no pair of this step."""
        return pairs.select(torch.zeros(0, dtype=torch.int64))

    def sampled(self) -> None:
        """In place of the sync of weights: nothing is to be given back."""


def measure(repeats: int, *, threads: bool = True) -> dict[str, Any]:
    """Milliseconds of CPU of a step, from its prompts to what an update trains on.

    ``threads``: one for each stage, as in a run on Ray; else the stages follow each other in one thread, and what is
    missing is what the threads' hand-overs cost.
    """
    stubs, run = Stubs(), _run(threads)
    source = _source(stubs, run)
    object.__setattr__(run, "source", source)
    object.__setattr__(run, "reference", stubs)
    object.__setattr__(run, "actor", stubs)
    object.__setattr__(run, "sync", stubs)
    steps = deque[Collected]()
    algorithm = ALGORITHMS["ray_online_dpo"]
    schedule = Lookahead(
        algorithm.stages(run),
        run.lanes,
        lambda step, boundary: Collected(step=step, sampled_at=boundary, version=0),
        num_ahead=0,
        num_steps=10**6,
        steps=steps,
    )
    found = []
    leave_out_what_is_loaded()  # as a run does
    for step in range(repeats + UNCOUNTED):
        stubs.seconds, begin = 0.0, time.process_time()
        collected = schedule.take(step)
        algorithm.complete(run, collected)
        run.state.step += 1
        found.append(1000 * (time.process_time() - begin - stubs.seconds))
    return spread(found[UNCOUNTED:])


def _run(threads: bool) -> Run:
    shape = {
        "num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 4, "vocab_size": 30_000,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    folder = str(ROOT)
    role = {"model": "stub", "load": folder}
    config = RunConfig.model_validate(
        {
            "runtime": "ray",
            "training": {"stage": "ray_online_dpo", "device": "cpu", "global_batch_size": PROMPTS},
            "model": {"stub": shape},
            "actor_rollout": {
                **role, "data_path": folder, "seq_length": 1088, "max_prompt_length": 64,
                "n_samples_per_prompt": SAMPLES, "ppo_mini_batch_size": PROMPTS // 4,
            },
            "ref": role, "reward": role,
            "rollout": {"engine": "hf", "stream_prompts": CHUNK},
        }
    )  # fmt: skip
    stop = Stop()
    nothing: Any = None
    return Run(
        config=config, source=nothing, reference=nothing, actor=nothing, sync=nothing, refresh=nothing,
        evaluate=nothing, report=nothing, folder=nothing, clock=Clock(), stop=stop, state=State(),
        lanes=InThreads(stop) if threads else OneAfterTheOther(), memory=lambda step: {}, steps=deque(),
    )  # fmt: skip


def _source(stubs: Stubs, run: Run) -> Online:
    nothing: Any = None
    recorder: Any = stubs
    rewards = Rewards([TokenTerm(term=Term(name="stub"), scorer=stubs)], nothing, run.state, 0, lambda: "", run.stop)
    lengths = SeenLengths()
    lengths.add(_one_token_each(ROWS))
    return Online(
        prompts=stubs, rollout=stubs, rewards=rewards, scales=RunningScales(rewards.terms, {}), eos_ids=(1,),
        recorder=recorder, lengths=lengths, complete_lengths=SeenLengths(),
    )  # fmt: skip


def _one_token_each(rows: int) -> Rollouts:
    """A completion of one token for each row of the file."""
    every, ones = torch.arange(rows), torch.ones(rows, dtype=torch.int64)
    prompts = PromptBatch(
        prompts=Tokens(tokens=torch.full((rows,), 5, dtype=torch.int32), lengths=ones),
        row_ids=every,
        positions=every,
        texts=("",) * rows,
        columns={},
    )
    return Rollouts(
        prompts=prompts,
        sequences=Sequences(
            tokens=torch.full((2 * rows,), 5, dtype=torch.int32), lengths=2 * ones, prompt_lengths=ones
        ),
        prompt_index=every,
        sample_index=torch.zeros(rows, dtype=torch.int64),
        engine_logps=torch.zeros(rows),
        policy_version=torch.zeros(rows, dtype=torch.int64),
    )
