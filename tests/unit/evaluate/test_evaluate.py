"""Evaluations: fresh samples, scored, against the initial policy's samples of the same prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlxf.assembly.build_run import evaluation_settings
from rlxf.core.errors import ConfigError, StopRequested
from rlxf.core.jsonl import Row
from rlxf.core.types import PromptBatch, Tokens
from rlxf.evaluate import EvalBackends, Evaluation, load_metrics
from rlxf.evaluate.answers import Scores, win_rate
from rlxf.evaluate.user import BUILT_IN
from tests.tiny_models import byte_tokenizer
from tests.unit.small_run import EOS, LIKED, VOCAB, SmallRun, TokenCounter, small_config, small_run

NUM_PROMPTS = 64
SAMPLED = {
    "eval/reward", "eval/raw_reward", "eval/win_rate", "eval/win_rate_previous", "eval/kl",
    "eval/reward_se", "eval/raw_reward_se", "eval/win_rate_se", "eval/win_rate_previous_se", "eval/kl_se",
    "eval/length", "eval/eos_rate", "eval/distinct",
}  # fmt: skip
GREEDY = {
    "eval/greedy_reward", "eval/greedy_raw_reward", "eval/greedy_win_rate", "eval/greedy_win_rate_previous",
    "eval/greedy_reward_se", "eval/greedy_raw_reward_se", "eval/greedy_win_rate_se", "eval/greedy_win_rate_previous_se",
    "eval/greedy_length", "eval/greedy_eos_rate",
}  # fmt: skip


OPEN = "eval/distinct"  # a file's own metric of this name, which is older, takes its place


def evaluation(small: SmallRun, show: Callable[[int, list[Row]], None] | None = None) -> Evaluation:
    prompts = PromptBatch(
        prompts=Tokens.from_rows([[2, 2 + i % 4] for i in range(NUM_PROMPTS)]),
        row_ids=torch.arange(NUM_PROMPTS),
        positions=torch.arange(NUM_PROMPTS),
        texts=tuple(f"prompt {i}" for i in range(NUM_PROMPTS)),
        columns={},
    )
    rooms = EvalBackends(rollout=small.engine, scorer=TokenCounter([]), actor=small.actor, reference=small.reference)
    settings = evaluation_settings(small.run.config, (EOS,))
    return Evaluation(settings, prompts, rooms, tokenizer=byte_tokenizer(), show=show)


def small(**changes: object) -> SmallRun:
    return small_run(small_config(**{"training__eval_interval": 2, "training__train_iters": 5, **changes}))


def test_it_is_due_before_the_first_step_at_the_interval_and_after_the_last_step() -> None:
    evaluate = evaluation(small())
    assert [bool(evaluate(step)) for step in range(6)] == [True, False, True, False, True, True]


def test_an_untrained_policy_is_its_own_equal() -> None:
    metrics = evaluation(small())(0)
    assert metrics["eval/kl"] == 0.0
    assert metrics["eval/win_rate"] == pytest.approx(0.5, abs=0.15)
    assert metrics["eval/greedy_win_rate"] == metrics["eval/greedy_win_rate_previous"] == 0.5  # the same answers
    assert set(metrics) == SAMPLED | GREEDY


def test_a_policy_that_says_what_scores_wins_and_is_far_from_the_reference() -> None:
    run = small()
    evaluate = evaluation(run)
    before = evaluate(0)
    with torch.no_grad():
        run.actor.logits[:, LIKED] += 3.0
    run.sync.push(1)
    after = evaluate(2)
    assert after["eval/reward"] > before["eval/reward"] + 2
    assert after["eval/win_rate"] > 0.8
    assert after["eval/eos_rate"] < before["eval/eos_rate"]
    probability = math.exp(3) / (math.exp(3) + VOCAB - 1)
    other = (1 - probability) / (VOCAB - 1)
    kl_per_token = probability * math.log(probability * VOCAB) + (1 - probability) * math.log(other * VOCAB)
    assert after["eval/kl"] == pytest.approx(kl_per_token * after["eval/length"], rel=0.15)


def test_it_shows_the_answers_to_the_same_prompts_with_their_share_of_the_kl() -> None:
    run, shown = small(log__eval_answers=NUM_PROMPTS), dict[int, list[Row]]()
    evaluate = evaluation(run, shown.__setitem__)
    evaluate(0)
    with torch.no_grad():
        run.actor.logits[:, LIKED] += 1.0
    run.sync.push(1)
    metrics = evaluate(2)
    assert evaluate(3) == {}
    assert list(shown) == [0, 2]
    assert [[row["prompt"] for row in rows] for rows in shown.values()] == [
        [f"prompt {i}" for i in range(NUM_PROMPTS)]
    ] * 2
    rows = shown[2]
    assert sum(row["kl"] for row in rows) / len(rows) == pytest.approx(metrics["eval/kl"], abs=1e-3)
    assert sum(row["score"] for row in rows) / len(rows) == pytest.approx(metrics["eval/reward"])
    assert sum(row["length"] for row in rows) / len(rows) == pytest.approx(metrics["eval/length"])
    assert sum(row["eos"] for row in rows) / len(rows) == pytest.approx(metrics["eval/eos_rate"])
    assert len({tuple(row["logps"]) for row in rows}) > 1
    assert all(len(row["tokens"]) == len(row["logps"]) == len(row["reference_logps"]) == row["length"] for row in rows)
    few = dict[int, list[Row]]()
    evaluation(small(log__eval_answers=3), few.__setitem__)(0)
    assert few[0] == shown[0][:3]


def test_a_standard_error_is_how_far_a_mean_spreads_over_other_samples() -> None:
    """Over a hundred seeds: of the reward, the KL and the win rate against fixed scores."""
    found = []
    for seed in range(100):
        run = small(training__seed=seed, eval__greedy=False)
        evaluate = evaluation(run)
        evaluate._baseline = evaluate._previous = Scores(torch.full((NUM_PROMPTS,), 2.0), None)
        with torch.no_grad():
            run.actor.logits[:, LIKED] += 1.0
        run.sync.push(1)
        found.append(evaluate(2))
    for name in ("eval/reward", "eval/raw_reward", "eval/kl", "eval/win_rate"):
        values = torch.tensor([metrics[name] for metrics in found], dtype=torch.float64)
        errors = [metrics[f"{name}_se"] for metrics in found]
        assert sum(errors) / len(errors) == pytest.approx(float(values.std()), rel=0.25), name


def test_the_raw_reward_is_the_score_before_the_penalty_for_a_missing_end() -> None:
    plain = evaluation(small())(0)
    metrics = evaluation(small(actor_rollout__missing_eos_penalty=10.0))(0)
    assert metrics["eval/raw_reward"] == plain["eval/reward"] == plain["eval/raw_reward"]
    assert metrics["eval/raw_reward_se"] == plain["eval/reward_se"]
    missing = 1 - metrics["eval/eos_rate"]
    assert 0 < missing < 1
    assert metrics["eval/reward"] == pytest.approx(metrics["eval/raw_reward"] - 10 * missing)
    assert metrics["eval/reward_se"] > metrics["eval/raw_reward_se"]
    assert metrics["eval/greedy_raw_reward"] - metrics["eval/greedy_reward"] == pytest.approx(
        10 * (1 - metrics["eval/greedy_eos_rate"])
    )


def test_the_penalties_for_length_count_in_an_evaluation() -> None:
    plain = evaluation(small())(0)
    metrics = evaluation(small(actor_rollout__length_penalty=0.5))(0)
    assert metrics["eval/raw_reward"] == plain["eval/reward"]
    assert metrics["eval/reward"] == pytest.approx(metrics["eval/raw_reward"] - 0.5 * metrics["eval/length"])


def test_an_evaluation_alone_is_not_held_against_itself() -> None:
    run = small(training__eval_only=True)
    metrics = evaluation(run)(0)
    assert set(metrics) == {name for name in SAMPLED | GREEDY if "win_rate" not in name}
    assert len(run.engine.samplings) == 2  # one sample and one greedy answer: nothing of an initial policy
    trained = small()
    evaluate = evaluation(trained)
    assert {name: value for name, value in evaluate(0).items() if name in metrics} == metrics
    resumed = evaluation(small(training__eval_only=True))
    resumed.restore(evaluate.describe_baseline())
    assert "eval/win_rate" in (found := resumed(2))
    assert not [name for name in found if "previous" in name]


def test_samples_are_fresh_and_never_those_of_training() -> None:
    run = small()
    evaluate = evaluation(run)
    for step in range(6):
        evaluate(step)
    sampled = [(sampling.purpose, sampling.step) for sampling in run.engine.samplings if sampling.temperature]
    assert sampled == [("initial", 0), ("eval", 0), ("eval", 2), ("eval", 4), ("eval", 5)]
    assert {s.purpose for s in run.engine.samplings if not s.temperature} == {"greedy"}
    assert {(s.temperature, s.top_p, s.num_samples) for s in run.engine.samplings} == {(1.0, 1.0, 1), (0.0, 1.0, 1)}


def learn(run: SmallRun, version: int) -> None:
    """The policy comes to like what scores a little more."""
    with torch.no_grad():
        run.actor.logits[:, LIKED] += 1.0
    run.sync.push(version)


def test_greedy_answers_depend_on_the_weights_alone() -> None:
    run = small(training__train_iters=9)
    evaluate = evaluation(run)
    learn(run, 1)
    found = [evaluate(step) for step in (0, 2, 4)]
    assert set(found[0]) == SAMPLED | GREEDY
    for metrics in found[1:]:
        assert {name: metrics[name] for name in GREEDY} == {name: found[0][name] for name in GREEDY}
        assert metrics["eval/reward"] != found[0]["eval/reward"]  # sampled anew
    assert found[0]["eval/greedy_reward"] == found[0]["eval/greedy_length"] == run.run.config.max_new_tokens


def test_greedy_answers_are_asked_for_once_per_evaluation_and_not_at_all_if_switched_off() -> None:
    run, off = small(), small(eval__greedy=False)
    for each in (run, off):
        evaluate = evaluation(each)
        metrics = [evaluate(step) for step in (0, 2)][-1]
    assert sum(sampling.temperature == 0 for sampling in run.engine.samplings) == 2
    assert all(sampling.temperature for sampling in off.engine.samplings)
    assert set(metrics) == SAMPLED


def test_a_policy_is_compared_with_the_evaluation_before() -> None:
    run = small(training__train_iters=9)
    evaluate = evaluation(run)
    evaluate(0)
    for version in (1, 2, 3):
        learn(run, version)
    better = evaluate(2)
    same = evaluate(4)
    assert better["eval/win_rate_previous"] > 0.8
    assert better["eval/greedy_win_rate_previous"] == 1.0
    assert same["eval/win_rate"] > 0.8
    assert same["eval/win_rate_previous"] == pytest.approx(0.5, abs=0.15)
    assert same["eval/greedy_win_rate"] == 1.0
    assert same["eval/greedy_win_rate_previous"] == 0.5


def test_an_evaluation_that_is_cut_off_is_not_the_one_before() -> None:
    run = small(training__train_iters=9)
    evaluate = evaluation(run)
    evaluate(0)
    before = evaluate.describe_baseline()
    run.engine.during_generate = lambda: (_ for _ in ()).throw(StopRequested("now"))
    with pytest.raises(StopRequested):
        evaluate(2)
    assert evaluate.describe_baseline() == before


def test_a_resumed_run_compares_with_what_the_initial_policy_said() -> None:
    first = small()
    evaluate = evaluation(first)
    evaluate(0)
    learn(first, 1)
    evaluate(2)  # the one before
    baseline = json.loads(json.dumps(evaluate.describe_baseline(), allow_nan=False))
    learn(first, 2)
    expected = evaluate(4)
    assert expected["eval/win_rate"] != expected["eval/win_rate_previous"]
    again = small()
    resumed = evaluation(again)
    resumed.restore(baseline)
    assert again.engine.samplings == []  # nothing is sampled anew
    again.engine.logits = first.engine.logits
    with torch.no_grad():
        again.actor.logits.copy_(first.actor.logits)
    assert resumed(4) == expected


@pytest.mark.parametrize("found", [None, {"prompts": "of another run", "scores": [1.0], "texts": ["a"]}])
def test_without_a_baseline_of_these_prompts_the_initial_policy_is_sampled(
    found: dict[str, object] | None, caplog: pytest.LogCaptureFixture
) -> None:
    first, again = small(), small()
    evaluate, resumed = evaluation(first), evaluation(again)
    evaluate(0)
    resumed.restore(found)
    assert "sampled again" in caplog.text
    initial = evaluate.describe_baseline()
    assert initial is not None
    assert resumed.describe_baseline() == {**initial, "previous": None}


def test_a_checkpoint_without_greedy_answers_keeps_its_sampled_ones(caplog: pytest.LogCaptureFixture) -> None:
    first, again = small(eval__greedy=False), small()
    evaluate, resumed = evaluation(first), evaluation(again)
    evaluate(0)
    found = evaluate.describe_baseline()
    assert found is not None
    found["scores"] = [9.0] * NUM_PROMPTS  # what no policy here can reach again
    resumed.restore(found)
    assert [sampling.temperature for sampling in again.engine.samplings] == [0.0]
    assert resumed(2)["eval/win_rate"] == 0.0
    assert resumed(4)["eval/greedy_win_rate"] == 0.5


def test_missing_scores_of_a_baseline_stay_missing() -> None:
    evaluate = evaluation(small())
    evaluate(0)
    baseline = evaluate.describe_baseline()
    assert baseline is not None
    baseline["scores"][0] = None
    evaluate.restore(baseline)
    assert evaluate.describe_baseline() == baseline


def test_ties_win_half_and_missing_scores_do_not_count() -> None:
    mine = torch.tensor([2.0, 1.0, 1.0, math.nan, 5.0])
    initial = torch.tensor([1.0, 1.0, 2.0, 0.0, math.nan])
    assert win_rate(mine, initial) == 0.5
    assert math.isnan(win_rate(mine[3:], initial[3:]))


METRICS = """
def evaluate(prompts, completions, initial_completions):
    assert prompts[3] == "prompt 3" and len(prompts) == len(completions) == len(initial_completions)
    return {"same": sum(a == b for a, b in zip(completions, initial_completions)) / len(prompts)}
