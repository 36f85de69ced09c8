"""Every key can be set on the command line of any recipe; a wrong one is answered with the nearest valid key."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from omegaconf import OmegaConf

from rlxf.config.devices import DEVICES
from rlxf.config.keys import ROLES, SECTIONS, is_known, keys_of, unknown_key
from rlxf.config.kinds import Strict
from rlxf.config.load import path_fields
from rlxf.config.schema import ModelConfig, RunConfig
from tests.unit.config.recipes import ROOT, composed
from workers import cli

EVERY_KEY = [
    "runtime",
    "dry_run",
    *(f"{section}.{key}" for section in SECTIONS for key in sorted(keys_of(section))),
    *(f"model.tiny.{key}" for key in ModelConfig.model_fields),
]


@pytest.fixture
def bare_recipe(tmp_path: Path) -> Path:
    (tmp_path / "bare.yaml").write_text("training:\n  stage: ray_online_dpo\n")
    return tmp_path


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_every_key_can_be_set_even_where_the_recipe_does_not_list_it(bare_recipe: Path, sign: str) -> None:
    command = cli.read_command([f"{sign}{key}=7" for key in EVERY_KEY])
    assert not command.problems
    config = composed("bare", command.arguments, bare_recipe)
    for key in EVERY_KEY:
        assert OmegaConf.select(config, key) == 7, key


def test_every_key_can_be_set_on_a_recipe_without_rewriting() -> None:
    keys = [key for key in EVERY_KEY if not key.startswith("training.")]
    keys += [f"training.{key}" for key in SECTIONS["training"].model_fields]
    config = composed("online_dpo_trainer_tiny", [f"{key}=7" for key in keys if is_listed(key)])
    assert OmegaConf.select(config, "actor_rollout.adam_eps") == 7


def is_listed(key: str) -> bool:
    """The tiny model's file leaves out keys that have a default."""
    return not key.startswith("model.tiny.") or key.rpartition(".")[2] in ("num_layers", "hidden_size", "vocab_size")


def test_a_key_of_the_reference_layout_sets_the_plain_one() -> None:
    command = cli.read_command(["actor_rollout_ref.actor_rollout.lr=1e-3", "~actor_rollout.dpo_beta"])
    config = composed("online_dpo_trainer_tiny", command.arguments)
    assert config.actor_rollout.lr == 1e-3
    assert config.actor_rollout.dpo_beta is None


def test_hydras_own_keys_and_groups_are_left_alone() -> None:
    given = ["hydra.run.dir=/tmp/x", "model=[tiny]", "hydra/launcher=basic", "+extra@pkg=x"]
    assert set(given) <= set(cli.read_command(given).arguments)


def test_options_may_stand_between_overrides() -> None:
    arguments = ["training.seed=2", "--config-name", "x=y", "--cfg", "job", "log.interval=3", "-m"]
    command = cli.read_command(arguments)
    assert command.arguments[-5:] == ["--config-name", "x=y", "--cfg", "job", "-m"]
    assert {"++training.seed=2", "++log.interval=3"} <= set(command.arguments)
    assert not command.problems


@pytest.mark.parametrize("argument", ["trainig.seed=1", "+trainig.seed=1", "++trainig.seed=1", "~trainig.seed"])
def test_an_unknown_key_on_the_command_line_is_ours_to_report(argument: str) -> None:
    command = cli.read_command([argument, "training.seed=2"])
    (problem,) = command.problems
    assert 'did you mean "training.seed"?' in problem
    assert not any("trainig" in part for part in command.arguments)


@pytest.mark.parametrize("argument", ["+critic.lr=1", "critic={}"])
def test_a_section_of_another_algorithm_is_refused_with_its_reason(argument: str) -> None:
    (problem,) = cli.read_command([argument]).problems
    assert "there is no critic here" in problem


