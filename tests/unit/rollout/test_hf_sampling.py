"""What changes the logits before a token is drawn is what transformers' own ``generate`` does; and stop strings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from rlxf.assembly.roles import engine_settings
from rlxf.models.stop_strings import StopStrings
from rlxf.platform import get_platform
from rlxf.rollout import HfEngine
from rlxf.rollout.engine import Sampling
from rlxf.rollout.hf_sampling import Sampler, warpers
from tests.rollout_world import load_model, prompt_batch, random_prompts, run_config
from tests.tiny_models import EOS, VOCAB, byte_tokenizer, save_causal_lm

LENGTHS = (1, 4, 9, 30)
RANDOM = Sampling(num_samples=3, max_new_tokens=16, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("hf"), tied=True, seed=1)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> HfEngine:
    return HfEngine(engine_settings(run_config(folder)), get_platform("cpu", cpu_linear="mkl"))


@pytest.mark.parametrize(
    "keys",
    [
        {"min_p": 0.2},
        {"repetition_penalty": 1.7},
        {"temperature": 0.6, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 0.8},
    ],
    ids=["min_p", "repetition_penalty", "all"],
)
def test_fixed_logits_become_the_scores_of_generate(model: Any, keys: dict[str, float]) -> None:
    sampling = Sampling(num_samples=1, max_new_tokens=1, **keys)  # type: ignore[arg-type]
    off = {"top_k": 0, "top_p": 1.0, "temperature": 1.0}
    expected = GenerationConfig(do_sample=True, **{**off, **keys})
    logits = 3 * torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(3, VOCAB, (3, 20), generator=torch.Generator().manual_seed(1))
    processors = model._get_logits_processor(expected, input_ids_seq_length=20)
    scores = logits
    for warper in warpers(sampling):
        scores = warper(ids, scores)
    assert torch.equal(scores, processors(ids, logits))
    assert not torch.equal(scores, logits)


def test_a_repetition_penalty_counts_prompt_and_completion_as_generate_does(engine: HfEngine, model: Any) -> None:
    prompts = random_prompts(LENGTHS)
    sampling = Sampling(num_samples=1, max_new_tokens=16, temperature=0, repetition_penalty=1.8)
    rows = engine.generate(prompt_batch(prompts), sampling).sequences.completion_rows()
    config = GenerationConfig(
        do_sample=False, max_new_tokens=16, repetition_penalty=1.8, eos_token_id=EOS, pad_token_id=0
    )
    expected = [
        model.generate(torch.tensor([row]), generation_config=config)[0, len(row) :].tolist() for row in prompts
    ]
    assert rows == expected
    plain = engine.generate(prompt_batch(prompts), replace(sampling, repetition_penalty=1.0))
    assert rows != plain.sequences.completion_rows()


def test_a_penalised_sample_does_not_depend_on_the_rest_of_the_batch(engine: HfEngine) -> None:
    sampling = replace(RANDOM, repetition_penalty=1.5, min_p=0.01)
    batch = prompt_batch(random_prompts(LENGTHS), first_id=70)
    whole = engine.generate(batch, sampling).sequences.rows()
    assert engine.generate(batch.slice(1, 2), sampling).sequences.rows() == whole[3:6]


def test_log_probs_stay_those_of_the_untouched_logits(engine: HfEngine, model: Any) -> None:
    sampling = replace(RANDOM, repetition_penalty=1.5, min_p=0.05, temperature=0.8)
    rollouts = engine.generate(prompt_batch(random_prompts(LENGTHS)), sampling)
    rows, starts = rollouts.sequences.rows(), rollouts.sequences.prompt_lengths.tolist()
    expected = []
    for row, start in zip(rows, starts, strict=True):
        logps = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected.append(logps[start - 1 : -1].gather(1, torch.tensor(row[start:])[:, None])[:, 0])
    torch.testing.assert_close(rollouts.engine_logps, torch.cat(expected).detach(), rtol=0, atol=1e-5)


def test_min_p_bounds_what_is_drawn() -> None:
    probabilities = torch.tensor([[0.5, 0.26, 0.2, 0.04]])
    sampler = Sampler(list(range(400)), Sampling(num_samples=1, max_new_tokens=1, min_p=0.5))
    drawn = sampler.choose(probabilities.log().repeat(400, 1), list(range(400)))
    assert set(drawn.tolist()) == {0, 1}


def test_a_completion_is_cut_behind_the_token_that_completes_a_stop_string(engine: HfEngine) -> None:
    """The samples are those without stop strings, up to there; most of them end so, and none goes on."""
    batch = prompt_batch(random_prompts(LENGTHS * 4))
    stop = (*"abcdefghijklmnop", "0", "1", "2 ")
    stops = StopStrings(byte_tokenizer(), stop)
    free = engine.generate(batch, RANDOM)
    found = engine.generate(batch, replace(RANDOM, stop=stop))
    expected = [row[: stops.end(row)] for row in free.sequences.completion_rows()]
    assert found.sequences.completion_rows() == expected
    assert 0 < int(stops.completed(found.sequences).sum()) < len(expected)
    assert found.engine_logps.shape == (sum(map(len, expected)),)
