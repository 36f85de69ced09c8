"""The Hugging Face engine against whole forward passes of the same model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlxf.assembly.roles import engine_settings
from rlxf.config.schema import RunConfig
from rlxf.core.errors import ConfigError, SyncError
from rlxf.core.progress import progress
from rlxf.core.types import Tokens
from rlxf.platform import get_platform, linear
from rlxf.rollout import HfEngine
from rlxf.rollout.engine import Sampling
from rlxf.rollout.hf_decoder import Decoder
from rlxf.sync.plan import Bucket, TensorSpec
from tests.rollout_world import HfActor, greedy, load_model, prompt_batch, random_prompts, run_config
from tests.tiny_models import EOS, VOCAB, randomize, save_causal_lm

LENGTHS = (1, 4, 9, 30, 150)
GREEDY = Sampling(num_samples=1, max_new_tokens=12, temperature=0)
RANDOM = Sampling(num_samples=3, max_new_tokens=12, seed=5)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama, an untied Qwen2 (biases), an untied Qwen3 (norms of queries and keys)."""
    return save_causal_lm(tmp_path_factory.mktemp("hf"), request.param, tied=request.param == "llama", seed=1)


def engine_of(config: RunConfig) -> HfEngine:
    return HfEngine(engine_settings(config), get_platform("cpu", cpu_linear="mkl"))


@pytest.fixture
def engine(folder: Path) -> HfEngine:
    return engine_of(run_config(folder))


def with_actor(config: RunConfig, **changes: object) -> RunConfig:
    actor = config.actor_rollout.model_copy(update=changes)
    return config.model_copy(update={"actor_rollout": actor})


def push(actor: HfActor, engine: HfEngine, version: int) -> None:
    engine.begin_update()
    for index, bucket in enumerate(actor.sync_plan()):
        engine.load_bucket(bucket, actor.packed_bucket(index))
    engine.end_update(version)


def test_greedy_tokens_are_the_plain_models_whatever_the_padding(engine: HfEngine, folder: Path) -> None:
    model = load_model(folder)
    batch = prompt_batch(random_prompts(LENGTHS))
    rows = engine.generate(batch, GREEDY).sequences.completion_rows()
    assert rows == [greedy(model, prompt, 12, stop=[EOS]) for prompt in batch.prompts.rows()]


def test_log_probs_are_those_of_the_untouched_logits(engine: HfEngine, folder: Path) -> None:
    sampling = Sampling(num_samples=4, max_new_tokens=12, temperature=0.7, top_p=0.9, top_k=50, seed=1)
    rollouts = engine.generate(prompt_batch(random_prompts(LENGTHS)), sampling)
    expected = HfActor(load_model(folder)).token_logps(rollouts.sequences)
    torch.testing.assert_close(rollouts.engine_logps, expected, rtol=0, atol=1e-5)


def test_a_sample_does_not_depend_on_the_rest_of_the_batch(folder: Path) -> None:
    batch = prompt_batch(random_prompts(LENGTHS), first_id=70)
    whole = engine_of(run_config(folder)).generate(batch, RANDOM).sequences.rows()
    chunked = engine_of(with_actor(run_config(folder), num_samples_per_step=2)).generate(batch, RANDOM)
    assert chunked.sequences.rows() == whole
    alone = engine_of(run_config(folder)).generate(batch.slice(1, 2), RANDOM).sequences.rows()
    assert alone == whole[3:6]


def test_samples_seeds_and_evaluations_differ(engine: HfEngine) -> None:
    batch = prompt_batch(random_prompts([20]))
    evaluations = [replace(RANDOM, purpose="eval", step=step) for step in (0, 5)]
    others = [RANDOM, replace(RANDOM, seed=6), replace(RANDOM, purpose="initial"), *evaluations]
    rows = [tuple(row) for other in others for row in engine.generate(batch, other).sequences.completion_rows()]
    assert len(set(rows)) == 3 * len(others)


def test_a_prompt_that_occurs_twice_in_a_step_is_sampled_twice(engine: HfEngine) -> None:
    once = prompt_batch(random_prompts([20]) * 2)
    batch = replace(once, row_ids=torch.zeros(2, dtype=torch.int64))  # one row of the data
    rows = engine.generate(batch, RANDOM).sequences.completion_rows()
    assert len({tuple(row) for row in rows}) == 6


def first_tokens(engine: HfEngine, prompt: list[int], **sampling: float) -> torch.Tensor:
    settings = Sampling(num_samples=4000, max_new_tokens=1, **sampling)  # type: ignore[arg-type]
    return engine.generate(prompt_batch([prompt]), settings).sequences.tokens[len(prompt) :: len(prompt) + 1].long()


