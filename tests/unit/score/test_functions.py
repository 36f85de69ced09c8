"""A reward function gets TRL's arguments, and every way in which it can go wrong has a message with a place."""

from __future__ import annotations

import math
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from rlxf.core.errors import ConfigError, ScoreError, StopRequested
from rlxf.core.types import Rollouts
from rlxf.score.functions import FunctionSource
from rlxf.score.sources import as_texts
from rlxf.score.texts import Answered
from tests.data_world import chat_tokenizer, make_rollouts, prompt_batch
from tests.tiny_models import EOS

TOKENIZER = chat_tokenizer()


def encode(text: str) -> list[int]:
    return [*TOKENIZER(text, add_special_tokens=False)["input_ids"], EOS]


class Scoring:
    """A reward function that reads rollouts, as a run has it."""

    def __init__(self, path: Path) -> None:
        self.source = FunctionSource.from_file(path)

    def answer(self, rollouts: Rollouts) -> Answered:
        return self.source.ask(as_texts(rollouts, TOKENIZER))

    def score(self, rollouts: Rollouts) -> torch.Tensor:
        return torch.tensor([math.nan if score is None else score for score in self.answer(rollouts).scores])


def scorer(folder: Path, code: str) -> Scoring:
    path = folder / "my_reward.py"
    path.write_text(dedent(code))
    return Scoring(path)


@pytest.fixture
def rollouts() -> Rollouts:
    chat = [{"role": "user", "content": "hi"}]
    prompts = prompt_batch([[5], [6]], texts=["say", chat], columns={"answer": ["A", "B"]})
    return make_rollouts(prompts, [[encode("one"), encode("three")], [encode("fifteen"), encode("")]])


def test_arguments_are_those_of_trl(tmp_path: Path, rollouts: Rollouts) -> None:
    code = """
        seen = {}
        def reward(prompts, completions, completion_ids, **columns):
            seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
            return [0.0] * len(prompts)
    """
    scoring = scorer(tmp_path, code)
    scoring.score(rollouts)
    chat = [{"role": "user", "content": "hi"}]
    assert scoring.source._call._function.__globals__["seen"] == {
        "prompts": ["say", "say", chat, chat],
        "completions": [
            "one",
            "three",
            [{"role": "assistant", "content": "fifteen"}],
            [{"role": "assistant", "content": ""}],
        ],
        "completion_ids": [encode("one"), encode("three"), encode("fifteen"), [EOS]],
        "answer": ["A", "A", "B", "B"],
    }


def test_none_and_nan_are_missing_and_numbers_of_any_kind_count(tmp_path: Path, rollouts: Rollouts) -> None:
    code = """
        import torch
        def reward(prompts, completions, completion_ids, **columns):
            return [None, float("nan"), torch.tensor(2.5), True]
    """
    scores = scorer(tmp_path, code).score(rollouts)
    assert scores.dtype == torch.float32
    assert [math.isnan(score) for score in scores.tolist()] == [True, True, False, False]
    assert scores[2:].tolist() == [2.5, 1.0]


def test_a_tensor_is_a_list_of_scores(tmp_path: Path, rollouts: Rollouts) -> None:
    code = """
        import torch
        def reward(completion_ids, **rest):
            return torch.tensor([float(len(ids)) for ids in completion_ids])
    """
    assert scorer(tmp_path, code).score(rollouts).tolist() == [4.0, 6.0, 8.0, 1.0]


def test_a_function_that_changes_its_messages_does_not_change_the_run(tmp_path: Path, rollouts: Rollouts) -> None:
    code = """
        def reward(prompts, completions, completion_ids, **columns):
            for prompt in prompts:
                if isinstance(prompt, list):
                    prompt[0]["content"] = "changed"
                    prompt.clear()
            return [0.0] * len(prompts)
    """
    scorer(tmp_path, code).score(rollouts)
    assert rollouts.prompts.texts[1] == [{"role": "user", "content": "hi"}]


BAD_FILES = {
    "no function": ("x = 1\n", "defines no function `reward`"),
    "not a function": ("reward = 3\n", "`reward` is a int; expected a function"),
    "too few arguments": ("def reward(prompts, completions): ...\n", "unexpected keyword argument 'completion_ids'"),
    "other arguments": (
        "def reward(texts, completions, completion_ids): ...\n",
        "unexpected keyword argument 'prompts'",
    ),
    "syntax error": ("x = 1\n\ndef reward(:\n", r"my_reward\.py:3: SyntaxError"),
    "fails at import": ("import math\nmath.sqrt(-1)\n", r"my_reward\.py:2: ValueError: math domain error"),
    "imports what is missing": ("import no_such_module_here\n", r"my_reward\.py:1: ModuleNotFoundError"),
}


