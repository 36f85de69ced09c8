"""Every completion of a run has a seed of its own, which does not depend on how the run is carried out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlxf.assembly.build_run import evaluation_settings
from rlxf.assembly.data import eval_prompts, open_prompts
from rlxf.config.schema import RunConfig
from rlxf.core.types import Metrics
from rlxf.driver import train
from rlxf.evaluate import EvalBackends, Evaluation
from rlxf.loop.run import Evaluate, State
from rlxf.rollout.engine import Sampling, sample_requests
from rlxf.rollout.shares import split_evenly
from tests.data_world import write_rows
from tests.tiny_models import byte_tokenizer
from tests.unit.small_run import EOS, SmallEngine, SmallRun, TokenCounter, small_config, small_run

STEPS, SAMPLES, EVAL_PROMPTS = 6, 3, 5


def rows(path: Path, count: int) -> str:
    """Tokenized prompts of the bigram's few tokens."""
    return str(write_rows(path, [{"input_ids": [2, 2 + i % 4]} for i in range(count)]))


def recipe(path: Path, batch: int, **changes: Any) -> RunConfig:
    held_out = rows(path / "eval.jsonl", EVAL_PROMPTS)
    defaults = {
        "training__global_batch_size": batch,
        "training__train_iters": STEPS,
        "training__eval_interval": 2,
        "actor_rollout__n_samples_per_prompt": SAMPLES,
        "actor_rollout__data_path": rows(path / "ten.jsonl", 10),
        "eval__data_path": held_out,
    }
    return small_config(**defaults | changes)


def epoch_edge(path: Path) -> RunConfig:
    """Batches of four from ten rows: the third one holds rows of two epochs."""
    return recipe(path, 4)


def batch_larger_than_the_file(path: Path) -> RunConfig:
    return recipe(path, 23)


def mixture_of_a_small_file(path: Path) -> RunConfig:
    """Every second row comes from a file of three."""
    paths = [rows(path / "large.jsonl", 40), rows(path / "small.jsonl", 3)]
    return recipe(path, 16, actor_rollout__data_path=paths, actor_rollout__data_weights=[0.5, 0.5])


RECIPES = [epoch_edge, batch_larger_than_the_file, mixture_of_a_small_file]


def trained(config: RunConfig, state: State | None = None) -> SmallRun:
    """A run over the file's rows, with evaluations."""
    small: SmallRun

    def evaluate(step: int) -> Metrics:
        return evaluation(step)

    small = small_run(config, prompts=open_prompts(config, byte_tokenizer()), evaluate=evaluate, state=state)
    rooms = EvalBackends(rollout=small.engine, scorer=TokenCounter([]), actor=small.actor, reference=small.reference)
    prompts = eval_prompts(config, byte_tokenizer())
    evaluation: Evaluate = Evaluation(evaluation_settings(config, (EOS,)), prompts, rooms, tokenizer=byte_tokenizer())
    train(small.run)
    return small


def drawn(small: SmallRun) -> list[list[int]]:
    """The seeds of each call but that for the initial policy's samples, which here no checkpoint holds."""
    calls = zip(small.engine.samplings, small.engine.seeds, strict=True)
    return [seeds for sampling, seeds in calls if sampling.purpose != "initial"]


@pytest.mark.parametrize("make", RECIPES)
def test_no_two_completions_of_a_run_share_a_seed(make: Any, tmp_path: Path) -> None:
    config = make(tmp_path)
    small = trained(config)
    ids = [step.rollouts.prompts.row_ids.tolist() for step in small.recorder.scored]
    assert any(len(set(step)) < len(step) for step in ids) or make is epoch_edge  # rows occur twice within a step
    evaluations = 1 + (1 + STEPS // 2) * 2  # the initial policy's samples; sampled and greedy ones of each
    calls = [len(call) for call in small.engine.seeds]
    expected = STEPS * config.training.global_batch_size * SAMPLES + evaluations * EVAL_PROMPTS
    assert sum(calls) == expected
    assert len({seed for call in small.engine.seeds for seed in call}) == expected


@pytest.mark.parametrize("make", RECIPES)
def test_a_resumed_run_draws_the_seeds_of_the_undisturbed_one(make: Any, tmp_path: Path) -> None:
    config = make(tmp_path)
    whole = drawn(trained(config))
    resumed = drawn(trained(config, State(step=4, policy_version=1)))  # a seed does not depend on the policy's version
    assert len(resumed) == 2 + 2  # steps 5 and 6, and the evaluation after them
    assert resumed == whole[-4:]


@pytest.mark.parametrize("engines", [2, 3, 23])
def test_engines_that_share_a_step_draw_the_seeds_of_one(engines: int, tmp_path: Path) -> None:
    config = batch_larger_than_the_file(tmp_path)
    small = small_run(config)
    batch = open_prompts(config, byte_tokenizer()).next_batch(1)
    small.engine.generate(batch, small.run.training_sampling())
    (whole,) = small.engine.seeds
    parts = SmallEngine([])
    for share in split_evenly(batch, engines):
        parts.generate(share, small.run.training_sampling())
    assert len(parts.seeds) == engines
    assert [seed for part in parts.seeds for seed in part] == whole


def test_both_models_of_a_comparison_draw_the_same_seeds_whatever_either_leaves_out(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a" * (9 - i)} for i in range(6)])
    seeds = []
    for longest in (64, 6):  # the second leaves out the first rows, as too long
        changes = {"actor_rollout__max_prompt_length": longest, "actor_rollout__seq_length": 99}
        prompts = eval_prompts(recipe(tmp_path, 4, **changes, eval__data_path=str(path)), byte_tokenizer())
        requests = next(sample_requests(prompts, Sampling(num_samples=2, max_new_tokens=4, purpose="eval"), None))
        seeds.append([seed for _, seed in requests])
    assert 0 < len(seeds[1]) < len(seeds[0])
    assert seeds[1] == seeds[0][-len(seeds[1]) :]
