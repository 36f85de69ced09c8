"""Sessions: a prompt comes back as soon as all its completions have ended, and they are those of ``generate``."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlxf.assembly.roles import engine_settings
from rlxf.core.errors import SyncError
from rlxf.core.progress import progress
from rlxf.core.types import PromptBatch, Rollouts
from rlxf.platform import get_platform
from rlxf.rollout import HfEngine
from rlxf.rollout.engine import Completion, Sampling, Session
from rlxf.rollout.hf_sampling import KeyValueCache
from rlxf.rollout.session import RequestSession, WholeSession
from tests.rollout_world import HfActor, load_model, prompt_batch, random_prompts, run_config
from tests.tiny_models import EOS, VOCAB, save_causal_lm

RANDOM = Sampling(num_samples=3, max_new_tokens=12, seed=5)
BATCH = replace(
    prompt_batch(random_prompts((1, 4, 9, 30, 150, 2, 7, 5)), first_id=70),
    texts=tuple("abcdefgh"),
    columns={"topic": list(range(8))},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every third token ends a completion, so that they have all lengths."""
    folder = save_causal_lm(tmp_path_factory.mktemp("hf"), seed=1)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, *range(5, VOCAB, 3)]}))
    return folder


@pytest.fixture(scope="module")
def make(folder: Path) -> Callable[..., HfEngine]:
    def engine(prompts_per_call: int | None = None, *, stale: bool = False) -> HfEngine:
        settings = replace(engine_settings(run_config(folder)), prompts_per_call=prompts_per_call, stale=stale)
        return HfEngine(settings, get_platform("cpu", cpu_linear="mkl"))

    return engine


@pytest.fixture(scope="module")
def engine(make: Callable[..., HfEngine]) -> HfEngine:
    return make()


@pytest.fixture(scope="module")
def expected(engine: HfEngine) -> dict[int, list[list[int]]]:
    return by_prompt([engine.generate(BATCH, RANDOM)])


def handed_back(session: Session) -> Iterator[Rollouts]:
    while (found := session.advance()) is not None:
        yield found


def by_prompt(parts: Iterable[Rollouts]) -> dict[int, list[list[int]]]:
    """The completions of each prompt, by its position; every prompt once, whole, with its own fields."""
    found: dict[int, list[list[int]]] = {}
    for part in parts:
        prompts, samples = part.prompts, len(part) // len(part.prompts)
        rows = part.sequences.completion_rows()
        assert part.prompt_index.tolist() == [p for p in range(len(prompts)) for _ in range(samples)]
        assert part.sample_index.tolist() == list(range(samples)) * len(prompts)
        assert part.sequences.prompt_rows() == [row for row in prompts.prompts.rows() for _ in range(samples)]
        for p, position in enumerate(prompts.positions.tolist()):
            assert position not in found
            found[position] = rows[p * samples : (p + 1) * samples]
            own = BATCH.slice(position - 70, position - 69)
            assert prompts.texts[p] == own.texts[0]
            assert prompts.columns["topic"][p] == own.columns["topic"][0]
            assert prompts.prompts.rows()[p] == own.prompts.rows()[0]
            assert prompts.row_ids[p] == own.row_ids[0]
    return found


def caches() -> int:
    """Number of caches of keys and values that have memory."""
    return sum(type(found) is KeyValueCache for found in gc.get_objects())


def test_completions_are_those_of_generate_to_the_bit(engine: HfEngine) -> None:
    whole = engine.generate(BATCH, RANDOM)
    logps = whole.engine_logps.split(whole.sequences.completion_lengths.tolist())
    session = engine.session(RANDOM)
    session.add(BATCH)
    parts = list(handed_back(session))
    assert len(parts) > 3
    for part in parts:
        first = part.prompts.positions.repeat_interleave(3) - 70
        rows = (first * 3 + part.sample_index).tolist()
        assert part.sequences.rows() == [whole.sequences.rows()[row] for row in rows]
        assert torch.equal(part.engine_logps, torch.cat([logps[row] for row in rows]))
        assert part.policy_version.tolist() == [0] * len(rows)


@pytest.mark.parametrize("order", [range(8), reversed(range(8)), (3, 1, 4, 0, 5, 2, 6, 7)])
def test_the_order_of_adding_changes_no_completion(
    engine: HfEngine, expected: dict[int, list[list[int]]], order: Iterable[int]
) -> None:
    session = engine.session(RANDOM)
    session.add(BATCH.select(list(order)))
    assert by_prompt(handed_back(session)) == expected


