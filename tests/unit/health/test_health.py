"""How verdicts come and are kept: once, with first and newest step, the same after a resume, in little time."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import yaml

from rlxf.config.kinds import HealthRule
from rlxf.health import RULES, Health, RunFacts, facts_of
from tests.unit.health.curves import FACTS, evaluation, follow, healthy, rows

ROOT = Path(__file__).resolve().parents[3]
LOST = {"val/contain_eos_token": lambda step: 0.2 if 20 < step <= 40 else 1.0}


def test_a_verdict_is_new_once_and_keeps_its_first_and_newest_step() -> None:
    health = Health(FACTS)
    told = [(step, verdict) for step, row in rows(LOST) for verdict in health.add(step, row)]
    assert [(step, verdict.name, verdict.step, verdict.last) for step, verdict in told] == [(22, "eos_lost", 22, 22)]
    (kept,) = health.verdicts
    assert (kept.step, kept.last) == (22, 48)
    assert kept.anchor == "docs/health.md#eos-lost"
    assert "max_new_tokens=32" in kept.seen
    assert told[0][1].seen.startswith("16%")


def test_a_resumed_run_says_what_an_uninterrupted_one_says() -> None:
    change = {**LOST, "objective/kl": 40.0, "pair/tie_rate": lambda step: step / 60}
    facts = replace(FACTS, num_eval_prompts=16)
    whole = follow(change, facts)
    names = [verdict.name for verdict in whole.verdicts]
    assert len(names) >= 4
    for cut in (0, 1, 22, 23, 24, 40, 60):
        resumed = Health(facts)
        kept = [{"step": step, **row} for step, row in rows(change) if step <= cut]
        evaluations = [{"step": 0, **evaluation(0), "answers": []}]
        evaluations += [row for row in kept if "eval/win_rate" in row]
        resumed.restore(kept, evaluations)
        for step, row in rows(change):
            if step > cut:
                resumed.add(step, row)
        assert resumed.verdicts == whole.verdicts


def test_a_step_that_comes_again_is_left_out() -> None:
    health = follow()
    assert health.add(60, {"val/contain_eos_token": 0.0}) == []
    assert health.add_evaluation(0, evaluation(0, wins=0.0)) == []


def test_a_row_without_an_evaluation_is_none() -> None:
    """A table of rows has a null where a step was not evaluated."""
    health = Health(replace(FACTS, num_eval_prompts=16))
    health.add_evaluation(0, evaluation(0))
    assert health.add(1, healthy(1) | {"eval/win_rate": None}) == []
    assert [verdict.name for verdict in health.add(2, healthy(2) | evaluation(2))] == ["evaluation_too_small"]


@pytest.mark.slow
def test_a_step_costs_less_than_a_millisecond_after_ten_thousand() -> None:
    health = Health(replace(FACTS, num_steps=20_000))
    for step in range(1, 10_001):
        health.add(step, healthy(step % 60))
    made = [(step, healthy(60)) for step in range(10_001, 10_501)]
    begin = time.process_time()
    for step, row in made:
        health.add(step, row)
    assert (time.process_time() - begin) / len(made) < 1e-3


def test_importing_the_rules_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, rlxf.health; print(sorted({'torch', 'ray', 'transformers', 'numpy', 'pydantic'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_facts_of_a_recipe() -> None:
    config = yaml.safe_load((ROOT / "configs" / "rlxf" / "online_dpo_trainer_tiny.yaml").read_text())
    assert facts_of({**config, "runtime": "local", "judge": {"function": "judge.py"}}) == RunFacts(
        stage="ray_online_dpo", num_steps=100, num_samples=2, max_new_tokens=32, num_eval_prompts=256, has_judge=True,
        has_reward=True, on_cpu=True, local=True,
    )  # fmt: skip


def test_a_recipe_of_an_earlier_version_has_the_defaults() -> None:
    assert facts_of({}) == replace(RunFacts(), has_reward=False)
    assert facts_of({"training": None, "rollout": [], "reward": {"load": "rm"}}) == RunFacts()
    room = {"actor_rollout": {"seq_length": 1024, "max_prompt_length": 512, "max_new_tokens": None}}
    assert facts_of(room).max_new_tokens == 512
    assert facts_of({"training": {"epochs": 2.0, "train_iters": 100}}).num_steps == 100
    assert facts_of({"resource_pool": {"colocate": ["ref", "train"]}}).pools == [
        ("train", "ref"),
        ("infer",),
        ("reward",),
    ]


def test_a_recipe_can_name_every_rule() -> None:
    assert get_args(HealthRule) == tuple(RULES)


def test_rules_tell_people_what_to_do() -> None:
    for name, rule in RULES.items():
        assert rule.name == name
        assert rule.why.endswith(".")
        assert rule.advice.endswith(".")
        assert rule.anchor.startswith("docs/health.md#")
