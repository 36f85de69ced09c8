"""What cannot be converted is refused in one clear line, and nothing is left behind."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlxf.core.errors import ConfigError
from rlxf.tools.convert import convert as convert_module
from tests.tiny_models import save_causal_lm, save_reward_model
from tests.unit.tools.convert.helpers import assert_same_tensors, hidden_leftovers, run

ROOT = Path(__file__).resolve().parents[4]
SCRIPT = ROOT / "scripts" / "convert_ckpt.py"
HF_MG, MG_HF, HF_HF = ("hf", "mg"), ("mg", "hf"), ("hf", "hf")


@dataclass(frozen=True)
class World:
    """Good folders, which a case may damage in its own copy."""

    folder: Path

    @property
    def hf(self) -> Path:
        return self.folder / "hf"

    @property
    def rm(self) -> Path:
        return self.folder / "rm"

    @property
    def dist(self) -> Path:
        return self.folder / "dist"

    @property
    def legacy(self) -> Path:
        return self.folder / "legacy"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("good"))
    save_causal_lm(world.hf, "llama", num_hidden_layers=4)
    save_reward_model(world.rm, "llama", num_hidden_layers=4)
    run(world.hf, world.dist)
    run(world.hf, world.legacy, *["--target-tensor-parallel-size", "2", "--save-format", "legacy"])
    return world


@pytest.fixture
def world(good: World, tmp_path: Path) -> World:
    shutil.copytree(good.folder, tmp_path / "world")
    return World(tmp_path / "world")


def settings(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rank_file(world: World) -> Path:
    return world.legacy / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"


def without(world: World, name: str) -> None:
    path = world.hf / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if key != name}, path, metadata={"format": "pt"})


def with_tensor(world: World, name: str) -> None:
    path = world.hf / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(2)}, path, metadata={"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def no_state(world: World) -> None:
    torch.save({"optimizer": {}}, rank_file(world))


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return len, ("run",)


Damage = Callable[[World], object]
Case = tuple[str, tuple[str, str], str, str, Damage, str]
NOTHING: Damage = lambda _: None  # noqa: E731  one of many short ones

CASES: list[Case] = [
    ("no-such-folder", HF_MG, "nowhere", "", NOTHING, r"--load-dir .*nowhere: no such folder"),
    (
        "no-config",
        HF_MG,
        "hf",
        "",
        lambda w: (w.hf / "config.json").unlink(),
        "no config.json in it; expected a Hug",
    ),
    ("broken-config", HF_MG, "hf", "", lambda w: (w.hf / "config.json").write_text("{"), "config.json: "),
    ("no-weights", HF_MG, "hf", "", lambda w: (w.hf / "model.safetensors").unlink(), "no model.safetensors"),
    ("truncated", HF_MG, "hf", "", lambda w: truncate(w.hf / "model.safetensors"), "not a readable safetensors file"),
    ("unknown-family", HF_MG, "hf", "", lambda w: settings(w.hf, model_type="gemma"), 'model_type "gemma" is not'),
    ("moe", HF_MG, "hf", "--target-expert-parallel-size 2", NOTHING, r"models with experts \(MoE\) are not supported"),
    ("missing-tensor", HF_MG, "hf", "", lambda w: without(w, "model.norm.weight"), r"no model.norm.weight \(1 tensors"),
    ("other-tensor", HF_MG, "hf", "", lambda w: with_tensor(w, "model.extra"), "holds model.extra, which a llama"),
    ("other-width", HF_MG, "hf", "", lambda w: settings(w.hf, intermediate_size=64), "config.json expects"),
    ("reward-without-orm", HF_MG, "rm", "", NOTHING, r"holds a reward model \(score.weight\); add --orm"),
    ("orm-without-head", HF_MG, "hf", "--orm", NOTHING, r"no reward head \(score.weight\) in it; leave out --orm"),
    ("tp", HF_MG, "hf", "--target-tensor-parallel-size 3", NOTHING, "4 attention heads, which it must divide"),
    ("tp-zero", HF_MG, "hf", "--target-tensor-parallel-size 0", NOTHING, "which it must divide"),
    ("pp", HF_MG, "hf", "--target-pipeline-parallel-size 3", NOTHING, "must divide the model's 4 layers"),
    (
        "vpp",
        HF_MG,
        "hf",
        "--target-pipeline-parallel-size 2 --num-layers-per-virtual-pipeline-stage 3",
        NOTHING,
        "must divide the 2 layers of each of 2 pipeline ranks",
    ),
    ("vpp-alone", HF_MG, "hf", "--num-layers-per-virtual-pipeline-stage 2", NOTHING, "need --target-pipeline-parallel"),
    ("model-type", HF_MG, "hf", "--model-type-hf qwen25", NOTHING, 'config.json has model_type = "llama"'),
    ("model-type-unknown", HF_MG, "hf", "--model-type-hf deepseek3", NOTHING, "--model-type-hf deepseek3: not supp"),
    ("dtype", HF_MG, "hf", "--params-dtype int8", NOTHING, "invalid choice: 'int8'"),
    ("unknown-flag", HF_MG, "hf", "--target-tensor-size 2", NOTHING, "unrecognized arguments: --target-tensor-size"),
    ("tokenizer", HF_MG, "hf", "--tokenizer-model nowhere", NOTHING, "--tokenizer-model nowhere: no tokenizer there"),
    ("lora-nowhere", HF_MG, "hf", "--lora-load nowhere", NOTHING, "--lora-load nowhere: no such folder"),
    ("lora-none", HF_MG, "hf", "--lora-load {rm}", NOTHING, "neither a PEFT folder .* nor a checkpoint"),
    ("legacy-to-hf", MG_HF, "dist", "--save-format legacy", NOTHING, "is for --save-model-type mg"),
    ("hf-as-mg", MG_HF, "hf", "", NOTHING, "no checkpoint of megatron and no latest_checkpointed_iteration.txt"),
    (
        "tracker",
        MG_HF,
        "dist",
        "",
        lambda w: (w.dist / "latest_checkpointed_iteration.txt").write_text("7"),
        "names iter_0000007, which is not there",
    ),
    (
        "no-tracker",
        MG_HF,
        "dist",
        "",
        lambda w: (w.dist / "latest_checkpointed_iteration.txt").unlink(),
        "name one of iter_0000001 in it",
    ),
    (
        "no-hf",
        MG_HF,
        "dist",
        "",
        lambda w: (w.dist / "config.json").unlink(),
        "name its Hugging Face folder in --hf",
    ),
    ("cfg-dir", MG_HF, "dist", "--hf-cfg-dir {folder}", NOTHING, "no config.json in it"),
    ("other-config", MG_HF, "dist", "", lambda w: settings(w.dist, num_hidden_layers=6), "holds 4 layers"),
    ("other-vocab", MG_HF, "dist", "", lambda w: settings(w.dist, vocab_size=300), "has 259 rows; .*vocab_size = 300"),
    (
        "dist-truncated",
        MG_HF,
        "dist",
        "",
        lambda w: truncate(w.dist / "iter_0000001" / "__0_0.distcp"),
        "cannot be read: .*copy the checkpoint again",
    ),
    (
        "index-truncated",
        MG_HF,
        "dist",
        "",
        lambda w: truncate(w.dist / "iter_0000001" / ".metadata"),
        r"\.metadata: cannot be read",
    ),
    (
        "index-evil",
        MG_HF,
        "dist",
        "",
        lambda w: (w.dist / "iter_0000001" / ".metadata").write_bytes(pickle.dumps(Evil())),
        "asks for builtins.len, which no checkpoint needs",
    ),
    ("dist-orm", MG_HF, "dist", "--orm", NOTHING, "no reward head .* leave out --orm"),
    ("no-adapters", MG_HF, "dist", "--save-lora-to-hf", NOTHING, "holds no LoRA adapters; leave out"),
    (
        "rank-missing",
        MG_HF,
        "legacy",
        "",
        lambda w: shutil.rmtree(w.legacy / "iter_0000001" / "mp_rank_00"),
        r"mp_rank_00 is missing \(1 of 2 ranks are there\)",
    ),
    (
        "experts",
        MG_HF,
        "legacy",
        "",
        lambda w: (w.legacy / "iter_0000001" / "mp_rank_00_000_001").mkdir(),
        r"checkpoints with experts \(MoE\) are not supported",
    ),
    ("rank-truncated", MG_HF, "legacy", "", lambda w: truncate(rank_file(w)), "model_optim_rng.pt: cannot be read"),
    ("rank-empty", MG_HF, "legacy", "", lambda w: rank_file(w).unlink(), "no model_optim_rng.pt in it"),
    ("rank-without-model", MG_HF, "legacy", "", no_state, "no model in it; expected `model`"),
    ("legacy-layers", MG_HF, "legacy", "", lambda w: settings(w.legacy, num_hidden_layers=2), "holds 4 layers; config"),
    ("legacy-orm", MG_HF, "legacy", "--orm", NOTHING, "has no rm_head.weight; without --orm?"),
]


@pytest.mark.parametrize(
    ("kinds", "load", "flags", "damage", "message"), [pytest.param(*case[1:], id=case[0]) for case in CASES]
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    world: World, tmp_path: Path, kinds: tuple[str, str], load: str, flags: str, damage: Damage, message: str
) -> None:
    damage(world)
    given = flags.format(folder=world.folder, rm=world.rm).split()
    with pytest.raises(ConfigError, match=message) as raised:
        run(world.folder / load, tmp_path / "out", *given, kinds=kinds)
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert not hidden_leftovers(tmp_path)


def test_a_folder_that_is_there_is_replaced_only_when_asked(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="exists already; name another folder, or add --overwrite"):
        run(world.dist, out, kinds=MG_HF)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    run(world.dist, out, "--overwrite", kinds=MG_HF)
    assert_same_tensors(out, world.hf)
    assert not (out / "mine.txt").exists()
    assert not hidden_leftovers(tmp_path)


@pytest.mark.parametrize("place", ["dist", "."])
def test_the_source_is_never_written_over(world: World, place: str) -> None:
    with pytest.raises(ConfigError, match="holds --load-dir"):
        run(world.dist, world.folder / place, "--overwrite", "--hf-cfg-dir", str(world.hf), kinds=MG_HF)
    assert (world.dist / "iter_0000001" / ".metadata").is_file()


def test_an_old_result_survives_a_conversion_that_breaks_in_the_middle(world: World, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(world.dist, out, kinds=MG_HF)
    data = world.dist / "iter_0000001" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-4000])
    with pytest.raises(ConfigError, match="cannot be read"):
        run(world.dist, out, "--overwrite", kinds=MG_HF)
    assert_same_tensors(out, world.hf)
    assert not hidden_leftovers(tmp_path)


def test_a_full_disk_is_found_out_before_the_first_byte(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"the weights take [\d,]+ bytes, but 1,000 are free"):
        run(world.hf, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_errors_without_a_traceback_and_flags_that_do_nothing(world: World, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    kinds = ("--load-model-type", "hf", "--save-model-type", "mg", "--save-dir", "out")
    wrong = command(*kinds, "--load-dir", "nowhere")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: --load-dir nowhere: no such folder\n"
    # As MindSpeed-LLM's users type it, but for the names of the folders.
    seed = "--use-mcore-models --model-type-hf llama3 --target-tensor-parallel-size 2 --params-dtype bf16"
    right = command(*kinds, "--load-dir", str(world.hf), "--tokenizer-model", str(world.hf), *seed.split())
    assert right.returncode == 0, right.stderr
    lines = right.stdout.splitlines()
    assert lines[0] == "[convert] --use-mcore-models: nothing to do, checkpoints are always megatron-core's"
    assert lines[1].startswith("[convert] out: 39 tensors in iter_0000001")
    assert (tmp_path / "out" / "iter_0000001" / ".metadata").is_file()