@pytest.mark.parametrize("prompts_per_call", [None, 1, 3])
def test_prompts_may_be_added_at_any_time(
    make: Callable[..., HfEngine], expected: dict[int, list[list[int]]], prompts_per_call: int | None
) -> None:
    session = make(prompts_per_call).session(RANDOM)
    assert session.num_slots == (None if prompts_per_call is None else 3 * prompts_per_call)
    parts: list[Rollouts | None] = []
    for start, stop in ((0, 3), (3, 4), (4, 4), (4, 7)):
        session.add(BATCH.slice(start, stop))
        parts.append(session.advance())
    parts += handed_back(session)
    assert session.advance() is None
    session.add(BATCH.slice(7, 8))
    parts += handed_back(session)
    assert by_prompt(filter(None, parts)) == expected


def test_what_is_added_in_the_middle_of_a_call_waits_for_the_next_one(engine: HfEngine) -> None:
    session = engine.session(RANDOM)
    session.add(BATCH.slice(1, 4))
    first = session.advance()
    session.add(BATCH.slice(0, 1))
    rest = list(handed_back(session))
    assert first is not None
    assert len(first.prompts) < 3
    assert rest[-1].prompts.positions.tolist() == [70]


def test_a_call_has_as_many_prompts_as_the_recipe_says(make: Callable[..., HfEngine]) -> None:
    session = make(2).session(RANDOM)
    session.add(BATCH)
    order = [position for part in handed_back(session) for position in part.prompts.positions.tolist()]
    assert [set(order[start : start + 2]) for start in (0, 2, 4, 6)] == [{70, 71}, {72, 73}, {74, 75}, {76, 77}]


def test_a_prompt_comes_back_when_its_last_completion_ends(engine: HfEngine) -> None:
    session = engine.session(RANDOM)
    session.add(BATCH)
    longest = 0
    for part in handed_back(session):
        own = part.sequences.completion_lengths.view(-1, 3).amax(1)
        assert own.unique().numel() == 1  # those that end with the same token come together
        assert own[0] > longest
        assert part.prompts.positions.tolist() == sorted(part.prompts.positions.tolist())
        longest = int(own[0])


def test_times_count_from_the_begin_and_grow_with_the_tokens(make: Callable[..., HfEngine]) -> None:
    engine = make()
    whole, session = engine.generate(BATCH, RANDOM), engine.session(RANDOM)
    session.add(BATCH)
    for rollouts in (whole, *handed_back(session)):
        assert rollouts.ended_s is not None
        assert bool((rollouts.ended_s > 0).all())
        order = rollouts.sequences.completion_lengths.argsort(stable=True)
        assert bool((rollouts.ended_s[order].diff() >= 0).all())


def test_in_calls_the_later_ones_end_later(make: Callable[..., HfEngine]) -> None:
    rollouts = make(4).generate(BATCH, RANDOM)
    assert rollouts.ended_s is not None
    assert rollouts.ended_s[:12].max() < rollouts.ended_s[12:].min()


def test_stop_strings_end_completions_as_in_generate(engine: HfEngine) -> None:
    sampling = replace(RANDOM, stop=(*"abcdefghijklmnop", "0", "1", "2 "))
    whole = by_prompt([engine.generate(BATCH, sampling)])
    session = engine.session(sampling)
    session.add(BATCH)
    assert by_prompt(handed_back(session)) == whole
    assert whole != by_prompt([engine.generate(BATCH, RANDOM)])


def test_a_closed_session_frees_its_memory_and_leaves_the_next_one_alone(
    engine: HfEngine, expected: dict[int, list[list[int]]]
) -> None:
    session = engine.session(RANDOM)
    session.add(BATCH)
    assert session.advance() is not None
    assert caches()
    session.close()
    session.close()
    assert not caches()
    with pytest.raises(SyncError, match=r"session .* is closed.*open a new one"):
        session.advance()
    with pytest.raises(SyncError, match="is closed"):
        session.add(BATCH)
    again = engine.session(RANDOM)
    again.add(BATCH)
    assert by_prompt(handed_back(again)) == expected


def test_a_session_whose_prompts_have_all_come_back_holds_no_memory(engine: HfEngine) -> None:
    session = engine.session(RANDOM)
    session.add(BATCH)
    assert by_prompt(handed_back(session)).keys() == set(range(70, 78))
    assert not caches()


