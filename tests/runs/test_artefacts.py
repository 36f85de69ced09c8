"""What a run leaves behind, file by file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlxf.evaluate.user import BUILT_IN
from rlxf.observe.formulas import read_jsonl
from tests.runs.small import Finished, World, run

NUM_STEPS, SAVE_INTERVAL, EVAL_INTERVAL, SAMPLES_INTERVAL = 5, 2, 3, 4

# The table of docs/metrics.md.
STEP_NAMES = {
    "loss", "grad_norm", "learning_rate", "beta", "epoch", "data/dropped", "num_tokens",
    "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected",
    "objective/kl", "objective/entropy", "objective/scores", "objective/scores_margin", "val/contain_eos_token",
    "pair/kept", "pair/dropped", "pair/tie_rate", "pair/margin", "pair/length_difference", "rollout/distinct",
    "score/std", "score/at_max", "score/length_correlation",
    "rollout/tokens_per_s", "rollout/logp_diff_mean", "rollout/logp_diff_max",
    "sync/bytes", "sync/seconds", "sync/gb_per_s", "sync/transport", "sync/version_lag",
    "rollout/tail_s", "rollout/longest_over_mean", "rollout/imbalance",
    "timing/gen", "timing/adv", "timing/ref", "timing/update_actor", "timing/sync", "timing/all", "timing/eval",
    "timing/save", "timing/idle_train", "timing/idle_infer", "timing/idle_ref", "timing/idle_reward",
    "pipeline/wait_rollout_s", "pipeline/wait_train_s", "memory/driver_rss_gib",
    "offpolicy/logratio_mean", "offpolicy/logratio_p99", "offpolicy/ess", "score/missing", "pair/missing",
    "reward/score/mean", "reward/score/max", "reward/score/min",
    "response_length/mean", "response_length/max", "response_length/min",
    "prompt_length/mean", "prompt_length/max", "prompt_length/min",
    "rewards/reward/mean", "rewards/reward/std", "rewards/reward/missing", "speed/busy",
    *(f"speed/{stage}_{what}" for stage in ("gen", "adv", "ref", "update_actor") for what in ("tokens_per_s", "mfu")),
}  # fmt: skip
PLAN_NAMES = {  # from the third step on
    f"plan/{name}_ratio" for name in ("gen", "adv", "ref", "update_actor", "sync", "memory_driver")
}
# Without a judge, and without answers to compare with.
EVAL_NAMES = {f"eval/{name}" for name in BUILT_IN if not name.startswith("judge/") and "reference" not in name}
EVAL_NAMES |= {"eval/distinct"}
PROBED = {"sync/probe_difference"}  # in the first two steps
SAMPLE_FIELDS = [
    "step", "prompt", "policy_version", "margin",
    *(f"{side}{key}" for key in ("", "_score", "_eos", "_length", "_tokens", "_logps", "_reference_logps", "_kl")
      for side in ("chosen", "rejected")),
]  # fmt: skip


@pytest.fixture(scope="module")
def done(world: World, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    recipe = world.recipe(
        training={"train_iters": NUM_STEPS, "save_interval": SAVE_INTERVAL, "eval_interval": EVAL_INTERVAL},
        actor_rollout={"missing_eos_penalty": 1.0},
        eval={"num_prompts": 5},
        log={"tensorboard": True, "samples_interval": SAMPLES_INTERVAL, "rollouts": True},
    )
    return run(recipe, tmp_path_factory.mktemp("runs") / "run")


def test_every_step_has_a_row_with_every_metric(done: Finished) -> None:
    lines = (done.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]
    for step, line in enumerate(lines, start=1):
        assert line.startswith(f'{{"step": {step}, ')
        evaluated = EVAL_NAMES if step in (EVAL_INTERVAL, NUM_STEPS) else set[str]()
        probed = PROBED if step <= 2 else set[str]()
        planned = PLAN_NAMES if step >= 3 else set[str]()
        assert set(json.loads(line)) == {"step"} | STEP_NAMES | evaluated | probed | planned


def test_numbers_have_full_precision(done: Finished) -> None:
    assert sum(len(str(value)) > 15 for value in done.rows[2].values()) > 10


def test_metrics_agree_with_each_other(done: Finished) -> None:
    for row in done.rows:
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-6)
        assert row["pair/kept"] + row["pair/dropped"] == 4
        assert row["reward/score/min"] <= row["objective/scores"] <= row["reward/score/max"]
        assert row["response_length/min"] <= row["response_length/mean"] <= row["response_length/max"] <= 12
        assert row["sync/version_lag"] == 0
        assert row["rollout/logp_diff_max"] < 1e-4
        assert abs(row["offpolicy/logratio_mean"]) < 1e-4  # the weights that sampled are those that are trained
        assert row["offpolicy/ess"] == pytest.approx(1)
    assert done.rows[0]["rewards/accuracies"] == 0  # actor = reference: no margin is above 0
    assert done.rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert done.rows[-1]["epoch"] == pytest.approx(NUM_STEPS * 4 / 12)


def test_the_plan_stands_beside_what_the_second_and_third_step_measured(done: Finished) -> None:
    plan = json.loads((done.folder / "plan.json").read_text())
    assert plan["measured"]["steps"] == [2, 3]
    for stage, numbers in plan["measured"]["stages"].items():
        assert numbers["measured_s"] == pytest.approx(sum(row[f"timing/{stage}"] for row in done.rows[1:3]) / 2)
        assert all(row[f"plan/{stage}_ratio"] == numbers["ratio"] for row in done.rows[2:])
        assert numbers["ratio"] == pytest.approx(numbers["planned_s"] / numbers["measured_s"])
    assert plan["device"]["kind"] == "cpu"
    assert set(plan["metrics"]) >= {f"timing/{stage}" for stage in plan["measured"]["stages"]}


def test_speed_is_what_a_step_worked_on_over_its_seconds(done: Finished) -> None:
    for before, row in zip([{"num_tokens": 0.0}, *done.rows], done.rows, strict=False):
        completions = 4 * 3
        trained = row["num_tokens"] - before["num_tokens"]
        tokens = {
            "gen": completions * row["response_length/mean"],
            "adv": completions * (row["response_length/mean"] + row["prompt_length/mean"]),
            "ref": trained,
            "update_actor": trained,
        }
        for stage, number in tokens.items():
            assert row[f"speed/{stage}_tokens_per_s"] == pytest.approx(number / row[f"timing/{stage}"])
            assert 0 < row[f"speed/{stage}_mfu"] < 1
        assert 0 < row["speed/busy"] <= 1


def test_evaluations_are_at_the_start_the_interval_and_the_end(done: Finished) -> None:
    rows = read_jsonl(done.folder / "eval.jsonl")
    assert [row["step"] for row in rows] == [0, EVAL_INTERVAL, NUM_STEPS]
    assert all(set(row) == {"step", "answers"} | EVAL_NAMES for row in rows)
    assert rows[0]["eval/kl"] == pytest.approx(0, abs=1e-5)
    assert rows[2]["eval/kl"] == done.rows[-1]["eval/kl"] != 0


def test_the_summary_holds_start_and_end(done: Finished) -> None:
    summary = json.loads((done.folder / "summary.json").read_text())
    evaluations = read_jsonl(done.folder / "eval.jsonl")
    assert summary["steps"] == NUM_STEPS
    assert summary["policy"] == str(done.folder / "policy")
    assert summary["seconds"] > sum(row["timing/all"] for row in done.rows)
    for name in EVAL_NAMES:
        assert summary["start"][name] == evaluations[0][name]
        assert summary["end"][name] == evaluations[-1][name]
    for name in STEP_NAMES:
        assert summary["start"][name] == done.rows[0][name]
        assert summary["end"][name] == done.rows[-1][name]


def test_samples_are_the_pairs_that_were_trained_on(done: Finished) -> None:
    table = read_jsonl(done.folder / "samples.jsonl")
    assert sorted({row["step"] for row in table}) == [1, SAMPLES_INTERVAL]
    for step in (1, SAMPLES_INTERVAL):
        rows = [row for row in table if row["step"] == step]
        metrics = done.rows[step - 1]
        assert len(rows) == metrics["pair/kept"]
        margins = [row["chosen_score"] - row["rejected_score"] for row in rows]
        assert min(margins) > 0
        assert sum(margins) / len(margins) == pytest.approx(metrics["pair/margin"])
    assert all(list(row) == SAMPLE_FIELDS for row in table)
    assert all(row["prompt"].startswith("say ") for row in table)


def test_recorded_rollouts_are_raw(done: Finished) -> None:
    rows = done.rollouts
    assert len(rows) == NUM_STEPS * 4
    assert [row["policy_version"] for row in rows] == [step for step in range(NUM_STEPS) for _ in range(4)]
    assert all(len(row["completions"]) == 3 for row in rows)
    first = [completion for row in rows[:4] for completion in row["completions"]]
    raw = sum(completion["score"] for completion in first) / len(first)
    penalty = 1 - done.rows[0]["val/contain_eos_token"]
    assert penalty > 0
    assert done.rows[0]["objective/scores"] == pytest.approx(raw - penalty)


def test_the_policy_loads_in_transformers_and_is_the_trained_one(world: World, done: Finished) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = AutoModelForCausalLM.from_pretrained(done.folder / "policy")
    first = AutoModelForCausalLM.from_pretrained(world.folder / "policy")
    moved = [(a - b).abs().max().item() for a, b in zip(policy.parameters(), first.parameters(), strict=True)]
    assert 0 < max(moved) < NUM_STEPS * 2e-3  # AdamW moves a weight by about the learning rate in a step
    tokenizer = AutoTokenizer.from_pretrained(done.folder / "policy")
    prompt = tokenizer("say one", return_tensors="pt")
    assert prompt["input_ids"].tolist() == [tokenizer.encode("say one")]
    text = policy.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert text.shape[1] > prompt["input_ids"].shape[1]
    assert policy.generation_config.eos_token_id == first.generation_config.eos_token_id


def test_checkpoints_are_made_at_the_interval_and_at_the_end(done: Finished) -> None:
    folder = done.folder / "checkpoints"
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    assert names == ["iter_0000002", "iter_0000004", "iter_0000005"]
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "5\n"
    for step, name in zip((2, 4, 5), names, strict=True):
        driver = json.loads((folder / name / "driver.json").read_text())
        assert (driver["step"], driver["policy_version"]) == (step, step)
        assert driver["num_tokens"] == done.rows[step - 1]["num_tokens"]


def test_the_config_is_the_merged_recipe(done: Finished) -> None:
    config: dict[str, Any] = yaml.safe_load((done.folder / "config.yaml").read_text())
    assert config["training"]["train_iters"] == NUM_STEPS
    assert config["actor_rollout"]["seq_length"] == 48  # from `training`
    assert config["actor_rollout"]["dpo_beta"] == 0.1  # a default


def test_tensorboard_holds_every_scalar_of_every_step(done: Finished) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (done.folder / "tensorboard").iterdir()
    events = EventAccumulator(str(file))
    events.Reload()
    assert set(events.Tags()["scalars"]) == STEP_NAMES | EVAL_NAMES | PROBED | PLAN_NAMES
    for name in STEP_NAMES:
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in done.rows]  # stored as float32
        assert found == expected, name
    assert [event.step for event in events.Scalars("eval/kl")] == [0, EVAL_INTERVAL, NUM_STEPS]


def test_nothing_else_is_left(done: Finished) -> None:
    expected = {
        "metrics.jsonl", "eval.jsonl", "samples.jsonl", "rollouts.jsonl", "run.jsonl", "summary.json", "config.yaml",
        "plan.json", "policy", "checkpoints", "tensorboard",
    }  # fmt: skip
    assert {path.name for path in done.folder.iterdir()} == expected
    assert not list(done.folder.rglob("*.tmp"))


def test_checkpoints_go_where_the_recipe_says(world: World, tmp_path: Path) -> None:
    recipe = world.recipe(training={"train_iters": 1}, actor_rollout={"save": str(tmp_path / "elsewhere")})
    finished = run(recipe, tmp_path / "run")
    assert (tmp_path / "elsewhere" / "iter_0000001" / "driver.json").is_file()
    assert not (finished.folder / "checkpoints").exists()


def test_the_policy_keeps_the_template_and_the_end_of_turn_that_it_was_trained_with(
    world: World, tmp_path: Path
) -> None:
    """With a chat template by name the folder's own tokenizer files would write other prompts."""
    import transformers

    keys = {"prompt_type": "chatml", "eos_tokens": ["!"]}
    done = run(world.recipe(training={"train_iters": 1}, actor_rollout=keys), tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(done.folder / "policy")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    ends = transformers.GenerationConfig.from_pretrained(done.folder / "policy").eos_token_id
    assert {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("!")} <= set(ends)
