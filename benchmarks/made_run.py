"""Run folders of any size, as a run writes them, made without a model: for the page of a run and its tests."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

Row = dict[str, Any]

_BEGAN = datetime(2026, 1, 5, 9, 0, tzinfo=UTC)
_WORDS = (
    *("the", "a", "of", "it", "was", "is", "not", "but", "and", "so", "plot", "film", "story", "acting", "music"),
    *("ending", "script", "pace", "moving", "clever", "slow", "dull", "warm", "great", "weak", "sharp", "we", "saw"),
    *("on", "monday", "with", "friends", "again", "never", "always", "quite", "rather", "more", "less", "中文", "很好"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What a made run is like. Its reward rises, and so does its KL."""

    steps: int = 60
    num_steps: int | None = None  # planned; as many as were done
    eval_interval: int = 20
    samples_interval: int = 10
    pairs: int = 16  # of a step whose pairs are shown
    tokens: int = 24  # of an answer
    eval_answers: int = 8
    seed: int = 1
    kl: float = 8.0  # at the end, nats
    extras: bool = True  # what earlier revisions did not write: versions, tokens, answers, run.jsonl
    ends: bool = True  # with a summary; else it was killed
    fault: bool = False  # a worker is lost in the middle, and a run is resumed


def make_run(folder: Path, made: Made) -> Path:
    """Write the files of a run into ``folder``; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(made.seed)
    evaluations = [_evaluation(made, step, draw) for step in range(0, made.steps + 1, made.eval_interval)]
    by_step = {row["step"]: row for row in evaluations}
    rows = [_step(made, step, by_step.get(step, {}), draw) for step in range(1, made.steps + 1)]
    shown = [step for step in range(1, made.steps + 1) if step == 1 or step % made.samples_interval == 0]
    _write(folder / "config.yaml", yaml.safe_dump(_recipe(made), sort_keys=False))
    _lines(folder / "metrics.jsonl", rows)
    _lines(folder / "eval.jsonl", evaluations)
    _lines(folder / "samples.jsonl", (pair for step in shown for pair in _pairs(made, step, draw)))
    if made.extras:
        _lines(folder / "run.jsonl", _journal(made))
    if made.fault:
        _lines(folder / "events.jsonl", _events(made))
    if made.ends:
        _write(folder / "summary.json", json.dumps({"steps": made.steps, "seconds": 2.0 * made.steps}))
    return folder


def _far(made: Made, step: int) -> float:
    return step / max(made.steps, 1)


def _recipe(made: Made) -> Row:
    return {
        "runtime": "local",
        "training": {
            "stage": "ray_online_dpo",
            "device": "cpu",
            "seed": made.seed,
            "global_batch_size": 32,
            "train_iters": made.num_steps or made.steps,
            "eval_interval": made.eval_interval,
        },
        "model": {"small": {"num_layers": 2, "hidden_size": 96, "vocab_size": 586}},
        "actor_rollout": {
            "model": "small",
            "load": "models/small/sft",
            "dpo_loss_type": ["sigmoid"],
            "dpo_beta": 0.2,
            "lr": 6.2e-4 * made.seed,
            "n_samples_per_prompt": 2,
            "max_new_tokens": made.tokens,
            "missing_eos_penalty": 5.0,
            "data_path": ["prompts.jsonl"],
            "prompt_key": "prompt",
            "max_tokens_per_micro_batch": 4096,
        },
        "reward": {
            "sources": [
                {"name": "model", "load": "models/small/rm", "weight": 1.0},
                {"name": "praise", "rule": "regex", "weight": 0.5},
            ]
        },
        "rollout": {"engine": "vllm", "temperature": 1.0, "lookahead": 1},
        "eval": {"num_prompts": 256},
    }


def _step(made: Made, step: int, evaluation: Row, draw: random.Random) -> Row:
    far = _far(made, step)
    noise = draw.gauss(0, 0.1)
    row: Row = {
        "step": step,
        "epoch": step * 0.35,
        "data/dropped": 0.0,
        "objective/scores": 6 * math.tanh(3 * far) + noise,
        "objective/scores_margin": 4.5 - 3 * far + noise,
        "score/missing": 0.0,
        "score/std": 2 - far,
        "score/at_max": 0.1 + 0.2 * far,
        "score/length_correlation": 0.2 * noise,
        "rewards/model/mean": 6 * math.tanh(3 * far) + noise,
        "rewards/model/std": 3 - 2 * far,
        "rewards/model/missing": 0.0,
        "rewards/praise/mean": far + noise,
        "rewards/praise/std": 0.5,
        "rewards/praise/missing": 0.0,
        "val/contain_eos_token": 1 - abs(noise) / 10,
        "rollout/distinct": 1 - 0.2 * far,
        "response_length/mean": made.tokens * (0.7 + 0.2 * far) + noise,
        "response_length/max": float(made.tokens),
        "response_length/min": 4.0,
        "rollout/tokens_per_s": 4000 + 500 * noise,
        "rollout/tail_s": 0.2 + abs(noise),
        "rollout/longest_over_mean": 1.5 + abs(noise),
        "rollout/imbalance": 1.0 + abs(noise) / 5,
        "pair/kept": 32.0,
        "pair/dropped": 0.0,
        "pair/missing": 0.0,
        "pair/tie_rate": 0.02 + abs(noise) / 10,
        "pair/margin": 4.5 - 3 * far + noise,
        "pair/length_difference": noise,
        "sync/version_lag": 1.0,
        "loss": 0.69 - 0.12 * far + noise / 5,
        "rewards/chosen": 1.8 * far,
        "rewards/rejected": 1.4 * far,
        "rewards/margins": 0.4 * far + noise / 5,
        "rewards/accuracies": 0.5 + 0.3 * far + noise / 5,
        "logps/chosen": -20 - noise,
        "logps/rejected": -21 + noise,
        "objective/kl": made.kl * far + abs(noise),
        "objective/entropy": 20 + noise,
        "rollout/logp_diff_mean": 4e-7,
        "rollout/logp_diff_max": 2e-6,
        "offpolicy/ess": 0.9 + noise / 10,
        "grad_norm": 0.8 + abs(noise),
        "learning_rate": 6e-4 * (1 - 0.8 * far),
        "sync/bytes": 1111680.0,
        "num_tokens": 1500.0 * step,
        "timing/gen": 0.6 + abs(noise),
        "timing/adv": 0.1,
        "timing/ref": 0.1,
        "timing/update_actor": 0.4,
        "timing/sync": 0.05,
        "timing/eval": 1.3 if evaluation else 0.0,
        "timing/save": 0.0,
        "timing/all": 1.3 + abs(noise),
        "timing/idle_train": 0.6,
        "timing/idle_infer": 0.4 + noise / 5,
        "timing/idle_ref": 0.9,
        "timing/idle_reward": 0.9,
        "pipeline/wait_rollout_s": 0.2,
        "pipeline/wait_train_s": 0.1 + abs(noise),
        "memory/driver_rss_gib": 0.46,
        "memory/train_rss_gib": 0.5 + far / 50,
        "memory/infer_rss_gib": 1.8,
        "memory/node_rss_gib": 3.7 + far / 50,
    }
    return row | {name: value for name, value in evaluation.items() if name not in ("step", "answers")}


def _evaluation(made: Made, step: int, draw: random.Random) -> Row:
    far = _far(made, step)
    row: Row = {
        "step": step,
        "eval/reward": 6 * math.tanh(3 * far) + draw.gauss(0, 0.1),
        "eval/reward_se": 0.24 - 0.15 * far,
        "eval/raw_reward": 6 * math.tanh(3 * far) + 0.1,
        "eval/raw_reward_se": 0.2,
        "eval/win_rate": 0.5 + 0.47 * math.tanh(3 * far),
        "eval/win_rate_se": 0.031 - 0.02 * far,
        "eval/kl": made.kl * far,
        "eval/kl_se": 0.2 * far,
        "eval/length": made.tokens * (0.7 + 0.2 * far),
        "eval/eos_rate": 1 - 0.01 * far,
        "eval/distinct": 1 - 0.1 * far,
        "eval/valid": 0.9 + 0.03 * far,
    }
    if made.extras:
        row["answers"] = [_answer(made, number, step, draw) for number in range(made.eval_answers)]
    return row


def _answer(made: Made, number: int, step: int, draw: random.Random) -> Row:
    tokens, policy, reference = _text(made, _far(made, step), draw)
    return {
        "prompt": f"review of the film number {number} :",
        "text": "".join(tokens[:-1]),
        "score": 6 * _far(made, step) + draw.gauss(0, 0.3),
        "length": len(tokens),
        "eos": True,
        "kl": sum(policy) - sum(reference),
        "tokens": tokens,
        "logps": policy,
        "reference_logps": reference,
    }


def _text(made: Made, far: float, draw: random.Random) -> tuple[list[str], list[float], list[float]]:
    """Tokens of an answer, and the log-probs of policy and reference."""
    count = max(int(made.tokens * draw.uniform(0.5, 1)), 2)
    tokens = [" " + draw.choice(_WORDS) for _ in range(count - 1)] + ["<eos>"]
    policy = [round(-draw.expovariate(1.0), 4) for _ in tokens]
    reference = [round(logp - draw.gauss(made.kl * far / count, 0.8), 4) for logp in policy]
    return tokens, policy, reference


def _pairs(made: Made, step: int, draw: random.Random) -> Iterator[Row]:
    for number in range(made.pairs):
        scores = sorted((draw.gauss(6 * _far(made, step), 1) for _ in range(2)), reverse=True)
        texts = [_text(made, _far(made, step), draw) for _ in range(2)]
        row: Row = {"step": step, "prompt": f"review of the film number {number % 45} :"}
        for side, (tokens, policy, reference), score in zip(("chosen", "rejected"), texts, scores, strict=True):
            row |= {side: "".join(tokens[:-1]), f"{side}_score": score, f"{side}_eos": True}
            row[f"{side}_scores"] = {"model": score, "praise": draw.random()}
            if made.extras:
                row |= {f"{side}_length": len(tokens), f"{side}_kl": sum(policy) - sum(reference)}
                row |= {f"{side}_tokens": tokens, f"{side}_logps": policy, f"{side}_reference_logps": reference}
        if made.extras:
            row |= {"policy_version": step - 1, "margin": scores[0] - scores[1]}
        yield row


def _at(step: int) -> str:
    return (_BEGAN + timedelta(seconds=2 * step)).isoformat(timespec="milliseconds")


def _journal(made: Made) -> Iterator[Row]:
    versions = {"rlxf": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "vllm": "0.32.0"}
    machine = {"host": "node-1", "system": "Linux 6.1", "cpus": 16, "memory_gib": 64.0, "devices": ["2 x cpu"]}
    command = ["python", "ray_gpt.py", "--config-name", "online_dpo_trainer_small"]
    start = {"num_steps": made.num_steps or made.steps, "recipe": "online_dpo_trainer_small", "command": command}
    start |= {"versions": versions, "machine": machine}
    yield {"what": "started", "time": _at(0), "step": 0, **start}
    middle = made.steps // 2
    yield {"what": "checkpoint", "time": _at(middle), "step": middle, "folder": f"checkpoints/step_{middle:06d}"}
    if made.fault:
        yield {"what": "started", "time": _at(middle + 3), "step": middle, **start}
    if made.ends:
        yield {"what": "ended", "time": _at(made.steps), "step": made.steps, "exit_code": 0, "message": ""}


def _events(made: Made) -> Iterator[Row]:
    middle = made.steps // 2
    lost = {"event": "lost", "who": "infer rank 1", "phase": "gen", "step": middle + 1}
    yield {"time": _at(middle + 1), **lost, "message": "infer rank 1 died: killed by signal 9"}
    back = {"event": "recovered", "who": "infer rank 1", "step": middle + 1, "seconds": 3.2}
    yield {"time": _at(middle + 2), **back, "message": "infer rank 1 is back"}


def _lines(path: Path, rows: Iterator[Row] | list[Row]) -> None:
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