@pytest.mark.parametrize("by", ["session", "generate", "probe", "begin_update"])
def test_whatever_else_the_engine_does_closes_the_session(
    make: Callable[..., HfEngine], expected: dict[int, list[list[int]]], by: str
) -> None:
    engine = make()
    session = engine.session(RANDOM)
    session.add(BATCH)
    assert session.advance() is not None
    actions: dict[str, Callable[[], object]] = {
        "session": lambda: engine.session(RANDOM),
        "generate": lambda: engine.generate(BATCH.slice(0, 1), RANDOM),
        "probe": lambda: engine.probe(BATCH.slice(0, 1).prompts, 2),
        "begin_update": engine.begin_update,
    }
    actions[by]()
    with pytest.raises(SyncError, match="is closed"):
        session.advance()
    if by != "begin_update":
        assert by_prompt([engine.generate(BATCH, RANDOM)]) == expected


def test_a_session_samples_from_the_weights_that_were_pushed(make: Callable[..., HfEngine], folder: Path) -> None:
    engine, actor = make(stale=True), HfActor(load_model(folder))
    with pytest.raises(SyncError, match="only what it has loaded from a folder"):
        engine.session(RANDOM)
    engine.begin_update()
    with pytest.raises(SyncError, match="a mixture"):
        engine.session(RANDOM)
    for index, bucket in enumerate(actor.sync_plan()):
        engine.load_bucket(bucket, actor.packed_bucket(index))
    engine.end_update(3)
    session = engine.session(RANDOM)
    session.add(BATCH)
    assert [part.policy_version.unique().tolist() for part in handed_back(session)][:1] == [[3]]


def test_a_stop_in_the_middle_leaves_nothing_under_way(engine: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    session = engine.session(RANDOM)
    session.add(BATCH)
    before = progress.look().counter

    def stop() -> None:
        raise KeyboardInterrupt

    assert session.advance() is not None
    assert progress.look().counter > before
    monkeypatch.setattr(progress, "tick", stop)
    with pytest.raises(KeyboardInterrupt):
        session.advance()
    with pytest.raises(SyncError, match="is closed"):
        session.advance()
    assert not caches()


class Backwards:
    """Ends some completions a step, the last one first."""

    num_slots = 4

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = at_once
        self.waiting: list[int] = []
        self.closed = 0

    def add(self, number: int, prompt: list[int], seed: int) -> None:
        if prompt == [0]:
            raise ValueError("no such prompt")
        self.waiting.append(number)

    def step(self) -> list[tuple[int, Completion]]:
        numbers = [self.waiting.pop() for _ in range(self.at_once)]
        return [(number, Completion(tokens=[number], logps=[0.0])) for number in numbers]

    def close(self) -> None:
        self.closed += 1


def test_no_prompt_comes_back_before_its_last_sample() -> None:
    requests = Backwards()
    session = RequestSession(requests, replace(RANDOM, num_samples=2), version=7)
    session.add(prompt_batch([[5], [6]]))
    first, steps = session.advance(), 4 - len(requests.waiting)
    assert first is not None
    assert (first.prompts.row_ids.tolist(), steps) == ([1], 2)
    assert first.sequences.rows() == [[6, 2], [6, 3]]
    assert (first.policy_version.tolist(), first.ended_s) == ([7, 7], None)
    session.add(prompt_batch([[8]], first_id=2))
    assert [part.sequences.rows() for part in handed_back(session)] == [[[8, 4], [8, 5]], [[5, 0], [5, 1]]]
    assert session.num_slots == 4


def test_prompts_that_end_together_come_back_in_the_order_of_adding() -> None:
    session = RequestSession(Backwards(at_once=4), replace(RANDOM, num_samples=2), version=0)
    session.add(prompt_batch([[5], [6]]))
    (found,) = handed_back(session)
    assert found.sequences.rows() == [[5, 0], [5, 1], [6, 2], [6, 3]]


def test_a_prompt_that_the_engine_refuses_closes_the_session() -> None:
    requests = Backwards()
    session = RequestSession(requests, RANDOM, version=0)
    with pytest.raises(ValueError, match="no such prompt"):
        session.add(prompt_batch([[5], [0]]))
    assert requests.closed == 1
    with pytest.raises(SyncError, match="is closed"):
        session.advance()


def test_an_engine_of_whole_answers_gives_back_what_was_added_at_once(engine: HfEngine) -> None:
    calls: list[PromptBatch] = []

    def generate(prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        calls.append(prompts)
        if len(calls) == 3:
            raise ValueError("broken")
        return engine.generate(prompts, sampling)

    session = WholeSession(generate, RANDOM)
    for part in (BATCH.slice(0, 2), BATCH.slice(2, 2), BATCH.slice(2, 3)):
        session.add(part)
    assert calls == []
    assert [part.prompts.positions.tolist() for part in handed_back(session)] == [[70, 71], [72]]
    session.add(BATCH)
    with pytest.raises(ValueError, match="broken"):
        session.advance()
    with pytest.raises(SyncError, match="is closed"):
        session.advance()
