"""Prompts: the batch of a step depends on the step alone, and special tokens occur once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from rlxf.assembly.data import eval_prompts, open_prompts
from rlxf.core.errors import DataError, ModelError
from rlxf.data.prompts import PromptFile
from tests.data_world import chat_tokenizer, recipe, write_rows
from tests.tiny_models import BOS, EOS, byte_tokenizer

TOKENIZER = chat_tokenizer()
TWO_PROMPTS = {"stage": "ray_online_dpo", "global_batch_size": 2}


def source(path: Path, *, batch: int = 4, seed: int = 1, **actor: Any) -> PromptFile:
    config = recipe(
        training={"stage": "ray_online_dpo", "global_batch_size": batch, "seed": seed},
        actor_rollout={"model": "tiny", "max_prompt_length": 64, "data_path": str(path), **actor},
    )
    return open_prompts(config, TOKENIZER)


def ids(prompts: PromptFile, *steps: int) -> list[int]:
    return [i for step in steps for i in prompts.next_batch(step).row_ids.tolist()]


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "ten.jsonl", [{"prompt": f"say {i}", "n": i} for i in range(10)])


def test_every_epoch_holds_every_row_once_and_batches_cross_its_edge(ten: Path) -> None:
    stream = ids(source(ten), *range(10))  # 40 prompts: four epochs of ten, in batches of four
    for epoch in range(4):
        assert sorted(stream[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert len({tuple(stream[10 * e : 10 * e + 10]) for e in range(4)}) == 4


def test_no_shuffle_keeps_file_order(ten: Path) -> None:
    assert ids(source(ten, no_shuffle=True), 0, 1, 2, 3) == [*range(10), *range(6)]


def test_the_seed_decides_the_order(ten: Path) -> None:
    assert ids(source(ten, seed=1), 0, 1) == ids(source(ten, seed=1), 0, 1)
    assert ids(source(ten, seed=1), 0, 1) != ids(source(ten, seed=2), 0, 1)


def test_a_batch_larger_than_the_file_is_filled_from_later_epochs(ten: Path) -> None:
    stream = ids(source(ten, batch=23), 0)
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10))
    assert len(stream) == 23


def test_a_row_that_comes_again_has_another_place_in_the_run(ten: Path) -> None:
    """Its prompt id is the same, its position is not: the seeds of its samples follow from both."""
    prompts = source(ten, batch=23)
    batches = [prompts.next_batch(step) for step in (1, 0)]
    assert [batch.positions.tolist() for batch in batches] == [list(range(23, 46)), list(range(23))]
    assert all(len(set(batch.row_ids.tolist())) == 10 for batch in batches)
    assert batches[0].slice(3, 5).positions.tolist() == [26, 27]


def test_positions_do_not_depend_on_rows_that_are_left_out(tmp_path: Path) -> None:
    mixed = write_rows(tmp_path / "mixed.jsonl", [{"prompt": "x" * (90 if i % 3 == 0 else 5)} for i in range(11)])
    prompts = source(mixed)
    assert prompts.next_batch(2).positions.tolist() == [8, 9, 10, 11]
    assert prompts.num_dropped > 0
    first = eval_prompts(recipe(eval={"data_path": str(mixed), "num_prompts": 4}), TOKENIZER)
    assert first.positions.tolist() == first.row_ids.tolist() == [1, 2, 4, 5]


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.integers(0, 12), min_size=1, max_size=6), batch=st.integers(1, 7))
def test_a_step_gives_the_same_batch_whatever_was_asked_for_before(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], batch: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "mixed.jsonl"
    if not path.exists():  # every third prompt is too long
        write_rows(path, [{"prompt": "x" * (90 if i % 3 == 0 else 5 + i)} for i in range(11)])
    undisturbed = source(path, batch=batch)
    expected = {step: ids(undisturbed, step) for step in range(13)}
    asked = source(path, batch=batch)
    assert [ids(asked, step) for step in steps] == [expected[step] for step in steps]


def test_long_prompts_are_dropped_and_counted_once_and_batches_stay_full(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "x" * (200 if i in (1, 4) else 3)} for i in range(6)])
    prompts = source(path, no_shuffle=True)
    assert ids(prompts, 0, 1, 2) == [0, 2, 3, 5] * 3
    assert prompts.num_dropped == 2
    assert [prompts.epoch(step) for step in range(3)] == [1.0, 2.0, 3.0]


def test_a_run_in_which_every_prompt_is_dropped_stops_with_the_reason(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "x" * 100}] * 3)
    with pytest.raises(DataError, match=r"all 3 rows are dropped: 3 because .*max_prompt_length=64"):
        source(path).next_batch(0)


def test_truncation_keeps_the_end_and_the_bos(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a" * 50 + "b" * 50}] * 4)
    row = source(path, prompt_overflow="truncate_left").next_batch(0).prompts.rows()[0]
    assert len(row) == 64
    assert row[0] == BOS
    assert TOKENIZER.decode(row[1:]) == "a" * 13 + "b" * 50


def test_overflow_error_names_every_row_at_the_start(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "ok"}, {"prompt": "x" * 99}, {"prompt": "x" * 70}])
    with pytest.raises(DataError) as raised:
        source(path, prompt_overflow="error")
    assert [problem.split(", ")[0] for problem in raised.value.problems] == [
        f"{path}:2: the prompt has 100 tokens",
        f"{path}:3: the prompt has 71 tokens",
    ]


def test_a_string_gets_the_bos_of_the_tokenizers_rule_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "hi"}, {"prompt": "<s>hi"}])
    rows = source(path, batch=2, no_shuffle=True).next_batch(0).prompts.rows()
    plain = TOKENIZER("hi", add_special_tokens=False)["input_ids"]
    assert rows == [[BOS, *plain], [BOS, *plain]]


def test_a_tokenizer_without_a_rule_adds_nothing(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "hi"}])
    config = recipe(actor_rollout={"model": "tiny", "data_path": str(path)})
    row = open_prompts(config, byte_tokenizer()).next_batch(0).prompts.rows()[0]
    assert row == byte_tokenizer()("hi", add_special_tokens=False)["input_ids"]


def test_the_chat_template_is_applied_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}])
    row = source(path).next_batch(0).prompts.rows()[0]
    assert TOKENIZER.decode(row) == "<s>[user]hi</s>[assistant]"
    assert row.count(BOS) == 1
    assert row.count(EOS) == 1


def test_a_chat_that_ends_with_the_assistant_is_continued(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well,"}]
    row = source(write_rows(tmp_path / "a.jsonl", [{"prompt": chat}])).next_batch(0).prompts.rows()[0]
    assert TOKENIZER.decode(row) == "<s>[user]hi</s>[assistant]Well,"


def test_chat_messages_need_a_chat_template(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(ModelError, match="has no chat template"):
        open_prompts(recipe(actor_rollout={"model": "tiny", "data_path": str(path)}), byte_tokenizer())


def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    good, bad = ([{"role": role, "content": "hi"}] for role in ("user", "refused"))
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": good}, {"prompt": bad}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: the chat template refuses the messages: no such role"):
        source(path, batch=2).next_batch(0)


def test_other_columns_travel_with_their_prompt(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "b"}, {"prompt": "c", "answer": [2], "source": "x"}]
    batch = source(write_rows(tmp_path / "a.jsonl", rows), batch=3, no_shuffle=True).next_batch(0)
    assert batch.columns == {"answer": [1, None, [2]], "source": [None, None, "x"]}
    assert batch.texts == ("a", "b", "c")


def test_the_prompt_column_can_have_another_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"question": "a", "prompt": "not this"}])
    batch = source(path, batch=1, prompt_key="question").next_batch(0)
    assert batch.texts == ("a",)
    assert batch.columns == {"prompt": ["not this"]}


def test_evaluation_takes_the_first_prompts_that_fit_in_file_order(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "x" * (200 if i == 1 else 3)} for i in range(6)])
    actor = {"model": "tiny", "max_prompt_length": 64, "data_path": str(path)}
    assert eval_prompts(recipe(actor_rollout=actor, eval={"num_prompts": 3}), TOKENIZER).row_ids.tolist() == [
        0,
        2,
        3,
    ]
    assert len(eval_prompts(recipe(actor_rollout=actor), TOKENIZER)) == 5
    other = write_rows(tmp_path / "b.jsonl", [{"prompt": "only"}])
    assert eval_prompts(recipe(actor_rollout=actor, eval={"data_path": str(other)}), TOKENIZER).texts == ("only",)


def test_the_example_prompts_are_readable() -> None:
    path = Path(__file__).parents[3] / "examples/data/chat_prompts.jsonl"
    prompts = source(path, batch=64, max_prompt_length=512)
    assert len(prompts) == 64
    assert sorted(ids(prompts, 0)) == list(range(64))


def test_a_tokenizer_whose_rule_appends_eos_does_not_end_the_prompt(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    both = [("<s>", BOS), ("</s>", EOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=both)
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "hi"}, {"prompt": "hi</s>"}])
    actor = {"model": "tiny", "data_path": str(path), "no_shuffle": True}
    rows = open_prompts(recipe(training=TWO_PROMPTS, actor_rollout=actor), tokenizer).next_batch(0).prompts.rows()
    plain = tokenizer("hi", add_special_tokens=False)["input_ids"]
    assert rows == [[BOS, *plain], [BOS, *plain, EOS]]
