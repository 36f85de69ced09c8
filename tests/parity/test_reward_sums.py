"""Sums of several reward functions and their metrics are those of live TRL, whose GRPO side has several."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlxf.observe.formulas import source_metrics
from rlxf.score.combine import Term, combine
from tests.data_world import chat_tokenizer, make_rollouts, prompt_batch
from tests.tiny_models import save_causal_lm

WEIGHTS = [1.0, -0.5, 2.5]
NUM_PROMPTS, NUM_SAMPLES = 3, 4


def length(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [len(ids) / 3 for ids in completion_ids]


def sometimes(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [None if sum(ids) % 3 == 0 else float(sum(ids) % 7) for ids in completion_ids]


def rarely(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [float(ids[0] % 5) if sum(ids) % 2 else None for ids in completion_ids]


FUNCTIONS = [length, sometimes, rarely]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[int]], list[list[float | None]], Any]:
    """The completions that TRL sampled in a step, what it logged, and the trainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    save_causal_lm(folder / "policy", seed=3)
    seen: list[list[int]] = []

    def watched(completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        seen.extend(completion_ids)
        return length(completion_ids, **columns)

    watched.__name__ = "length"
    arguments = GRPOConfig(
        output_dir=str(folder / "out"), max_steps=1, per_device_train_batch_size=NUM_PROMPTS * NUM_SAMPLES,
        num_generations=NUM_SAMPLES, max_completion_length=8, reward_weights=WEIGHTS, report_to=[], logging_steps=1,
        use_cpu=True, seed=1, save_strategy="no", bf16=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy"),
        reward_funcs=[watched, sometimes, rarely],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": word} for word in ("one", "two", "three")]),
        processing_class=chat_tokenizer(),
    )
    trainer.train()
    logged = [list(trainer._logs["rewards"][function.__name__]) for function in FUNCTIONS]
    return seen, logged, trainer


def test_each_function_the_weighted_sum_and_the_metrics_are_trls(
    theirs: tuple[list[list[int]], list[list[float | None]], Any],
) -> None:
    seen, logged, trainer = theirs
    table = torch.tensor(
        [[math.nan if score is None else score for score in function(completion_ids=seen)] for function in FUNCTIONS]
    ).T
    torch.testing.assert_close(table, torch.tensor(logged).T.to(table), equal_nan=True, rtol=0, atol=1e-6)
    assert table.isnan().any()
    assert not table.isnan().all(dim=1).any()
    terms = [
        Term(name=function.__name__, weight=weight, leave_out=True)
        for function, weight in zip(FUNCTIONS, WEIGHTS, strict=True)
    ]
    sums = combine(table, terms, {})
    (row,) = [row for row in trainer.state.log_history if "reward" in row]
    assert float(sums.mean()) == pytest.approx(row["reward"], abs=1e-6)

    from rlxf.score.penalty import Shaping, with_scores  # a step with these scores, for its metrics

    rollouts = make_rollouts(prompt_batch([[5]] * NUM_PROMPTS), [seen[i : i + NUM_SAMPLES] for i in range(0, 12, 4)])
    scored = with_scores(rollouts, sums, eos_ids=(), shaping=Shaping())
    sources = {term.name: column for term, column in zip(terms, table.unbind(1), strict=True)}
    object.__setattr__(scored, "sources", sources)
    for name, value in source_metrics(scored).items():
        if not name.endswith("/missing"):
            assert value == pytest.approx(row[name], abs=1e-6), name
