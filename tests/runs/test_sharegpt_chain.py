"""The whole chain on ShareGPT pairs with a real chat model: the documented script, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlxf.observe.formulas import read_jsonl
from tests.runs.small import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

PAIRS = "RLXF_SHAREGPT_PAIRS"  # a file of real pairs; without it the test writes a few rows of its own


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if path := os.environ.get(PAIRS):
        return Path(path)
    rows = []
    for number in range(40):
        question = f"How much is {number} plus {number + 1}? Say how you found it."
        good = f"{number} plus {number + 1} is {2 * number + 1}: add the two numbers."
        rows.append(
            {
                "conversations": [{"from": "human", "value": question}],
                "chosen": {"from": "gpt", "value": good},
                "rejected": {"from": "gpt", "value": "I do not know. " * (number % 5 + 1)},
            }
        )
    path = tmp_path_factory.mktemp("data") / "pairs.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def work(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "prepare_smollm2.py")], check=True)
    folder = tmp_path_factory.mktemp("chain") / "work"
    environment = os.environ | {
        "INPUT": str(pairs),
        "MODEL": str(ROOT / "models" / "smollm2-135m"),
        "WORK": str(folder),
        "PYTHON": sys.executable,
    }
    script = ROOT / "scripts" / "examples" / "dpo_smollm2_sharegpt.sh"
    done = subprocess.run([str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_five_steps_learn_and_are_evaluated(work: Path) -> None:
    rows = read_jsonl(work / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    first, last = read_jsonl(work / "run" / "eval.jsonl")
    assert (first["step"], last["step"]) == (0, 5)
    assert first["eval/loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["eval/loss"] < first["eval/loss"]
    assert last["eval/rewards/margins"] > 0.0


def test_the_merged_model_is_the_trained_policy_and_answers(work: Path) -> None:
    from transformers import AutoModelForCausalLM

    merged, policy = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (work / "merged", work / "run" / "policy")
    )
    base = AutoModelForCausalLM.from_pretrained(ROOT / "models" / "smollm2-135m").state_dict()
    assert set(merged) == set(policy)
    for name, value in policy.items():
        torch.testing.assert_close(merged[name], value, atol=1e-7, rtol=0)
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    assert "Paris" in (work / "stdout.txt").read_text().split("answer:")[1]