def test_a_word_without_a_value_is_reported() -> None:
    assert cli.read_command(["-cn", "x", "seed"]).problems == ["seed: expected key=value, such as training.seed=1"]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("actor_rollout.micro_batchsize", "actor_rollout.micro_batch_size"),
        ("actor_rolout.lr", "actor_rollout.lr"),
        ("actor.lr", "actor_rollout.lr"),
        ("lr", "actor_rollout.lr"),
        ("seed", "training.seed"),
        ("runtme", "runtime"),
        ("actor_rollout.temperature", "rollout.temperature"),
        ("ref.lr", "actor_rollout.lr"),
        ("actor_rollout.global_batch_size", "training.global_batch_size"),
        ("actor_rollout.hidden_size", "model.<name>.hidden_size"),
        ("actor_rollout.beta", "actor_rollout.dpo_beta"),
        ("training.learning_rate", "actor_rollout.lr"),
        ("training.num_generations", "actor_rollout.n_samples_per_prompt"),
        ("training.save_total_limit", "training.keep_latest"),
        ("training.resume_from_checkpoint", "training.resume"),
        ("training.gradient_accumulation_steps", "actor_rollout.ppo_mini_batch_size"),
        ("actor_rollout.log_interval", "log.interval"),
        ("model.tiny.num_hidden_layers", "model.tiny.num_layers"),
        ("model.tiny.head_dim", "model.tiny.kv_channels"),
        ("rollout.enigne", "rollout.engine"),
        ("resource_pool.actor", "resource_pool.actor_rollout"),
    ],
)
def test_the_nearest_key_is_named(key: str, meant: str) -> None:
    path = key.split(".")
    assert not is_known(path)
    assert f'did you mean "{meant}"?' in unknown_key(path)


def test_a_key_like_no_other_is_answered_with_its_section() -> None:
    names = "eval_answers, interval, project, report, report_to, rollouts, run_name, samples_interval, tensorboard"
    assert f"log holds {names}" in unknown_key(["log", "zzzz"])
    assert "known: runtime, dry_run, training" in unknown_key(["zzzz", "qqqq"])
    assert "nothing is nested below rollout.engine" in unknown_key(["rollout", "engine", "vllm"])


def test_every_key_has_a_reader() -> None:
    """A key that nothing reads is not in the schema; a key with a single choice is read by its check."""
    read = set()
    for file in [*ROOT.glob("rlxf/**/*.py"), *ROOT.glob("workers/*.py")]:
        read |= {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    sections: list[tuple[str, type[Strict]]] = [*SECTIONS.items(), ("model", ModelConfig)]
    unread = [
        f"{section}.{key}"
        for section, schema in sections
        for key, field in schema.model_fields.items()
        if key not in read and not has_one_choice(field.annotation)
    ]
    assert unread == ["ref.refer_model_iter"]  # it becomes part of ref.load


def has_one_choice(annotation: Any) -> bool:
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def test_every_path_of_the_schema_is_known_as_one() -> None:
    found = {f"{section}.{key}" for section, schema in SECTIONS.items() for key, _ in path_fields(schema)}
    assert found == {
        *(f"{role}.{key}" for role in ROLES for key in ("load", "tokenizer_name_or_path")),
        *("actor_rollout.data_path", "actor_rollout.save", "actor_rollout.lora_load"),
        *("reward.function", "rollout.replay_path", "ref.cache"),
        *("eval.data_path", "eval.metrics", "eval.reference_answers", "training.resume"),
        *("judge.load", "judge.function", "judge.template", "judge.verdicts", "plan.write", "plan.calibrate"),
    }


def test_sections_cover_the_whole_recipe() -> None:
    assert set(RunConfig.model_fields) == {*SECTIONS, "model", "runtime", "dry_run"}


def test_checks_and_platforms_know_the_same_devices() -> None:
    from rlxf.platform import PLATFORMS

    assert list(DEVICES) == list(PLATFORMS)
    for name, platform in PLATFORMS.items():
        assert DEVICES[name].ray_resource == platform.ray_resource
        assert DEVICES[name].head_sizes == platform.head_sizes
        assert DEVICES[name].vllm_sleeps == (platform.vllm_sleep_level is not None)


def test_a_recipe_is_checked_without_torch_or_ray() -> None:
    program = (
        "import sys\n"
        "from tests.unit.config.recipes import compose\n"
        "from rlxf.config.load import load_config\n"
        "from rlxf.placement.plan import make_plan\n"
        "from rlxf.placement.text import describe\n"
        "import workers.dry_run\n"
        "config = load_config(compose('online_dpo_trainer_llama3_8b', 'dry_run=true'))\n"
        "describe(config, make_plan(config))\n"
        "print(sorted({'torch', 'ray', 'numpy', 'transformers', 'vllm', 'megatron'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


def test_the_reference_page_has_every_key() -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    sections = {part.partition("\n")[0]: part for part in page.split("\n## ")[1:]}
    common = sections["`actor_rollout, ref and reward`"]
    for name, schema in SECTIONS.items():
        for key in schema.model_fields:
            assert f"| `{key}` |" in sections[f"`{name}`"] + (common if name in ROLES else ""), f"{name}.{key}"


def test_the_reference_page_is_up_to_date() -> None:
    script = ROOT / "scripts" / "make_config_docs.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_reference_page_explains_every_key() -> None:
    for line in (ROOT / "docs" / "config.md").read_text().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.replace("\\|", "").split("|")[1:-1]]
            assert all(cells), f"no comment behind this key in schema.py: {line}"