"""


def test_a_file_of_the_user_adds_metrics(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(METRICS)
    metrics = evaluation(small(eval__metrics=str(tmp_path / "mine.py")))(0)
    assert 0 < metrics["eval/same"] < 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "no such file; expected a Python file"),
        ("x = 1", "defines no function `evaluate`"),
        ("import nowhere_to_be_found", r"cannot be loaded: .*wrong\.py:1: ModuleNotFoundError"),
        ("evaluate = 3", "`evaluate` is a int; expected a function"),
        ("async def evaluate(p, c, i): ...", "`evaluate` is asynchronous"),
    ],
)
def test_a_wrong_file_is_refused_when_the_run_starts(tmp_path: Path, source: str | None, message: str) -> None:
    path = tmp_path / "wrong.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ConfigError, match=message) as caught:
        load_metrics(str(path))
    assert "eval.metrics=" in str(caught.value)


def test_a_function_that_fails_is_named(tmp_path: Path) -> None:
    path = tmp_path / "fails.py"
    path.write_text("def evaluate(prompts, completions, initial_completions):\n    raise ValueError('no')\n")
    with pytest.raises(
        ConfigError, match=r"eval\.metrics=.*fails\.py: `evaluate` failed: .*fails\.py:2: ValueError: no"
    ):
        evaluation(small(eval__metrics=str(path)))(0)


DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Found:
    count: float

def evaluate(prompts, completions, initial_completions):
    return {"count": Found(len(completions)).count}
"""


def test_a_file_may_define_dataclasses(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(DATACLASS)
    assert evaluation(small(eval__metrics=str(tmp_path / "mine.py")))(0)["eval/count"] == NUM_PROMPTS


def test_an_evaluations_own_names_are_those_that_a_file_may_not_take() -> None:
    judged = {name for name in BUILT_IN if name.startswith("judge/") or "win_rate_reference" in name}
    assert {f"eval/{name}" for name in BUILT_IN - judged} == (SAMPLED | GREEDY) - {OPEN}


@pytest.mark.parametrize("greedy", [True, False])
def test_a_metric_of_an_evaluations_own_name_is_refused(tmp_path: Path, greedy: bool) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def evaluate(prompts, completions, initial):\n    return {'mine': 1, 'reward': 9, 'greedy_length': 0}"
    )
    message = r"`evaluate` returns 'greedy_length', 'reward', but .* \(eval/greedy_length\); give it another name"
    with pytest.raises(ConfigError, match=message):
        evaluation(small(eval__metrics=str(path), eval__greedy=greedy))(0)