@torch.no_grad()
def test_tokens_come_as_often_as_the_softmax_says(engine: HfEngine, folder: Path) -> None:
    (prompt,) = random_prompts([10])
    tokens = first_tokens(engine, prompt, temperature=0.5)
    probabilities = (load_model(folder)(torch.tensor([prompt])).logits[0, -1] / 0.5).softmax(dim=-1)
    common = probabilities > 5 / 4000
    counts = tokens.bincount(minlength=len(probabilities))[common]
    expected = probabilities[common] * 4000
    chi_square = ((counts - expected) ** 2 / expected).sum() / common.sum()
    assert common.sum() > 30
    assert 0.6 < chi_square < 1.4


@torch.no_grad()
def test_top_k_and_top_p_bound_what_is_sampled(engine: HfEngine, folder: Path) -> None:
    (prompt,) = random_prompts([10])
    probabilities, order = load_model(folder)(torch.tensor([prompt])).logits[0, -1].softmax(-1).sort(descending=True)
    assert set(first_tokens(engine, prompt, top_k=5).tolist()) == set(order[:5].tolist())
    nucleus = int((probabilities.cumsum(0) < 0.3).sum()) + 1
    assert 1 < nucleus < 40
    assert set(first_tokens(engine, prompt, top_p=0.3).tolist()) == set(order[:nucleus].tolist())


def test_a_sample_ends_with_its_first_eos_or_at_the_limit(engine: HfEngine) -> None:
    sampling = Sampling(num_samples=32, max_new_tokens=40, seed=3)
    rows = engine.generate(prompt_batch(random_prompts(LENGTHS)), sampling).sequences.completion_rows()
    ended = [row for row in rows if row[-1] == EOS]
    assert 0 < len(ended) < len(rows)
    assert all(EOS not in row[:-1] for row in rows)
    assert all(len(row) == 40 for row in rows if row[-1] != EOS)


def test_the_folders_generation_settings_give_stop_tokens_and_nothing_else(tmp_path: Path) -> None:
    save_causal_lm(tmp_path, seed=1)
    prompts = random_prompts((5, 6))
    model = load_model(tmp_path)
    second = greedy(model, prompts[0], 12)[3]
    settings = {"eos_token_id": [EOS, second], "repetition_penalty": 9.0, "do_sample": True, "top_k": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    rows = engine_of(run_config(tmp_path)).generate(prompt_batch(prompts), GREEDY).sequences.completion_rows()
    assert rows == [greedy(model, prompt, 12, stop=[EOS, second]) for prompt in prompts]
    assert rows[0][-1] == second


def ending_engine(folder: Path) -> HfEngine:
    """Every fifth token ends a completion, so that rows leave a batch one by one."""
    save_causal_lm(folder, seed=1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, *range(5, VOCAB, 5)]}))
    return engine_of(run_config(folder))


def test_rows_that_go_on_are_not_disturbed_by_rows_that_end(tmp_path: Path) -> None:
    engine = ending_engine(tmp_path)
    model, prompts = load_model(tmp_path), random_prompts(LENGTHS * 4)
    rows = engine.generate(prompt_batch(prompts), GREEDY).sequences.completion_rows()
    assert rows == [greedy(model, prompt, 12, stop=[EOS, *range(5, VOCAB, 5)]) for prompt in prompts]
    assert len({len(row) for row in rows}) >= 5


