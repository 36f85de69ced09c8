"""Where a resumed run goes on in its data: at the stored place, as if it had looked at every row before it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxf.assembly.data import open_prompts
from rlxf.core.errors import DataError
from rlxf.data.batches import MALFORMED, BatchStream, DropReason
from rlxf.data.order import MixedOrder, Order, RowOrder
from rlxf.data.prompts import PromptFile
from tests.data_world import chat_tokenizer, recipe, write_rows

TOKENIZER = chat_tokenizer()


class Numbers:
    """Rows that are their number; some are malformed."""

    name = "numbers"

    def __init__(self, count: int, bad: set[int]) -> None:
        self._count = count
        self.bad = dict.fromkeys(bad, "bad")

    def __len__(self) -> int:
        return self._count

    def where(self, row: int) -> str:
        return f"numbers:{row + 1}"


class Looks:
    """Makes items, drops what it must, and counts how often it was asked."""

    def __init__(self, rows: Numbers, reasons: dict[int, str]) -> None:
        self._rows, self._reasons = rows, reasons
        self.count = 0

    def __call__(self, row: int) -> int | DropReason:
        self.count += 1
        if row in self._rows.bad:
            return DropReason(MALFORMED)
        return DropReason(self._reasons[row]) if row in self._reasons else row


Worlds = tuple[Callable[[], tuple[BatchStream[int], Looks]], int]


@st.composite
def worlds(draw: st.DrawFn) -> Worlds:
    """Files with bad rows and dropped rows, in one order or a mixture, and a batch size."""
    sizes = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    total = sum(sizes)
    bad = draw(st.sets(st.integers(0, total - 1), max_size=total // 3))
    reasons = draw(st.dictionaries(st.integers(0, total - 1), st.sampled_from(["long", "empty"]), max_size=total // 3))
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    ranges = [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    # Without a row that is kept in each of them a stream may never end.
    for stretch in ranges:
        bad.discard(stretch[0])
        reasons.pop(stretch[0], None)
    seed, shuffle, mixed = draw(st.integers(0, 9)), draw(st.booleans()), draw(st.booleans())
    size = draw(st.integers(1, 5))

    def make() -> tuple[BatchStream[int], Looks]:
        order: Order = (
            MixedOrder(ranges, [1.0 + i for i in range(len(ranges))], seed=seed, shuffle=shuffle)
            if mixed
            else RowOrder(ranges, (seed,) if shuffle else None)
        )
        rows = Numbers(total, bad)
        looks = Looks(rows, reasons)
        return BatchStream(rows, order, size, looks, strict=False), looks

    return make, size


def told(batches: BatchStream[int], step: int) -> tuple[list[int], float, dict[str, int], list[str]]:
    """All that a run sees of a step."""
    return batches.batch(step), batches.epoch(step), dict(batches.dropped), batches.summary()


@settings(max_examples=150, deadline=None)
@given(world=worlds(), step=st.integers(1, 12), probes=st.booleans(), begun=st.booleans())
def test_a_resumed_stream_is_the_undisturbed_one_and_looks_at_nothing_again(
    world: Worlds, step: int, probes: bool, begun: bool
) -> None:
    make, _ = world
    undisturbed, _ = make()
    rows = [told(undisturbed, number) for number in range(step)][-1][0]
    if begun:  # and broke off: its rows are counted, and will be read again
        undisturbed.batch(step)
    stream = json.loads(json.dumps(undisturbed.stream(step)))
    resumed, looks = make()
    assert resumed.go_on(step, rows, stream)
    assert looks.count == 0
    assert begun or resumed.stream(step) == stream
    if probes:  # the prompts of the weight sync's probe are those of the first step
        assert resumed.batch(0) == make()[0].batch(0)
    for number in range(step, step + 8):
        assert told(resumed, number) == told(undisturbed, number)
        assert resumed.stream(number + 1) == undisturbed.stream(number + 1)


@settings(max_examples=50, deadline=None)
@given(world=worlds(), step=st.integers(1, 8))
def test_where_all_rows_were_counted_at_the_start_nothing_is_counted_twice(world: Worlds, step: int) -> None:
    """``training.epochs``: a run counts the rows that are kept before its first step, and before it is resumed."""
    make, _ = world
    undisturbed, resumed = make()[0], make()[0]
    assert undisturbed.num_kept() == resumed.num_kept()
    rows = [undisturbed.rows(number) for number in range(step)][-1]
    assert resumed.go_on(step, rows, json.loads(json.dumps(undisturbed.stream(step))))
    for number in range(step, step + 8):
        assert told(resumed, number) == told(undisturbed, number)


def test_another_order_is_noticed_and_nothing_is_taken_over() -> None:
    def make(seed: int) -> BatchStream[int]:
        rows = Numbers(40, set())
        return BatchStream(rows, RowOrder([range(40)], (seed,)), 4, Looks(rows, {}), strict=False)

    saved, other = make(1), make(2)
    rows = [saved.rows(number) for number in range(3)][-1]
    assert not other.go_on(3, rows, saved.stream(3))
    assert [other.rows(number) for number in range(5)] == [make(2).rows(number) for number in range(5)]


def source(path: Path, **actor: Any) -> PromptFile:
    config = recipe(
        training={"global_batch_size": 2},
        actor_rollout={"data_path": str(path), "no_shuffle": True, **actor},
    )
    return open_prompts(config, TOKENIZER)


def test_rows_that_the_template_refused_before_count_towards_the_limit(tmp_path: Path) -> None:
    def chat(role: str) -> dict[str, Any]:
        return {"prompt": [{"role": role, "content": "Q"}]}

    roles = ["user", "refused", "user", "user", "refused", "user", "user", "user"]
    path = write_rows(tmp_path / "a.jsonl", [chat(role) for role in roles])
    saved = source(path, max_bad_rows=1)
    assert saved.row_ids(0) == [0, 2]
    stream = json.loads(json.dumps(saved.stream(1)))
    resumed = source(path, max_bad_rows=1)
    assert resumed.go_on(1, [0, 2], stream)
    assert resumed.num_dropped == 1
    messages = []
    for prompts in (saved, resumed):
        with pytest.raises(DataError) as caught:
            prompts.next_batch(1)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].count("\n") == 1  # both rows are named


def test_a_resume_tokenizes_no_row_before_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": f"say {i}"} for i in range(100)])
    saved = source(path)
    expected = [saved.row_ids(step) for step in range(31)]
    stream = saved.stream(30)
    resumed = source(path)
    made: list[int] = []
    make = PromptFile._make
    monkeypatch.setattr(PromptFile, "_make", lambda self, row, record: made.append(row) or make(self, row, record))
    assert resumed.go_on(30, expected[29], stream)
    assert resumed.next_batch(30).row_ids.tolist() == expected[30] == made
