"""Parts, mixtures and bad rows of whole sources: what a recipe's keys do."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.assembly.data import eval_prompts, open_preferences, open_prompts
from rlxf.config.load import load_config
from rlxf.core.errors import ConfigError, DataError
from rlxf.data.prompts import PromptFile
from rlxf.data.readers import Part
from tests.data_world import chat_tokenizer, recipe, write_rows

TOKENIZER = chat_tokenizer()


def source(
    paths: list[Path], *, part: Part = "train", batch: int = 4, eval: dict[str, Any] | None = None, **actor: Any
) -> PromptFile:
    config = recipe(
        training={"stage": "ray_online_dpo", "global_batch_size": batch},
        actor_rollout={"model": "tiny", "max_prompt_length": 64, "data_path": [str(path) for path in paths], **actor},
        eval=eval or {},
    )
    return open_prompts(config, TOKENIZER, part)


def texts(prompts: PromptFile, steps: int) -> list[Any]:
    return [text for step in range(steps) for text in prompts.next_batch(step).texts]


def write(folder: Path, name: str, count: int, **columns: Any) -> Path:
    return write_rows(folder / f"{name}.jsonl", [{"prompt": f"{name}{i}", **columns} for i in range(count)])


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [write(tmp_path, "a", 10), write(tmp_path, "b", 6, label="x")]


def test_several_paths_make_one_epoch_of_all_their_rows(two: list[Path]) -> None:
    prompts = source(two, batch=16)
    first, second = prompts.next_batch(0), prompts.next_batch(1)
    assert (
        sorted(first.texts)
        == sorted(second.texts)
        == sorted([f"a{i}" for i in range(10)] + [f"b{i}" for i in range(6)])
    )
    assert first.texts != second.texts
    assert len(prompts) == 16
    assert prompts.epoch(1) == 2.0
    labels = dict(zip(first.texts, first.columns["label"], strict=True))
    assert (labels["a0"], labels["b0"]) == (None, "x")


def test_ids_tell_rows_of_several_paths_apart(two: list[Path]) -> None:
    batch = source(two, batch=16).next_batch(0)
    expected = {f"a{i}": i for i in range(10)} | {f"b{i}": 10 + i for i in range(6)}
    assert batch.row_ids.tolist() == [expected[text] for text in batch.texts]


def test_weights_decide_the_shares_and_every_source_has_its_own_epochs(two: list[Path]) -> None:
    seen = texts(source(two, batch=10, data_weights=[1, 3]), 100)
    own = [text for text in seen if text.startswith("b")]
    assert len(own) == 750
    assert all(len(set(own[start : start + 6])) == 6 for start in range(0, 750, 6))


@settings(max_examples=15, deadline=None)
@given(steps=st.lists(st.integers(0, 9), min_size=1, max_size=5), weighted=st.booleans(), shuffle=st.booleans())
def test_a_step_of_a_mixture_is_the_same_whatever_was_asked_for_before(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], weighted: bool, shuffle: bool
) -> None:
    folder = tmp_path_factory.getbasetemp()
    paths = [folder / "m.jsonl", folder / "n.jsonl"]
    if not paths[0].exists():
        for path, count in zip(paths, (7, 5), strict=True):  # every third prompt is too long
            write_rows(path, [{"prompt": path.stem + "x" * (90 if i % 3 == 0 else i)} for i in range(count)])
    actor = {"data_weights": [2, 1] if weighted else [], "no_shuffle": not shuffle}
    undisturbed = source(paths, **actor)
    expected = {step: undisturbed.next_batch(step).texts for step in range(10)}
    asked = source(paths, **actor)
    assert [asked.next_batch(step).texts for step in steps] == [expected[step] for step in steps]


def test_a_split_gives_disjoint_parts_of_every_source(two: list[Path]) -> None:
    parts = [source(two, part=part, split="50,30,20", batch=1) for part in ("train", "valid", "test")]  # type: ignore[arg-type]
    kept = [[text for batch in part.eval_batches() for text in batch.texts] for part in parts]
    assert kept == [
        ["a0", "a1", "a2", "a3", "a4", "b0", "b1", "b2"],
        ["a5", "a6", "a7", "b3", "b4"],
        ["a8", "a9", "b5"],
    ]
    assert [len(part) for part in parts] == [8, 5, 3]
    assert parts[1].next_batch(3).row_ids.tolist() == [13]
    assert sorted(texts(parts[0], 8)) == sorted(kept[0])


def test_evaluation_reads_its_own_file_or_the_validation_part_or_else_training_rows(
    two: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    def evaluated(**sections: Any) -> tuple[Any, ...]:
        actor = {"model": "tiny", "data_path": str(two[0]), **sections.pop("actor", {})}
        return eval_prompts(recipe(actor_rollout=actor, **sections), TOKENIZER).texts

    aside = {"actor": {"split": [80, 20]}}
    assert evaluated(eval={"data_path": str(two[1])}, **aside) == tuple(f"b{i}" for i in range(6))
    assert evaluated(**aside) == ("a8", "a9")
    assert "evaluations use training rows" not in caplog.text
    assert evaluated(eval={"num_prompts": 3}) == ("a0", "a1", "a2")
    assert "evaluations use training rows" in caplog.text


def test_a_dataset_dict_brings_its_own_parts(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}"} for i in range(10)]
    splits = {"train": datasets.Dataset.from_list(rows[:8]), "validation": datasets.Dataset.from_list(rows[8:])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "hf")
    path = [tmp_path / "hf"]
    assert sorted(texts(source(path, batch=8), 1)) == [f"p{i}" for i in range(8)]
    assert texts(source(path, part="valid", batch=2), 1) == ["p8", "p9"]


def test_a_dataset_dict_of_one_split_is_cut_like_a_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}"} for i in range(10)]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "hf")
    path = [tmp_path / "hf"]
    assert texts(source(path, part="valid", split="80,20,0", batch=2), 1) == ["p8", "p9"]
    assert len(source(path, split="80,20,0")) == 8


def test_a_share_that_comes_to_no_row_is_an_error(two: list[Path]) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: actor_rollout\.split=99,1,0 leaves no row for valid"):
        source(two, part="valid", split="99,1,0")


def test_evaluation_batches_hold_each_row_once_and_the_last_may_be_short(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * (99 if i in (2, 5) else i + 1)} for i in range(9)]
    prompts = source([write_rows(tmp_path / "a.jsonl", rows)], part="valid", batch=3)
    assert [batch.row_ids.tolist() for batch in prompts.eval_batches()] == [[0, 1, 3], [4, 6, 7], [8]]
    assert [batch.row_ids.tolist() for batch in prompts.eval_batches(4)] == [[0, 1, 3], [4]]


def test_rows_that_give_an_item_are_counted_before_any_step(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * (99 if i % 4 == 0 else i + 1)} for i in range(9)]
    prompts = source([write_rows(tmp_path / "a.jsonl", rows)])
    assert prompts.num_kept() == 6
    before = texts(source([tmp_path / "a.jsonl"]), 5)
    assert texts(prompts, 5) == before
    assert prompts.dropped == {"the prompt is longer than actor_rollout.max_prompt_length=64": 3}


BAD_LINES = ['{"prompt": "a"}', "{", '{"prompt": null}', '{"prompt": "b"}', '{"prompt": ""}', '{"prompt": "xxx"}']


def test_malformed_rows_are_left_out_up_to_a_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(BAD_LINES))
    with pytest.raises(DataError) as raised:
        source([path], max_bad_rows=2)
    assert len(raised.value.problems) == 3
    assert raised.value.problems[-1].endswith("actor_rollout.max_bad_rows=3 leaves such rows out")
    caplog.set_level(logging.WARNING)
    prompts = source([path], max_bad_rows=3, batch=3)
    assert f"{path}:2: not JSON" in caplog.text
    assert prompts.next_batch(4).row_ids.tolist() in (
        [0, 3, 5],
        [0, 5, 3],
        [3, 0, 5],
        [3, 5, 0],
        [5, 0, 3],
        [5, 3, 0],
    )
    assert prompts.dropped == {"it is malformed": 3}
    assert prompts.num_kept() == 3
    prompts.log_dropped()
    assert f"3 rows are left out because it is malformed (first: {path}:2)" in caplog.text


def test_the_limit_is_for_all_files_together(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in paths:
        path.write_text("\n".join(BAD_LINES))
    assert source(paths, max_bad_rows=6).num_dropped == 6
    with pytest.raises(DataError, match="max_bad_rows=6 leaves"):
        source(paths, max_bad_rows=5)


def test_long_rows_do_not_count_against_the_limit(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 99}] * 5 + [{"prompt": "p"}, {"prompt": 1}]
    prompts = source([write_rows(tmp_path / "a.jsonl", rows)], max_bad_rows=1)
    assert set(texts(prompts, 2)) == {"p"}
    assert prompts.num_dropped == 6


def test_a_file_of_malformed_rows_only_is_refused_whatever_the_limit(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x"}] * 3)
    with pytest.raises(DataError, match="all 3 rows are malformed; the first: field 'prompt' is missing"):
        source([path], max_bad_rows=9)


def test_rows_that_the_template_refuses_count_as_malformed(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": role, "content": "hi"}]} for role in ("user", "refused", "user", "refused")]
    path = write_rows(tmp_path / "a.jsonl", rows)
    prompts = source([path], max_bad_rows=2, no_shuffle=True)
    assert prompts.next_batch(0).row_ids.tolist() == [0, 2, 0, 2]
    assert prompts.dropped == {"it is malformed": 2}
    with pytest.raises(DataError, match=r"a\.jsonl:2: the chat template refuses the messages"):
        source([path], max_bad_rows=1, no_shuffle=True).next_batch(0)


def test_bad_rows_of_another_part_are_not_counted_in_this_one(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}"} for i in range(9)] + [{"prompt": 5}]
    path = [write_rows(tmp_path / "a.jsonl", rows)]
    parts = [source(path, part=part, split="80,20,0", max_bad_rows=1) for part in ("train", "valid")]  # type: ignore[arg-type]
    assert [part.num_dropped for part in parts] == [0, 1]
    assert [part.num_kept() for part in parts] == [8, 1]


def test_pairs_come_in_parts_too(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "chosen": "x", "rejected": "y"} for i in range(10)]
    actor = {"model": "tiny", "data_path": str(write_rows(tmp_path / "a.jsonl", rows)), "split": "70,30,0"}
    config = recipe(training={"stage": "dpo", "global_batch_size": 2}, actor_rollout=actor)
    batches = open_preferences(config, TOKENIZER, part="valid").eval_batches(limit=3)
    prompts = [TOKENIZER.decode(ids) for batch in batches for ids in batch.chosen.prompt_rows()]
    assert prompts == ["<s>7", "<s>8", "<s>9"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "weights without paths": ({"data_weights": [1, 2]}, "expected one for each of the 1 paths"),
    "weight 0": ({"data_path": ["a.jsonl", "b.jsonl"], "data_weights": [1, 0]}, "expected greater than 0"),
    "weight too small": (
        {"data_path": ["a.jsonl", "b.jsonl"], "data_weights": [1, 1e-5]},
        "expected at least a thousandth of their sum each",
    ),
    "no path": ({"data_path": []}, "expected a path, or a list of paths"),
    "split of words": ({"split": "most,rest"}, "expected three shares (train, validation, test)"),
    "negative share": ({"split": "90,-10,20"}, "expected three shares"),
    "no training rows": ({"split": "0,100,0"}, "expected three shares"),
    "four shares": ({"split": [1, 1, 1, 1]}, "expected three shares"),
    "unknown format": ({"data_format": "shargpt"}, 'did you mean "sharegpt"?'),
    "map_keys, broken JSON": ({"map_keys": "{"}, "expected a mapping, or one in JSON"),
    "map_keys, unknown key": (
        {"map_keys": {"promt": "x"}},
        "prompt, query, response, history, system, chosen, rejected to names of columns; 'promt' is none of them",
    ),
    "map_keys, no names": ({"map_keys": {"prompt": 1}}, "expected a mapping from prompt, query"),
    "map_keys, no prompt": ({"map_keys": {"prompt": ""}}, "expected a column for 'prompt'"),
    "bad rows": ({"max_bad_rows": -1}, "expected at least 0"),
}  # fmt: skip


@pytest.mark.parametrize(("actor", "reason"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_key_is_named(actor: dict[str, Any], reason: str, tmp_path: Path) -> None:
    raw = recipe().dump()
    raw["actor_rollout"] |= {"load": str(tmp_path), "data_path": "a.jsonl"} | actor
    raw["reward"] |= {"function": "f.py"}
    with pytest.raises(ConfigError) as raised:
        load_config(raw | {"dry_run": True})
    (line,) = [
        problem for problem in raised.value.problems if problem.startswith(f"actor_rollout.{next(reversed(actor))}")
    ]
    assert reason in line