def test_a_prompt_is_computed_once_and_a_row_that_has_ended_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    hidden_states = Decoder.hidden_states

    def counting(self: Decoder, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        computed.append(len(tokens))
        return hidden_states(self, tokens, *args, **kwargs)

    engine = ending_engine(tmp_path)
    monkeypatch.setattr(Decoder, "hidden_states", counting)
    batch = prompt_batch(random_prompts(LENGTHS))
    lengths = engine.generate(batch, RANDOM).sequences.completion_lengths
    assert len(set(lengths.tolist())) > 3
    # The last token of a completion is never an input.
    assert sum(computed) == sum(LENGTHS) + int((lengths - 1).sum())


def test_prompts_may_take_several_forward_passes(engine: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = prompt_batch(random_prompts(LENGTHS))
    whole = engine.generate(batch, RANDOM)
    monkeypatch.setattr("rlxf.rollout.hf_sampling.PREFILL_TOKENS", 10)
    parts = engine.generate(batch, RANDOM)
    assert parts.sequences.rows() == whole.sequences.rows()
    torch.testing.assert_close(parts.engine_logps, whole.engine_logps, rtol=0, atol=1e-5)


def test_after_an_update_the_engine_follows_the_new_weights(engine: HfEngine, folder: Path) -> None:
    actor = HfActor(load_model(folder))
    batch = prompt_batch(random_prompts(LENGTHS))
    for version in (1, 2):
        randomize(actor.model, seed=version)
        push(actor, engine, version)
        rollouts = engine.generate(batch, GREEDY)
        expected = [greedy(actor.model, prompt, 12, stop=[EOS]) for prompt in batch.prompts.rows()]
        assert rollouts.sequences.completion_rows() == expected
        assert rollouts.policy_version.tolist() == [version] * len(LENGTHS)


def test_the_fast_linear_path_follows_the_new_weights_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    product = linear._times_transposed

    def counted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return product(*args)

    monkeypatch.setattr(linear, "MIN_WEIGHT_ELEMENTS", 1)
    monkeypatch.setattr(linear, "_times_transposed", counted)
    engine = HfEngine(engine_settings(run_config(folder)), get_platform("cpu", cpu_linear="onednn"))
    actor = HfActor(load_model(folder))
    batch = prompt_batch(random_prompts(LENGTHS))
    for version in (1, 2):
        randomize(actor.model, seed=version)
        push(actor, engine, version)
        rollouts = engine.generate(batch, GREEDY)
        torch.testing.assert_close(rollouts.engine_logps, actor.token_logps(rollouts.sequences), rtol=0, atol=1e-5)
        assert calls > 0


def test_an_update_that_breaks_off_leaves_the_engine_stale(engine: HfEngine, folder: Path) -> None:
    actor = HfActor(load_model(folder))
    batch = prompt_batch(random_prompts(LENGTHS))
    engine.begin_update()
    engine.load_bucket(actor.sync_plan()[0], actor.packed_bucket(0))
    with pytest.raises(SyncError, match="weights did not arrive"):
        engine.end_update(1)
    with pytest.raises(SyncError, match="mixture of version 0"):
        engine.generate(batch, GREEDY)
    with pytest.raises(SyncError, match="mixture of version 0"):
        engine.probe(batch.prompts, 4)
    push(actor, engine, 1)
    assert engine.generate(batch, GREEDY).policy_version.tolist() == [1] * len(LENGTHS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec("model.nothing.weight", (128,), "float32"), "no such parameter"),
        (TensorSpec("model.norm.weight", (64,), "float32"), r"sent model.norm.weight \(64,\).*shape \(128,\)"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(engine: HfEngine, spec: TensorSpec, message: str) -> None:
    engine.begin_update()
    with pytest.raises(SyncError, match=message):
        engine.load_bucket(Bucket((spec,), spec.num_bytes), torch.zeros(spec.num_bytes, dtype=torch.uint8))


def test_an_engine_in_place_of_another_does_not_sample_from_its_folder(folder: Path) -> None:
    engine = HfEngine(replace(engine_settings(run_config(folder)), stale=True), get_platform("cpu"))
    with pytest.raises(SyncError, match="only what it has loaded from a folder"):
        engine.generate(prompt_batch([[5, 6]]), GREEDY)
    with pytest.raises(SyncError, match="only what it has loaded from a folder"):
        engine.probe(Tokens.from_rows([[5, 6]]), 2)
    push(HfActor(load_model(folder)), engine, 3)
    assert engine.generate(prompt_batch([[5, 6]]), GREEDY).policy_version.unique().tolist() == [3]


def test_a_probe_goes_on_past_an_eos(tmp_path: Path) -> None:
    save_causal_lm(tmp_path, seed=1)
    (prompt,) = random_prompts([6])
    model = load_model(tmp_path)
    continuation = greedy(model, prompt, 12)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": continuation[2]}))
    answer = engine_of(run_config(tmp_path)).probe(Tokens.from_rows([prompt]), 12)
    assert answer.completion == continuation
    assert len(answer.logps) == 12


def test_bf16_weights_give_float32_log_probs(folder: Path) -> None:
    engine = engine_of(with_actor(run_config(folder), bf16=True))
    rollouts = engine.generate(prompt_batch(random_prompts(LENGTHS)), GREEDY)
    expected = HfActor(load_model(folder).bfloat16()).token_logps(rollouts.sequences)
    assert rollouts.engine_logps.dtype == torch.float32
    assert 0 < (rollouts.engine_logps - expected).abs().mean() < 2e-2


def test_a_folder_that_is_no_model_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        engine_of(run_config(tmp_path))


def test_every_token_is_progress(engine: HfEngine) -> None:
    before = progress.look().counter
    engine.generate(prompt_batch([[5, 6]]), replace(GREEDY, max_new_tokens=3))
    assert progress.look().counter >= before + 1
