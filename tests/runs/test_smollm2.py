"""A real chat model on the real parts: SmolLM2-135M-Instruct, Ray, vLLM, a rule reward, three steps."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlxf.observe.formulas import read_jsonl
from tests.runs.small import ROOT, Finished, ray_gpt

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.vllm, pytest.mark.timeout(1800)]

NUM_STEPS, STEP_SIZE = 3, 4
START, END = "<|im_start|>", "<|im_end|>"


@pytest.fixture(scope="module")
def model() -> Path:
    """The weights come from a package (scripts/install.sh --dev has it); making the folder takes about a minute."""
    subprocess.run([sys.executable, str(ROOT / "scripts" / "prepare_smollm2.py")], check=True)
    return ROOT / "models" / "smollm2-135m"


@pytest.fixture(scope="module")
def done(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    run_dir = tmp_path_factory.mktemp("smollm2") / "run"
    options = ("--config-name", "online_dpo_trainer_smollm2_135m", "log.rollouts=true", "log.report=false")
    steps = f"training.train_iters={NUM_STEPS}"
    result = ray_gpt(*options, steps, f"hydra.run.dir={run_dir}", timeout_s=1500)
    assert result.returncode == 0, result.stderr[-4000:]
    return Finished(run_dir)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def test_the_steps_have_sane_numbers(done: Finished) -> None:
    rows = done.rows
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-3)
    for row in rows:
        assert 0.3 < row["loss"] < 1.2
        assert 0 < row["grad_norm"] < math.inf
        assert 0 <= row["reward/score/min"] <= row["objective/scores"] <= row["reward/score/max"] <= 3
        assert row["pair/kept"] + row["pair/dropped"] == STEP_SIZE
        assert row["pair/kept"] > 0
        assert row["rollout/logp_diff_mean"] < 1e-2  # vLLM and the trainer hold the same weights
        assert row["response_length/max"] <= 32
    assert [row["step"] for row in read_jsonl(done.folder / "eval.jsonl")] == [0, NUM_STEPS]


def test_the_chat_template_is_applied_exactly_once(done: Finished, tokenizer: Any) -> None:
    chats = [row["prompt"] for row in read_jsonl(ROOT / "examples" / "data" / "chat_prompts.jsonl")]
    expected = {
        tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)): chat
        for chat in chats
    }  # fmt: skip
    rows = done.rollouts
    assert len(rows) == NUM_STEPS * STEP_SIZE
    for row in rows:
        chat = expected[tuple(row["prompt_ids"])]
        text = tokenizer.decode(row["prompt_ids"])
        has_system = chat[0]["role"] == "system"
        assert text.count(START) == len(chat) + 2 - has_system  # the template adds a system message
        assert text.count(END) == len(chat) + 1 - has_system
        assert text.startswith(f"{START}system\n")
        assert text.endswith(f"{START}assistant\n")


def test_completions_are_the_assistants_turn_and_end_with_it(done: Finished, tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids(END)
    completions = [completion["token_ids"] for row in done.rollouts for completion in row["completions"]]
    assert any(ids[-1] == end for ids in completions)
    assert all(end not in ids[:-1] for ids in completions)
    assert all(START not in tokenizer.decode(ids) for ids in completions)


def test_the_policy_loads_and_answers(model: Path, done: Finished, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(done.folder / "policy", dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = policy.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    saved = json.loads((done.folder / "policy" / "config.json").read_text())
    assert saved["model_type"] == json.loads((model / "config.json").read_text())["model_type"]
