"""Wrong recipes: one clear line each, with the key, the value and the fix; at once, without traceback, torch or Ray."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlxf.config.load import load_config
from rlxf.core.errors import ConfigError
from tests.unit.config.recipes import ROOT, model_folder, recipe


class Wrong(NamedTuple):
    """A change to the small recipe, and what its one line of error must say."""

    change: dict[str, Any]
    key: str
    says: str


def actor(**keys: Any) -> dict[str, Any]:
    return {"actor_rollout": keys}


def shape(**keys: Any) -> dict[str, Any]:
    return {"model": {"tiny": keys}}


SPLIT = {"actor_rollout": [8], "ref": [1], "reward": [1]}
WRONG = [
    # unknown keys
    Wrong(actor(lrr=1.0), "actor_rollout.lrr", 'unknown key; did you mean "actor_rollout.lr"?'),
    Wrong({"training": {"gobal_batch_size": 4}}, "training.gobal_batch_size", '"training.global_batch_size"'),
    Wrong({"optimizer": {"lr": 1}}, "optimizer", "unknown key"),
    Wrong({"seed": 3}, "seed", 'did you mean "training.seed"?'),
    Wrong({"rollout": {"max_new_tokens": 4}}, "rollout.max_new_tokens", '"actor_rollout.max_new_tokens"'),
    Wrong({"ref": {"lr": 1.0}}, "ref.lr", '"actor_rollout.lr"'),
    Wrong(shape(num_hidden_layers=2), "model.tiny.num_hidden_layers", '"model.tiny.num_layers"'),
    Wrong({"actor_rollout_ref": {"critic": {}}}, "actor_rollout_ref.critic", "actor_rollout and ref"),
    Wrong({"algorithm": {"kl_ctl": {}}}, "algorithm.kl_ctl", "algorithm holds"),
    # types
    Wrong(actor(lr="fast"), "actor_rollout.lr", "expected a number, got text"),
    Wrong(actor(lr="1e-6"), "actor_rollout.lr", "write it without quotes"),
    Wrong({"training": {"global_batch_size": "8"}}, "training.global_batch_size", '= "8": expected a whole number'),
    Wrong({"training": {"global_batch_size": True}}, "training.global_batch_size", "= true: expected a whole number"),
    Wrong({"training": {"global_batch_size": 8.5}}, "training.global_batch_size", "= 8.5: expected a whole number"),
    Wrong({"training": {"bf16": "yes"}}, "training.bf16", "expected true or false"),
    Wrong({"training": {"bf16": 1}}, "training.bf16", "expected true or false"),
    Wrong(actor(clip_grad=True), "actor_rollout.clip_grad", "expected a number"),
    Wrong(actor(load=3), "actor_rollout.load", "expected text"),
    Wrong({"rollout": 4}, "rollout", "expected a section with keys of its own"),
    Wrong({"model": {"tiny": 7}}, "model.tiny", "expected a section"),
    Wrong({"resource_pool": {"ref": "4"}}, "resource_pool.ref", "expected a list"),
    Wrong({"resource_pool": {"ref": []}}, "resource_pool.ref", "such as 4 or [4, 4]"),
    Wrong({"resource_pool": {"ref": [0]}}, "resource_pool.ref", "expected at least 1"),
    # bounds and choices
    Wrong(actor(lr=float("nan")), "actor_rollout.lr", "expected a finite number"),
    Wrong(actor(lr=-1e-6), "actor_rollout.lr", "expected at least 0"),
    Wrong(actor(dpo_beta=0), "actor_rollout.dpo_beta", "expected greater than 0"),
    Wrong(actor(dpo_loss_type="sigmod"), "actor_rollout.dpo_loss_type", 'did you mean "sigmoid"?'),
    Wrong({"training": {"stage": "rlhf"}}, "training.stage", "expected one of ray_online_dpo, dpo, sft, rm"),
    Wrong(
        {"training": {"stage": None}}, "training.stage", "one of ray_online_dpo (online DPO), dpo (offline DPO), sft"
    ),
    Wrong({"training": {"device": "gpu"}}, "training.device", 'did you mean "cuda"?'),
    Wrong({"rollout": {"top_p": 1.5}}, "rollout.top_p", "expected at most 1"),
    Wrong(actor(adam_beta2=1.0), "actor_rollout.adam_beta2", "expected less than 1"),
    Wrong(actor(n_samples_per_prompt=1), "actor_rollout.n_samples_per_prompt", "a pair needs two completions"),
    Wrong(actor(pipeline_model_parallel_size=0), "actor_rollout.pipeline_model_parallel_size", "at least 1"),
    Wrong({"training": {"save_interval": -1}}, "training.save_interval", "expected at least 0"),
    Wrong({"training": {"train_iters": 0}}, "training.train_iters", "expected at least 1"),
    Wrong({"training": {"keep_latest": -1}}, "training.keep_latest", "expected at least 0"),
    Wrong({"training": {"keep_best_mode": "largest"}}, "training.keep_best_mode", "expected one of max, min"),
    Wrong({"training": {"resume": True}}, "training.resume", "expected text"),
    # features that are not there
    Wrong(actor(qlora=True), "actor_rollout.qlora", "needs actor_rollout.lora_r > 0; set it, or set qlora to false"),
    Wrong(actor(lora_rank=8), "actor_rollout.lora_rank", 'did you mean "actor_rollout.lora_r"?'),
    Wrong(actor(lr="???"), "actor_rollout.lr", "the recipe leaves this value to you"),
    # several keys together
    Wrong(actor(do_sample=False), "actor_rollout.do_sample", "expected true: greedy decoding makes the 2 completions"),
    Wrong({"rollout": {"top_k": 1}}, "rollout.top_k", "expected -1 (off) or at least 2"),
    Wrong(actor(max_prompt_length=64), "actor_rollout.max_prompt_length", "expected at most 63"),
    Wrong(actor(max_new_tokens=33), "actor_rollout.max_new_tokens", "expected at most 32"),
    Wrong(
        {"training": {"seq_length": 1024}},
        "actor_rollout.seq_length",
        "expected at most 512, the longest sequence of",
    ),
    Wrong({"ref": {"seq_length": 32}}, "ref.seq_length", "expected at least actor_rollout.seq_length = 64"),
    Wrong(actor(num_gpus_for_train=2), "num_gpus_for_train + num_gpus_for_infer", "= 2 + 1: expected 2"),
    Wrong({"resource_pool": {"actor_rollout": 4}}, "num_gpus_for_train + num_gpus_for_infer", "= 1 + 1: expected 4"),
    Wrong(
        actor(num_gpus_for_infer=3) | {"resource_pool": {"colocate": ["train", "infer"]}},
        "actor_rollout.num_gpus_for_infer",
        "= 3: expected at most 2",
    ),
    Wrong(
        {"resource_pool": {"colocate": ["actor"]}},
        "resource_pool.colocate",
        "expected one of train, infer, ref, reward",
    ),
    Wrong({"resource_pool": {"colocate": ["ref", "ref"]}}, "resource_pool.colocate", "expected each role once"),
    Wrong({"resource_pool": {"ref": [2], "colocate": ["infer", "ref"]}}, "resource_pool.ref", "expected at most [1]"),
    Wrong(
        actor(num_gpus_for_train=3, num_gpus_for_infer=5, tensor_model_parallel_size=2) | {"resource_pool": SPLIT},
        "actor_rollout.tensor_model_parallel_size",
        "expected a divisor of the 3 devices of actor_rollout.num_gpus_for_train",
    ),
    Wrong(
        {"ref": {"tensor_model_parallel_size": 8}, "resource_pool": {"ref": [8]}},
        "ref.tensor_model_parallel_size",
        "= 8: expected a divisor of model.tiny.num_attention_heads = 4",
    ),
    Wrong(
        {
            "ref": {"tensor_model_parallel_size": 2},
            "resource_pool": {"ref": [2]},
            **shape(num_attention_heads=6, num_query_groups=3, kv_channels=32),
        },
        "ref.tensor_model_parallel_size",
        "expected a divisor or a multiple of model.tiny.num_query_groups = 3",
    ),
    Wrong(
        {"ref": {"tensor_model_parallel_size": 2, "context_parallel_size": 2}, "resource_pool": {"ref": [3]}},
        "ref.tensor_model_parallel_size",
        "= 2 times ref.context_parallel_size = 2 makes 4 devices: expected a divisor of the 3 devices of",
    ),
    Wrong(
        {"ref": {"pipeline_model_parallel_size": 4}, "resource_pool": {"ref": [4]}},
        "ref.pipeline_model_parallel_size",
        "expected a divisor of model.tiny.num_layers",
    ),
    Wrong(
        {
            "reward": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            "resource_pool": {"reward": [2]},
            **shape(num_layers=4),
        },
        "reward.virtual_pipeline_model_parallel_size",
        "interleaved stages hang",
    ),
    Wrong(
        {
            "ref": {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "max_tokens_per_micro_batch": 100,
            },
            "resource_pool": {"ref": [2]},
            **shape(num_layers=4),
        },
        "ref.max_tokens_per_micro_batch",
        "expected at least 2 * seq_length = 128, the longest pair",
    ),
    Wrong(
        {"ref": {"virtual_pipeline_model_parallel_size": 2}, **shape(num_layers=4)},
        "ref.virtual_pipeline_model_parallel_size",
        "expected 1 without pipeline parallelism",
    ),
    Wrong(
        actor(num_gpus_for_infer=7, inference_tensor_model_parallel_size=2)
        | {"resource_pool": SPLIT, "training": {"device": "npu"}},
        "actor_rollout.inference_tensor_model_parallel_size",
        "expected a divisor of actor_rollout.num_gpus_for_infer = 7",
    ),
    Wrong(
        actor(num_gpus_for_infer=2, inference_tensor_model_parallel_size=2)
        | {"resource_pool": {"actor_rollout": [2, 1]}, "training": {"device": "npu"}},
        "actor_rollout.inference_tensor_model_parallel_size",
        "one engine would span two nodes",
    ),
    Wrong(
        actor(num_gpus_for_infer=2, inference_tensor_model_parallel_size=2) | {"resource_pool": {"actor_rollout": 3}},
        "actor_rollout.inference_tensor_model_parallel_size",
        "on cpu a vLLM engine is one process",
    ),
    Wrong(
        actor(num_gpus_for_train=7) | {"resource_pool": SPLIT, "training": {"global_batch_size": 4}},
        "training.global_batch_size",
        "expected at least 7: each of the 7 data-parallel ranks needs a pair",
    ),
    Wrong(shape(num_attention_heads=8), "model.tiny", "head size 16: vLLM on cpu has kernels for 32, 64"),
    Wrong(
        shape(num_attention_heads=3, num_query_groups=1),
        "model.tiny.num_attention_heads",
        "expected a divisor of hidden_size = 128",
    ),
    Wrong(shape(num_query_groups=3), "model.tiny.num_query_groups", "expected a divisor of num_attention_heads = 4"),
    Wrong(actor(lr_warmup_iters=5, lr_warmup_fraction=0.1), "actor_rollout.lr_warmup_iters", "keep one of them"),
    Wrong(
        actor(lr_decay_style="cosine", min_lr=1e-3), "actor_rollout.min_lr", "expected at most actor_rollout.lr = 1e-06"
    ),
    Wrong(
        actor(dpo_loss_type="ipo", dpo_label_smoothing=0.1),
        "actor_rollout.dpo_label_smoothing",
        "expected 0 with dpo_loss_type=ipo",
    ),
    Wrong(
        actor(missing_eos_penalty=2.0) | {"algorithm": {"missing_eos_penalty": 1.0}},
        "algorithm.missing_eos_penalty",
        "keep actor_rollout.missing_eos_penalty",
    ),
    Wrong({"training": {"keep_best": 1}}, "training.keep_best", "set training.keep_latest"),
    Wrong(
        {"training": {"keep_best": 1, "keep_latest": 1}},
        "training.keep_best_metric",
        '= "eval/reward": nothing is evaluated in this run; set training.eval_interval',
    ),
    Wrong(
        {"training": {"keep_best": 1, "keep_latest": 1, "save_interval": 10, "eval_interval": 4}},
        "training.save_interval",
        "= 10: expected a multiple of training.eval_interval = 4",
    ),
    # sampling ahead of training
    Wrong({"rollout": {"lookahead": -1}}, "rollout.lookahead", "= -1: expected at least 0"),
    Wrong({"rollout": {"lookahead": 0.5}}, "rollout.lookahead", "= 0.5: expected a whole number"),
    Wrong({"rollout": {"lookahead": True}}, "rollout.lookahead", "= true: expected a whole number"),
    Wrong(
        {"rollout": {"lookahead": 1}, "resource_pool": {"actor_rollout": 1, "colocate": ["train", "infer", "ref"]}},
        "rollout.lookahead",
        "= 1: expected 0, because resource_pool.colocate has train and infer: the engines cannot sample on a device",
    ),
    *(
        Wrong(
            {"training": {"stage": stage}, "rollout": {"lookahead": 1}} | needs,
            "rollout.lookahead",
            f"= 1: expected 0: training.stage = {stage} reads a file, and nothing is sampled ahead",
        )
        for stage, needs in (
            ("dpo", {"reward": {"load": None}}),
            ("sft", {"reward": {"load": None}}),
            ("rm", {"reward": {"load": None}}),
        )
    ),
    # what a run needs
    Wrong({"reward": {"load": None}}, "reward.load", "is required: a reward model's folder; or give reward.function"),
    Wrong({"reward": {"function": "f.py"}}, "reward.load and reward.function", "are both set"),
    Wrong(actor(load=None), "actor_rollout.load", "is required"),
    Wrong(
        actor(data_path=None), "actor_rollout.data_path", "is required: a file or a folder of prompts, such as a .jsonl"
    ),
    Wrong(actor(data_path="prompts.txt"), "actor_rollout.data_path", "expected a file that ends in .jsonl"),
    Wrong({"rollout": {"engine": "replay"}}, "rollout.replay_path", "is required with rollout.engine=replay"),
    Wrong({"rollout": {"replay_path": "r.jsonl"}}, "rollout.replay_path", "add rollout.engine=replay"),
    Wrong({"ref": {"model": "tinny"}}, "ref.model", 'did you mean "tiny"?'),
    Wrong({"runtime": "local", "rollout": {"engine": "vllm"}}, "rollout.engine", "expected hf with runtime=local"),
    Wrong({"runtime": "local", "resource_pool": {"ref": 2}}, "resource_pool.ref", "expected 1 with runtime=local"),
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: f"{wrong.key} {wrong.says[:20]}")
def test_a_wrong_recipe_gets_one_line_with_key_and_fix(wrong: Wrong) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe(**wrong.change))
    (line,) = caught.value.problems
    assert wrong.key in line.split(": ")[0]
    assert wrong.says in line
    assert "\n" not in line


def test_a_replay_without_scores_asks_for_a_scorer(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text('{"prompt_ids": [5], "completions": [{"token_ids": [6]}], "policy_version": 0}\n')
    with pytest.raises(ConfigError, match=r"reward\.load is required.* rollout\.replay_path = .* holds no scores"):
        load_config(recipe(reward={"load": None}, rollout={"engine": "replay", "replay_path": str(path)}))


def test_what_only_looks_odd_is_accepted() -> None:
    """Batch sizes that do not divide, a mini-batch above the batch, a micro-batch above the mini-batch."""
    raw = recipe(
        training={"global_batch_size": 7},
        actor_rollout={
            "ppo_mini_batch_size": 32,
            "micro_batch_size": 5,
            "num_samples_per_step": 100,
            "lr_warmup_iters": 500,
        },
    )
    load_config(raw)
    load_config(recipe(actor_rollout={"ppo_mini_batch_size": 3, "micro_batch_size": 4}))


def test_one_process_looks_ahead_whatever_shares_devices_on_ray() -> None:
    shared = {"actor_rollout": 1, "colocate": ["train", "infer"]}
    found = load_config(recipe(runtime="local", rollout={"lookahead": 4}, resource_pool=shared))
    assert found.rollout.lookahead == 4


def test_offline_asks_for_no_rollout_and_no_reward() -> None:
    raw = recipe(training={"stage": "dpo"}, actor_rollout={"num_gpus_for_infer": 9, "do_sample": False})
    raw["reward"] = {}
    raw["model"]["tiny"]["kv_channels"] = 16  # only vLLM has no kernel for it
    load_config(raw)


# Files


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the small recipe finds everything."""
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "sft")
    model_folder(tmp_path / "rm", architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"})
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    return tmp_path


def only_problem(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe(dry_run=False, **changes))
    (line,) = caught.value.problems
    return line


def test_a_recipe_whose_files_are_there_is_accepted(files: Path) -> None:
    load_config(recipe(dry_run=False))


@pytest.mark.parametrize(
    ("section", "key", "value", "says"),
    [
        ("actor_rollout", "data_path", "other.jsonl", '= "./other.jsonl": no such file; paths are relative to'),
        ("actor_rollout", "tokenizer_name_or_path", "other", '= "./other": no such folder'),
        ("training", "resume", "other", '= "./other": no such folder'),
        ("training", "resume", "lst", "; or one of auto, last, never"),
        ("ref", "load", "other", '= "./other": no such folder'),
        ("ref", "load", "prompts.jsonl", "expected a folder, but it is a file"),
        ("reward", "load", "sft", "is a LlamaForCausalLM, which has no score head"),
        ("ref", "load", "rm", "is a LlamaForSequenceClassification; expected a language model"),
    ],
)
def test_a_path_that_cannot_be_used_is_named(files: Path, section: str, key: str, value: str, says: str) -> None:
    line = only_problem(**{section: {key: value}})
    assert line.startswith(f"{section}.{key}")
    assert says in line


def test_checkpoints_of_an_earlier_run_are_gone_on_with_unless_the_recipe_says_never(files: Path) -> None:
    (files / "ckpt" / "iter_0000010").mkdir(parents=True)
    load_config(recipe(dry_run=False, actor_rollout={"save": "ckpt"}))
    line = only_problem(actor_rollout={"save": "ckpt"}, training={"resume": "never"})
    assert line.startswith('actor_rollout.save = "./ckpt": holds iter_0000010 of an earlier run')
    assert "training.resume=auto" in line


def test_a_data_folder_must_hold_data(files: Path) -> None:
    (files / "dir.jsonl").mkdir()
    (files / "dir.jsonl" / "notes.txt").touch()
    line = only_problem(actor_rollout={"data_path": "dir.jsonl"})
    assert line.startswith(
        'actor_rollout.data_path = "./dir.jsonl": a folder that holds no file that ends in .jsonl or'
    )


def test_a_reward_function_must_be_a_python_file(files: Path) -> None:
    (files / "reward.txt").touch()
    line = only_problem(reward={"load": None, "function": "reward.txt"})
    assert line.startswith('reward.function = "./reward.txt": expected a file that ends in .py')


def test_evaluation_files_count_only_when_a_run_evaluates(files: Path) -> None:
    missing = {"eval": {"data_path": "eval.jsonl"}}
    load_config(recipe(dry_run=False, **missing))
    assert only_problem(training={"eval_interval": 5}, **missing).startswith("eval.data_path")


def test_a_reward_model_with_two_labels_is_refused(files: Path) -> None:
    model_folder(files / "two", architectures=["LlamaForSequenceClassification"])
    assert "has 2 labels; a reward model has one" in only_problem(reward={"load": "two"})


def test_a_reward_model_is_trained_from_a_language_model_or_another_reward_model(files: Path) -> None:
    (files / "pairs.jsonl").touch()
    stage: dict[str, Any] = {"training": {"stage": "rm"}, "ref": None, "reward": None}
    for load in ("sft", "rm"):
        load_config(recipe(dry_run=False, **stage, actor_rollout={"load": load, "data_path": "pairs.jsonl"}))
    model_folder(files / "two", architectures=["LlamaForSequenceClassification"])
    line = only_problem(**stage, actor_rollout={"load": "two", "data_path": "pairs.jsonl"})
    assert line == 'actor_rollout.load = "./two": has 2 labels; a reward model has one (num_labels=1)'
    line = only_problem(training={"stage": "sft"}, ref=None, reward=None, actor_rollout={"load": "rm"})
    assert "expected a language model" in line


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", None, "holds no config.json"),
        ("config.json", "{", "its config.json cannot be read"),
        ("config.json", "[]", "its config.json is not a JSON object"),
        ("model.safetensors", None, "holds no model.safetensors"),
        ("tokenizer.json", None, "holds no tokenizer"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "x.safetensors"}}', "1 of 1 weight files are missing"),
        ("model.safetensors.index.json", "{}", "cannot be read"),
    ],
)
def test_a_damaged_model_folder_is_refused(files: Path, name: str, content: str | None, says: str) -> None:
    (files / "sft" / name).unlink(missing_ok=True)
    if content is not None:
        (files / "sft" / name).write_text(content)
    line = only_problem()
    assert line.startswith("actor_rollout.")
    assert says in line