def test_a_column_that_the_function_needs_may_be_required(tmp_path: Path, rollouts: Rollouts) -> None:
    made = scorer(tmp_path, "def reward(prompts, completions, completion_ids, nowhere, **rest): ...\n")
    with pytest.raises(ConfigError, match="missing a required argument: 'nowhere'"):
        made.score(rollouts)


@pytest.mark.parametrize(("code", "message"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_wrong_file_is_refused_at_the_start(code: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        scorer(tmp_path, code)
    assert "reward.function=" in str(raised.value)


def test_a_missing_file_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        FunctionSource.from_file(tmp_path / "none.py")


BAD_RESULTS = {
    "exception": ("helper(prompts)", r"my_reward\.py:1: ZeroDivisionError: division by zero"),
    "too few": ("[1.0]", "expected 4 scores, one per completion, got 1"),
    "no list": ("3.0", "expected a list of 4 scores, got float"),
    "None": ("None", "expected a list of 4 scores, got NoneType"),
    "text": ('["1"] * 4', "score 0 must be a finite number or None, got '1'"),
    "infinite": ('[0, 0, float("inf"), 0]', "score 2 must be a finite number or None, got inf"),
    "too large": ("[0, 1e300, 0, 0]", "score 1 must be a finite number or None"),
    "list of lists": ("[[1.0]] * 4", r"score 0 must be a number or None, got \[1.0\]"),
    "a tensor of tensors": ('__import__("torch").zeros(4, 2)', "score 0 must be a number or None, got tensor"),
    "no float at all": ("[10**400, 0, 0, 0]", "score 0 must be a number or None, got 1000"),
    "a generator that fails": ("(helper(p) for p in prompts)", r"my_reward\.py:1: ZeroDivisionError"),
}


@pytest.mark.parametrize(("result", "message"), BAD_RESULTS.values(), ids=BAD_RESULTS.keys())
def test_a_wrong_answer_names_the_function(result: str, message: str, tmp_path: Path, rollouts: Rollouts) -> None:
    code = f"def helper(x): return 1 / 0\ndef reward(prompts, completions, completion_ids, **c): return {result}\n"
    scoring = scorer(tmp_path, code)
    with pytest.raises(ScoreError, match=message) as raised:
        scoring.score(rollouts)
    assert "reward.function=" in str(raised.value)
    assert raised.value.exit_code == 1  # the recipe is not what is wrong


def test_a_column_that_the_function_does_not_take_is_named(tmp_path: Path, rollouts: Rollouts) -> None:
    scoring = scorer(tmp_path, "def reward(prompts, completions, completion_ids): return [0.0] * 4\n")
    with pytest.raises(ConfigError, match=r"unexpected keyword argument 'answer'.*\*\*columns"):
        scoring.score(rollouts)


def test_a_column_with_the_name_of_an_argument_is_refused(tmp_path: Path) -> None:
    prompts = prompt_batch([[5]], columns={"completions": ["x"]})
    scoring = scorer(tmp_path, "def reward(prompts, completions, completion_ids, **c): return [0.0]\n")
    with pytest.raises(ConfigError, match="rename column 'completions'"):
        scoring.score(make_rollouts(prompts, [[[EOS], [EOS]]]))


def test_a_stop_request_passes_through(tmp_path: Path, rollouts: Rollouts) -> None:
    code = """
        from rlxf.core.errors import StopRequested
        def reward(prompts, completions, completion_ids, **columns):
            raise StopRequested("SIGTERM")
    """
    with pytest.raises(StopRequested):
        scorer(tmp_path, code).score(rollouts)


def test_the_example_prefers_short_complete_answers_that_do_not_repeat(rollouts: Rollouts) -> None:
    path = Path(__file__).parents[3] / "examples/rewards/concise.py"
    scoring = Scoring(path)
    good = "The capital of Portugal is Lisbon, on the river Tagus."
    answers = [good, good + " It is a city." * 20, good[:-5], good[:-1] + ", is Lisbon, is Lisbon, is Lisbon.", "Yes."]
    prompts = prompt_batch([[5]], texts=["?"], columns={"topic": ["fact"]})
    scores = scoring.score(make_rollouts(prompts, [[encode(answer) for answer in answers]])).tolist()
    assert scores[0] == max(scores)
    assert scores[4] == min(scores) == 0.0
    assert len(set(scores)) == len(scores)
