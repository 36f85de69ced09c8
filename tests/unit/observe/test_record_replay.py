"""A replayed recording gives back the very tensors of the live run; `rollouts.jsonl` is as documented."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.assembly.data import open_replay
from rlxf.config.recording import holds_scores
from rlxf.core.errors import ConfigError, DataError, SyncError
from rlxf.core.types import PairValues, ReferenceRecord, Rollouts, ScoredRollouts
from rlxf.observe.record import RecordedRollouts, Recorders, RolloutRecorder, SampleRecorder
from rlxf.pair import PairingSettings
from rlxf.pair.strategies import all_pairs, best_worst
from rlxf.rollout.engine import Sampling
from rlxf.rollout.replay import ReplayEngine
from rlxf.score.penalty import Shaping, with_scores
from rlxf.score.recorded import RecordedScorer
from rlxf.sync.plan import Bucket
from tests.data_world import chat_tokenizer, make_rollouts, prompt_batch, recipe, reorder, write_rows
from tests.pair_world import scored as scored_of
from tests.tiny_models import EOS

SAMPLING = Sampling(num_samples=2, max_new_tokens=8)
ROW: dict[str, Any] = {
    "prompt_ids": [1, 5],
    "completions": [{"token_ids": [6, EOS], "score": 0.5}, {"token_ids": [7], "score": None}],
    "policy_version": 3,
}


def step_of(step: int, num_prompts: int = 4, samples: int = 3) -> ScoredRollouts:
    """A live step: prompts that repeat, ragged completions, one score missing."""
    draw = torch.Generator().manual_seed(step)

    def ids(longest: int) -> list[int]:
        length = int(torch.randint(1, longest, (1,), generator=draw))
        return torch.randint(3, 200, (length,), generator=draw).tolist()

    prompts = prompt_batch([ids(6) for _ in range(num_prompts)])
    rollouts = make_rollouts(prompts, [[ids(9) for _ in range(samples)] for _ in range(num_prompts)], version=step)
    raw_scores = torch.randn(len(rollouts), generator=draw)
    raw_scores[0] = math.nan
    return with_scores(rollouts, raw_scores, eos_ids=(EOS,), shaping=Shaping(missing_eos_penalty=0.3))


def record(path: Path, *steps: ScoredRollouts, after: int | None = None) -> Path:
    recorder = RolloutRecorder(path, after=after)
    for step, scored in enumerate(steps, start=(after or 0) + 1):
        recorder.write(step, scored)
    recorder.close()
    return path


def replay(path: Path, **training: Any) -> ReplayEngine:
    settings = {"stage": "ray_online_dpo", "global_batch_size": 4, "train_iters": 2, **training}
    actor = {"model": "tiny", "seq_length": 64}
    rollout = {"engine": "replay", "replay_path": str(path)}
    return open_replay(recipe(training=settings, actor_rollout=actor, rollout=rollout), chat_tokenizer())


def assert_same(live: ScoredRollouts, again: ScoredRollouts) -> None:
    for name in ("raw_scores", "scores"):
        assert torch.equal(getattr(live, name).view(torch.int32), getattr(again, name).view(torch.int32)), name
    assert torch.equal(live.contains_eos, again.contains_eos)
    for name in ("prompt_index", "sample_index", "policy_version"):
        assert torch.equal(getattr(live.rollouts, name), getattr(again.rollouts, name)), name
    for name in ("tokens", "lengths", "prompt_lengths"):
        assert torch.equal(getattr(live.rollouts.sequences, name), getattr(again.rollouts.sequences, name)), name
    assert live.rollouts.prompts.prompts.rows() == again.rollouts.prompts.prompts.rows()


def test_replay_gives_the_live_steps_bit_for_bit(tmp_path: Path) -> None:
    live = [step_of(0), step_of(1)]
    path = record(tmp_path / "rollouts.jsonl", *live)
    engine, scorer = replay(path), RecordedScorer(path)
    for step in (1, 0):  # in any order, as a resumed run may ask
        rollouts = engine.generate(engine.next_batch(step), SAMPLING)
        again = with_scores(rollouts, scorer.score(rollouts), eos_ids=(EOS,), shaping=Shaping(missing_eos_penalty=0.3))
        assert_same(live[step], again)
        assert rollouts.engine_logps.isnan().all()
        session = engine.session(SAMPLING)
        session.add(engine.next_batch(step).slice(1, 2))
        (found, end) = (session.advance(), session.advance())
        assert found is not None
        assert end is None
        assert found.sequences.rows() == [
            row for row, p in zip(rollouts.sequences.rows(), rollouts.prompt_index.tolist(), strict=True) if p == 1
        ]
        pairs = [best_worst(scored, PairingSettings(min_score_margin=0.1)).pairs for scored in (live[step], again)]
        assert pairs[0].chosen.rows() == pairs[1].chosen.rows()
        assert torch.equal(pairs[0].margin, pairs[1].margin)


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    prompts = prompt_batch([[5, 6], [7]])
    rollouts = make_rollouts(prompts, [[[8, EOS], [9]], [[10], [11, EOS]]], version=4)
    scored = with_scores(
        rollouts, torch.tensor([0.5, math.nan, -1.0, 2.0]), eos_ids=(EOS,), shaping=Shaping(missing_eos_penalty=9.0)
    )
    rows = [json.loads(line) for line in record(tmp_path / "rollouts.jsonl", scored).read_text().splitlines()]
    assert rows == [
        {
            "step": 1,
            "prompt_ids": [5, 6],
            "completions": [{"token_ids": [8, EOS], "score": 0.5}, {"token_ids": [9], "score": None}],
            "policy_version": 4,
        },
        {
            "step": 1,
            "prompt_ids": [7],
            "completions": [{"token_ids": [10], "score": -1.0}, {"token_ids": [11, EOS], "score": 2.0}],
            "policy_version": 4,
        },
    ]


def test_the_order_of_rows_in_memory_does_not_change_the_file(tmp_path: Path) -> None:
    live = step_of(0, num_prompts=2, samples=2)
    order = [3, 0, 2, 1]
    mixed = with_scores(
        reorder(live.rollouts, order), live.raw_scores[order], eos_ids=(EOS,), shaping=Shaping(missing_eos_penalty=0.3)
    )
    first, second = record(tmp_path / "a.jsonl", live), record(tmp_path / "b.jsonl", mixed)
    assert first.read_bytes() == second.read_bytes()


@settings(max_examples=50, deadline=None)
@given(scores=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=6))
def test_scores_keep_every_bit(tmp_path_factory: pytest.TempPathFactory, scores: list[float]) -> None:
    rollouts = make_rollouts(prompt_batch([[5]]), [[[9]] * len(scores)])
    scored = with_scores(rollouts, torch.tensor(scores), eos_ids=(), shaping=Shaping())
    path = record(tmp_path_factory.getbasetemp() / "bits.jsonl", scored)
    again = RecordedScorer(path).score(rollouts).tolist()
    assert [struct.pack("f", score) for score in again] == [struct.pack("f", score) for score in scores]


@pytest.mark.parametrize("half_row", ['{"step":3,"prompt_ids": [1', '{"st', ""])
def test_a_resumed_run_goes_on_after_the_step_of_its_checkpoint(tmp_path: Path, half_row: str) -> None:
    whole = record(tmp_path / "whole.jsonl", step_of(0), step_of(1), step_of(2))
    killed = record(tmp_path / "killed.jsonl", step_of(0), step_of(1))
    with killed.open("a") as file:
        file.write(half_row)  # the machine stopped here; the last checkpoint was after step 1
    record(killed, step_of(1), step_of(2), after=1)
    assert killed.read_bytes() == whole.read_bytes()


def test_a_resumed_run_in_a_new_folder_begins_a_file(tmp_path: Path) -> None:
    path = record(tmp_path / "new" / "rollouts.jsonl", step_of(7), after=7)
    assert {json.loads(line)["step"] for line in path.read_text().splitlines()} == {8}


def test_a_file_of_other_rows_is_not_cut(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rollouts.jsonl", [ROW])
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"rollouts\.jsonl:1: the line has no step"):
        RolloutRecorder(path, after=1)
    assert path.read_bytes() == before


def test_a_new_run_does_not_append_to_an_old_file(tmp_path: Path) -> None:
    path = record(tmp_path / "rollouts.jsonl", step_of(0))
    assert len(RecordedRollouts(record(path, step_of(1)))) == 4


def test_ragged_rows_are_replayed(tmp_path: Path) -> None:
    three = {**ROW, "completions": [{"token_ids": [i], "score": i} for i in (5, 6, 7)]}
    path = write_rows(tmp_path / "rollouts.jsonl", [ROW, three])
    engine = replay(path, global_batch_size=2, train_iters=1)
    rollouts = engine.generate(engine.next_batch(0), SAMPLING)
    assert rollouts.prompt_index.tolist() == [0, 0, 1, 1, 1]
    assert rollouts.sample_index.tolist() == [0, 1, 0, 1, 2]
    scores = RecordedScorer(path).score(rollouts)
    assert scores[[0, 2, 3, 4]].tolist() == [0.5, 5.0, 6.0, 7.0]
    assert scores[1].isnan()


def test_prompts_of_a_replay_are_rows_with_text(tmp_path: Path) -> None:
    ids = chat_tokenizer()("hello")["input_ids"]
    path = write_rows(tmp_path / "rollouts.jsonl", [ROW, {**ROW, "prompt_ids": ids}])
    batch = replay(path, global_batch_size=1, train_iters=2).next_batch(1)
    assert batch.row_ids.tolist() == [1]
    assert batch.texts == ("hello",)


def test_too_few_rows_say_how_many_steps_are_possible(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rollouts.jsonl", [ROW] * 11)
    with pytest.raises(ConfigError, match=r"holds 11 prompts, enough for 2 steps .*set training\.train_iters=2"):
        replay(path, train_iters=3)


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    engine = replay(write_rows(tmp_path / "rollouts.jsonl", [ROW] * 8))
    with pytest.raises(ConfigError, match=r"training\.eval_interval must be 0"):
        engine.generate(prompt_batch([[1, 9]]), SAMPLING)


def test_weights_are_accepted_and_change_nothing_but_a_probe_is_refused(tmp_path: Path) -> None:
    engine = replay(write_rows(tmp_path / "rollouts.jsonl", [ROW] * 8))
    engine.begin_update()
    engine.load_bucket(Bucket((), 0), torch.empty(0, dtype=torch.uint8))
    engine.end_update(7)
    batch = engine.next_batch(0)
    assert engine.generate(batch, SAMPLING).policy_version.tolist() == [3] * 8
    with pytest.raises(SyncError, match=r"sync\.verify_first=0"):
        engine.probe(batch.prompts, 4)


@pytest.mark.parametrize(("score", "expected"), [(None, False), (0, True)])
def test_scores_are_present_when_one_is(score: float | None, expected: bool, tmp_path: Path) -> None:
    completions = [{"token_ids": [5], "score": score}, {"token_ids": [5]}]
    path = write_rows(tmp_path / "rollouts.jsonl", [{**ROW, "completions": completions}])
    assert holds_scores(path) is expected
    write_rows(path, [{**ROW, "score": 1, "completions": [{"token_ids": [5], "text": 'a "score": 1'}] * 2}])
    assert holds_scores(path) is False  # of the row, not of a completion; and the file has changed
    write_rows(path, [ROW, {**ROW, "completions": [*completions, {"token_ids": [6], "score": -2.5}]}])
    assert holds_scores(path) is True
    path.write_text('{"completions": 3, "score": 1}\nno json "score": 1\n[{"score": 1}]\n')
    assert holds_scores(path) is False
    assert holds_scores(tmp_path / "missing.jsonl") is None


def test_samples_show_every_prompt_before_the_second_pair_of_any(tmp_path: Path) -> None:
    made = scored_of([[2.0, 1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    samples = SampleRecorder(tmp_path / "samples.jsonl", chat_tokenizer(), max_rows=3)
    Recorders(None, samples, 1).write(1, made, all_pairs(made, PairingSettings()), ReferenceRecord())
    samples.close()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    found = [(row["prompt"], row["chosen_score"], row["rejected_score"]) for row in rows]
    assert found == [("prompt 0", 2.0, 1.0), ("prompt 2", 4.0, 3.0), ("prompt 0", 2.0, 0.0)]


def test_samples_show_text_and_scores(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("good", "bad")]
    rollouts: Rollouts = make_rollouts(prompt_batch([[5]], texts=["say é"]), [[[*answers[0], EOS], answers[1]]])
    scored = with_scores(rollouts, torch.tensor([0.1, 0.2]), eos_ids=(EOS,), shaping=Shaping(missing_eos_penalty=1.0))
    result = best_worst(scored, PairingSettings())
    recorder = SampleRecorder(tmp_path / "samples.jsonl", tokenizer)
    table = recorder.write(6, scored, result.pairs)
    recorder.close()
    (row,) = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row] == table
    assert {name: row[name] for name in ("step", "prompt", "chosen", "rejected", "chosen_eos", "rejected_eos")} == {
        "step": 6,
        "prompt": "say é",
        "chosen": "good",
        "rejected": "bad",
        "chosen_eos": True,
        "rejected_eos": False,
    }
    assert [row["chosen_score"], row["rejected_score"]] == pytest.approx([0.1, -0.8])


def test_samples_show_what_both_models_say_of_each_token(tmp_path: Path) -> None:
    made = scored_of([[2.0, 1.0], [0.0, 0.0], [3.0, 4.0]])
    samples = SampleRecorder(tmp_path / "samples.jsonl", chat_tokenizer(), max_rows=2)
    recorders = Recorders(None, samples, 10)
    pairing = all_pairs(made, PairingSettings())
    shown = recorders.shown(10, pairing.pairs)
    assert not len(recorders.shown(9, pairing.pairs))
    lengths = [*shown.chosen.completion_lengths.tolist(), *shown.rejected.completion_lengths.tolist()]
    reference = torch.arange(sum(lengths)).float()
    recorders.write(9, made, pairing, ReferenceRecord())
    recorders.write(10, made, pairing, ReferenceRecord(tokens=reference))
    samples.close()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 10]
    sides = [row[f"{side}_reference_logps"] for side in ("chosen", "rejected") for row in rows]
    assert sides == [part.tolist() for part in torch.split(reference, lengths)]
    for row in rows:
        for side in ("chosen", "rejected"):
            assert len(row[f"{side}_tokens"]) == len(row[f"{side}_logps"]) == row[f"{side}_length"]
        assert row["margin"] == row["chosen_score"] - row["rejected_score"]
        assert row["policy_version"] == 0


def test_rollouts_have_the_kl_of_completions_in_pairs(tmp_path: Path) -> None:
    made = scored_of([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    pairing = best_worst(made, PairingSettings())
    sums = [
        part.sum()
        for part in torch.split(made.rollouts.engine_logps, made.rollouts.sequences.completion_lengths.tolist())
    ]
    recorders = Recorders(RolloutRecorder(tmp_path / "rollouts.jsonl"), None, 0)
    values = PairValues(chosen=torch.tensor([-3.0]), rejected=torch.tensor([-5.0]))
    recorders.write(1, made, pairing, ReferenceRecord(pairs=values))
    recorders.write(2, made, pairing, ReferenceRecord())
    for file in recorders.files:
        file.close()
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    found = [[completion.get("kl") for completion in row["completions"]] for row in rows]
    expected = [round(float(sums[0]) + 3.0, 4), None, round(float(sums[2]) + 5.0, 4)]
    assert found[0] == expected
    assert found[1:] == [[None] * 3] * 3
