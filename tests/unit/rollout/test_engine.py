"""What every engine shares: seeds, the weight state, and the packing of completions."""

from __future__ import annotations

import pytest
import torch

from rlxf.core.errors import SyncError
from rlxf.rollout.engine import (
    Completion,
    EngineState,
    Purpose,
    Sampling,
    WeightState,
    pack_rollouts,
    sample_seed,
)
from tests.rollout_world import prompt_batch


def test_every_part_of_the_key_changes_the_seed() -> None:
    purposes: tuple[Purpose, ...] = ("train", "eval", "greedy", "initial")
    samplings = [
        Sampling(num_samples=1, max_new_tokens=1, seed=seed, purpose=purpose, step=step)
        for seed in (1, 11)
        for purpose in purposes
        for step in (0, 1, 11)
    ]
    keys = [(position, row, k) for position in (1, 11, 111) for row in (1, 11, 111) for k in (0, 1, 11)]
    seeds = {
        sample_seed(sampling, position=position, prompt_id=row, sample_index=k)
        for sampling in samplings
        for position, row, k in keys
    }
    assert len(seeds) == len(samplings) * len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_never_changes_between_versions_of_the_program() -> None:
    """Resume relies on it. The figure is what ``printf 1/eval/2/3/4/5 | b2sum -l 64`` prints, without its last bit."""
    sampling = Sampling(num_samples=9, max_new_tokens=1, seed=1, purpose="eval", step=2)
    assert sample_seed(sampling, position=3, prompt_id=4, sample_index=5) == 0x0B3E458AA8C307EF >> 1


def test_completions_keep_their_prompt_sample_and_log_probs() -> None:
    batch = prompt_batch([[5, 6], [7]])
    completions = [Completion(tokens=[i] * (i + 1), logps=[-float(i)] * (i + 1)) for i in range(4)]
    rollouts = pack_rollouts(batch, 2, completions, policy_version=3)
    assert rollouts.sequences.rows() == [[5, 6, 0], [5, 6, 1, 1], [7, 2, 2, 2], [7, 3, 3, 3, 3]]
    assert rollouts.sequences.prompt_rows() == [[5, 6], [5, 6], [7], [7]]
    assert rollouts.prompt_index.tolist() == [0, 0, 1, 1]
    assert rollouts.sample_index.tolist() == [0, 1, 0, 1]
    assert rollouts.engine_logps.tolist() == [-0.0, -1, -1, -2, -2, -2, -3, -3, -3, -3]
    assert rollouts.engine_logps.dtype == torch.float32
    assert rollouts.policy_version.tolist() == [3] * 4


def test_between_begin_and_end_an_engine_must_not_sample() -> None:
    state = WeightState()
    state.require_ready()
    state.begin()
    with pytest.raises(SyncError, match="mixture of version 0"):
        state.require_ready()
    with state.receiving():
        pass
    state.end(4)
    state.require_ready()
    assert (state.version, state.state) == (4, EngineState.READY)


def test_a_stale_engine_samples_only_after_a_whole_push() -> None:
    state = WeightState(EngineState.STALE)
    with pytest.raises(SyncError, match="only what it has loaded from a folder"):
        state.require_ready()
    with pytest.raises(SyncError, match="call begin_update first"), state.receiving():
        pass  # what it has loaded is no beginning of an update
    state.begin()
    with state.receiving():
        pass
    with pytest.raises(SyncError, match="a mixture"):
        state.require_ready()
    state.end(3)
    state.require_ready()


def test_an_engine_that_is_asleep_neither_samples_nor_takes_weights() -> None:
    state = WeightState(EngineState.ASLEEP)
    with pytest.raises(SyncError, match="is asleep, without weights; wake it and push"):
        state.require_ready()
    with pytest.raises(SyncError, match=r"asleep .*; wake it before a push"):
        state.begin()
    assert state.state is EngineState.ASLEEP


def test_weights_without_a_begin_are_refused() -> None:
    with pytest.raises(SyncError, match="call begin_update first"), WeightState().receiving():
        pass


def test_after_a_failed_call_only_a_new_begin_is_accepted() -> None:
    state = WeightState()
    state.begin()
    with pytest.raises(ZeroDivisionError), state.receiving():
        _ = 1 / 0
    with pytest.raises(SyncError, match="failed before"), state.receiving():
        pass
    state.begin()
    with state.receiving():
        pass