def test_a_dry_run_forgives_missing_files_but_not_wrong_ones(files: Path) -> None:
    load_config(recipe(ref={"load": "missing"}))
    with pytest.raises(ConfigError, match="has no score head"):
        load_config(recipe(reward={"load": "sft"}))


# The command


def command(*arguments: str, folder: Path) -> tuple[int, str, str, float]:
    """Exit code, stdout, stderr and CPU seconds of the real command, typed in ``folder``."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, str(ROOT / "ray_gpt.py"), *arguments],
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.returncode, done.stdout, done.stderr, end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime


TINY = ("--config-name", "online_dpo_trainer_tiny")
COMMANDS: list[tuple[tuple[str, ...], list[str]]] = [
    (("--config-name", "online_dpo_trainer_tinny"), ['did you mean "online_dpo_trainer_tiny"?']),
    ((), ["--config-name is required: the recipe to run; known: offline_dpo_trainer_llama3_8b"]),
    (
        (*TINY, "dry_run=true", "actor_rollout.lrr=1", "+log.foo=2", "actor_rollout.dpo_beta=-1"),
        ['actor_rollout.lrr = 1: unknown key; did you mean "actor_rollout.lr"?', "log.foo = 2", "dpo_beta = -1"],
    ),
    ((*TINY, "model=[tinny]"), ["model 'tinny', named in the defaults list, does not exist; did you mean \"tiny\"?"]),
    ((*TINY, "actor_rollout.lr=${training.lrr}"), ["actor_rollout.lr: Interpolation key 'training.lrr' not found"]),
    ((*TINY, "actor_rollout.split=90,10,0"), ["actor_rollout.split=[90,10,0]"]),
    ((*TINY, "training.seed=[1"), ["training.seed=[1: cannot be read as key=value"]),
    (
        (*TINY, "runtime=local", "rollout.engine=vllm", "training.device=cpu", "dry_run=true"),
        ["expected hf with runtime"],
    ),
    ((*TINY, "foo.bar=1", "--cfg", "job"), ["foo.bar = 1: unknown section 'foo'"]),
]


@pytest.mark.parametrize(("arguments", "says"), COMMANDS, ids=lambda part: " ".join(part)[-40:])
def test_the_command_answers_a_mistake_in_plain_lines(
    tmp_path: Path, arguments: tuple[str, ...], says: list[str]
) -> None:
    code, stdout, stderr, seconds = command(*arguments, folder=tmp_path)
    assert code == 2, stdout + stderr
    assert "Traceback" not in stdout + stderr
    assert len(stderr.splitlines()) == len(says)
    for text in says:
        assert text in stderr
    assert seconds < 5
    assert not list(tmp_path.iterdir())  # a run that did not start leaves nothing


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("training:\n  seed: 1\n  seed: 2\n", "recipe.yaml:3: not valid YAML: found duplicate key seed"),
        ("training: {seed: [1\n", "recipe.yaml:2: not valid YAML"),
        ("defaults: [rlxf_schema, nothing]\n", "recipe 'nothing' does not exist"),
        ("defaults: [modell: [tiny]]\n", "'modell', named in the defaults list, is no group of recipes"),
        ("- 1\n", "must be a DictConfig"),
    ],
)
def test_a_recipe_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    code, _, stderr, _ = command("--config-dir", str(tmp_path), "--config-name", "recipe", folder=tmp_path)
    assert code == 2
    assert says in stderr
    assert len(stderr.splitlines()) == 1


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe")
    code, _, stderr, _ = command("--config-dir", str(tmp_path), "--config-name", "recipe", folder=tmp_path)
    assert (code, len(stderr.splitlines())) == (2, 1)
    assert "expected UTF-8 text" in stderr
